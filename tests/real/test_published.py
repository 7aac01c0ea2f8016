"""The values that stand in the tests are what the published files say."""

from __future__ import annotations

import pytest
from safetensors import safe_open

from tests.real.folders import WEIGHTS, build
from tests.real.published import NOT_HERE, PUBLISHED, SHARED, files

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=NOT_HERE)


def missing(values, found, at=""):
    """Where nested values are not those that were found."""
    if isinstance(values, dict) and isinstance(found, dict):
        return [place for key in values for place in missing(values[key], found.get(key, "nothing"), f"{at}/{key}")]
    return [] if values == found else [f"{at}: {found}"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_what_the_files_say(name):
    published, found = PUBLISHED[name], files(name)
    assert missing(published.config, found["config.json"]) == []
    assert missing(published.generation, found["generation_config.json"]) == []
    assert missing(published.pictures, found["preprocessor_config.json"]) == []
    assert missing(published.processor, found.get("processor_config.json", {})) == []
    assert missing(published.roles, found["tokenizer_config.json"]) == []
    added = found["tokenizer_config.json"]["added_tokens_decoder"]
    assert missing(published.tokens, {token["content"]: int(number) for number, token in added.items()}) == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_that_is_said_of_generation_is_left_out(name):
    found = files(name)["generation_config.json"]
    assert {key for key in found if key != "transformers_version"} == PUBLISHED[name].generation.keys()


def test_weights_are_loaded_by_their_published_names(tmp_path):
    """`real_vlm` loads this folder, and loading refuses one in which a weight is missing."""
    build("llava-1.5-7b-hf", tmp_path)
    published = files("llava-1.5-7b-hf")["tensor_names.json"]
    with safe_open(tmp_path / WEIGHTS, "pt") as written:
        assert set(written.keys()) <= set(published)
