"""What `make lint` refuses outside of vlmfix/upstream."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("room", Path(__file__).parents[2] / ".ci" / "room.py")
room = importlib.util.module_from_spec(spec)
spec.loader.exec_module(room)

INWARD = {"past_key_values", "inputs_embeds"}


def found(text):
    tree = ast.parse(text)
    return [what for _, what in (*room._inside(tree), *room._named(tree, INWARD))]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("from transformers.cache_utils import DynamicLayer", "imports transformers.cache_utils"),
        ("import transformers.masking_utils", "imports transformers.masking_utils"),
        ("import importlib\nimportlib.import_module('transformers.cache_utils')", "imports transformers.cache_utils"),
        ("from torch._dynamo import config", "imports torch._dynamo"),
        ("def f(model):\n    return model._expand()", "touches model._expand"),
        ("def f(model):\n    return getattr(model, '_expand', None)", "touches _expand by getattr"),
        ("def f(kwargs):\n    return kwargs['past_key_values']", "spells past_key_values"),
        ("def f(model, cache):\n    return model(past_key_values=cache)", "hands over past_key_values"),
        ("def f(output):\n    return output.past_key_values", "reads past_key_values"),
        ("def f(inputs_embeds):\n    return 1", "takes inputs_embeds"),
    ],
)
def test_a_place_is_found(text, what):
    assert found(text) == [what]


OWN = """
class A:
    def _own(self):
        return self._seen

    def f(self, other):
        return other._own()
"""


@pytest.mark.parametrize(
    "text",
    [
        "from transformers import DynamicCache",
        OWN,
        "def f(module):\n    return getattr(module, '_vlmfix_plan', None)",
        "def f(batch):\n    return batch['input_ids']",
    ],
)
def test_what_is_public_or_ones_own_is_left_alone(text):
    assert found(text) == []


def test_the_repository_keeps_to_it(capsys):
    assert room.main() == 0, capsys.readouterr().out
