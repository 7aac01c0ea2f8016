"""Log-probabilities that are read off while samples come and go."""

from __future__ import annotations

import pytest
import torch

from vlmfix.decoding.choice import MostProbable
from vlmfix.serve.scores import Read


def test_each_sample_has_its_own_entry_after_others_have_left():
    scores = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0], [0.0, 2.0, -torch.inf]])
    read = Read(MostProbable(), 3, 5)  # more than there are
    assert read(scores).tolist() == [2, 0, 1]
    logs = scores.log_softmax(dim=-1)
    entries = read.newest()
    assert {sample: entry.token for sample, entry in entries.items()} == {0: 2, 1: 0, 2: 1}
    assert entries[2].logprob == pytest.approx(float(logs[2, 1]))
    assert [token for token, _ in entries[0].top] == [2, 1, 0]
    assert entries[2].top[-1] == (2, -9999.0)
    read.keep(torch.tensor([0, 2]))
    assert read(scores[[0, 2]]).tolist() == [2, 1]
    assert {sample: entry.token for sample, entry in read.newest().items()} == {0: 2, 2: 1}
