"""Words the questions by which refining decoders probe where a model looks."""

from __future__ import annotations

from vlmfix.errors import UsageError

GENERAL = "Write a general description of the image."
TERSE = "Answer the question using a single word or phrase."


def worded(prompt: str, terse: bool) -> str:
    """Appends the request for a short answer to a prompt, if it is wanted and not there."""
    return f"{prompt} {TERSE}" if terse and not prompt.rstrip().endswith(TERSE) else prompt


def check_wording(owner: str, text: str) -> None:
    """Refuses a text that would make a decoder's specification unreadable.

    Raises:
        UsageError: It is empty, or holds a comma, a line break or a plus before a letter.
    """
    if not text.strip() or text != text.strip() or any(sign in text for sign in ",+\n"):
        raise UsageError(
            f"{owner}: general_prompt={text!r} is not allowed", "give a text without commas, plus signs and line breaks"
        )
