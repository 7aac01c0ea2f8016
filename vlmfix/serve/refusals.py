"""Why a request has no answer, as the protocol says it: a status and an error body."""

from __future__ import annotations

from typing import Any

from vlmfix.errors import (
    ContextError,
    DataError,
    LayoutError,
    PassingError,
    SystematicError,
    UpstreamError,
    VlmfixError,
)
from vlmfix.parsing import escaped


class RefusedError(VlmfixError):
    """A request is not answered.

    Args:
        message: What is wrong.
        hint: What to do about it.
        status: HTTP status.
        param: The field of the request that is at fault.
        code: The protocol's word for it, which programs read.
    """

    def __init__(
        self, message: str, hint: str = "", *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, hint)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """Returns the error body."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        text = f"{self.message}; {self.hint}" if self.hint else self.message
        return {"error": {"message": text, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Returns what else is sent: after which time to ask again, where that helps."""
        return {"Retry-After": "1"} if self.status == 503 else {}


def refusal_of(error: Exception) -> RefusedError:
    """Makes a refusal of what answering a request alone ended with; nobody is shown a traceback."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, ContextError):
        return RefusedError(error.message, error.hint, param="messages", code="context_length_exceeded")
    if isinstance(error, PassingError):
        return RefusedError(error.message, "ask again later", status=503, code="overloaded")
    if isinstance(error, VlmfixError):
        status = 500 if isinstance(error, UpstreamError | SystematicError) else 400
        param = "messages" if isinstance(error, DataError | LayoutError) else None
        return RefusedError(error.message, error.hint, status=status, param=param)
    first = (str(error).strip().splitlines() or [""])[0]
    return RefusedError(
        f"the model could not answer this request: {type(error).__name__}: {escaped(first)[:200]}",
        "ask in another way, or with another picture",
        status=500,
    )
