"""Finds decoders, families, profilers and benchmarks by name: vlmfix's own, those of other distributions, and files.

Names are known without any of the classes: vlmfix's own are listed by hand, and those of other distributions stand in
their metadata, as entry points. A class is imported when it is asked for, so a plug-in that is broken stops nothing
else. A class in a file is named by the file's path and its own name, ``path/to/mine.py:Mine``, and is never listed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from vlmfix.errors import PluginError, UsageError
from vlmfix.files import path_of, resolved

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

FILE = re.compile(r"(?P<path>(?:[./~].*?|[^:+@,=]*?)\.py):(?P<name>[A-Za-z_]\w*)", re.DOTALL)
"""A class in a file. A path may hold what a specification gives a meaning (``:``, ``+``, ``,``, ``=``, ``@``) when it
begins with ``/``, ``.`` or ``~``, as no name does."""
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
"""What a name may be, so that a specification can hold it."""

T = TypeVar("T")


@dataclass(frozen=True)
class Origin:
    """Says where a class comes from that is not vlmfix's own.

    Attributes:
        name: What it is asked for by: the name of the entry point, or the file's path as given and the class.
        made_by: Name and version of the distribution, or ``sha256:`` and the digest of the file.
    """

    name: str
    made_by: str


_ORIGINS: dict[type, Origin] = {}


def origin_of(kind: type) -> Origin | None:
    """Returns where a class comes from; None for one that was not found by its name, or is vlmfix's own."""
    return _ORIGINS.get(kind)


def plugins_of(kinds: Iterable[type]) -> dict[str, str]:
    """Maps the names of those classes that are not vlmfix's own to what made them; cards keep it, runs compare it."""
    found = [origin for kind in kinds if (origin := origin_of(kind)) is not None]
    return {origin.name: origin.made_by for origin in found}


def refuse_other_plugins(where: str, before: Mapping[str, str] | None, now: Mapping[str, str]) -> None:
    """Checks that plug-ins are those that something was made with.

    Args:
        where: What was made with them, for the message.
        before: What its card says of them; None when it says nothing.
        now: The same of those that are there now.

    Raises:
        PluginError: Some differ; the message names them, with both versions or digests.
    """
    former = before or {}
    for name in dict.fromkeys([*former, *now]):
        if former.get(name) != now.get(name):
            was, found = former.get(name) or "part of vlmfix", now.get(name) or "part of vlmfix"
            raise PluginError(
                f"{name} is not what {where} was made with: it was {was}, now it is {found}",
                "put the former file or version back, or run again with another --out",
            )


def near(word: str, known: Iterable[str]) -> str:
    """Asks whether a similar known word was meant; empty when none is similar."""
    import difflib  # here, and metadata below: not every start of the command line needs them

    found = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {found[0]}? " if found else ""


@dataclass(frozen=True)
class Found:
    """Holds what metadata say of one plug-in.

    Attributes:
        name: Name of the entry point.
        distribution: Name and version of the distribution that has it.
        entry: The entry point.
    """

    name: str
    distribution: str
    entry: EntryPoint


class Table(Mapping[str, type[T]], Generic[T]):
    """Maps names to classes of one kind, each imported when it is asked for.

    Iteration gives vlmfix's own names in their order, then those of other distributions. A class in a file is found
    under ``path.py:Class`` too, but is not among the names.

    Args:
        noun: Word for one of them, for messages.
        group: Group of entry points that adds to them.
        kind: ``module:Class`` that each must inherit.
        homes: ``module:Class`` of vlmfix's own, by name.
        plural: Word for several; empty for ``noun`` with an s.
        reserved: Names that nobody's may have.
        needs: Class attributes that each must have.
        keys: Class attribute that says its names: a text, or a set of them.
    """

    def __init__(
        self,
        noun: str,
        group: str,
        kind: str,
        homes: Mapping[str, str],
        *,
        plural: str = "",
        reserved: Sequence[str] = (),
        needs: Sequence[str] = (),
        keys: str = "name",
    ) -> None:
        self.noun, self.plural, self.group, self.homes = noun, plural or f"{noun}s", group, homes
        self._kind, self._needs, self._keys = kind, tuple(needs), keys
        self._taken = (*homes, *reserved)

    def __iter__(self) -> Iterator[str]:
        return iter([*self.homes, *self.plugins()])

    def __len__(self) -> int:
        return len(self.homes) + len(self.plugins())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (
            name in self.homes or FILE.fullmatch(name) is not None or name in self.plugins()
        )

    def __getitem__(self, name: str) -> type[T]:
        if name in self.homes:
            own: type[T] = _imported(self.homes[name])
            return own
        if found := FILE.fullmatch(name):
            return self._in_file(name, found["path"], found["name"])
        return self._loaded(self.plugins()[name])

    def find(self, name: str) -> type[T]:
        """Returns the class of a name.

        Raises:
            UsageError: There is none; the hint names a similar one, and all.
            PluginError: It is a plug-in's or in a file, and cannot be used.
        """
        self.check(name)
        return self[name]

    def check(self, name: str) -> None:
        """Checks that there is such a name, or such a file, without importing anything.

        Raises:
            UsageError: There is none; the hint names a similar one, and all.
        """
        if found := FILE.fullmatch(name):
            _read(found["path"])
        elif name.endswith(".py"):
            raise UsageError(f"{name} names no class", f"write {name}:CLASS, with the name of the {self.noun}'s class")
        elif name not in self:
            if clashing := self.clashes().get(name):
                raise UsageError(clashing, "uninstall one of the two")
            known = f"known {self.plural}: {', '.join(self)}"
            raise UsageError(f"unknown {self.noun} {name!r}", f"{near(name, self)}{known}")

    def plugins(self) -> dict[str, Found]:
        """Returns what other distributions add, by name; names that are refused are left out."""
        return _sorted(self.group, self._taken, self.noun, tuple(sys.path))[0]

    def refused(self) -> list[str]:
        """Says in a sentence each which names of other distributions are not used, and why."""
        return [*self.clashes().values()]

    def clashes(self) -> dict[str, str]:
        """Maps the names that are refused to the same sentences."""
        return dict(_sorted(self.group, self._taken, self.noun, tuple(sys.path))[1])

    def _loaded(self, found: Found) -> type[T]:
        called = f"the {self.noun} {found.name} of {found.distribution}"
        try:
            kind = found.entry.load()
        except (Exception, SystemExit) as error:  # whatever its module does when it is imported
            raise PluginError(
                f"{called} cannot be loaded: {_words(error)}", "repair or uninstall that distribution"
            ) from error
        self._require(kind, called)
        names = getattr(kind, self._keys)
        if found.name not in ({names} if isinstance(names, str) else names):
            raise PluginError(
                f"{called} says {self._keys} = {names!r}", f"let the entry point and {self._keys} say the same"
            )
        return self._noted(kind, Origin(found.name, found.distribution))

    def _in_file(self, spec: str, path: str, name: str) -> type[T]:
        module, digest = _executed(path)
        own = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == module.__name__
        }
        if name not in own:
            base = _imported(self._kind)
            known = [key for key, value in own.items() if issubclass(value, base)]
            raise UsageError(f"{path} has no class {name}", f"{near(name, known)}it has: {', '.join(known) or 'none'}")
        kind = own[name]
        self._require(kind, spec)
        return self._noted(kind, Origin(spec, f"sha256:{digest}"))

    def _noted(self, kind: type[T], origin: Origin) -> type[T]:
        _ORIGINS[kind] = origin
        return kind

    def _require(self, kind: object, called: str) -> None:
        """Refuses what cannot be used as a class of this table.

        Raises:
            PluginError: The message says what it lacks.
        """
        base: type[T] = _imported(self._kind)
        wanted = f"class that inherits {base.__name__}"
        if not (isinstance(kind, type) and issubclass(kind, base)):
            raise PluginError(f"{called} is no {wanted}", f"from vlmfix.extend import {base.__name__}")
        if lacking := sorted(getattr(kind, "__abstractmethods__", ())):
            raise PluginError(f"{called} has no {' and no '.join(lacking)}", f"write it as {base.__name__} says")
        if lacking := [name for name in self._needs if not hasattr(kind, name)]:
            raise PluginError(
                f"{called} has no {' and no '.join(lacking)}",
                f"class attributes that it must have: {', '.join(self._needs)}",
            )
        if any(isinstance(value, dataclasses.Field) for value in vars(kind).values()):
            raise PluginError(
                f"{called} is no dataclass", "write @dataclass(frozen=True, kw_only=True) above the class"
            )


def _imported(home: str) -> Any:  # noqa: ANN401 (whatever the table holds)
    module, _, name = home.partition(":")
    return getattr(import_module(module), name)


@cache
def _sorted(
    group: str, own: tuple[str, ...], noun: str, _path: tuple[str, ...]
) -> tuple[dict[str, Found], tuple[tuple[str, str], ...]]:
    """Reads the entry points of a group: those that are used, and sentences about the others by name."""
    from importlib.metadata import entry_points

    found: dict[str, list[Found]] = {}
    for entry in entry_points(group=group):
        distribution = "an unknown distribution" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
        found.setdefault(entry.name, []).append(Found(entry.name, distribution, entry))
    used: dict[str, Found] = {}
    refused: list[tuple[str, str]] = []
    for name, several in sorted(found.items()):
        several.sort(key=lambda one: one.distribution)  # the order on the path says nothing
        by = " and ".join(one.distribution for one in several)
        if not NAME.fullmatch(name):
            sentence = f"the {noun} {name!r} of {by} is refused: a name has letters, digits, - and _ alone"
        elif name in own:
            sentence = f"the {noun} {name} of {by} is refused: vlmfix has one of that name"
        elif len(several) > 1:
            sentence = f"the {noun} {name} is refused: {by} both have one of that name"
        else:
            used[name] = several[0]
            continue
        refused.append((name, sentence))
    return used, tuple(refused)


def _read(path: str) -> bytes:
    try:
        return path_of(path).read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}", "paths are read from the folder that the command runs in"
        ) from error


def _executed(path: str) -> tuple[ModuleType, str]:
    """Runs a file, once for each content, and returns it as a module, with the hex digest of what was run."""
    source = _read(path)
    digest = hashlib.sha256(source).hexdigest()
    return _run(path, source, digest), digest


@cache
def _run(path: str, source: bytes, digest: str) -> ModuleType:
    module = ModuleType(f"vlmfix_file_{digest[:16]}_{hashlib.sha256(path.encode()).hexdigest()[:8]}")
    module.__file__ = str(resolved(path_of(path)))
    sys.modules[module.__name__] = module  # dataclasses look their annotations up there
    try:
        exec(compile(source, module.__file__, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # whatever it does
        del sys.modules[module.__name__]
        raise PluginError(f"{path} cannot be run: {_words(error)}", "use --debug for the traceback") from error
    return module


def _words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
