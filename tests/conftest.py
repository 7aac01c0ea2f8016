"""Settings of the whole suite, which stand before any import of transformers, and what several files use."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from vlmfix import cli
from vlmfix.commands import options

torch.set_num_threads(1)


@pytest.fixture
def vlmfix(capsys, monkeypatch):
    """The command line: called with arguments, it gives exit code, standard output and standard error.

    It leaves warnings and other packages' chatter in this process as they are.
    """
    monkeypatch.setattr(options, "quieten", lambda: None)

    def call(*arguments):
        code = cli._run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny random LLaVA."""
    from tests.tiny import saved, tiny_vlm  # transformers, for which tests of other things need not wait

    return str(saved(tiny_vlm("llava"), tmp_path_factory.mktemp("model")))
