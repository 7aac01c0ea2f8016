"""What a shell completes: decoders, their parameters, models, profilers and benchmarks, without torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete

from vlmfix.cli import cli
from vlmfix.decoders import DECODERS


def completed(*words):
    *before, last = words
    return [item.value for item in ShellComplete(cli, {}, "vlmfix", "_VLMFIX_COMPLETE").get_completions(before, last)]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["dec"], ["decoders"]),
        (["run", "in", "--decoder", "v"], ["var", "vcd", "vicrop", "vhr", "vaf", "vista", "vti"]),
        (["run", "in", "--decoder", "beam+lo"], ["beam+locore"]),
        (["run", "in", "--decoder", "beam+vcd:con"], ["beam+vcd:contrast="]),
        (
            ["eval", "pope", "--decoder", "vcd:contrast=1,noise"],
            ["vcd:contrast=1,noise_step=", "vcd:contrast=1,noise_seed="],
        ),
        (["tune", "zero"], ["zerotuning"]),
        (["decoders", "vcd", "inte"], ["inter"]),
        (["doctor", "tiny-"], ["tiny-qwen"]),
        (["run", "in", "--model", "t"], ["tiny", "tiny-qwen"]),
        (["profile", "--profiler", "vhd,im"], ["vhd,image-mass"]),
        (["eval", "po"], ["pope"]),
        (["new", "decoder", "x", "--kind", "p"], ["picture"]),
        (["run", "in", "--decoder", "./mine"], ["./mine"]),  # told to be a file
    ],
)
def test_words_are_completed(words, found):
    assert completed(*words) == found
    assert completed("decoders", "") == [*DECODERS]


def test_a_shell_gets_them_without_torch():
    """As the line that docs/cli.md gives makes the shell ask."""
    code = "import sys, vlmfix.cli as c\ntry: c.main()\nfinally: print('torch' in sys.modules)"
    asked = {"_VLMFIX_COMPLETE": "bash_complete", "COMP_WORDS": "vlmfix run --decoder vc", "COMP_CWORD": "3"}
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = ['vlmfix']\n{code}"],
        env=os.environ | asked,
        capture_output=True,
        text=True,
    )
    assert run.stdout.split() == ["plain,vcd", "False"]
