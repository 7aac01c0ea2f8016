"""Processes that begin with everything imported: one server forks them all, so that no test waits for torch.

They are processes of their own in all but their beginning: signals, streams and exit codes are theirs, and their
interpreter ends as any does, with what threads and streams do to that.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from contextlib import contextmanager

from vlmfix import cli

PRELOADED = ["vlmfix.cli", "vlmfix.crew", "vlmfix.generation", "vlmfix.jobs.folder", "tests.jobs.fake"]


def server():
    """The context whose ``Process`` is forked by the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def said(work, *arguments):
    """Exit code and standard error of a function that runs in a process of its own.

    Args:
        work: A function of a module.
        *arguments: What it is called with.
    """
    with started(work, *arguments) as (process, _, stderr):
        told = stderr.read().decode()
        process.join(60)
        return process.exitcode, told


def ended(work, *arguments):
    """Exit code of a function that runs in a process of its own to its end."""
    process = server().Process(target=work, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@contextmanager
def started(work, *arguments, stdout=None):
    """A process that runs a function; gives it, and its two outputs as files of bytes.

    Args:
        work: A function of a module.
        *arguments: What it is called with.
        stdout: Path of a file for its standard output; a pipe if None.
    """
    context = server()
    (out, into_out), (err, into_err) = context.Pipe(duplex=False), context.Pipe(duplex=False)
    process = context.Process(target=_begin, args=(work, arguments, stdout or into_out, into_err))
    process.start()
    into_out.close()
    into_err.close()
    # a connection closes its own end, so the files get copies
    with (
        open(os.dup(out.fileno()), "rb", buffering=0) as read_out,
        open(os.dup(err.fileno()), "rb", buffering=0) as read_err,
    ):
        out.close()
        err.close()
        try:
            yield process, read_out, read_err
        finally:
            process.kill()
            process.join()


def command(*arguments):
    """The command line, as it runs from a terminal."""
    sys.argv = ["vlmfix", *map(str, arguments)]
    cli.main()


def _begin(work, arguments, stdout, stderr):
    os.dup2(os.open(stdout, os.O_WRONLY) if isinstance(stdout, str) else stdout.fileno(), 1)
    os.dup2(stderr.fileno(), 2)
    if not isinstance(stdout, str):
        stdout.close()
    stderr.close()
    # buffered as streams to files and pipes are, whatever the tests' own environment says
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs deaf to Ctrl-C
    try:
        work(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code
    ctypes.pythonapi.Py_Exit(code)  # multiprocessing would leave at once, past threads that are still at work
