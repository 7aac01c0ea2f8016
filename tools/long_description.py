"""Makes the long description of a distribution from README.md, for the backend that builds it.

A package index shows it without the files beside it, so links to them lead nowhere there: they become words.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?!https?://|mailto:|#)(?P<path>[^)\s]+)\)")
"""A link, or a picture, that leads to a file of the repository."""


def without_links(text: str) -> str:
    """Returns a Markdown text with its links to files as words, and without its pictures that are such files."""
    return re.sub(r"\n{3,}", "\n\n", LINK.sub(_words, text))


def _words(link: re.Match[str]) -> str:
    if link["picture"]:
        return ""
    return link["text"] if link["text"] == link["path"] else f"{link['text']} ({link['path']})"


class Description(MetadataHookInterface):
    """Gives the metadata its long description."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Sets the field ``readme``."""
        text = without_links((Path(self.root) / "README.md").read_text(encoding="utf-8"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
