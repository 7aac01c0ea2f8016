"""What an error must look like."""

from __future__ import annotations

import re

LONGEST = 4100
"""Characters of a message and its hint, which may list all decoders; neither holds a whole file."""
STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def one_line(error):
    """Makes sure that an error is one line that a terminal shows as it is.

    Raises:
        AssertionError: It is empty, too long, or holds what breaks a line or steers a terminal.
    """
    said = str(error)
    assert error.message.strip(), "no message"
    assert not STEERING.search(said), f"not one plain line: {said[:400]!r}"
    assert len(said) <= LONGEST, f"{len(said)} characters: {said[:200]!r}"


def names(error, *places):
    """Makes sure that an error says which file it is about.

    Args:
        error: The error.
        *places: Names of which one must stand there.

    Raises:
        AssertionError: None does.
    """
    assert any(str(place) in str(error) for place in places), f"no file is named: {error}"
