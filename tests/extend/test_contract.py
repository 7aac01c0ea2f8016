"""The contract that authors inherit: it holds for the example and one decoder of each kind, and finds mistakes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from tests.extend.installed import EXAMPLES
from vlmfix.attention.edit import BiasEdit
from vlmfix.decoders import VCD, ZeroTuning
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.testing import FAMILIES, DecoderContract, tiny_vlm

FILE = EXAMPLES / "vlmfix_outside" / "textless.py"


class TestTextless(DecoderContract):
    decoder = f"{FILE}:Textless:gamma=2"
    neutral = f"{FILE}:Textless:gamma=1"


class TestChain(DecoderContract):
    decoder = f"locore:strength=4+{FILE}:Textless:gamma=2"


class TestGate(DecoderContract):
    decoder = "sgrs:tries=3"

    def test_it_acts(self):
        """Its logits are the model's own, of which it takes others."""


class TestRefiner(DecoderContract):
    decoder = "vicrop:base=12"


@dataclass(frozen=True, kw_only=True)
class OfTheBatch(VCD):
    """Depends on its neighbours."""

    name: ClassVar[str] = "of-the-batch"

    def plan(self, vlm, batch, layout):
        @dataclass(frozen=True, eq=False, kw_only=True)
        class Bias(BiasEdit):
            def bias(self, site):
                return torch.full((1, 1, 1, 1), 1.0) * site.image_keys[:, None, None].float() * batch.rows

        return DecodingPlan(edits=(Bias(),))


class Kept(VCD):
    def plan(self, vlm, batch, layout):
        if not hasattr(type(self), "kept"):
            type(self).kept = super().plan(vlm, batch, layout)
        return self.kept


class Leaves(VCD):
    def plan(self, vlm, batch, layout):
        vlm.model.left = 1
        return super().plan(vlm, batch, layout)


class Spoils(VCD):
    def plan(self, vlm, batch, layout):
        next(vlm.model.parameters()).data.view(-1)[0] += 1
        return super().plan(vlm, batch, layout)


class NoBeams(VCD):
    beams: ClassVar[bool] = False


CONTRACT = DecoderContract()


@pytest.mark.parametrize(
    ("test", "decoder", "problem"),
    [
        (CONTRACT.test_a_padded_batch_equals_each_row_alone, OfTheBatch(), "not close"),
        (CONTRACT.test_planning_twice_gives_independent_plans, Kept(), "two plans share"),
        (CONTRACT.test_the_model_is_left_as_it_was, Leaves(), "other attributes, hooks or settings"),
        (CONTRACT.test_the_model_is_left_as_it_was, Spoils(), "weights were changed: "),
        (CONTRACT.test_beams_work_or_are_refused, NoBeams(), "DID NOT RAISE"),
        (CONTRACT.test_it_acts, ZeroTuning(gain=1), "leaves a row as plain decoding has it"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_wrong_is_found(test, decoder, problem):
    vlm = tiny_vlm.__wrapped__("llava")
    with pytest.raises((AssertionError, pytest.fail.Exception), match=problem):
        test(vlm, decoder)


def test_a_decoder_that_is_not_written_as_it_is_read_is_found():
    with pytest.raises(AssertionError, match="is read as vcd"):
        CONTRACT.test_it_is_a_value_that_is_written_and_read_back(Kept())


def test_a_neutral_that_acts_is_found():
    class Named(DecoderContract):
        neutral = VCD()

    with pytest.raises(AssertionError, match="not close"):
        Named().test_without_strength_it_is_plain_decoding(tiny_vlm("llava"))


def test_without_pytest_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", None)
    monkeypatch.delitem(sys.modules, "vlmfix.testing")
    with pytest.raises(ImportError, match="needs pytest: pip install pytest"):
        __import__("vlmfix.testing")


def test_the_models_are_tiny():
    for family in FAMILIES:
        vlm = tiny_vlm(family)
        assert (vlm.layers, vlm.heads, vlm.model.dtype) == (3, 8, torch.float32)
        assert vlm is tiny_vlm(family)
