"""The pictures of requests: data URLs, and files below one folder. Nothing is ever fetched."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit
from weakref import WeakValueDictionary

from PIL import Image

from vlmfix.errors import DataError, PassingError
from vlmfix.files import resolved
from vlmfix.images import picture_of
from vlmfix.kinds import kind_named
from vlmfix.parsing import told
from vlmfix.serve.refusals import RefusedError
from vlmfix.web import in_data_url


class Gallery:
    """Opens pictures; equal ones of requests at the same time are one object, whose encoding their rows share.

    Args:
        allowed: Folder whose files may be named; None to refuse all files.
        most: Most bytes of a file.
    """

    def __init__(self, allowed: Path | None, most: int) -> None:
        self._allowed = None if allowed is None else resolved(allowed)
        self._most = most
        self._open: WeakValueDictionary[bytes, Image.Image] = WeakValueDictionary()
        self._lock = threading.Lock()

    def open(self, url: str, param: str) -> Image.Image:
        """Opens the picture that a URL holds or names.

        Args:
            url: A data URL, or a ``file://`` URL.
            param: Where it stands in the request.

        Raises:
            RefusedError: It is another kind of URL, names a file that may not be read, or what is there is no picture.
        """
        try:
            content = in_data_url(url)
        except DataError as error:
            raise RefusedError(error.message, error.hint, param=param) from error
        if content is None and url[:5].lower() == "file:":
            content = self._file(url, param)
        if content is None:
            raise RefusedError(
                f"{told(url)} is no data URL, and this server fetches nothing from outside",
                "send the picture itself: data:image/png;base64,...",
                param=param,
            )
        digest = hashlib.sha256(content).digest()
        with self._lock:
            known = self._open.get(digest)
        if known is not None:
            return known
        try:
            picture = picture_of(content)
        except DataError as error:
            raise RefusedError(error.message, "send a JPEG, PNG, WebP, TIFF, BMP or GIF file", param=param) from error
        except PassingError as error:
            raise RefusedError(error.message, "ask again later", status=503, code="overloaded") from error
        with self._lock:
            return self._open.setdefault(digest, picture)

    def _file(self, url: str, param: str) -> bytes:
        if self._allowed is None:
            raise RefusedError(
                "this server reads no local files", "send the picture in a data URL, or start with --allow", param=param
            )
        outside = RefusedError(
            f"{told(url)} is not below the folder that this server may read", "name a file in it", param=param
        )
        try:
            parts = urlsplit(url)
            path = Path(unquote(parts.path, errors="strict")).resolve()
        except (ValueError, OSError, RuntimeError) as error:  # a zero byte, a name that is too long, links in a circle
            raise outside from error
        if parts.netloc not in ("", "localhost") or self._allowed not in path.parents:
            raise outside
        try:
            if not path.is_file():
                kind = kind_named(path.name)
                missing = f"{told(url)}: {kind}" if kind else f"there is no file {told(url)}"
                raise RefusedError(missing, "name a picture", param=param)
            with path.open("rb") as file:
                content = file.read(self._most + 1)
        except OSError as error:
            raise RefusedError(f"{told(url)} cannot be read: {error.strerror}", "name another", param=param) from error
        if len(content) > self._most:
            raise RefusedError(f"{told(url)} has more than {self._most} bytes", "make it smaller", param=param)
        return content
