"""Reads what URLs stand for: files of this machine, data in the URL itself, and the web, in bounded time and size."""

from __future__ import annotations

import base64
import binascii
import re
import time
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from ssl import SSLCertVerificationError
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

import vlmfix
from vlmfix.errors import DataError, PassingError
from vlmfix.parsing import told

SILENCE = 10.0
"""Seconds after which a server that says nothing is given up."""
LONGEST = 60.0
"""Seconds that a picture may take to come."""
LARGEST = 64 << 20
"""Bytes that it may have."""
PIECE = 1 << 16
AGAIN = {408, 425, 429}
"""HTTP's codes below 500 that ask to come back later."""
HINT = "see whether the address opens in a browser"
KEPT = "%/:=&?~#+!$,;'@()*[]"
"""Signs of a URL that stay as they are."""


def is_web(address: str) -> bool:
    """Returns whether an address is one of the web, ``http://`` or ``https://``."""
    return re.match("https?://", address, re.IGNORECASE) is not None


def local(address: str) -> str | None:
    """Returns the path that a ``file://`` URL stands for, as text; None for what is no such URL.

    Raises:
        DataError: It names a file of another machine.
    """
    if not re.match("file:", address, re.IGNORECASE):
        return None
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost"):
        raise DataError(f"a file of another machine, {parts.netloc}", "copy it here, or give its address in the web")
    return unquote(parts.path)


def in_data_url(address: str) -> bytes | None:
    """Returns what a ``data:`` URL holds; None for what is no such URL.

    Raises:
        DataError: It does not hold a picture in base64.
    """
    if not re.match("data:", address, re.IGNORECASE):
        return None
    head, comma, data = address.partition(",")
    kind, *rest = head[5:].lower().split(";")
    if not comma or not kind.startswith("image/") or "base64" not in rest:
        raise DataError(f"the data URL begins with {told(head)}", "write data:image/png;base64, and then the file")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"the data URL is not base64: {error}", "encode the file's bytes") from error


def fetched(address: str) -> bytes:
    """Fetches what an address of the web stands for, over no more than a few redirections, all within the web.

    Raises:
        DataError: There is no such thing, it has more than ``LARGEST`` bytes, or the address holds a password, which
            would come into results with it.
        PassingError: It could not be had now: no connection, or a server that is too slow or has trouble.
    """
    try:
        parts = urlsplit(address)
        named = parts.username is not None or not parts.hostname
    except ValueError as error:
        raise DataError(f"no address: {error}", HINT) from error
    if named:
        raise DataError("an address with a name and a password, or without a host, is not fetched", HINT)
    until = time.monotonic() + LONGEST
    request = Request(quote(address, safe=KEPT), headers={"User-Agent": f"vlmfix/{vlmfix.__version__}"})
    try:
        with _opener().open(request, timeout=SILENCE) as reply:
            return _whole(reply, until)
    except HTTPError as error:
        error.close()
        said = f"the server answers {error.code}"
        if error.code >= 500 or error.code in AGAIN:
            raise PassingError(said, "start again later") from error
        raise DataError(said, HINT) from error
    except URLError as error:
        if isinstance(error.reason, SSLCertVerificationError):
            raise DataError(f"the server's certificate is not valid: {error.reason.verify_message}", HINT) from error
        raise PassingError(f"cannot be reached: {error.reason}", "start again when that is over") from error
    except (HTTPException, OSError) as error:  # a reply that is none, or a connection that ends
        said = str(error) or type(error).__name__
        raise PassingError(f"cannot be fetched: {said}", "start again when that is over") from error
    except ValueError as error:  # of an address that no library takes
        raise DataError(f"no address: {error}", HINT) from error


def _opener() -> OpenerDirector:
    """Makes what opens addresses of the web, through a proxy where the environment names one, and nothing else."""
    opener = OpenerDirector()
    for handler in (
        ProxyHandler(),
        UnknownHandler(),
        HTTPHandler(),
        HTTPSHandler(),
        HTTPDefaultErrorHandler(),
        HTTPRedirectHandler(),
        HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _whole(reply: HTTPResponse, until: float) -> bytes:
    """Reads a reply to its end."""
    said = reply.headers.get("Content-Length", "")
    content = bytearray()
    while len(content) <= LARGEST and int(said if said.isdigit() else 0) <= LARGEST:
        if time.monotonic() > until:
            raise PassingError(f"takes more than {LONGEST:.0f} seconds", "start again later")
        piece = reply.read1(PIECE)
        if not piece:
            if said.isdigit() and len(content) < int(said):
                raise PassingError("the connection ended before the picture did", "start again later")
            return bytes(content)
        content += piece
    raise DataError(f"larger than {LARGEST >> 20} MiB", "make it smaller, or download it")


def path_of(address: str, folder: Path) -> Path:
    """Returns the place of a path or a ``file://`` URL.

    Args:
        address: Absolute, or relative to the folder.
        folder: The folder.

    Raises:
        DataError: It names a file of another machine.
    """
    named = local(address)
    return folder / (address if named is None else named)
