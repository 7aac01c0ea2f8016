"""Prints requirement lists that follow from pyproject.toml; see the targets of the Makefile that call it.

python requirements/bounds.py floor     every lower bound as an exact version
python requirements/bounds.py newest    every requirement, the tools' and the build's too, without an upper bound
python requirements/bounds.py build     what builds the package, and what builds the sources among the locked ones
"""

import re
import sys
import tomllib
from pathlib import Path

SETUPTOOLS = ["setuptools"]  # docopt, which num2words asks for, is published as source only
EDITABLES = ["editables~=0.3"]  # hatchling asks for it when it installs the checkout itself


def extra(project: dict, name: str) -> list[str]:
    """Returns the requirements of an extra, with those of the extras that it names."""
    lines = []
    for line in project["optional-dependencies"][name]:
        others = re.fullmatch(r"vlmfix\[(.*)\]", line)
        lines += [one for other in others[1].split(",") for one in extra(project, other)] if others else [line]
    return lines


def main(which: str) -> None:
    """Prints one list, a requirement a line."""
    with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as file:
        content = tomllib.load(file)
    project, build = content["project"], [*content["build-system"]["requires"], *EDITABLES, *SETUPTOOLS]
    if which == "floor":
        wanted = [*project["dependencies"], *extra(project, "all"), *extra(project, "small")]
        lines = [re.sub(r"^([\w-]+)(?:\[[\w,]+\])?>=([\w.]+).*", r"\1==\2", line) for line in wanted]
    elif which == "newest":
        wanted = [*project["dependencies"], *extra(project, "dev"), *build]
        lines = [re.sub(r",<[\w.]+", "", line) for line in wanted]
    elif which == "build":
        lines = build
    else:
        sys.exit(f"no such list: {which}")
    print("\n".join(dict.fromkeys(lines)))  # an extra may stand in several


if __name__ == "__main__":
    main(sys.argv[1])
