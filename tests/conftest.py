"""Settings of the whole suite, which stand before any import of transformers, and what several files use."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from vlmfix import cli

torch.set_num_threads(1)


@pytest.fixture
def vlmfix(capsys):
    """The command line: called with arguments, it gives exit code, standard output and standard error."""

    def call(*arguments):
        code = cli._run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call
