"""Shows why a decoder's row in the tables is as it is: `python -m tools.study.reasons --model small`.

For each decoder: what it needs and whether the model has it, and what it changes while the model's own captions are
replayed, in attention and in the probability of what was said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image

from tools.entry import run
from tools.study.replay import Replay, averaged, replayed
from tools.training.questions import DESCRIBE
from vlmfix.decoders import Decoder, Greedy, parse
from vlmfix.generation import VLM, load
from vlmfix.insight.sinks import find_sinks, first_token_mass
from vlmfix.insight.wording import decoded
from vlmfix.world.mentions import mentions
from vlmfix.world.render import render
from vlmfix.world.scenes import scene

NEEDS: Mapping[str, str] = {
    "var": "image tokens beside the first token that are massive in the sink dimensions, to take their attention from",
    "act": "sinks whose attention it can lower in heads that were calibrated with labels",
    "imbalance": "a vision tower with a class token, and a picture that gets too little attention",
    "carve": "attention that differs between the question and a general instruction, over what the question is about",
    "gift": "gaze that moves to a picture's objects while the question is read",
    "locore": "answers that lose the tokens right before them from sight",
    "inter": "branches with and without picture and question that differ where an object is named",
}
"""What a method takes for granted, by name."""
LONGEST = 96


@dataclass(frozen=True)
class Word:
    """An object that a caption names.

    Attributes:
        place: Number of the token that begins it.
        there: Whether the scene has it.
    """

    place: int
    there: bool


def named(vlm: VLM, said: Sequence[int], there: Sequence[str]) -> list[Word]:
    """Finds the object words of a caption, each once.

    Args:
        vlm: The model.
        said: The caption's tokens.
        there: COCO names of what the scene has.
    """
    text, ends = decoded(vlm.processor.tokenizer, said, special=False)
    lower, words = text.lower(), []
    for name in dict.fromkeys(mentions(text)):
        at = lower.find(name)
        if at >= 0:  # some plurals are other words: their objects are left out
            words.append(Word(next(number for number, end in enumerate(ends) if end > at), name in there))
    return words


def compared(
    plain: Sequence[Replay], edited: Sequence[Replay], said: Sequence[Sequence[int]], words: Sequence[Sequence[Word]]
) -> dict[str, Any]:
    """Says what changed: attention by group, and probabilities of what was said.

    Args:
        plain: Captions replayed without the decoder.
        edited: The same with it.
        said: Their tokens.
        words: The objects that they name.
    """
    pairs = [(one.probabilities, two.probabilities) for one, two in zip(plain, edited, strict=True)]
    distance = torch.cat([(one - two).abs().sum(-1) / 2 for one, two in pairs])
    other = torch.cat([one.argmax(-1) != two.argmax(-1) for one, two in pairs])
    found: dict[str, Any] = {
        "attention": {"plain": averaged(plain), "edited": averaged(edited)},
        "distance of the next token's distribution": float(distance.mean()),
        "tokens that would be others": float(other.float().mean()),
    }
    for name, there in (("true", True), ("invented", False)):
        own = [
            (float(one[word.place, tokens[word.place]]), float(two[word.place, tokens[word.place]]))
            for (one, two), tokens, listed in zip(pairs, said, words, strict=True)
            for word in listed
            if word.there == there
        ]
        if own:
            before, after = (sum(values) / len(own) for values in zip(*own, strict=True))
            found[f"probability of {name} object words"] = {"words": len(own), "plain": before, "edited": after}
    return found


def reasons(vlm: VLM, decoders: Sequence[Decoder], count: int, seed: int) -> dict[str, Any]:
    """Measures all decoders over the same scenes.

    Args:
        vlm: The model.
        decoders: What is asked about.
        count: Number of scenes.
        seed: Theirs.
    """
    scenes = [scene(seed, number) for number in range(count)]
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in render(scenes)]
    answers = vlm.generate(pictures, DESCRIBE[0], max_new_tokens=LONGEST)
    said = [list(answer.ids) for answer in answers]
    words = [named(vlm, own, list(one.counts())) for own, one in zip(said, scenes, strict=True)]
    plain = [replayed(vlm, [picture], own, Greedy()) for picture, own in zip(pictures, said, strict=True)]
    sinks = find_sinks(vlm)
    model = {
        "sink dimensions": list(sinks.dims),
        "strength of the first token": sinks.largest,
        "strength that makes a sink": sinks.threshold,
        "image tokens beside the first that are sinks": sum(one.sinks for one in plain) / count,
        "largest attention of a head to the first token": float(first_token_mass(vlm).max()),
        "attention": averaged(plain),
    }
    found: dict[str, Any] = {"model": model, "decoders": {}}
    for decoder in decoders:
        row: dict[str, Any] = {"needs": NEEDS.get(decoder.name, ""), "cannot act": decoder.check(vlm)}
        if row["cannot act"] is None:
            shown = [[picture] for picture in pictures]
            if decoder.refines:
                refined = vlm.refine(pictures, DESCRIBE[0], decoder=decoder)
                shown = [list(one.pictures) for one in refined]
            each = zip(shown, said, strict=True)
            edited = [replayed(vlm, own, tokens, decoder.decoding) for own, tokens in each]
            row |= compared(plain, edited, said, words)
        found["decoders"][decoder.spec()] = row
    return found


def lines(found: Any, indent: str = "") -> list[str]:  # noqa: ANN401 (JSON)
    """Writes figures below each other."""
    written = []
    for name, value in found.items():
        if isinstance(value, Mapping):
            written += [f"{indent}{name}", *lines(value, indent + "  ")]
        elif value not in (None, ""):
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            written.append(f"{indent}{name}: {text}")
    return written


@click.command()
@click.option("--model", default="small", show_default=True, help="An embedded model, or one like it.")
@click.option("--decoder", "specs", multiple=True, help="May repeat.  [default: those that need something]")
@click.option("--scenes", "count", default=24, show_default=True, type=click.IntRange(1), help="Fresh scenes.")
@click.option("--seed", default=606, show_default=True, type=click.IntRange(0), help="Theirs.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--json", "file", type=click.Path(path_type=Path, dir_okay=False), help="Also write the figures here.")
def command(*, model: str, specs: tuple[str, ...], count: int, seed: int, device: str, file: Path | None) -> None:
    """Show what decoders need, whether the model has it, and what they change in attention and probabilities.

    The model describes scenes of the drawn world; then its captions are replayed token by token under each decoder.
    """
    vlm = load(model, device=device)
    decoders = [
        parse(spec)
        for spec in specs or ("var", "act:heads=all", *[name for name in NEEDS if name not in ("var", "act")])
    ]
    found = {"model": model, "scenes": count, "seed": seed, **reasons(vlm, decoders, count, seed)}
    click.echo("\n".join(lines({key: value for key, value in found.items() if isinstance(value, Mapping)})))
    if file is not None:
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(command)
