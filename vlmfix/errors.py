"""Everything that vlmfix raises on purpose: one root, and a hint that says what to do."""

from __future__ import annotations

import errno

from vlmfix.parsing import escaped

LONGEST = 2000
"""Characters of a message; of a longer one the middle is left out."""
PASSING = {
    getattr(errno, name)
    for name in (
        "EMFILE ENFILE ENOMEM EAGAIN EINTR EBUSY ENOBUFS ENOLCK ENOSPC EDQUOT EIO ESTALE EREMOTEIO ENODEV ENXIO "
        "ENOTCONN ENOLINK EKEYEXPIRED ENETDOWN ENETUNREACH ENETRESET ENONET EHOSTDOWN EHOSTUNREACH ECONNREFUSED "
        "ECONNRESET ECONNABORTED ESHUTDOWN ETIMEDOUT ECOMM EPROTO"
    ).split()
    if hasattr(errno, name)  # not every system knows all of them
}
"""What goes wrong with a machine, a disk or a network, whatever file is opened."""


def one_line(text: str) -> str:
    """A message on one line of bounded length, whatever names and values from elsewhere it holds."""
    line, half = escaped(text), LONGEST // 2
    return line if len(line) <= LONGEST else f"{line[:half]} ... {line[-half:]}"


class VlmfixError(Exception):
    """A problem that the caller can repair.

    Both texts become one line each (``one_line``), since the values in them may come from anywhere.

    Args:
        message: What is wrong, with the offending value and what is allowed.
        hint: What to do about it, one sentence; printed under the message.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        self.message, self.hint = one_line(message), one_line(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[type[VlmfixError], tuple[str, str]]:  # else a copy, or another process, has no hint
        return type(self), (self.message, self.hint)


class UsageError(VlmfixError):
    """A parameter, option or specification that is not allowed; exit code 2 on the command line."""


class UnsupportedModelError(VlmfixError):
    """The model's family is not known, or lacks what was asked of it."""


class UnsupportedAttentionError(VlmfixError):
    """The model computes attention by other mathematics than the edits assume."""


class LayoutError(VlmfixError):
    """Image tokens and picture geometry do not agree, or a token has no place in a picture."""


class IncompatibleDecodersError(VlmfixError):
    """Two decoders cannot act on the same run, or a decoder cannot act on this kind of run."""


class DataError(VlmfixError):
    """A file, picture or record is not what it should be."""


class ContextError(DataError):
    """A prompt leaves no room for an answer in the model's context."""


class WindowError(UnsupportedAttentionError, DataError):
    """A question and its answer are too long for a sliding window of a layer whose every key an edit must see."""


class ProfileMismatchError(VlmfixError):
    """A head profile was measured on another model, or two profiles are of different models."""


class PluginError(VlmfixError):
    """A plug-in of another distribution, or a class in a file, cannot be used, or is another than before."""


class MissingExtraError(VlmfixError):
    """Packages are not installed that only some work needs; the message names the extra of vlmfix that has them."""


class UpstreamError(VlmfixError):
    """The installed transformers or torch lacks something that vlmfix builds on; the hint says which version has it."""


class SystematicError(VlmfixError):
    """One question after the other failed with an error that is not ours, so it is no fault of the questions."""


class PassingError(VlmfixError):
    """Trouble of the machine, such as too little memory or a network folder that is away: it may be gone next time."""


class DiedError(PassingError):
    """A process that answered questions for this one has died, perhaps on one of them."""


def passing(error: BaseException | None) -> PassingError | None:
    """Tells trouble that passes from faults of a file or a question, by an error or by what it comes from.

    Returns:
        The trouble in words; None when the error is something else.
    """
    while error is not None:
        if isinstance(error, PassingError):
            return error
        if isinstance(error, MemoryError):
            return PassingError("out of memory", "free some memory and start again")
        if isinstance(error, OSError) and error.errno in PASSING:
            return PassingError(f"{error.strerror}", "start again when that is over")
        error = error.__cause__
    return None
