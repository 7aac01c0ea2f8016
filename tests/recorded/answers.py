"""Answers of the embedded models, token for token: what the decoding of every method must go on saying.

``python -m tests.recorded.answers`` adds to ``answers.json`` the methods that it lacks, and with names writes those
anew. That is right only when a method or a model was changed on purpose; a change of how decoding is done changes no
token.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from tests.embedded import TINY
from vlmfix.decoders import DECODERS
from vlmfix.generation import VLM, load
from vlmfix.jobs.folder import DESCRIBE
from vlmfix.world.render import render
from vlmfix.world.scenes import scene

FILE = Path(__file__).with_name("answers.json")

QUESTIONS = ((0, DESCRIBE), (1, "Is there a dog in the image? Please answer yes or no."), (1, DESCRIBE))
"""Scene and question of each row: one picture twice, and questions of different lengths, one of which ends early."""
TOKENS = 10
SEED = 987

_VAR = "var:sink_dims=1/2/3/4,sink_threshold=0.8,min_visual_mass=0,min_nonsink_ratio=0,layers=2:,moved_fraction=1"

MORE: dict[str, str] = {
    "var": _VAR,
    "locore-score": "locore:strength=4,mode=score",
    "locore-post": "locore:strength=4,mode=post",
    "vcd-strong": "vcd:contrast=1.5,plausibility=0",
    "inter-always": "inter:variance=0,plausibility=0",
    "vhr-all": "vhr:alpha=4,layers=all",
    "gift-strong": "gift:saliency_layers=0,layers=1:,alpha=6",
    "zerotuning-strong": "zerotuning:gain=20,heads=0/3/4/7",
    "zerotuning-text": "zerotuning:gain=20,heads=0/3/4/7,rows=text",
    "act": "act:heads=all,layers=all,sink_factor=1,kept_fraction=0",
    "act-text": "act:heads=all,layers=all,sink_factor=1,kept_fraction=0,rows=text",
    "spin-scores": "spin:preset=official-code,kept_share=0.5,suppression=0.2",
    "adhh": "adhh:heads=L0H0/L0H3/L0H5/L1H1/L1H6/L2H2/L2H7,threshold=0.2",
    "ph3": "ph3:heads=L0H2/L1H0/L1H6/L2H5",
    "amplify-blend": "amplify:heads=L0H2/L1H0/L1H6/L2H5,by=3,identity=0.6",
    "vti-strong": "vti:text=3,image=3",
    "nullu-strong": "nullu:rank=8,layers=all",
    "pti-strong": "pti:keys=1,values=3",
    "imbalance": "imbalance:significance=received,alpha=1,beta=0.8,local_share=0.5,layers=all",
    "sgrs-greedy": "sgrs:draw=greedy,scope=generated",
    "carve-chain": "carve+vcd",
    "sampled-chain": "sample:temperature=0.7,top_p=0.9+vcd",
    "beam-chain": "beam:num_beams=3+vcd+spin",
    "gate-chain": "sgrs+locore+vcd",
    "gate-inter": "inter+sgrs:draw=greedy",
    "gate-drawn": "sgrs:preset=official-code",
    "chain": f"{_VAR}+gift:saliency_layers=0,layers=1:,alpha=6+locore:strength=2+vcd:plausibility=0+inter",
}
"""Methods beside the defaults: strong parameters, every mode of a method, and chains of different kinds."""


def methods() -> dict[str, str]:
    """Specifications by name, the same for both models; a name of ``MORE`` stands for the default of that name too."""
    return {name: name for name in DECODERS} | MORE


@cache
def pictures() -> list[Image.Image]:
    """The picture of each row."""
    pixels = render([scene(SEED, number) for number, _ in QUESTIONS])
    return [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pixels]


def answered(vlm: VLM, spec: str) -> list[list[int]]:
    """The generated tokens of each row."""
    answers = vlm.generate(pictures(), [text for _, text in QUESTIONS], decoder=spec, max_new_tokens=TOKENS, seed=3)
    return [list(answer.ids) for answer in answers]


def record(names: Collection[str], known: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    """Model, name and tokens of every case: as they are known, but for the given names and for new ones."""
    for model in TINY:
        vlm = load(model, device="cpu", dtype="float32")
        for name, spec in methods().items():
            if name in names or name not in known.get(model, {}):
                print(model, name)
                yield model, name, answered(vlm, spec)
            else:
                yield model, name, known[model][name]


def recorded() -> dict[str, dict[str, Any]]:
    """What the file holds, by model and name."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text())
    return found


if __name__ == "__main__":
    found: dict[str, dict[str, list[list[int]]]] = {}
    for model, name, rows in record(sys.argv[1:], recorded()):
        found.setdefault(model, {})[name] = rows
    lines = [
        f'  "{model}": {{\n' + ",\n".join(f'    "{name}": {json.dumps(rows)}' for name, rows in of.items()) + "\n  }"
        for model, of in found.items()
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
