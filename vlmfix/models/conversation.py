"""Reads what was said before a question: chat messages, as chat APIs and transformers write them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from vlmfix.errors import DataError, PassingError, UsageError
from vlmfix.images import picture_at
from vlmfix.models.layout import Turn
from vlmfix.parsing import UnreadableError, is_text, json_at, text_of, told

Role = Literal["system", "user", "assistant"]
ROLES: Mapping[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles in messages, and who that is for a chat template."""
ADDRESSES = ("image", "path", "url")
"""Fields of a part of type ``image`` that may say where the picture is."""
FORM = 'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]'


def conversation(path: Path) -> tuple[tuple[Turn, ...], list[Image.Image]]:
    """Reads a JSON file of chat messages: a list, or an object with one under ``messages``.

    Args:
        path: The file; paths of pictures in it are relative to its folder.

    Returns:
        What was said, oldest first, and all pictures in that order.

    Raises:
        UsageError: The file cannot be read.
        DataError: It holds something else, or a picture that cannot be opened.
        PassingError: A picture cannot be opened now.
    """
    try:
        text = text_of(path.read_bytes()).strip()
        found, end = json_at(text)
    except UnreadableError as error:
        raise DataError(f"{path} {error.problem}", FORM) from error
    except (OSError, ValueError) as error:  # the latter of a zero byte in the name
        reason = getattr(error, "strerror", error)
        raise UsageError(f"cannot read {path}: {reason}", "give a JSON file of chat messages") from error
    if text[end:]:
        raise DataError(f"{path}: something stands behind its JSON", FORM)
    messages = found.get("messages") if isinstance(found, dict) else found
    try:
        return turns_of(messages, path.parent)
    except DataError as error:
        raise DataError(f"{path}: {error.message}", error.hint) from error
    except PassingError as error:
        raise PassingError(f"{path}: {error.message}", error.hint) from error


def turns_of(messages: Any, folder: Path) -> tuple[tuple[Turn, ...], list[Image.Image]]:  # noqa: ANN401 (JSON)
    """Reads chat messages, and opens their pictures; see ``conversation``.

    Args:
        messages: A list of messages: ``role``, and ``content`` that is a text or a list of parts.
        folder: Folder that paths are relative to.

    Raises:
        DataError: They are something else, or a picture cannot be opened.
        PassingError: A picture cannot be opened now.
    """
    if not isinstance(messages, list):
        raise DataError(f"messages are {told(messages)}", FORM)
    turns: list[Turn] = []
    pictures: list[Image.Image] = []
    for number, message in enumerate(messages):
        turn, addresses = _turn(message, f"message {number + 1}")
        turns.append(turn)
        for address in addresses:
            try:
                pictures.append(picture_at(address, folder=folder).image)
            except (DataError, PassingError) as error:
                raise type(error)(f"{told(address)}: {error.message}", error.hint) from error
    return tuple(turns), pictures


def _turn(message: Any, place: str) -> tuple[Turn, list[str]]:  # noqa: ANN401
    """What one message says, and where its pictures are."""
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{place} has the role {told(role)}", f"roles are {', '.join(ROLES)}")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise DataError(f"the content of {place} is {told(content)}", "give a text, or a list of parts")
    texts: list[str] = []
    addresses: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        said = part.get("text") if kind == "text" else _address(part, kind)
        if not is_text(said):
            raise DataError(
                f"{place} has a part that is no text and no picture",
                'a part is {"type": "text", "text": ...} or {"type": "image", "path": ...}; videos are not read',
            )
        (texts if kind == "text" else addresses).append(said)
    order = "".join("t" if part["type"] == "text" else "p" for part in parts)
    if re.search("pt+p", order):
        raise DataError(f"{place} has text between its pictures", "pictures of a message stand before its text")
    return Turn(ROLES[role], "\n".join(texts), len(addresses)), addresses


def _address(part: Mapping[str, Any], kind: Any) -> Any:  # noqa: ANN401
    """What a part of a message says of where its picture is; None for no such part."""
    if kind == "image_url":
        named = part.get("image_url")
        return named.get("url") if isinstance(named, dict) else named
    return next((part[name] for name in ADDRESSES if name in part), None) if kind == "image" else None
