"""Which versions of transformers and torch vlmfix was tested with, and what is said where they do not fit."""

from __future__ import annotations

import functools
import logging
from importlib.metadata import version

from vlmfix.errors import UpstreamError

logger = logging.getLogger(__name__)

TESTED = {"transformers": ("5.19", "5.20", "5.21", "5.22", "5.23", "5.24"), "torch": ("2.12", "2.13", "2.14")}
"""Minor versions that vlmfix was tested with, ascending; ``CONTRIBUTING.md`` says how one is taken in."""


def installed(package: str) -> str:
    """The installed version of a package, such as ``5.24.0``."""
    return version(package)


def untested() -> list[str]:
    """The packages of ``TESTED`` whose installed minor version is not among those tested, as ``name version``."""
    found = {package: installed(package) for package in TESTED}
    return [f"{name} {number}" for name, number in found.items() if minor(number) not in TESTED[name]]


def minor(number: str) -> str:
    """The first two numbers of a version: ``5.24`` for ``5.24.0``."""
    return ".".join(number.split(".")[:2])


def remedy() -> str:
    """The command that repairs the installation, in one sentence.

    Returns:
        ``install a tested version: pip install 'transformers>=5.19,<5.25'``, for instance. Where all versions are
        tested ones, the installed files are not those that were tested, and are to be installed again.
    """
    names = [entry.split()[0] for entry in untested()]
    if names:
        return f"install a tested version: pip install {' '.join(map(_range, names))}"
    number = installed("transformers")
    return (
        f"transformers {number} was tested, so this copy of it was changed: "
        f"pip install --force-reinstall --no-deps transformers=={number}"
    )


def missing(what: str) -> UpstreamError:
    """The error for something that the installed transformers does not have.

    Args:
        what: What is missing, a sentence's end: ``LlamaModel.forward takes no cache under a known name``.
    """
    return UpstreamError(f"transformers {installed('transformers')}: {what}", remedy())


@functools.cache
def say_once(message: str) -> None:
    """Logs a warning the first time that it is called with a message."""
    logger.warning("vlmfix: %s", message)


def _range(package: str) -> str:
    first, last = TESTED[package][0], TESTED[package][-1]
    major, minor = last.split(".")
    return f"'{package}>={first},<{major}.{int(minor) + 1}'"
