"""Folders that vlmfix 0.1.0 began are gone on with, and come out as it would have left them, field by field.

``begun`` has both folders as that version left them when it was interrupted, each file of answers with a torn line, and
as it finished them: answers, failures and cards, to which the run's has the fields that later versions add (``cut``,
``notes``). Its pictures' folder is called ``/pictures``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.evals.fake import Says, workload
from tests.jobs.fake import FakeVLM, colour
from vlmfix.decoders import parse
from vlmfix.jobs.benchmark.job import evaluate
from vlmfix.jobs.folder import Questions, run
from vlmfix.settings import Settings

BEGUN = Path(__file__).with_name("begun")
OF_THE_START = {"started", "updated", "peak_memory", "versions", "device"}
"""What a card says of the machine and the clock."""
SINCE = {"progress"}
"""What that version did not say."""


def odd(batch):
    return ValueError("odd") if any(shown == colour(1) for shown, _ in batch) else None


@pytest.fixture
def pictures(tmp_path):
    return shutil.copytree(BEGUN / "pictures", tmp_path / "pictures")


def left(name, pictures):
    """The folder as it was left, about the pictures where they are now."""
    out = shutil.copytree(BEGUN / name, pictures.with_name("out"))
    for card in out.glob("*.json"):
        card.write_text(card.read_text().replace("/pictures", str(pictures.resolve())))
    return out


def lasting(value):
    """A card's fields, in order, without what depends on the start."""
    if isinstance(value, list):
        return [lasting(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    timing = {"seconds"} if list(value) == ["tokens", "seconds"] else set()  # of an arm; elsewhere it is the answers'
    return [
        (name, None if name in OF_THE_START | timing else lasting(inner))
        for name, inner in value.items()
        if name not in SINCE
    ]


def same_card(out, finished, name, pictures):
    then = (BEGUN / finished / name).read_text().replace("/pictures", str(pictures.resolve()))
    return lasting(json.loads((out / name).read_text())) == lasting(json.loads(then))


def same_lines(out, finished):
    names = [path.relative_to(BEGUN / finished) for path in (BEGUN / finished).rglob("*.jsonl")]
    assert len(names) == 2
    return all(lines(out / name) == lines(BEGUN / finished / name) for name in names)


def lines(path):
    """The lines without what later versions add."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("logprob", "entropy")} for line in found]


def test_a_run_over_pictures(pictures):
    out = left("run-begun", pictures)
    questions = Questions(everywhere=("A?", "B?"), about={"prompt": None, "prompts": "sha256:ab"})
    end = run(pictures, out, questions=questions, settings=Settings(), batch_size=3, loader=FakeVLM(fails=odd).load)
    assert (end.before, end.done, end.total) == (4, 10, 10)
    assert same_lines(out, "run-finished")
    assert same_card(out, "run-finished", "run.json", pictures)


def test_an_evaluation(pictures, monkeypatch):
    work, out = workload(pictures, 4), left("eval-begun", pictures)
    (pictures / "0002.png").write_bytes(b"broken")
    samples = (out / "samples.jsonl").read_bytes()
    vlm = FakeVLM(fails=odd)
    found = evaluate(
        out, Says(), work, Settings(), {"vcd": parse("vcd")}, batch_size=4, command="another", loader=vlm.load
    )
    assert (found.asked_now, found.answered_now) == (12, 4)
    assert same_lines(out, "eval-finished")
    assert (out / "samples.jsonl").read_bytes() == samples
    assert same_card(out, "eval-finished", "card.json", pictures)
