"""The package as it is installed and imported: quick, typed, and the same in every file that names it."""

import ast
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vlmfix

ROOT = Path(__file__).parent.parent


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def cost(*arguments):
    """Seconds that the processor works on a call of Python."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    python(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_import_is_light():
    code = "import vlmfix, sys; print({'torch', 'transformers', 'PIL', 'numpy', 'click'} & set(sys.modules))"
    assert python("-c", code) == "set()\n"


def test_help_is_light_and_quick():
    run = "import sys, vlmfix.cli as c; sys.argv = ['vlmfix', '--help']"
    code = f"{run}\ntry: c.main()\nfinally: print(*sys.modules)"
    loaded = set(python("-c", code).split())
    assert not {"torch", "transformers", "PIL", "numpy", "rich"} & loaded
    # Processor time, in turns with what no command line can do without: a busy machine slows both, and waits count in
    # neither. It is 2 to 2.5 times as much; numpy alone would make it 5.
    pairs = [(cost("-m", "vlmfix", "--help"), cost("-c", "import click")) for _ in range(5)]
    ours, least = (min(costs) for costs in zip(*pairs, strict=True))
    assert ours < 4 * least


def test_public_names_are_there_and_typed():
    for name in vlmfix.__all__:
        assert getattr(vlmfix, name) is not None
        assert name in dir(vlmfix)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = vlmfix.nonsense
    stub = ast.parse((ROOT / "vlmfix" / "__init__.pyi").read_text())
    typed = {
        alias.asname: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed == vlmfix._HOME
    (listed,) = (node for node in stub.body if isinstance(node, ast.Assign))
    assert ast.literal_eval(listed.value) == vlmfix.__all__ == [*vlmfix.__all__]
    assert set(typed) | {"__version__"} == set(vlmfix.__all__)


def test_one_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {vlmfix.__version__}\n" in citation
    assert "Unreleased" in (ROOT / "CHANGELOG.md").read_text()


def test_floor_names_every_dependency():
    floor = python("requirements/bounds.py", "floor").split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ("eval", "parquet", "ray", "serve", "small", "tune")
    lists = [project["dependencies"], *(project["optional-dependencies"][name] for name in extras)]
    wanted = {re.split(r"\[|>=", line)[0] for lines in lists for line in lines if not line.startswith("vlmfix[")}
    assert sorted(line.partition("==")[0] for line in floor) == sorted(wanted)
    assert all("==" in line and ">" not in line for line in floor)
