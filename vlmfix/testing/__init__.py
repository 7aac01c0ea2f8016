"""Tests decoders from outside as vlmfix tests its own: one class to inherit, and tiny models with random weights.

A test file beside ``mine.py``::

    from pathlib import Path

    from vlmfix.testing import DecoderContract


    class TestMine(DecoderContract):
        decoder = f"{Path(__file__).with_name('mine.py')}:Mine"
        neutral = f"{decoder}:strength=0"

``docs/extending.md`` says what each test holds. It needs pytest, and nothing else of vlmfix does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from functools import cache
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LogitsProcessor

from vlmfix.decoders import Chain, Decoder, Greedy, describe, parse
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.generation import VLM
from vlmfix.models.layout import Batch
from vlmfix.testing import llava, qwen

try:
    import pytest
except ImportError as error:
    raise ImportError("vlmfix.testing needs pytest: pip install pytest") from error

FAMILIES = ("llava", "qwen2_5_vl")
"""The families that a decoder is tried on: pictures of one size and of their own, plain and multimodal positions."""
TOLERANCE = 1e-4
"""Difference of logits, absolute and relative, that another order of sums in float32 explains."""
STEPS = 3


@cache
def tiny_vlm(family: str, *, seed: int = 0) -> VLM:
    """Makes a tiny model with random weights, in float32 on the CPU; leave it as it is, since calls share the object.

    It has 3 layers, 8 query heads and 2 key/value heads, and a tokenizer of single bytes.

    Args:
        family: One of ``FAMILIES``.
        seed: Seed of its weights.
    """
    made = llava.llava(seed) if family == "llava" else qwen.build(family, seed)
    return VLM(model=made.model, processor=made.processor, family=made.family, name=family)


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Makes a picture of random cells.

    Args:
        seed: Seed of their colours.
        size: (height, width) in pixels.
    """
    cells = torch.rand(1, 3, 7, 5, generator=torch.Generator().manual_seed(seed))
    pixels = nn.functional.interpolate(cells, size=size, mode="nearest")[0]
    return Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy(), mode="RGB")


PROMPTS: tuple[str, ...] = ("what is here?", "and is there a dog in one of these two pictures?")
PICTURES: tuple[tuple[Image.Image, ...], ...] = ((picture(1, (40, 60)),), (picture(2, (60, 40)), picture(3, (50, 50))))
"""A short row with one picture and a longer row with two, so that the first is padded on the left."""


def logits(
    vlm: VLM, batch: Mapping[str, Tensor], decoder: Decoder | str = "greedy", *, steps: int = STEPS, **options: Any
) -> Tensor:
    """Decodes greedily with a decoder, and lets no row end early.

    Args:
        vlm: The model.
        batch: B encoded rows.
        decoder: A decoder that refines no pictures.
        steps: Number of tokens.
        options: Further arguments of ``generate``.

    Returns:
        (steps, B, V) logits as the decoder made them.
    """
    method = parse(decoder) if isinstance(decoder, str) else decoder
    with method.applied(vlm, batch) as arguments:
        generate: Any = vlm.model.generate
        output = generate(
            **batch,
            **arguments,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            suppress_tokens=[vlm.family.image_token(vlm.model.config)],  # a random model may say one
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    return torch.stack(output.logits)


def close(left: Tensor, right: Tensor, tolerance: float = TOLERANCE) -> None:
    """Fails unless both are equal within a tolerance, -inf where -inf."""
    torch.testing.assert_close(left.float(), right.float(), atol=tolerance, rtol=tolerance)


class Forced(LogitsProcessor):
    """Makes greedy search take given tokens.

    Args:
        tokens: (B, steps).
        prompt: T, length of the prompt.
    """

    def __init__(self, tokens: Tensor, prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns zero for the given token, and -inf for all others."""
        column = self.tokens[:, input_ids.shape[1] - self.prompt]
        return torch.full_like(scores, float("-inf")).scatter(1, column[:, None], 0.0)


class DecoderContract:
    """Tests what must hold for every decoder, on two families; a test class inherits it and names the decoder.

    Class attributes:
        decoder: The decoder, or its specification, with parameters under which it acts on a model with random weights.
        neutral: The same under parameters that leave the model as it is; None when there are none.
    """

    decoder: ClassVar[Decoder | str]
    neutral: ClassVar[Decoder | str | None] = None

    @pytest.fixture
    def method(self) -> Decoder:
        """The decoder."""
        return parse(self.decoder) if isinstance(self.decoder, str) else self.decoder

    @pytest.fixture(params=FAMILIES)
    def vlm(self, request: pytest.FixtureRequest) -> VLM:
        """A tiny model of each family."""
        vlm = tiny_vlm(request.param)
        vlm.memo.clear()
        return vlm

    def test_it_is_a_value_that_is_written_and_read_back(self, method: Decoder) -> None:
        """Equal specifications make equal decoders, and nothing about one can change."""
        again = parse(method.spec())
        assert again == method, f"{method.spec()} is read as {again.spec()}"
        assert hash(again) == hash(method), "two equal decoders have different hashes"
        with pytest.raises(FrozenInstanceError):
            method.anything = 1  # type: ignore[attr-defined]

    def test_it_is_described(self, method: Decoder) -> None:
        """``vlmfix decoders NAME`` has something to say of it and of each parameter."""
        parts = method.decoders if isinstance(method, Chain) else (method,)
        for info in (describe(type(part)) for part in parts):
            assert info.title, f"{info.name}: its source has no title"
            assert info.summary, f"{info.name} has no docstring"
            helpless = [parameter.name for parameter in info.parameters if not parameter.help]
            assert not helpless, f"{info.name}: no help= for {', '.join(helpless)}"

    def test_it_acts(self, vlm: VLM, method: Decoder) -> None:
        """It changes the logits of every row."""
        changed = (self._logits(vlm, method) - self._logits(vlm, Greedy())).abs()
        changed = changed.nan_to_num(nan=0.0)  # -inf of both
        assert bool((changed.amax(dim=(0, 2)) > TOLERANCE).all()), (
            f"{method.spec()} leaves a row as plain decoding has it: choose parameters under which it acts"
        )

    def test_without_strength_it_is_plain_decoding(self, vlm: VLM) -> None:
        """Under the parameters of ``neutral``, tokens and logits are those of plain decoding."""
        if self.neutral is None:
            pytest.skip("neutral says no parameters that leave the model as it is")
        neutral = parse(self.neutral) if isinstance(self.neutral, str) else self.neutral
        close(self._logits(vlm, neutral), self._logits(vlm, Greedy()))
        assert self._tokens(vlm, neutral) == self._tokens(vlm, Greedy())

    def test_a_padded_batch_equals_each_row_alone(self, vlm: VLM, method: Decoder) -> None:
        """Neither left padding nor a neighbour with other pictures and a longer prompt changes a row."""
        together = self._logits(vlm, method)
        for row in range(len(PROMPTS)):
            vlm.memo.clear()
            close(together[:, row], self._logits(vlm, method, [row])[:, 0])

    def test_planning_twice_gives_independent_plans(self, vlm: VLM, method: Decoder) -> None:
        """What one call learns is not seen by the next: plans share no edit and no contrast."""
        if method.refines:
            pytest.skip("a decoder that refines pictures has no plan")
        batch = self._batch(vlm, method)
        one, two = (method.plan(vlm, batch, vlm.layout(batch)) for _ in range(2))
        shared = [part for part in (*one.edits, *one.contrasts) if any(part is o for o in (*two.edits, *two.contrasts))]
        assert not shared, f"two plans share {shared}"

    def test_the_model_is_left_as_it_was(self, vlm: VLM, method: Decoder) -> None:
        """After a call, weights, modules, hooks and settings are as before it, and so is plain decoding."""
        plain, before, weights = self._logits(vlm, Greedy()), _state(vlm), _weights(vlm)
        self._logits(vlm, method)
        assert _state(vlm) == before, "the model has other attributes, hooks or settings"
        changed = [name for name, weight in vlm.model.state_dict().items() if not torch.equal(weight, weights[name])]
        assert not changed, f"weights were changed: {', '.join(changed)}"
        assert torch.equal(self._logits(vlm, Greedy()), plain), "plain decoding has other logits"

    def test_beams_work_or_are_refused(self, vlm: VLM, method: Decoder) -> None:
        """The best beam has the score that the decoder gives its tokens, or the call says that beams do not work."""
        own = method.decoding
        batch = self._batch(vlm, method)
        if own.strategy is not None:
            pytest.skip("it chooses tokens itself")
        if not own.beams:
            with pytest.raises(IncompatibleDecodersError), own.applied(vlm, batch, num_beams=2):
                pass
            return
        steps = STEPS + 1
        with own.applied(vlm, batch, num_beams=2) as arguments:
            generate: Any = vlm.model.generate
            found = generate(
                **batch,
                **arguments,
                num_beams=2,
                max_new_tokens=steps,
                min_new_tokens=steps,
                do_sample=False,
                length_penalty=0.0,
                return_dict_in_generate=True,
                output_scores=True,
            )
        tokens = found.sequences[:, batch.length :]
        forced = logits(vlm, batch, own, steps=steps, logits_processor=[Forced(tokens, batch.length)])
        expected = forced.log_softmax(dim=-1).gather(2, tokens.T[:, :, None]).sum(dim=(0, 2))
        close(found.sequences_scores, expected, 1e-3)

    def test_threads_are_answered_as_one_after_the_other(self, vlm: VLM, method: Decoder) -> None:
        """Answers with it and plain ones, asked for at the same time, are those of a quiet model."""
        expected = [self._tokens(vlm, one) for one in (method, Greedy())]
        with ThreadPoolExecutor(4) as threads:
            found = [threads.submit(self._tokens, vlm, one) for one in (method, Greedy()) * 2]
        assert [each.result() for each in found] == expected * 2

    def _tokens(self, vlm: VLM, method: Decoder) -> list[tuple[int, ...]]:
        answers = vlm.generate([list(row) for row in PICTURES], list(PROMPTS), decoder=method, max_new_tokens=4)
        return [answer.ids for answer in answers]

    def _batch(self, vlm: VLM, method: Decoder, rows: Sequence[int] = (0, 1)) -> Batch:
        """Encodes rows, with the pictures that the decoder shows the model."""
        prompts, pictures = [PROMPTS[row] for row in rows], [PICTURES[row] for row in rows]
        if method.refines:
            shown = vlm.refine([list(row) for row in pictures], prompts, decoder=method)
            pictures = [refined.pictures for refined in shown]
        return vlm.encode(prompts, pictures)

    def _logits(self, vlm: VLM, method: Decoder, rows: Sequence[int] = (0, 1)) -> Tensor:
        return logits(vlm, self._batch(vlm, method, rows), method.decoding)


def _state(vlm: VLM) -> Any:  # noqa: ANN401 (to be compared with another)
    """What a call could leave on the model: attributes and numbers of hooks of every module, and settings."""
    modules = {
        name: {key: len(value) if isinstance(value, dict) else None for key, value in vars(module).items()}
        for name, module in vlm.model.named_modules()
    }
    settings = vars(vlm.model.config.get_text_config())
    return modules, {name: repr(value) for name, value in settings.items()}, vlm.model.training


def _weights(vlm: VLM) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in vlm.model.state_dict().items()}
