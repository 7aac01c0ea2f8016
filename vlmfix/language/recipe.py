"""Recipes: a tuned decoder in a file, with what it was tuned for and what that gave; some come with the package."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmfix.errors import DataError, UsageError
from vlmfix.extras import need
from vlmfix.files import path_of, replacing
from vlmfix.parsing import UnreadableError, told, toml_of
from vlmfix.plugins import near

FORMAT = 1
"""Of the file; raised when an older reader could not understand it."""
HINT = 'give a recipe that vlmfix tune wrote, or a TOML file with a line such as decoder = "vcd:contrast=0.5"'

SHIPPED = {file.stem: file for file in sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))}
"""Name behind ``@`` -> file, of the recipes that come with the package."""
BARE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def recipe_file(name: str) -> Path:
    """Returns the file of a recipe.

    Args:
        name: What stands behind ``@``: a path, or the name of a recipe that comes with the package, unless a file is
            called so.

    Raises:
        UsageError: No recipe and no file has the name.
    """
    path = path_of(name)
    if not BARE.fullmatch(name) or os.path.exists(path):
        return path
    if name not in SHIPPED:
        known = f"recipes of vlmfix: {', '.join(f'@{one}' for one in SHIPPED)}; else give a file, @recipe.toml"
        raise UsageError(f"there is no recipe {name!r}", f"{near(name, SHIPPED)}{known}")
    return SHIPPED[name]


def read_recipe(path: Path) -> dict[str, Any]:
    """Reads a recipe.

    Args:
        path: A TOML file; only its ``decoder`` must be there.

    Returns:
        Everything in it. ``decoder`` is a specification; whether it is a valid one is for its parser to say.

    Raises:
        DataError: The file is missing, is not TOML, is of a later format or has no decoder.
    """
    try:
        recipe = toml_of(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read the recipe {path}: {error.strerror}", "check the path after @") from error
    except UnreadableError as error:
        raise DataError(f"the recipe {path} {error.problem}", HINT) from error
    if recipe.get("format", FORMAT) != FORMAT:
        raise DataError(f"the recipe {path} has format {told(recipe['format'])}", f"this version reads format {FORMAT}")
    if not isinstance(recipe.get("decoder"), str):
        raise DataError(f"the recipe {path} has no decoder", HINT)
    return recipe


def write_recipe(path: Path, decoder: str, about: Mapping[str, Any]) -> None:
    """Writes a recipe so that a reader sees the old one or the new one, never a part.

    Args:
        path: The file, with a name that ends in ``.toml``.
        decoder: The specification with all its parameters.
        about: What else is known of it, in nested mappings; a value of None is left out, because TOML has none.

    Raises:
        DataError: The file cannot be written.
    """
    need("tune")
    import tomli_w

    recipe = {"format": FORMAT, "decoder": decoder, **_without_none(about)}
    text = f"# Use it with --decoder @{path.name}\n{tomli_w.dumps(recipe)}"
    with replacing(path) as file:
        file.write(text.encode())


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_none(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if value is not None
    }
