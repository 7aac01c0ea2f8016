"""Writes the gallery: the demonstration's scenes beside what several decoders say of them.

python -m tools.site.gallery
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

from vlmfix.demo import PLAIN, Comparison, Count, Described, demonstrate

PAGE = Path(__file__).parents[2] / "docs" / "gallery.md"
PICTURES = PAGE.with_name("gallery")
DECODERS = ("@keep-recall", "@fewest-inventions", "vcd")
SEED = 20260
"""The demonstration's own."""
SIDE = 320
"""Pixels of a picture's side."""
INTRO = f"""\
# Gallery

The twelve scenes of `vlmfix demo`, all of them and none chosen, with what the small model that comes with the package
says: plain, and under three decoders with their defaults. **What is in the picture is bold**, <s>what is not is
struck</s>; what a scene shows and an answer leaves out stands behind it. The model has never seen these scenes. Twelve
scenes prove nothing: [recipes](recipes.md) has figures with intervals.

Made by `python -m tools.site.gallery`, on a CPU in float32; `vlmfix demo --decoder {DECODERS[0]}` shows a part of it on
your machine.
"""


def said(answer: Described, present: tuple[str, ...]) -> str:
    """Writes an answer with its objects marked, and what it leaves out."""
    marks = {"present": "**{}**", "absent": "<s>{}</s>"}
    text = "".join(marks.get(kind, "{}").format(words) for words, kind in answer.pieces)
    missing = [name for name in present if name not in answer.named]
    return text.strip() + (f" *Left out: {', '.join(missing)}.*" if missing else "")


def summary(counts: dict[str, Count]) -> str:
    """Writes a table of what each decoder named over all scenes."""
    rows = [
        f"| `{spec}` | {count.hallucinated} of {count.mentioned} | {count.found} of {count.present} |"
        for spec, count in counts.items()
    ]
    return "\n".join(["| decoder | named and absent | there and named |", "| --- | --- | --- |", *rows])


def written(comparisons: dict[str, Comparison]) -> str:
    """Writes the page.

    Args:
        comparisons: What the demonstration made, by decoder.
    """
    first = next(iter(comparisons.values()))
    counts = {PLAIN: first.counts[PLAIN], **{spec: one.counts[spec] for spec, one in comparisons.items()}}
    parts = [INTRO.rstrip(), summary(counts)]
    for number, scene in enumerate(first.scenes):
        answers = {
            PLAIN: scene.answers[PLAIN],
            **{spec: one.scenes[number].answers[spec] for spec, one in comparisons.items()},
        }
        rows = [f"| `{spec}` | {said(answer, scene.present)} |" for spec, answer in answers.items()]
        there = ", ".join(scene.present)
        parts += [
            f"## Scene {number + 1}",
            f"![A drawn scene with {there}](gallery/{number:02d}.webp)",
            "\n".join(["| decoder | answer |", "| --- | --- |", *rows]),
        ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Runs the demonstration for each decoder, and writes page and pictures."""
    with tempfile.TemporaryDirectory() as folder:
        made = {spec: demonstrate(Path(folder), decoder=spec, seed=SEED) for spec in DECODERS}
        PICTURES.mkdir(exist_ok=True)
        for number, scene in enumerate(next(iter(made.values())).scenes):
            with Image.open(scene.image) as picture:
                picture.resize((SIDE, SIDE)).save(PICTURES / f"{number:02d}.webp", quality=80)
    PAGE.write_text(written(made), encoding="utf-8")


if __name__ == "__main__":
    main()
