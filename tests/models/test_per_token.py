"""Values of the tower's patches find their way to the image tokens that are made of them.

Measured, not computed: a part of a picture is painted; what enters the tower's first attention tells which patches
changed, and the decoder's embeddings, without mixing in the tower, which tokens did.
"""

from __future__ import annotations

import pytest
import torch

from tests.models.spotlight import embeddings, painted, plain
from tests.tiny import TINY, tiny_vlm
from vlmfix.decoding.encoding import encoded
from vlmfix.models.grid import merged
from vlmfix.upstream.names import hidden

CASES = [((90, 60), (0.1, 0.1, 0.35, 0.4)), ((40, 200), (0, 0.43, 0.5, 0.5)), ((200, 40), (0.5, 0, 0.55, 1))]
"""(width, height) and the painted part, within what a crop of the middle shows."""


def entering(vlm, batch):
    """What enters the tower's first attention, (views, tokens, D)."""
    seen = []

    def keep(module, args, kwargs):
        seen.append(hidden(args, kwargs))

    hook = vlm.family.tower_attention(vlm.model)[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            encoded(vlm.model, batch)
    finally:
        hook.remove()
    return seen[0] if seen[0].ndim == 3 else seen[0][None]


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(("size", "box"), CASES)
def test_tokens_get_what_their_patches_have(family, size, box):
    vlm = tiny_vlm(family)
    rows = (
        [[plain(50, 70), plain(*size)], [plain(*size)]],
        [[plain(50, 70), painted(*size, box)], [painted(*size, box)]],
    )
    before, after = (vlm.encode(["what?", "and?"], pictures) for pictures in rows)
    changed = (entering(vlm, after) - entering(vlm, before)).abs().sum(dim=-1)  # (views, tokens)
    got = vlm.family.per_token(vlm.model, before, [changed])
    marked = before["input_ids"] == vlm.family.image_token(vlm.model.config)
    layout = vlm.layout(before)
    assert got.shape == (int(marked.sum()),)
    assert torch.equal(got.isnan(), ~layout.tokens[marked])
    moved = (embeddings(vlm, after) - embeddings(vlm, before)).abs().sum(dim=-1)  # (B, T)
    assert 0 < int((moved > 1e-3).sum()) < int(layout.tokens.sum())
    assert torch.equal(got.nan_to_num() > 1e-3, (moved > 1e-3)[marked])


def test_squares_are_summed_row_by_row():
    values = torch.arange(24.0).reshape(1, 24)  # 4 rows of 6
    want = torch.tensor([[0 + 1 + 6 + 7, 2 + 3 + 8 + 9, 4 + 5 + 10 + 11, 62, 70, 78]])
    assert torch.equal(merged(values, (4, 6), 2), want.float())
