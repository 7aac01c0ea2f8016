"""Prints the lower bounds of pyproject.toml as exact versions, one pip constraint per line."""

import re
import tomllib
from pathlib import Path

with (Path(__file__).parent.parent / "pyproject.toml").open("rb") as file:
    project = tomllib.load(file)["project"]
for requirement in project["dependencies"]:
    print(re.sub(r"^([\w-]+)>=([\w.]+).*", r"\1==\2", requirement))
