"""The compiler's start beside other work."""

import threading

import torch

from vlmfix.upstream import compiling


def test_the_compiler_starts_once_and_whoever_records_waits_for_it(monkeypatch):
    go, done = threading.Event(), []

    def slowly(device):
        go.wait(10)
        done.append(device)

    monkeypatch.setattr(compiling, "_STARTING", [])
    monkeypatch.setattr(compiling, "_compile_something", slowly)
    compiling.settle()  # nothing was started
    for _ in range(2):
        compiling.start(torch.device("cpu"))
    assert not done, "nobody waits for it"
    go.set()
    compiling.settle()
    assert done == [torch.device("cpu")]


def test_without_a_compiler_its_start_says_nothing(monkeypatch):
    """Whoever needs it is told then."""

    def fails(*_, **__):
        raise RuntimeError("Failed to find a compiler")

    monkeypatch.setattr(torch, "compile", fails)
    compiling._compile_something(torch.device("cpu"))
