"""The training command: quick help, one line for a mistake, and a whole run at toy size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tools.training.__main__ import command
from tools.training.architecture import resized
from tools.training.checkpoint import ARCHITECTURES
from tools.training.muon import Muon, orthogonal
from tools.training.painting import paint
from vlmfix.errors import UsageError
from vlmfix.world.render import render
from vlmfix.world.scenes import scene


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.training", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_loads_without_torch() -> None:
    code = "import sys, tools.training.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Missing option '--out'"),
        (("--out", "x", "--steps", "0"), "0 is not in the range x>=1"),
        (("--out", "x", "--hallucination", "2"), "2.0 is not in the range 0<=x<=1"),
        (("--out", "x", "--device", "tpu"), "'tpu' is not one of 'cuda', 'cpu'"),
        (("--out", "x", "--speed", "9"), "No such option"),
        (("--out", "x", "--architecture", "bert"), "'bert' is not one of 'llava', 'qwen2_5_vl'"),
    ],
)
def test_a_mistake_gets_one_line(arguments: tuple[str, ...], words: str) -> None:
    done = train(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_toy_run_writes_a_model_and_can_go_on_from_it(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    shared = ("--architecture", name, "--device", "cpu", "--small", "--scenes", "8", "--workers", "0")
    first, second = tmp_path / "first", tmp_path / "second"
    command(["--out", str(first), "--language-steps", "2", "--steps", "3", *shared], standalone_mode=False)
    log = (first / "training.log").read_text(encoding="utf-8")
    assert log.startswith("python -m tools.training ")
    assert "language     2/2" in log
    assert "pictures     3/3" in log
    more = ["--start", str(first), "--language-steps", "0", "--steps", "1"]
    command(["--out", str(second), *more, *shared], standalone_mode=False)
    for file in ("tokenizer.json", "config.json"):
        assert (first / file).read_text(encoding="utf-8") == (second / file).read_text(encoding="utf-8")
    before, after = (AutoModelForImageTextToText.from_pretrained(path).state_dict() for path in (first, second))
    assert any(not torch.equal(before[weight], after[weight]) for weight in before)


def test_going_on_from_another_architecture_is_refused(tmp_path: Path) -> None:
    start = ["--start", "vlmfix/world/assets/tiny", "--architecture", "qwen2_5_vl", "--out", str(tmp_path)]
    with pytest.raises(UsageError, match="is a llava, not a qwen2_5_vl"):
        command([*start, "--device", "cpu"], standalone_mode=False)


def test_every_architecture_can_be_chosen() -> None:
    choice = next(option for option in command.params if option.name == "architecture").type
    assert tuple(choice.choices) == tuple(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_pool_holds_what_the_processor_would_make(name: str) -> None:
    from transformers import CLIPImageProcessor

    side = ARCHITECTURES[name].side
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    pool = paint(5, 0, 2, side, "cpu")
    canvas = render([scene(5, 0), scene(5, 1)])
    made = processor(list(canvas), do_normalize=False, do_rescale=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(pool[:, 0], resized(canvas, side, side))
    assert (pool[:, 0].float() - made.float()).abs().mean() < 0.5


def test_orthogonal_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 40, 90), (3, 90, 40), (2, 32, 32)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)).float())
        assert values.max() < 1.3
    assert torch.linalg.svdvals(orthogonal(torch.randn(3, 40, 90)).float()).min() > 0.5


def test_muon_goes_downhill_and_leaves_what_has_no_gradient() -> None:
    torch.manual_seed(0)
    used, idle = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(8, 16))
    target, kept = torch.randn(8, 16), idle.detach().clone()
    optimizer = Muon([used, idle], lr=0.2)
    losses = []
    for _ in range(60):
        loss = (used - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    assert torch.equal(idle.detach(), kept)
