"""Measures a model's attention sinks and what they are worth: `python -m tools.study.sinking --model small`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import click
import torch
from PIL import Image
from torch import Tensor

from tools.entry import run
from tools.study.reasons import LONGEST, lines
from tools.study.replay import GROUPS, Replay, Without, replayed, sinks_of
from tools.training.questions import DESCRIBE
from vlmfix.decoders import Decoder, Greedy
from vlmfix.decoders.base import Source
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import UsageError
from vlmfix.generation import VLM, load
from vlmfix.insight.sinks import find_sinks, sink_strength
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout
from vlmfix.world.mentions import mentions
from vlmfix.world.render import render
from vlmfix.world.scenes import Scene, scene

QUARTERS = 4


@dataclass(frozen=True, kw_only=True)
class Dropping(Decoder):
    """Answers without seeing some image tokens of each prompt.

    Attributes:
        hidden: For each sample, (T,) bool.
    """

    name: ClassVar[str] = "dropping"
    source: ClassVar[Source] = Source(title="Image tokens left out", year=2026, arxiv="")
    acts_on: ClassVar[str] = "attention"

    hidden: tuple[Tensor, ...]

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Hides the tokens."""
        return DecodingPlan(edits=(Without(hidden=torch.stack(self.hidden)),), compiles=False)


def strengths(vlm: VLM, pictures: Sequence[Image.Image]) -> dict[str, list[float]]:
    """Measures how massive tokens are as they enter each layer, and after the last.

    Returns:
        By name, a number for each layer: the strength of the first token, of the strongest image token beside it and
        the median of all others; the norms of these; means over the pictures.
    """
    dims = find_sinks(vlm).dims
    rows = []
    for picture in pictures:
        batch = vlm.encode([DESCRIBE[0]], [[picture]])
        image = vlm.layout(batch).tokens[0].clone()  # (T,)
        image[0] = False
        with torch.inference_mode():
            states = torch.stack(vlm.model(**batch, output_hidden_states=True).hidden_states)[:, 0].float()
        strength, norm = sink_strength(states, dims), states.norm(dim=-1)  # (L + 1, T)
        best = strength[:, image].argmax(-1, keepdim=True)
        rows.append(
            torch.stack(
                [
                    strength[:, 0],
                    strength[:, image].amax(-1),
                    strength[:, 1:].median(-1).values,
                    norm[:, 0],
                    norm[:, image].gather(-1, best)[:, 0],
                    norm[:, 1:].median(-1).values,
                ]
            )
        )
    names = ("strength of the first token", "of the strongest image token beside it", "median")
    norms = ("norm of the first token", "norm of that image token", "median norm")
    means = torch.stack(rows).mean(0)
    return dict(zip((*names, *norms), (row.tolist() for row in means), strict=True))


def along(replays: Sequence[Replay]) -> list[float]:
    """Returns the attention to image tokens in each quarter of the captions, mean over layers; sinks are left out."""
    other = GROUPS.index("other image tokens")
    quarters: list[list[Tensor]] = [[] for _ in range(QUARTERS)]
    for one in replays:
        for number, part in enumerate(one.attention[..., other].mean(1).tensor_split(QUARTERS)):
            quarters[number].append(part)
    return [float(torch.cat(parts).mean()) for parts in quarters]


def judged(texts: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    """Scores captions by CHAIR's counts on exact truth; each object counts once a caption."""
    named = [set(mentions(text)) for text in texts]
    there = [set(one.counts()) for one in scenes]
    said, found = sum(map(len, named)), sum(len(one & own) for one, own in zip(named, there, strict=True))
    return {
        "CHAIR_i": 1 - found / max(1, said),
        "recall": found / sum(map(len, there)),
        "words": sum(len(text.split()) for text in texts) / len(texts),
    }


def measured(vlm: VLM, count: int, seed: int) -> dict[str, Any]:
    """Measures sinks, attention to them, and captions without them.

    Args:
        vlm: The model.
        count: Number of scenes.
        seed: Theirs.
    """
    if not find_sinks(vlm).dims:
        raise UsageError("the model has no sink dimension", "small has one")
    scenes = [scene(seed, number) for number in range(count)]
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in render(scenes)]
    plain = vlm.generate(pictures, DESCRIBE[0], max_new_tokens=LONGEST)
    replays = [
        replayed(vlm, [picture], list(answer.ids), Greedy()) for picture, answer in zip(pictures, plain, strict=True)
    ]
    hidden = tuple(sinks_of(vlm, vlm.encode([DESCRIBE[0]], [[picture]])) for picture in pictures)
    for own in hidden:
        own[0] = False
    others = tuple(_others(vlm, picture, own, seed) for picture, own in zip(pictures, hidden, strict=True))
    attention = torch.stack([one.attention.mean(0) for one in replays]).mean(0)  # (L, 5)
    found: dict[str, Any] = {
        "sinks of a picture": sum(int(own.sum()) for own in hidden) / count,
        "by layer": strengths(vlm, pictures)
        | {f"attention to {name}": attention[:, number].tolist() for number, name in enumerate(GROUPS)},
        "attention to other image tokens in each quarter": along(replays),
        "captions": judged([answer.text for answer in plain], scenes),
    }
    for name, chosen in (("without the sinks", hidden), ("without as many other image tokens", others)):
        answers = vlm.generate(pictures, DESCRIBE[0], decoder=Dropping(hidden=chosen), max_new_tokens=LONGEST)
        changed = sum(answer.ids != own.ids for answer, own in zip(answers, plain, strict=True)) / count
        found[f"captions {name}"] = judged([answer.text for answer in answers], scenes) | {"changed": changed}
    return found


def _others(vlm: VLM, picture: Image.Image, sinks: Tensor, seed: int) -> Tensor:
    """Draws as many image tokens as there are sinks, none of them a sink and none the prompt's first."""
    free = vlm.layout(vlm.encode([DESCRIBE[0]], [[picture]])).tokens[0] & ~sinks
    free[0] = False
    places = free.nonzero().flatten()
    dice = torch.Generator().manual_seed(seed)
    drawn = places[torch.randperm(len(places), generator=dice)[: int(sinks.sum())].to(places.device)]
    return torch.zeros_like(sinks).index_fill(0, drawn, True)


def table(found: Mapping[str, Any]) -> list[str]:
    """Writes what was measured: first what has one number, then a column for each layer."""
    by_layer = found["by layer"]
    rows = [f"{name:42} " + " ".join(f"{value:8.4g}" for value in values) for name, values in by_layer.items()]
    return [*lines({name: value for name, value in found.items() if name != "by layer"}), "by layer", *rows]


@click.command()
@click.option("--model", default="small", show_default=True, help="An embedded model, or one like it.")
@click.option("--scenes", "count", default=48, show_default=True, type=click.IntRange(1), help="Fresh scenes.")
@click.option("--seed", default=606, show_default=True, type=click.IntRange(0), help="Theirs.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--json", "file", type=click.Path(path_type=Path, dir_okay=False), help="Also write the figures here.")
def command(*, model: str, count: int, seed: int, device: str, file: Path | None) -> None:
    """Measure how massive tokens are by layer, what attention they draw, and captions that do not see the sinks."""
    found = measured(load(model, device=device), count, seed)
    click.echo("\n".join(table(found)))
    if file is not None:
        file.write_text(json.dumps({"model": model, "scenes": count, "seed": seed, **found}, indent=1) + "\n")


if __name__ == "__main__":
    run(command)
