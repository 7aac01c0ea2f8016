"""Says what a decoder or a chain would do with a model: the plans of its parts for a made-up picture and question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from vlmfix.attention.edit import (
    AttentionEdit,
    BiasEdit,
    CacheEdit,
    LayerSet,
    OutputEdit,
    PromptCacheEdit,
    PromptReading,
    ResidualEdit,
    ScoreEdit,
    SplitEdit,
    WeightEdit,
)
from vlmfix.attention.windows import check_windows, narrowest
from vlmfix.decoders import DECODERS, Chain, Decoder, DecodingPlan, Strategy
from vlmfix.decoders.spec import read_parts
from vlmfix.decoding.branches import Branch
from vlmfix.decoding.graphs import SHORT
from vlmfix.errors import IncompatibleDecodersError, VlmfixError
from vlmfix.fitting import key_bytes
from vlmfix.generation import VLM
from vlmfix.models.context import room_for_answers
from vlmfix.models.layout import Batch
from vlmfix.models.turns import turn_of
from vlmfix.upstream.positions import grows

QUESTION = "What is in this picture?"
ACTS_ON: tuple[tuple[type[AttentionEdit], str], ...] = (
    (BiasEdit, "attention scores, by a bias before the softmax"),
    (ScoreEdit, "attention scores"),
    (WeightEdit, "attention weights"),
    (SplitEdit, "head outputs, by the part that some keys have in them"),
    (OutputEdit, "head outputs"),
    (CacheEdit, "the KV cache, of generated tokens"),
    (PromptCacheEdit, "the KV cache, of the prompt"),
    (ResidualEdit, "the residual stream"),
    (PromptReading, "nothing"),
)
"""What each kind of edit changes."""
WHOLE_PROMPT = ("prompt", "all")
"""Rows of edits that begin with the prompt's first token."""


@dataclass(frozen=True)
class Asked:
    """Holds the made-up question, as one part of a chain meets it.

    Attributes:
        batch: Its one row.
        shown: Pictures that a refiner shows in place of the one; 0 without a refiner.
    """

    batch: Batch
    shown: int = 0


def parts_of(spec: str) -> list[Decoder]:
    """Reads the parts of a specification, whether or not they go together.

    Raises:
        UsageError: A name or a parameter is unknown, or a value is not allowed.
        DataError: A recipe cannot be read.
    """
    return [part.decoder(**part.given) for part in read_parts(spec, DECODERS)]


def planned(vlm: VLM, decoders: Sequence[Decoder], *, max_new_tokens: int, num_beams: int = 1) -> dict[str, Any]:
    """Plans a made-up question about a made-up picture, and decodes nothing.

    Some plans ask the model: a refiner looks at the picture, and what a method looks for in the model is looked for.

    Args:
        vlm: The model.
        decoders: The parts of a chain, or the one decoder.
        max_new_tokens: Longest answer, in tokens.
        num_beams: Beams; 1 for none, or for as many as the decoder says.

    Returns:
        ``family``, ``type`` (that of the configuration), ``layers``, ``heads``, ``dtype``; ``parts``, for each its
        ``refusal`` (a sentence, or None), ``layers``, ``shown`` (pictures that a refiner shows), ``edits``,
        ``tower`` (whether it edits the vision tower), ``branches``, ``exits``, ``gate`` and ``asks``; ``conflicts``, a
        sentence for each; ``total`` of the whole call, None where something is refused.
    """
    config: Any = vlm.model.config.get_text_config()
    with turn_of(vlm.model).taken():
        asked, refusals = _asked(vlm, decoders)
        found = [
            _plan(vlm, decoder, asked.batch) if not refusal else refusal
            for decoder, refusal in zip(decoders, refusals, strict=True)
        ]
        parts = [_part(vlm, one, asked, refines=decoder.refines) for one, decoder in zip(found, decoders, strict=True)]
        plans = [one for one in found if isinstance(one, DecodingPlan)]
        conflicts, total = [], None
        try:
            beams = _beams(decoders, num_beams)
            if len(plans) == len(decoders):
                total = _total(vlm, decoders, plans, asked.batch, max_new_tokens, beams)
        except VlmfixError as error:
            conflicts.append(error.message)
    return {
        "family": vlm.family.title,
        "type": vlm.model.config.model_type,
        "layers": vlm.layers,
        "heads": config.num_attention_heads,
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "parts": parts,
        "conflicts": conflicts,
        "total": total,
    }


def _asked(vlm: VLM, decoders: Sequence[Decoder]) -> tuple[Asked, list[str | None]]:
    """The question with the pictures that the first part makes, if it refines, and why parts cannot act."""
    refusals = [decoder.check(vlm) for decoder in decoders]
    picture = _picture()
    if decoders[0].refines and not refusals[0]:
        try:
            (refined,) = vlm.refine([picture], QUESTION, decoder=decoders[0])
            return Asked(vlm.encode([QUESTION], [refined.pictures]), len(refined.pictures)), refusals
        except VlmfixError as error:
            refusals[0] = error.message
    return Asked(vlm.encode([QUESTION], [[picture]])), refusals


def _plan(vlm: VLM, decoder: Decoder, batch: Batch) -> DecodingPlan | str:
    """The plan of one part, or why there is none."""
    try:
        return decoder.decoding.plan(vlm, batch, vlm.layout(batch))
    except VlmfixError as error:
        return error.message


def _beams(decoders: Sequence[Decoder], num_beams: int) -> int:
    """The beams of the call.

    Raises:
        IncompatibleDecodersError: The parts do not go together.
        UsageError: The decoder searches in another way.
    """
    chain = decoders[0] if len(decoders) == 1 else Chain(decoders=tuple(decoders))
    beams = Strategy(num_beams=num_beams).combined(chain.strategy).num_beams
    if beams > 1 and not chain.beams:
        unable = " and ".join(decoder.name for decoder in decoders if not decoder.beams)
        raise IncompatibleDecodersError(f"{unable} cannot be searched with {beams} beams", "use num_beams=1")
    return beams


def _part(vlm: VLM, plan: DecodingPlan | str, asked: Asked, *, refines: bool) -> dict[str, Any]:
    if isinstance(plan, str):
        return {"refusal": plan}
    return {
        "refusal": None,
        "layers": vlm.layers,
        "shown": asked.shown if refines else 0,
        "edits": [_edit(vlm, edit) for edit in plan.every_edit],
        "tower": bool(plan.tower),
        "branches": [{"tokens": branch.batch.length, "picture": _seen(branch)} for branch in plan.branches],
        "margins": [rule.margin for rule in plan.contrasts if rule.branches and rule.margin is not None],
        "exits": sorted({place.after for contrast in plan.contrasts for place in contrast.exits}),
        "gate": plan.gate is not None,
        "asks": _numbers(vlm, plan.asks) if plan.asks is not None else [],
    }


def _edit(vlm: VLM, edit: AttentionEdit) -> dict[str, Any]:
    return {
        "acts_on": next(words for kind, words in ACTS_ON if isinstance(edit, kind)),
        "reads": isinstance(edit, PromptReading),
        "layers": _numbers(vlm, edit.layers),
        "rows": "cached" if isinstance(edit, PromptCacheEdit) else edit.rows,
    }


def _numbers(vlm: VLM, layers: LayerSet) -> list[int]:
    return sorted(layers.resolve(vlm.layers))


def _seen(branch: Branch) -> str:
    if branch.same_pictures:
        return "same"
    return "other" if "pixel_values" in branch.batch else "none"


def _total(
    vlm: VLM, decoders: Sequence[Decoder], plans: Sequence[DecodingPlan], batch: Batch, longest: int, beams: int
) -> dict[str, Any]:
    """What the whole call takes, and what it does not do.

    Raises:
        VlmfixError: The plans do not go together, or prompt and answer do not fit.
    """
    plan = DecodingPlan()
    for other in plans:
        plan = plan.merged(other)
    branches = [branch.batch for branch in plan.branches]
    same = [
        batch if branch.same_pictures else branch.batch for contrast in plan.contrasts for branch in contrast.branches
    ]
    padded = max(part.length for part in (batch, *branches))
    room_for_answers(vlm, torch.tensor([padded]))
    if plan.leader is None:
        layers = frozenset[int]().union(*(edit.layers.resolve(vlm.layers) for edit in plan.every_edit))
        check_windows(vlm, layers, padded, longest)
    else:
        check_windows(vlm, range(vlm.layers), padded, longest + 1)
    rows = (1 + len(branches)) * beams * (1 if plan.leader is None else plan.leader.rows)
    return {
        "beams": beams,
        "prompt": batch.length,
        "padded": padded,
        "rows": rows,
        "pictures": len({id(part["pixel_values"]) for part in (batch, *same) if "pixel_values" in part}),
        "last_token_twice": plan.asks is not None,
        "max_new_tokens": longest,
        "bytes_per_token": key_bytes(vlm),
        "bytes": rows * (padded + longest) * key_bytes(vlm),
        "recorded": list(_unrecorded(vlm, plan, longest, beams)),
        "compiled": list(_uncompiled(plan, longer=padded > batch.length)),
        "beams_work": [f"{decoder.name} does not work with it" for decoder in decoders if not decoder.beams],
        "shares": list(_apart(vlm, plan, padded)),
        "pieces": list(_in_one(vlm, plan)),
    }


def _unrecorded(vlm: VLM, plan: DecodingPlan, longest: int, beams: int) -> Iterator[str]:
    if not plan.compiles:
        yield "the decoder does something in Python at every step"
    if beams > 1:
        yield "beams reorder their rows at every step"
    if longest <= SHORT:
        yield f"answers of at most {SHORT} tokens are not worth it"
    if _windows(vlm) is not None:
        yield "the model has sliding windows"


def _uncompiled(plan: DecodingPlan, *, longer: bool) -> Iterator[str]:
    if longer:
        yield "a branch has a longer prompt than the question, for which a static cache has no room"
    if plan.gate is not None:
        yield "the cache must be dynamic"
    if not plan.compiles:
        yield "the decoder does something in Python at every step"
    if plan.compiles and not plan.steps_alike:
        yield "the rule that fuses logits counts or remembers the steps"


def _apart(vlm: VLM, plan: DecodingPlan, padded: int) -> Iterator[str]:
    if any(edit.rows in WHOLE_PROMPT for edit in plan.every_edit):
        yield "an edit acts on the picture's rows, or before them"
    if plan.views:
        yield "what becomes of the prompt's tokens is read in one pass"
    narrow = _windows(vlm)
    if narrow is not None and narrow < padded:
        yield f"a sliding window of {narrow} ends inside the prompt"
    if grows(vlm.family.decoder(vlm.model)):
        yield "rotary embeddings depend on the length of the pass"


def _in_one(vlm: VLM, plan: DecodingPlan) -> Iterator[str]:
    if any(edit.rows in WHOLE_PROMPT for edit in plan.every_edit):
        yield "an edit acts on all rows of the prompt"
    if plan.views:
        yield "what becomes of the prompt's tokens is read in one pass"
    if any(edit.needs_hidden for edit in plan.every_edit):
        yield "an edit reads the residual stream of the whole prompt"
    if _windows(vlm) is not None:
        yield "masks differ between layers"
    if grows(vlm.family.decoder(vlm.model)):
        yield "rotary embeddings depend on the length of the pass"


def _windows(vlm: VLM) -> int | None:
    """The model's narrowest sliding window."""
    found = narrowest(vlm, range(vlm.layers))
    return None if found is None else found[1]


def _picture() -> Image.Image:
    """A picture with a bright square on a dark slope, so that a refiner has something to look at."""
    picture = Image.linear_gradient("L").resize((448, 336)).convert("RGB")
    picture.paste((240, 240, 240), (90, 60, 200, 170))
    return picture
