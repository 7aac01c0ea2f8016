"""Measure models and decoders on fresh scenes of the drawn world: `python -m tools.study.embedded`."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from PIL import Image
from rich.console import Console
from rich.progress import track

from tools.entry import run
from tools.study.looking import looking
from tools.training.questions import (
    DESCRIBE,
    beside_any,
    beside_exchanges,
    count_exchange,
    exists_question,
    where_exchange,
    window,
)
from vlmfix.evals.benchmarks.chair import Chair
from vlmfix.evals.benchmarks.pope import Pope
from vlmfix.evals.task import Sample
from vlmfix.generation import VLM, load
from vlmfix.world.captions import absent
from vlmfix.world.language import NUMBERS, alone, place
from vlmfix.world.mentions import mentions
from vlmfix.world.pope import SPLITS, choose
from vlmfix.world.pope import lines as pope_lines
from vlmfix.world.render import render
from vlmfix.world.scenes import Scene, scene

Pictures = Sequence[Image.Image]
Answer = Callable[[Sequence[Pictures], Sequence[str]], list[str]]
"""Answers one prompt for each row; a row has no, one or two pictures."""

SMALL_SIDE = 48


@dataclass(frozen=True)
class Set:
    """Scenes with their pictures, 512 pixels square."""

    scenes: list[Scene]
    pictures: list[Image.Image]


def draw(count: int, seed: int, device: str) -> Set:
    """Draw the scenes to measure on."""
    scenes = [scene(seed, index) for index in range(count)]
    canvases = render(scenes, device=device).permute(0, 2, 3, 1).cpu().numpy()  # (N, 512, 512, 3)
    return Set(scenes, [Image.fromarray(canvas) for canvas in canvases])


def answering(vlm: VLM, decoder: str, batch_size: int) -> Answer:
    """Answer with a loaded model, greedily, under a decoder's specification; a bar on stderr shows how far it is."""
    terminal = Console(stderr=True)

    def answer(pictures: Sequence[Pictures], prompts: Sequence[str]) -> list[str]:
        found: list[str] = []
        starts = range(0, len(prompts), batch_size)
        hidden = not terminal.is_terminal
        for start in track(starts, description=decoder, console=terminal, transient=True, disable=hidden):
            rows = slice(start, start + batch_size)
            found += [entry.text for entry in vlm.generate(pictures[rows], prompts[rows], decoder=decoder)]
        return found

    return answer


def measure(answer: Answer, shown: Set) -> dict[str, Any]:
    """Run every measurement that needs pictures and answers.

    Args:
        answer: What is measured.
        shown: Scenes and pictures.

    Returns:
        Figures by name, probabilities in [0, 1], and the captions.
    """
    captions = answer([[picture] for picture in shown.pictures], [DESCRIBE[0]] * len(shown.pictures))
    return {
        "captions": caption_figures(shown.scenes, captions),
        "pope": pope_figures(answer, shown),
        "counting": counting(answer, shown),
        "position": position(answer, shown),
        "small objects": small_objects(answer, shown),
        "texts": captions,
    }


def caption_figures(scenes: Sequence[Scene], captions: Sequence[str]) -> dict[str, Any]:
    """CHAIR on exact ground truth, and where in the caption the hallucinated mentions stand.

    Args:
        scenes: What is there.
        captions: One for each scene.

    Returns:
        CHAIR's results; mentions and words per caption; the hallucinated share of the mentions in each quarter of a
        caption's mentions and in each sentence, and how many mentions each sentence has.
    """
    task = Chair()
    samples = [
        Sample(id=str(row), image=None, prompt="", target={"objects": list(view.counts()), "captions": []})
        for row, view in enumerate(scenes)
    ]
    judged = list(zip(samples, task.judge_all(samples, captions), strict=True))
    about = task.details(judged, captions)
    return {
        **task.results(judged),
        "mentions": about["mentions_per_caption"],
        "words": about["words_per_caption"],
        "by quarter": [row["share"] for row in about["by_quarter"]],
        "by sentence": [row["share"] for row in about["by_sentence"]],
        "mentions by sentence": [row["mentions"] / len(captions) for row in about["by_sentence"]],
    }


def pope_figures(answer: Answer, shown: Set, *, blind: bool = False) -> dict[str, Any]:
    """POPE by the official rules on the three splits.

    Args:
        answer: What is measured.
        shown: Scenes and pictures; those with three categories or more are asked about.
        blind: Ask without the picture.

    Returns:
        POPE's results.
    """
    pictures = choose(((str(row), list(view.counts())) for row, view in enumerate(shown.scenes)), seed=0)
    samples = []
    for split in SPLITS:
        for entry in map(json.loads, pope_lines(pictures, split=split, seed=0)):
            name, image = f"{split}/{entry['question_id']}", None if blind else entry["image"]
            samples.append(_yes_no(name, image, entry["text"], entry["label"] == "yes", split))
    # the splits share their yes questions, and without pictures only the words differ: each is asked once
    asked = dict.fromkeys((sample.image, sample.prompt) for sample in samples)
    rows = [[] if image is None else [shown.pictures[int(image)]] for image, _ in asked]
    said = dict(zip(asked, answer(rows, [prompt for _, prompt in asked]), strict=True))
    return _yes_no_results(samples, [said[sample.image, sample.prompt] for sample in samples])


def _yes_no(name: str, image: str | None, prompt: str, truth: bool, group: str) -> Sample:
    return Sample(id=name, image=image, prompt=prompt, target={"label": "yes" if truth else "no"}, group=group)


def _yes_no_results(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Any]:
    task = Pope()
    return task.results(list(zip(samples, task.judge_all(samples, answers), strict=True)))


def counting(answer: Answer, shown: Set) -> dict[str, float]:
    """Exact count of the most prominent single category and of the most prominent repeated one."""
    asked = []
    for row, view in enumerate(shown.scenes):
        for repeated in (False, True):
            names = [name for name, count in view.counts().items() if (count > 1) is repeated]
            asked += [(row, name, view.counts()[name]) for name in names[:1]]
    said = answer(
        [[shown.pictures[row]] for row, _, _ in asked], [count_exchange(name, 1).prompt for _, name, _ in asked]
    )
    right = [(count > 1, spelled(text) == count) for (_, _, count), text in zip(asked, said, strict=True)]
    return {
        "one": _share([ok for many, ok in right if not many]),
        "several": _share([ok for many, ok in right if many]),
    }


def spelled(text: str) -> int | None:
    """First number in a text, as a word or in digits; None without one."""
    for word in re.findall(r"[a-z]+|\d+", text.lower()):
        if word in NUMBERS or word.isdigit():
            return NUMBERS.index(word) if word in NUMBERS else int(word)
    return None


def position(answer: Answer, shown: Set) -> dict[str, float]:
    """Place of the most prominent single object on the 3 by 3 grid, and its neighbour on a side that has one."""
    where = [(row, thing) for row, view in enumerate(shown.scenes) for thing in list(alone(view).values())[:1]]
    said = answer([[shown.pictures[row]] for row, _ in where], [where_exchange(thing).prompt for _, thing in where])
    places = [place(thing.box) in text for (_, thing), text in zip(where, said, strict=True)]
    beside = []
    for row, view in enumerate(shown.scenes):
        full = [found for found in beside_exchanges(view) if not found.answer.startswith("Nothing")]
        beside += [(row, found) for found in full[:1]]
    said = answer([[shown.pictures[row]] for row, _ in beside], [found.prompt for _, found in beside])
    named = [mentions(text)[:1] for text in said]
    return {
        "place": _share(places),
        "nearest on that side": _share(
            [name == mentions(found.answer)[:1] for (_, found), name in zip(beside, named, strict=True)]
        ),
        "on that side": _share(
            [
                bool(name) and name[0] in beside_any(shown.scenes[row], found)
                for (row, found), name in zip(beside, named, strict=True)
            ]
        ),
    }


def small_objects(answer: Answer, shown: Set) -> dict[str, Any]:
    """Yes/no about objects under 48 pixels, without and with a second picture that shows their part enlarged.

    Each scene with such an object is asked about it and about a category that would fit but is absent.
    """
    asked: list[tuple[int, str, bool, Image.Image]] = []
    for row, view in enumerate(shown.scenes):
        small = [t for t in alone(view).values() if max(t.box[2] - t.box[0], t.box[3] - t.box[1]) < SMALL_SIDE]
        if not small:
            continue
        rng = random.Random(f"small/{view.seed}/{view.index}")
        part = shown.pictures[row].crop(window(small[0].box, 0.6, rng.random(), rng.random()))
        asked.append((row, small[0].category, True, part))
        asked += [(row, name, False, part) for name in absent(view, rng, 1)]
    prompts = [exists_question(name) for _, name, _, _ in asked]
    samples: list[Sample] = []
    answers: list[str] = []
    for group, rows in (
        ("one picture", [[shown.pictures[row]] for row, _, _, _ in asked]),
        ("two pictures", [[shown.pictures[row], part] for row, _, _, part in asked]),
    ):
        answers += answer(rows, prompts)
        samples += [
            _yes_no(f"{group}/{number}", None, prompt, truth, group)
            for number, (prompt, (_, _, truth, _)) in enumerate(zip(prompts, asked, strict=True))
        ]
    return _yes_no_results(samples, answers)


def _share(found: Sequence[bool]) -> float:
    return sum(found) / max(1, len(found))


def lines(figures: Mapping[str, Any], title: str = "") -> list[str]:
    """Flatten figures to "name value" lines, three digits."""
    found = []
    for name, value in figures.items():
        if name == "texts":
            continue
        full = f"{title} {name}".strip()
        if isinstance(value, Mapping):
            found += lines(value, full)
        elif isinstance(value, list):
            found.append(f"{full:45} " + " ".join(f"{entry:.3f}" for entry in value))
        else:
            found.append(f"{full:45} {value:.3f}" if isinstance(value, float) else f"{full:45} {value}")
    return found


@click.command()
@click.option("--model", default="tiny", show_default=True, help="tiny, tiny-qwen, or a directory with such a model.")
@click.option("--decoder", "decoders", multiple=True, default=("greedy",), show_default=True, help="May be repeated.")
@click.option("--scenes", "count", default=500, type=click.IntRange(1), show_default=True, help="Fresh scenes.")
@click.option("--seed", default=1, type=click.IntRange(0), show_default=True, help="Seed of the scenes.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--batch-size", default=50, type=click.IntRange(1), show_default=True, help="Questions at a time.")
@click.option("--json", "file", type=click.Path(path_type=Path, dir_okay=False), help="Also write the figures here.")
def command(
    *,
    model: str,
    decoders: tuple[str, ...],
    count: int,
    seed: int,
    device: str,
    batch_size: int,
    file: Path | None,
) -> None:
    """Measure the embedded model, or one like it, on scenes of the drawn world that it has not seen.

    Hallucination in captions, POPE, counting, position, small objects with and without an enlarged part, and where
    the model looks. Use another seed than 10000000 and 10000001, which the embedded models were trained on.
    """
    vlm = load(model, device=device)
    shown = draw(count, seed, vlm.device.type)
    found: dict[str, Any] = {}
    for decoder in decoders:
        found[decoder] = measure(answering(vlm, decoder, batch_size), shown)
        click.echo("\n".join([f"# {decoder}", *lines(found[decoder])]))
    plain = answering(vlm, "greedy", batch_size)
    few = min(count, 48)
    texts = plain([[picture] for picture in shown.pictures[:few]], [DESCRIBE[0]] * few)
    model_alone = {
        "pope without the picture": pope_figures(plain, shown, blind=True),
        "looking": looking(vlm, shown.pictures[:few], texts),
    }
    click.echo("\n".join(["# the model alone", *lines(model_alone)]))
    if file is not None:
        figures = {"model": model, "scenes": count, "seed": seed, "decoders": found, **model_alone}
        file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(command)
