"""Makes Markdown of the house's docstrings, for the pages of the Python interface."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

LITERAL = re.compile(r"::$", re.MULTILINE)


class Literals(Extension):
    """Turns the double colon before an indented block into a single one: Markdown knows such blocks by their indent."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrites one docstring."""
        if obj.docstring:
            obj.docstring.value = LITERAL.sub(":", obj.docstring.value)
