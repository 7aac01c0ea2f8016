"""Sums and parts that SDPA gives of all rows, against the weights themselves."""

from __future__ import annotations

import pytest
import torch

from vlmfix.attention.whole import Whole

B, H, G, T, D = 3, 6, 2, 37, 16
KINDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def whole(kind, masked):
    dice = torch.Generator().manual_seed(0)
    query = torch.randn(B, H, T, D, generator=dice, dtype=torch.float64).to(kind)
    key, value = (torch.randn(B, G, T, D, generator=dice, dtype=torch.float64).to(kind) for _ in range(2))
    allowed = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, -1, -1).clone()
    if masked:
        allowed[1, :, :, :5] = False  # padding, whose own rows see nothing
        allowed[2, :, 3:6, 3:6] = True  # a picture that sees all of itself
    return Whole(query, key, value, allowed if masked else None, 0.4), allowed


def weights(seen, allowed):
    key, value = (part.double().repeat_interleave(H // G, dim=1) for part in (seen.key, seen.value))
    scores = (seen.query.double() @ key.mT * seen.scale).masked_fill(~allowed, torch.finfo(torch.float64).min)
    return scores.softmax(dim=-1), value


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
def test_columns(kind, masked):
    seen, allowed = whole(kind, masked)
    exact, _ = weights(seen, allowed)
    rows = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.6
    rows[1, :5] = False
    with torch.no_grad():
        got = seen.column_sums(rows)
    want = (exact * rows[:, None, :, None]).sum(dim=2)
    torch.testing.assert_close(got.double(), want, atol=KINDS[kind], rtol=KINDS[kind])
    assert not got.requires_grad
    assert torch.equal(seen.seeing(rows), (allowed[:, 0] & rows[:, :, None]).sum(dim=1))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
def test_parts(kind, masked):
    seen, allowed = whole(kind, masked)
    exact, value = weights(seen, allowed)
    keys = torch.rand(B, H, T, generator=torch.Generator().manual_seed(2)) < 0.2
    others, rest, own = seen.without(keys)
    kept = exact * ~keys[:, :, None]
    wanted = kept @ value, kept.sum(dim=-1, keepdim=True), (exact * keys[:, :, None]).sum(dim=-1, keepdim=True)
    sees = allowed.any(dim=-1)[:, 0]  # (B, T)
    for got, want in zip((others, rest, own), wanted, strict=True):
        close = {"atol": KINDS[kind], "rtol": KINDS[kind]}
        torch.testing.assert_close(got.double()[sees], want.transpose(1, 2)[sees], **close)
