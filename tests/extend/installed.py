"""Distributions that are installed as far as metadata go: a folder on the path, with modules and a dist-info."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def install(monkeypatch, folder, name="outside", version="1.2", modules=None, **groups):
    """Puts a distribution on the path.

    Args:
        monkeypatch: Takes it off again.
        folder: Where it lies; made.
        name: Its name.
        version: Its version.
        modules: Texts of modules, by name.
        groups: Entry points, "name = module:Class" in lines, by group without ``vlmfix.``.
    """
    folder.mkdir(parents=True)
    for module, text in (modules or {}).items():
        (folder / f"{module}.py").write_text(text)
        monkeypatch.delitem(sys.modules, module, raising=False)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    text = "\n".join(f"[vlmfix.{group}]\n{lines}\n" for group, lines in groups.items())
    (info / "entry_points.txt").write_text(text)
    monkeypatch.syspath_prepend(str(folder))


def install_examples(monkeypatch, folder):
    """Puts the examples on the path, as their pyproject.toml says."""
    project = tomllib.loads((EXAMPLES / "pyproject.toml").read_text())["project"]
    groups = {
        group.removeprefix("vlmfix."): "\n".join(f"{name} = {home}" for name, home in entries.items())
        for group, entries in project["entry-points"].items()
    }
    install(monkeypatch, folder, project["name"], project["version"], **groups)
    monkeypatch.syspath_prepend(str(EXAMPLES))
