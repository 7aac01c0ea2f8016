"""Read COCO annotation files of any size: streamed once, then from a small index in the user's cache folder."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from vlmfix.errors import DataError
from vlmfix.extras import need
from vlmfix.files import make_folder, replacing, resolved
from vlmfix.parsing import is_text, some, told

Kind = Literal["instances", "captions"]
Progress = Callable[[int, int], None]
"""Told the bytes read and the bytes of the file, while a file is read for the first time."""

Outlines = Sequence[Any]
"""Outlines of a picture's objects: of each its polygons, a list of lists, or its runs, an object."""

FORMAT = 1
"""Of the index; raised when an older index must not be used."""
BLOCK = 1 << 16

_WANTED: Mapping[Kind, Mapping[str, Mapping[str, type]]] = {
    "instances": {
        "images": {"id": int, "file_name": str},
        "annotations": {"image_id": int, "category_id": int},
        "categories": {"id": int, "name": str},
    },
    "captions": {
        "images": {"id": int, "file_name": str},
        "annotations": {"image_id": int, "caption": str},
    },
}
LIST, ENTRY, DEEPEST = 2, 3, 64
"""Levels: of a list of entries, of an entry in it, and the deepest that is read; COCO's own files have six."""
_OPENING, _CLOSING = frozenset({"start_map", "start_array"}), frozenset({"end_map", "end_array"})
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Index:
    """What one annotation file says about its pictures.

    Attributes:
        path: The file.
        sha256: Hex digest of the file.
        files: File name of every picture by image id, in the order of the file.
        told: For an image id the names of its objects without repeats, or its captions, in the order of the
            annotations; ids without annotations are left out.
    """

    path: Path
    sha256: str
    files: Mapping[int, str]
    told: Mapping[int, Sequence[str]]


@dataclass(frozen=True)
class AnnotatedPicture:
    """One picture.

    Attributes:
        id: COCO image id.
        file: File name, as the annotations have it.
        objects: Category names of its instances without repeats, in the order of the annotations.
        captions: Its reference captions.
    """

    id: int
    file: str
    objects: tuple[str, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Annotations:
    """Pictures with their instances and captions, of one pair of files or of several.

    Attributes:
        pictures: By image id, in the order of the instances files.
        sources: For instances and for captions the files and their sha256, in JSON values.
    """

    pictures: Mapping[int, AnnotatedPicture]
    sources: Mapping[str, Mapping[str, list[str]]]


def picture_objects(
    instances: Path | Sequence[Path], *, progress: Progress | None = None
) -> Iterator[tuple[str, list[str]]]:
    """The objects of every picture.

    Args:
        instances: One instances file, or several with different pictures.
        progress: Called while a file is read for the first time.

    Yields:
        File name, and the names of its objects without repeats in the order of the annotations; pictures in the
        order of the files, those without objects too.

    Raises:
        DataError: A file is not one of instances, or two files have the same picture.
    """
    for index in _indexes(instances, "instances", progress):
        for number, file in index.files.items():
            yield file, list(index.told.get(number, ()))


def read_annotations(
    instances: Path | Sequence[Path], captions: Path | Sequence[Path], *, progress: Progress | None = None
) -> Annotations:
    """Instances and reference captions of every picture.

    Args:
        instances: One instances file, or several with different pictures.
        captions: One captions file, or several; together they must have the pictures of ``instances``.
        progress: Called while a file is read for the first time.

    Raises:
        DataError: A file has another shape, two files of one kind have the same picture, or instances and captions
            are about different pictures.
    """
    by_kind: dict[str, list[Index]] = {
        "instances": _indexes(instances, "instances", progress),
        "captions": _indexes(captions, "captions", progress),
    }
    files = {kind: {n: file for index in found for n, file in index.files.items()} for kind, found in by_kind.items()}
    told = {kind: {n: text for index in found for n, text in index.told.items()} for kind, found in by_kind.items()}
    _same_pictures(by_kind, files)
    pictures = {
        number: AnnotatedPicture(
            number, file, tuple(told["instances"].get(number, ())), tuple(told["captions"].get(number, ()))
        )
        for number, file in files["instances"].items()
    }
    sources = {
        kind: {"file": [index.path.name for index in found], "sha256": [index.sha256 for index in found]}
        for kind, found in by_kind.items()
    }
    return Annotations(pictures, sources)


def read_outlines(instances: Path | Sequence[Path], wanted: Collection[int]) -> dict[int, Outlines]:
    """The outlines of the objects of some pictures; the files are read whole, one entry after the other.

    Args:
        instances: One instances file, or several, which ``read_annotations`` has read.
        wanted: Image ids.

    Returns:
        By image id, in the order of the annotations; pictures without objects are left out.

    Raises:
        DataError: A file cannot be read, or an annotation has no segmentation.
    """
    need("eval")
    import ijson

    found: dict[int, list[Any]] = {}
    for path in [instances] if isinstance(instances, Path) else instances:
        try:
            with path.open("rb") as file:
                for entry in ijson.items(file, "annotations.item", buf_size=BLOCK, use_float=True):
                    number, outline = entry.get("image_id"), entry.get("segmentation")
                    if number not in wanted:
                        continue
                    if not isinstance(outline, list | dict) or not outline:
                        raise _bad(path, f"an annotation of image {number} has no segmentation")
                    found.setdefault(number, []).append(outline)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}", "give COCO's instances file") from error
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise _bad(path, "it is not JSON") from error
    return dict(found)


def read_index(path: Path, kind: Kind, *, progress: Progress | None = None) -> Index:
    """What one annotation file says, from the cache when the file is the one that was read before.

    The cache is ``$XDG_CACHE_HOME/vlmfix/coco`` (``~/.cache`` when unset). An index belongs to a path, a size and a
    time of change; one that is broken, of another format or of another file is made anew. Where the cache cannot
    be written, a warning is logged and the file is read every time.

    Args:
        path: The annotation file.
        kind: What it must hold.
        progress: Called while the file is read, when it must be.

    Raises:
        DataError: The file cannot be read, is not JSON, is empty, or lacks something; the message says what.
    """
    try:
        source = _identity(path)
        cached = _cache_file(kind, source["path"])
        found = _load(cached, path, source)
        if found is None:
            if not source["size"]:
                raise _bad(path, "it is empty")
            with path.open("rb") as file:
                found = _build(path, _Metered(file, source["size"], progress), kind)
            _store(cached, source, found)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", f"give COCO's {kind} file") from error
    return found


def _indexes(paths: Path | Sequence[Path], kind: Kind, progress: Progress | None) -> list[Index]:
    """The index of every file; no picture may be in two of them."""
    found = [read_index(path, kind, progress=progress) for path in ([paths] if isinstance(paths, Path) else paths)]
    if not found:
        raise DataError(f"no {kind} file was given", f"give COCO's {kind} file")
    seen: dict[int, Path] = {}
    for index in found:
        for number in index.files:
            if number in seen:
                raise DataError(
                    f"image id {number} is in {seen[number]} and in {index.path}",
                    "give each file once, and files about different pictures",
                )
            seen[number] = index.path
    return found


def _same_pictures(indexes: Mapping[str, Sequence[Index]], files: Mapping[str, Mapping[int, str]]) -> None:
    """Raise unless instances and captions are about the same pictures.

    Args:
        indexes: Of the files of either kind.
        files: For either kind the pictures' file names by image id.
    """
    instances, captions = files["instances"], files["captions"]
    given = (f"the {kind} in {some([index.path for index in found])}" for kind, found in indexes.items())
    problem = f"{' and '.join(given)} do not match"
    hint = "give the instances and captions files of the same pictures"
    for one, other, kind in ((instances, captions, "instances"), (captions, instances, "captions")):
        alone = sorted(one.keys() - other.keys())
        if alone:
            raise DataError(f"{problem}: {len(alone)} image ids are only in the {kind}: {some(alone)}", hint)
    for number, file in instances.items():
        if captions[number] != file:
            raise DataError(f"{problem}: picture {number} is {file!r} and {captions[number]!r}", hint)


class _Metered:
    """A file that is hashed while it is read, and says how far it is."""

    def __init__(self, file: BinaryIO, size: int, progress: Progress | None) -> None:
        self._file = file
        self._size = size
        self._progress = progress
        self._done = 0
        self.hash = hashlib.sha256()

    def read(self, count: int = -1) -> bytes:
        block = self._file.read(count)
        self.hash.update(block)
        first, self._done = not self._done, self._done + len(block)
        if first:
            block = block.removeprefix(codecs.BOM_UTF8)
        if self._progress is not None and block:
            self._progress(self._done, self._size)
        return block


def _build(path: Path, file: _Metered, kind: Kind) -> Index:
    """Read a whole annotation file; memory grows with its pictures and captions, not with its outlines."""
    files: dict[int, str] = {}
    names: dict[int, str] = {}
    annotations: dict[int, list[Any]] = {}
    for section, entry in _entries(path, file, kind):
        if section == "annotations":
            annotations.setdefault(entry["image_id"], []).append(
                entry["category_id" if kind == "instances" else "caption"]
            )
            continue
        table, value = (files, entry["file_name"]) if section == "images" else (names, entry["name"])
        if table.setdefault(entry["id"], value) != value:
            raise _bad(path, f"id {entry['id']} of {section!r} stands for {table[entry['id']]!r} and {value!r}")
    if not files:
        raise _bad(path, "it has no pictures")
    if not annotations:
        raise _bad(path, "it has no annotations")
    strangers = sorted(annotations.keys() - files.keys())
    if strangers:
        raise _bad(path, f"{len(strangers)} image ids of annotations are not in 'images': {some(strangers)}")
    if kind == "instances":
        unknown = sorted({number for found in annotations.values() for number in found} - names.keys())
        if unknown:
            raise _bad(path, f"{len(unknown)} category ids are not in 'categories': {some(unknown)}")
        told = {image: [names[n] for n in dict.fromkeys(found)] for image, found in annotations.items()}
    else:
        told = annotations
    return Index(path, file.hash.hexdigest(), files, told)


def _entries(path: Path, file: _Metered, kind: Kind) -> Iterator[tuple[str, dict[str, Any]]]:
    """The wanted fields of the wanted lists, in whatever order the file has them.

    ``ijson.parse`` would keep the names of all levels for every event of a block, which takes memory by the square of
    the depth; so the levels are counted here, and a file that nests deeply ends with the first block.
    """
    need("eval")
    import ijson

    wanted = _WANTED[kind]
    missing = set(wanted)
    entry: dict[str, Any] = {}
    section = key = ""
    depth = 0
    try:
        for event, value in ijson.basic_parse(file, buf_size=BLOCK, use_float=True):
            if event in _OPENING:
                depth += 1
                if depth == 1 and event == "start_array":
                    raise _bad(path, "it holds a list")
                if depth == LIST and event == "start_array":
                    missing.discard(section)
                elif depth == LIST:
                    section = ""  # an object where a list is wanted
                elif depth == ENTRY and event == "start_array" and section in wanted:
                    raise _bad(path, f"{section!r} holds a list, which is no object")
                elif depth > DEEPEST:
                    raise _bad(path, f"it nests deeper than {DEEPEST} levels")
            elif event in _CLOSING:
                if depth == ENTRY and section in wanted:
                    _check(path, section, entry, wanted[section])
                    yield section, entry
                    entry = {}
                depth -= 1
            elif depth > ENTRY:
                continue
            elif event == "map_key":
                if depth == 1:
                    section = value
                elif depth == ENTRY:
                    key = value
            elif depth == ENTRY and section in wanted and key in wanted[section]:
                if key in entry:
                    raise _bad(path, f"in an entry of {section!r} {key!r} stands twice")
                entry[key] = value
            elif depth == LIST and section in wanted:
                raise _bad(path, f"{section!r} holds {told(value)}, which is no object")
    except UnicodeDecodeError as error:
        raise _bad(path, f"it is not UTF-8 text: {error.reason}") from error
    except ijson.JSONError as error:
        said = error.args[0] if error.args else ""
        words = said.decode(errors="replace") if isinstance(said, bytes) else str(said)  # the parser in C gives bytes
        raise _bad(path, f"it is not JSON: {(words.splitlines() or ['it ends too early'])[0]}") from error
    if missing:
        raise _bad(path, f"it has no list {' and no list '.join(map(repr, sorted(missing)))}")


def _check(path: Path, section: str, entry: Mapping[str, Any], keys: Mapping[str, type]) -> None:
    for key, kind in keys.items():
        if type(entry.get(key)) is not kind or (kind is str and not is_text(entry[key])):
            found = f"{key!r} is {told(entry[key])}" if key in entry else f"there is no {key!r}"
            wanted = "a whole number" if kind is int else "text"
            raise _bad(path, f"in an entry of {section!r} {found}; {wanted} is needed")


def _bad(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path} is not an annotation file of the wanted kind: {problem}",
        "COCO's instances_*.json has 'images', 'annotations' and 'categories', captions_*.json the first two",
    )


def _cache_file(kind: Kind, path: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return folder / "vlmfix" / "coco" / f"{hashlib.sha256(f'{kind} {path}'.encode()).hexdigest()[:24]}.json.gz"


def _identity(path: Path) -> dict[str, Any]:
    """What tells this version of the file from another."""
    status = path.stat()
    return {
        "path": str(resolved(path)),
        "size": status.st_size,
        "changed": [status.st_mtime_ns, status.st_ctime_ns, status.st_ino],
    }


def _load(cached: Path, path: Path, source: Mapping[str, Any]) -> Index | None:
    """The index of exactly this file; None when there is none that can be trusted."""
    try:
        with gzip.open(cached, "rb") as file:
            document = json.load(file)
        if document["format"] != FORMAT or document["source"] != source:
            return None
        pictures, sha256 = document["pictures"], document["sha256"]
        whole = all(
            type(number) is int and isinstance(name, str) and isinstance(texts, list) and set(map(type, texts)) <= {str}
            for number, name, texts in pictures
        )
        if not whole or not isinstance(sha256, str):
            return None
        files = {number: name for number, name, _ in pictures}
        told = {number: list(texts) for number, _, texts in pictures if texts}
        return Index(path, sha256, files, told)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, RecursionError):
        return None


def _store(cached: Path, source: Mapping[str, Any], index: Index) -> None:
    """Write the index whole or not at all."""
    document = {
        "format": FORMAT,
        "source": source,
        "sha256": index.sha256,
        "pictures": [[number, name, index.told.get(number, ())] for number, name in index.files.items()],
    }
    try:
        make_folder(cached.parent)
        with replacing(cached) as file:
            file.write(gzip.compress(json.dumps(document).encode(), compresslevel=3))
    except DataError as error:
        _LOG.warning("cannot keep an index of %s: %s", index.path, error.message)
