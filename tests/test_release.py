"""What a release holds: the wheel what the commands need and no more, the source distribution what `make` needs."""

import ast
import email
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder

from vlmfix.settings import EMBEDDED

ROOT = Path(__file__).parent.parent
FOR_AUTHORS = {"vlmfix.extend", *(f"vlmfix.testing{part}" for part in ("", ".llava", ".qwen", ".text"))}
"""What is imported by methods of other people, and their tests."""
CALLED_FROM_PYTHON = {"vlmfix.decoders.attention.calibration", "vlmfix.decoders.picture.complexity"} | FOR_AUTHORS
"""Modules that no command leads to: `act` sends people to the first, the second is CARVE's analysis."""
LEFT_OUT = {path.relative_to(ROOT).as_posix() for path in (ROOT / "vlmfix").rglob("training.log")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel's content, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (packed,) = folder.glob("*.whl")
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def files(folder, base):
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(base).as_posix() for path in found}


def modules(wheel):
    """Names and trees of the wheel's modules."""
    paths = {".".join(path.relative_to(wheel).with_suffix("").parts): path for path in wheel.glob("vlmfix/**/*.py")}
    return {name.removesuffix(".__init__"): ast.parse(path.read_text()) for name, path in paths.items()}


def leads_to(tree):
    """What a module imports, anywhere in it, or names in full as one that is imported by its name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.partition(":")[0]  # a class of a table is named by its module and itself


def test_the_wheel_holds_the_package_whole_and_nothing_else(wheel):
    assert {path.name.partition("-")[0] for path in wheel.iterdir()} == {"vlmfix"}
    assert files(wheel / "vlmfix", wheel) == files(ROOT / "vlmfix", ROOT) - LEFT_OUT
    for name in EMBEDDED:
        weights = "parts" if name == "small" else "model"
        assert (wheel / f"vlmfix/world/assets/{name}/{weights}.safetensors").stat().st_size > 10_000_000


def test_the_commands_or_the_python_interface_lead_to_every_module_of_the_wheel(wheel):
    trees = modules(wheel)
    reached, ahead = set(), ["vlmfix", "vlmfix.__main__"]
    while ahead:
        name = ahead.pop()
        if name in trees and name not in reached:
            reached.add(name)
            ahead += [*leads_to(trees[name]), name.rpartition(".")[0]]
    assert set(trees) - reached == CALLED_FROM_PYTHON


def test_no_module_of_the_wheel_knows_the_tools(wheel):
    known = {name for tree in modules(wheel).values() for name in leads_to(tree)}
    assert "torch.nn" in known
    assert not {
        name for name in known if name.startswith("tools.")
    }  # `tools` alone is a field of the server's protocol


def test_the_demonstration_runs_from_the_wheel_alone(wheel, tmp_path):
    code = (
        "import pathlib, vlmfix.demo as d; print(d.__file__);"
        "d.demonstrate(pathlib.Path('demo'), decoder='vcd', seed=20260, count=1)"
    )
    path = os.pathsep.join(filter(None, (str(wheel), os.environ.get("PYTHONPATH"))))
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        check=True,
        capture_output=True,
        text=True,
    )
    assert Path(run.stdout.strip()) == wheel / "vlmfix" / "demo.py"
    assert "not in the picture" in (tmp_path / "demo" / "index.html").read_text(encoding="utf-8")


def test_the_source_distribution_holds_what_make_needs():
    held = {Path(file.distribution_path).as_posix() for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    for folder in ("vlmfix", "tests", "tools", "benchmarks", "docs", "examples", "requirements", ".ci"):
        assert files(ROOT / folder, ROOT) <= held
    alone = {"pyproject.toml", "Makefile", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"}
    assert alone | {".pre-commit-config.yaml", "mkdocs.yml"} <= held
    assert not [name for name in held if name.startswith((".venv", "build/", "dist/"))]


def test_the_long_description_has_no_links_that_lead_nowhere(wheel):
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    described = email.message_from_string(metadata.read_text(encoding="utf-8"))
    assert described["Description-Content-Type"] == "text/markdown"
    text = described.get_payload()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](docs/" in readme
    assert all(heading in text for heading in re.findall(r"^## .+$", readme, re.MULTILINE))
    assert "are in docs/recipes.md." in text
    assert "Start here (docs/start.md) · " in text
    targets = re.findall(r"\]\(([^)]*)\)|(?:src|href)=[\"']?([^\"' >]+)|^\[[^\]]+\]: *(\S+)", text, re.MULTILINE)
    assert targets
    assert all("".join(target).startswith("https://") for target in targets)


def test_no_upper_bound_holds_the_newest_versions_back():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any("<" in wanted for wanted in project["dependencies"])
    listed = subprocess.run(
        [sys.executable, "requirements/bounds.py", "newest"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "transformers>=" in listed.stdout
    assert "<" not in listed.stdout
