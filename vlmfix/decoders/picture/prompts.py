"""What refining decoders ask a model when they look for where it looks."""

from __future__ import annotations

from vlmfix.errors import UsageError

GENERAL = "Write a general description of the image."
TERSE = "Answer the question using a single word or phrase."


def worded(prompt: str, terse: bool) -> str:
    """The prompt, with the request for a short answer behind it if that is wanted and not there."""
    return f"{prompt} {TERSE}" if terse and not prompt.rstrip().endswith(TERSE) else prompt


def check_wording(owner: str, text: str) -> None:
    """Refuses a text that a decoder's specification could not be read back from.

    Raises:
        UsageError: It is empty, or holds a comma, a line break or a plus before a letter.
    """
    if not text.strip() or text != text.strip() or any(sign in text for sign in ",+\n"):
        raise UsageError(
            f"{owner}: general_prompt={text!r} is not allowed", "give a text without commas, plus signs and line breaks"
        )
