"""The commands that are killed, each with what it needs, and the models that answer them at once."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass

from tests.jobs.fake import FakeVLM, colour, draw

PICTURES = 5
OBJECTS = (("dog", "yes"), ("cat", "no"))


@dataclass(frozen=True)
class Command:
    """A command line that is started again and again.

    Attributes:
        name: For messages.
        arguments: What stands behind ``vlmfix``; ``{base}`` is a folder of inputs, ``{out}`` the folder to write.
        begun: A file of the folder that says whose it is; empty where the folder belongs to nobody.
        before: Command lines that have come to their end in the folder.
        places: Steps at which the suite strikes; `make fuzz` does at all.
    """

    name: str
    arguments: str
    begun: str = ""
    before: tuple[str, ...] = ()
    places: int = 2


RUN = "run {base}/in --out {out} --prompts {base}/asked.csv --batch-size 3"
MAPS = "run {base}/in --out {out}/out --save-maps {out}/maps --batch-size 3 --decoder vicrop"
EVAL = "eval pope --questions {base}/pope --images {base}/in --out {out} --decoder vcd --batch-size 3"
TUNE = (
    "tune vcd:noise_step=500,plausibility=0.1 --task pope --questions {base}/pope --images {base}/in --out {out} "
    "--budget 2 --batch-size 4"
)
PROFILE = "profile --images {base}/drawn --out {out}/heads --plot {out}/heads.png --profiler image-mass"
COMMANDS = {
    command.name: command
    for command in (
        Command("run", RUN, "run.json", places=5),
        Command("run --retry-failed", f"{RUN} --retry-failed", "run.json", (RUN,)),
        Command("run --save-maps", MAPS, "out/run.json", places=4),
        Command("run --shard", f"{RUN} --shard 1/2", "shards/1-of-2/run.json", (f"{RUN} --shard 0/2",), places=1),
        Command("merge", "merge {out}", "run.json", (f"{RUN} --shard 0/2", f"{RUN} --shard 1/2"), places=3),
        Command("eval", EVAL, "card.json"),
        Command("eval --retry-failed", f"{EVAL} --retry-failed", "card.json", (EVAL,), places=1),
        Command("tune", TUNE, "tune.json"),
        Command("profile", PROFILE),
        Command("profile --add", f"{PROFILE} --profiler vhd --add", "", (PROFILE,), places=1),
        Command("world make", "world make {out} --count 2", "world.json", places=3),
    )
}


def inputs(base):
    """Writes what the commands read: pictures, one of them broken and one that the model refuses, and questions."""
    draw(base / "in", PICTURES)
    draw(base / "drawn", 2)
    (base / "in" / "0002x.png").write_bytes(b"broken")
    with (base / "asked.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt"], ["Is it, so to say, red?"], ["What?"]])
    (base / "pope").mkdir()
    asked = [
        {"question_id": 2 * n + k, "image": f"{n:04d}.png", "text": f"Is there a {name} in the image?", "label": label}
        for n in range(PICTURES)
        for k, (name, label) in enumerate(OBJECTS)
    ]
    (base / "pope" / "random.json").write_text("".join(f"{json.dumps(question)}\n" for question in asked))


def ready():
    """Imports everything, loads the models, and gives the command line as a function of its arguments."""
    from dataclasses import replace

    import numpy as np

    from vlmfix import cli, display, load
    from vlmfix.decoders import VCD
    from vlmfix.decoders.picture.refined import Look, PictureMap, Refined

    class Quick(FakeVLM):
        """Fails with one picture; says yes to all when plain, and tells right from wrong with enough contrast."""

        def generate(self, pictures, prompts, **options):
            decoder = options["decoder"]
            strong = isinstance(decoder, VCD) and decoder.contrast > 0.3
            return [
                replace(
                    answer,
                    text="No, there is none." if strong and "cat" in prompt else "Yes, there is one.",
                    refined=refined(shown) if decoder.refines else None,
                )
                for answer, shown, prompt in zip(
                    super().generate(pictures, prompts, **options), pictures, prompts, strict=True
                )
            ]

    def refined(shown):
        look = Look(picture=shown.crop((0, 0, 3, 2)), box=(0.25, 0.5, 0.75, 1.0), map=PictureMap(np.eye(4)))
        return Refined((shown, look.picture), (look,))

    odd = colour(2)
    quick = Quick(fails=lambda batch: ValueError("odd") if any(shown == odd for shown, _ in batch) else None)
    tiny = load("tiny", device="cpu")

    def call(arguments):
        display.loading = lambda *model, **how: tiny if arguments[0] == "profile" else quick
        sys.argv = ["vlmfix", *arguments]
        return cli._run(arguments)

    return call
