"""Makes Markdown of the house's docstrings, for the pages of the Python interface."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

LITERAL = re.compile(r"::$", re.MULTILINE)
OF_CLASSES = re.compile(r"^Class attributes:$", re.MULTILINE)


class Literals(Extension):
    """Writes docstrings as Markdown and Google's sections have it.

    The double colon before an indented block becomes a single one, since Markdown knows such blocks by their indent;
    class attributes are listed as attributes are.
    """

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrites one docstring."""
        if obj.docstring:
            obj.docstring.value = OF_CLASSES.sub("Attributes:", LITERAL.sub(":", obj.docstring.value))
