"""The process that is killed: it waits with everything imported, forks for each command, and the fork dies where told.

A step is whatever changes files below one folder: a file opened to be written, a write, a sync, a rename, a removal, a
new folder, a cut. The interpreter's audit hook sees most of them, also those of other packages; writes go through raw
files that count. A killed process runs no ``finally`` and flushes nothing, as after ``kill -9``.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import signal
import sys

NAMED = {
    "os.rename": "rename",
    "os.remove": "remove",
    "os.mkdir": "mkdir",
    "os.rmdir": "rmdir",
    "os.truncate": "cut",
    "os.link": "link",
    "os.symlink": "symlink",
}
ALLOCATES = ("write", "open", "mkdir")
"""Steps that fail when the disk is full."""


class Steps:
    """Counts the steps below a folder, and does what was ordered at one of them.

    Args:
        base: The folder.
        fault: What happens: ``kill``; ``torn``, a kill when half of the bytes are written; ``io``, an error once;
            ``full``, no room from then on; empty for nothing.
        at: Number of the step.
    """

    def __init__(self, base, fault, at):
        self.base = os.path.join(os.path.realpath(base), "")
        self.fault = fault
        self.at = at
        self.seen = []
        self.paths = {}  # of open files

    def watch(self):
        sys.addaudithook(self._audit)
        for name in ("write", "fsync", "fdatasync"):
            if hasattr(os, name):
                setattr(os, name, self._on_file(name, getattr(os, name)))
        os.open = self._opened(os.open)
        builtins.open = io.open = self._open(io.open)

    def _below(self, path):
        if isinstance(path, int):
            return self.paths.get(path, "")
        if not isinstance(path, str | bytes | os.PathLike):
            return ""
        whole = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path)))), "")
        return os.path.basename(os.fsdecode(path)) if whole.startswith(self.base) else ""

    def _step(self, what, path, half=lambda: None):
        name = self._below(path)
        if not name:
            return
        number = len(self.seen)
        self.seen.append(f"{what} {name}")
        if self.fault == "full" and number >= self.at and what in ALLOCATES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if number != self.at:
            return
        if self.fault == "io":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.fault == "torn":
            half()
        if self.fault in ("kill", "torn"):
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event, arguments):
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR | os.O_TRUNC):
                self._step("open", path)
        elif event in NAMED:
            for path in arguments[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
                if self._below(path):
                    self._step(NAMED[event], path)
                    break

    def _on_file(self, name, call):
        def counted(file, *data):
            self._step(name, file, half=lambda: call(file, data[0][: len(data[0]) // 2]))
            return call(file, *data)

        return counted

    def _opened(self, call):
        def noted(path, *arguments, **options):
            file = call(path, *arguments, **options)
            self.paths[file] = self._below(path)
            return file

        return noted

    def _open(self, call):
        steps = self

        class Raw(io.FileIO):
            def write(self, data):
                view = memoryview(data).cast("B")
                steps._step("write", self.name, half=lambda: super(Raw, self).write(view[: len(view) // 2]))
                return super().write(view)

        def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
            if not set(mode) & set("wax+"):
                return call(file, mode, buffering, encoding, errors, newline, closefd, opener)
            raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            steps.paths[raw.fileno()] = steps._below(file)
            if buffering == 0:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)

        return opened


def main():
    """Obeys orders, one JSON object a line, and answers each with the exit code; -9 is a kill."""
    from tests.fuzz import commands

    call = commands.ready()
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            steps = Steps(order["base"], order["fault"], order["at"])
            steps.watch()
            code = call(order["arguments"])
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(log, f"\n{json.dumps(steps.seen)}".encode())
            os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
