"""Measure how well scores of confidence tell invented object words from true ones: `python -m tools.study.doubt`."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from scipy.stats import rankdata

from tools.entry import run
from tools.study.embedded import Set, draw
from tools.study.page import put
from tools.training.questions import DESCRIBE
from vlmfix.evals.benchmarks.chair import Chair
from vlmfix.evals.comparison.statistics import interval
from vlmfix.evals.task import Numbers, Sample
from vlmfix.generation import VLM, load
from vlmfix.insight.relevance import Confidence, flags
from vlmfix.parsing import WORD
from vlmfix.settings import EMBEDDED, GROUNDED, OWN

SCORES = {"logprob": "-logprob", "entropy": "entropy", "sar": "SAR", "picture": "-saliency of the picture"}
"""What is compared, and how a table calls it; of a word the sum over its tokens, of saliency the mean."""
DRAWS = 2000


@dataclass(frozen=True)
class Named:
    """One object word of a caption.

    Attributes:
        picture: Number of its picture.
        invented: Whether the object is not there.
        scores: By the names of `SCORES`; the larger, the more doubtful.
        flagged: Whether it was flagged.
    """

    picture: int
    invented: bool
    scores: Mapping[str, float]
    flagged: bool


def named(vlm: VLM, shown: Set, *, similarity: str, batch_size: int) -> list[Named]:
    """Let a model describe pictures, and score every object word of its captions.

    Args:
        vlm: The model.
        shown: Scenes and pictures.
        similarity: What tells relevance; see `VLM.generate`.
        batch_size: Pictures at a time.
    """
    task, found = Chair(), []
    for start in range(0, len(shown.pictures), batch_size):
        pictures = shown.pictures[start : start + batch_size]
        said = vlm.generate(pictures, DESCRIBE[0], confidence=GROUNDED, similarity=similarity)
        for number, answer in enumerate(said, start):
            target = {"objects": list(shown.scenes[number].counts()), "captions": []}
            sample = Sample(id=str(number), image=None, prompt="", target=target)
            if answer.confidence is not None:
                found += _named(number, answer.text, answer.confidence, task.mentions(sample, answer.text))
    return found


def _named(number: int, text: str, confidence: Confidence, mentions: Sequence[Any]) -> list[Named]:
    spans = [(mention.start, mention.end) for mention, _ in mentions]
    flagged = flags(confidence, [word.span() for word in WORD.finditer(text)], spans)
    found = []
    for (begin, end), (_, absent), flag in zip(spans, mentions, flagged, strict=True):
        own = [token for token in confidence.tokens if token.begin < end and token.end > begin]
        sar, owed = confidence.of(begin, end)
        scores = {
            "logprob": -sum(token.logprob for token in own),
            "entropy": sum(token.entropy for token in own),
            "sar": sar,
            "picture": -(owed or 0.0),
        }
        found.append(Named(number, absent, scores, flag))
    return found


def auroc(scores: Numbers, invented: Numbers) -> float:
    """Compute the probability that an invented word scores higher than a true one; ties count half.

    Args:
        scores: (N,) scores.
        invented: (N,) whether each word is invented.

    Returns:
        In [0, 1]; NaN without words of both kinds.
    """
    positive, count = int(invented.sum()), len(invented)
    if positive in (0, count):
        return float("nan")
    ranks = rankdata(scores)[invented.astype(bool)].sum()
    return float((ranks - positive * (positive + 1) / 2) / (positive * (count - positive)))


def figures(words: Sequence[Named], *, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Compute the AUROC of each score with its 95 % interval, by a bootstrap over pictures, and what flags are worth.

    Args:
        words: The object words.
        draws: Draws of the bootstrap; each draws as many pictures as there are, with all their words.
        seed: Its seed.

    Returns:
        `words`, `invented`; for each score `auroc` and `interval`, and beside `logprob` the `gain` over it with its
        interval; `flagged`: how many words, and how many of them are invented.
    """
    invented = np.array([word.invented for word in words])
    scores = {name: np.array([word.scores[name] for word in words]) for name in SCORES}
    pictures = sorted({word.picture for word in words})
    rows = {picture: [row for row, word in enumerate(words) if word.picture == picture] for picture in pictures}
    generator, drawn = np.random.default_rng(seed), {name: np.empty(draws) for name in SCORES}
    for number in range(draws):
        chosen = np.concatenate([rows[pictures[place]] for place in generator.integers(len(pictures), size=len(rows))])
        for name, values in scores.items():
            drawn[name][number] = auroc(values[chosen], invented[chosen])
    found: dict[str, Any] = {"words": len(words), "invented": int(invented.sum()), "scores": {}}
    plain = auroc(scores["logprob"], invented)
    for name, values in scores.items():
        own = auroc(values, invented)
        found["scores"][name] = {"auroc": own, "interval": interval(drawn[name])}
        if name != "logprob":
            found["scores"][name] |= {"gain": own - plain, "gain_interval": interval(drawn[name] - drawn["logprob"])}
    flagged = [word for word in words if word.flagged]
    found["flagged"] = {"words": len(flagged), "invented": sum(word.invented for word in flagged)}
    return found


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the figures of all models as a Markdown table, and a sentence about the flags of each."""
    lines = ["| model | score of a word | AUROC ↑ | beside `logprob` |", "| --- | --- | --- | --- |"]
    for model, found in results.items():
        for name, one in found["scores"].items():
            gain = f"{one['gain']:+.3f} {_between(one['gain_interval'])}" if "gain" in one else ""
            lines.append(f"| `{model}` | {SCORES[name]} | {one['auroc']:.3f} {_between(one['interval'])} | {gain} |")
    told = []
    for model, found in results.items():
        flagged, invented = found["flagged"]["words"], found["flagged"]["invented"]
        rest, left = found["words"] - flagged, found["invented"] - invented
        among, beyond = _share(invented, flagged), _share(left, rest)
        told.append(
            f"- `{model}`: {found['invented']} of {found['words']} object words are invented. Of the {flagged} "
            f"that are flagged {invented} are ({among}), of the {rest} others {left} ({beyond})."
        )
    return "\n".join([*lines, "", *told]) + "\n"


def _between(ends: tuple[float, float]) -> str:
    return f"[{ends[0]:.3f}, {ends[1]:.3f}]"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


@click.command()
@click.option("--model", "models", multiple=True, default=tuple(EMBEDDED), show_default=True, help="May repeat.")
@click.option("--count", default=200, show_default=True, type=click.IntRange(2), help="Fresh scenes.")
@click.option("--seed", default=515, show_default=True, type=click.IntRange(0), help="Seed of the scenes.")
@click.option("--similarity", default=OWN, show_default=True, help="As of vlmfix run.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--batch-size", default=25, show_default=True, type=click.IntRange(1), help="Pictures at a time.")
@click.option("--page", type=click.Path(path_type=Path), help="Page that gets the table, between its marks.")
def command(
    *,
    models: tuple[str, ...],
    count: int,
    seed: int,
    similarity: str,
    device: str,
    batch_size: int,
    page: Path | None,
) -> None:
    """Measure how well logprob, entropy, SAR and saliency tell invented object words from true ones.

    Greedy captions of scenes that no model was trained on; what is there is known exactly. AUROC with 95 % intervals by
    a bootstrap over pictures.
    """
    warnings.simplefilter("ignore")
    results, where = {}, ""
    for model in models:
        vlm = load(model, device=device)
        where = f"{vlm.device.type}, {platform.machine()}, {str(vlm.model.dtype).removeprefix('torch.')}"
        shown = draw(count, seed, vlm.device.type)
        results[model] = figures(named(vlm, shown, similarity=similarity, batch_size=batch_size))
    given = "" if similarity == OWN else f" --similarity {similarity}"
    words = f"```sh\npython -m tools.study.doubt --count {count} --seed {seed}{given} --page docs/confidence.md\n```\n"
    about = f"Greedy captions of {count} scenes of seed {seed}; {where}. 95 % intervals, bootstrap over pictures.\n"
    text = "\n".join([words, about, table(results)])
    click.echo(text)
    if page is not None:
        put(page, text)


if __name__ == "__main__":
    run(command)
