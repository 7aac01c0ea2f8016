"""Writes the first files of a decoder of one's own: one that works, and its test."""

from __future__ import annotations

import keyword
import os
from importlib.util import find_spec
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vlmfix.decoders.index import DECODERS
from vlmfix.errors import DataError, UsageError
from vlmfix.plugins import NAME

KINDS = ("logits", "attention", "picture")
"""What a decoder changes: the scores of tokens by a contrast branch, attention by an edit, or the picture."""


def write(name: str, kind: str, folder: Path) -> tuple[Path, Path, str]:
    """Writes a decoder and its test.

    Args:
        name: The decoder's name; the files and the class get theirs from it.
        kind: One of ``KINDS``.
        folder: Where.

    Returns:
        Both files, and the name of the class.

    Raises:
        UsageError: The name is not allowed, or is taken, or a file is there.
        DataError: A file cannot be written.
    """
    if not NAME.fullmatch(name) or keyword.iskeyword(name.lower()):
        raise UsageError(f"{name!r} can be no decoder's name", "use letters, digits, - and _, and begin with a letter")
    if name in DECODERS:
        raise UsageError(f"there is a decoder {name}", "choose another name; see: vlmfix decoders")
    module = name.replace("-", "_").lower()
    cls = "".join(part[:1].upper() + part[1:] for part in name.replace("_", "-").split("-"))
    files = folder / f"{module}.py", folder / f"test_{module}.py"
    for path in files:
        if os.path.exists(path) or os.path.islink(path):
            raise UsageError(f"{path} is there", "nothing is overwritten: choose another name, or move it away")
    found = find_spec(module)
    if found is not None and found.origin is not None:  # a folder of that name hides nothing
        raise UsageError(f"{module}.py would hide the module {module} from the test", "choose another name")
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    for path, template in zip(files, (f"{kind}.py.jinja", "test.py.jinja"), strict=True):
        text = templates.get_template(template).render(name=name, module=module, cls=cls, kind=kind)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}", "choose another folder, or make room") from error
    return *files, cls
