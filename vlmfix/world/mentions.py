"""Find the COCO categories that a text of the world's language mentions."""

from __future__ import annotations

import re

from vlmfix.world.categories import CATEGORIES

_FORMS = {form: category.name for category in CATEGORIES for form in (category.name, category.plural)}
# the longest form first, so that a hot dog is no dog and a teddy bear no bear
_PATTERN = re.compile(
    r"\b(" + "|".join(re.escape(form) for form in sorted(_FORMS, key=len, reverse=True)) + r")\b",
    re.IGNORECASE,
)


def mentions(text: str) -> list[str]:
    """List the categories that a text mentions.

    Args:
        text: Any text; every singular and plural form that the world's captions and answers use is known.
            Synonyms ("puppy", "man") are not.

    Returns:
        COCO names in the order of the text; an object mentioned twice is listed twice.
    """
    return [_FORMS[match.group(1).lower()] for match in _PATTERN.finditer(text)]
