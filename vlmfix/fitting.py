"""Estimates how many rows of a batch fit into the model's free memory.

It estimates a row's memory from the model's configuration and from a sample of the questions, which the processor
tokenizes: families make between a hundred and some ten thousand tokens of a picture. The estimate is rough and on the
safe side; a batch that does not fit all the same is halved (``vlmfix.answering``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlmfix.card import free_memory
from vlmfix.decoders import Decoder
from vlmfix.decoding.graphs import ROOM, capacity, slots
from vlmfix.errors import DataError, PassingError
from vlmfix.generation import VLM
from vlmfix.images import Found, open_found
from vlmfix.models.layout import Prepared
from vlmfix.settings import Settings
from vlmfix.supply import Question
from vlmfix.upstream.wrappers import layer_devices

LARGEST_BATCH = {"cuda": 128, "cpu": 8}
"""Most rows of an automatic batch, by kind of device; beyond, a step takes longer for each further row."""
KEPT_BACK = 0.2
"""Share of the free memory that is left for what the estimate omits: fragments, edits, libraries."""
SAMPLED = 4
"""Number of pictures that represent all."""
HIDDEN, INNER = 6, 3
"""Activations that a prompt token takes in one layer, in vectors of the hidden size and of the MLP's inner size."""
TOWER = 100
"""Values that the vision tower holds for each value of a picture's pixels: the states of all its layers, of which some
families use one, and the activations of one layer. LLaVA-1.5's takes 70."""
SCORES = 24
"""Bytes for each entry of the vocabulary: logits of a step in two precisions, and their sorted copies."""


@dataclass(frozen=True)
class Need:
    """Estimates the memory that a question takes.

    Attributes:
        rows: Rows that it is decoded in, branches and beams included.
        waiting: Rows of these whose keys and values are held once more, apart; see ``Decoder.waiting``.
        kept: Bytes of the KV cache of one of these rows, prompt and answer.
        passing: Bytes that the question's prefill takes beside the cache, and frees.
    """

    rows: int
    waiting: int
    kept: int
    passing: int

    def of(self, questions: int) -> int:
        """Computes the bytes for a batch of questions, with the rows of the recorded step that serves it."""
        return (slots(questions * self.rows) + questions * self.waiting) * self.kept + questions * self.passing


def typical(files: Sequence[Found], prompts: Iterable[str]) -> list[Question]:
    """Makes questions that represent those to come: the longest prompt about a few pictures, or alone if none opens.

    Args:
        files: The pictures.
        prompts: All prompts.
    """
    longest, shown = max(prompts, key=len, default=""), []
    for file in files[:: max(1, math.ceil(len(files) / SAMPLED))]:
        try:
            shown.append(open_found(file).image)
        except (DataError, PassingError):  # reported where the picture is asked about
            continue
    return [Question(picture, longest) for picture in shown] or [Question(None, longest)]


def fitting_batch(vlm: VLM, decoder: Decoder, settings: Settings, questions: Sequence[Question]) -> int:
    """Computes the rows of a batch that the free memory has room for, at least 1.

    Args:
        vlm: The model.
        decoder: How it decodes.
        settings: Its generation settings.
        questions: A sample of those to come; see ``typical``.
    """
    needs = [_need(vlm, decoder, settings, found) for found in _prepared(vlm, questions, settings.system)]
    if not needs:
        return 1  # none can be prepared, which is reported of each where it is asked
    devices = Counter(layer_devices(vlm.family.layers(vlm.model), vlm.device))
    layers = devices.total()  # a device with half of them has half of all keys and values
    free = min((1 - KEPT_BACK) * free_memory(device) * layers / own for device, own in devices.items())
    most = LARGEST_BATCH.get(vlm.device.type, LARGEST_BATCH["cpu"])
    return next((rows for rows in range(most, 1, -1) if all(need.of(rows) <= free for need in needs)), 1)


def _prepared(vlm: VLM, questions: Sequence[Question], system: str | None) -> Iterable[Prepared]:
    for question in questions:
        shown = [] if question.picture is None else [question.picture]
        try:
            yield vlm.prepared([question.prompt], [shown], system=system)
        except Exception:  # of any kind: it is that question's, and occurs again where it is asked
            continue


def _need(vlm: VLM, decoder: Decoder, settings: Settings, prepared: Prepared) -> Need:
    """Estimates the memory of a question with such a prompt."""
    config, size = vlm.model.config.get_text_config(), vlm.model.dtype.itemsize
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    shown = 2 if decoder.refines else 1  # a refined part beside the picture
    tokens, longest = shown * prepared.length, settings.max_new_tokens
    own_beams = decoder.strategy is not None and decoder.strategy.num_beams > 1
    rows = decoder.passes * (1 if own_beams else settings.num_beams)  # its passes count its own
    keys = capacity(tokens, longest) if longest <= ROOM else tokens + longest + ROOM  # it grows by so many
    states = tokens * (HIDDEN * config.hidden_size + INNER * inner) * size
    mask = tokens * tokens * (1 + size)
    pixels = sum(value.numel() for value in prepared.inputs.values() if value.is_floating_point())
    pictures = shown * pixels * TOWER * size
    return Need(
        rows=rows,
        waiting=decoder.waiting,
        kept=key_bytes(vlm) * keys,
        passing=(states + mask + pictures) * decoder.passes + SCORES * config.vocab_size * rows,
    )


def key_bytes(vlm: VLM) -> int:
    """Computes the bytes that keys and values of one row's token take in all layers."""
    config = vlm.model.config.get_text_config()
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * groups * width * vlm.model.dtype.itemsize)
