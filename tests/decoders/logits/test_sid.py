"""SID against its formula: whole sequences in two rows, of which one hides image tokens that its own step chose."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import batch_of, close, logits, method_of, picture, vlm_of
from tests.decoders.whole import QUESTION, STEPS, whole
from vlmfix.decoders import SID
from vlmfix.decoders.logits.sid import most_seen
from vlmfix.errors import IncompatibleDecodersError


class Second:
    """What the second row does in each layer, the slow way."""

    def __init__(self, layer, kept):
        self.layer, self.kept, self.hidden = layer, kept, None

    def __call__(self, here):
        if here.layer == self.layer:
            count = len(here.image)
            causal = torch.ones(count, count, dtype=torch.bool).tril()
            looks = here.scores.masked_fill(~causal, -torch.inf).softmax(dim=-1).mean(dim=0)  # (T, T)
            columns = here.image.nonzero().flatten().tolist()
            stay = max(round(self.kept * len(columns)), 1)
            first = int(here.last.nonzero()[0])
            self.hidden = torch.zeros(count, count, dtype=torch.bool)
            for row in range(count):
                least = sorted(columns, key=lambda c, row=row: float(looks[max(row, first), c]))[:stay]
                self.hidden[row, [c for c in columns if c not in least]] = True
        scores = here.scores
        if here.layer > self.layer:
            scores = scores.masked_fill(self.hidden, -torch.inf)
        return here.output(scores)


@pytest.mark.parametrize(("family", "layer", "kept"), [("llava", 0, 0.3), ("llava", 1, 0.5), ("qwen2_5_vl", 0, 0.2)])
def test_the_second_row_sees_what_it_looks_at_least(family, layer, kept):
    vlm = vlm_of(family)
    batch = vlm.encode([QUESTION], [[picture(5, (40, 60))]])
    found = logits(vlm, batch, SID(contrast=1.5, plausibility=0, kept=kept, layer=layer), steps=STEPS)[:, 0]
    said = found[:-1].clone()
    said[:, vlm.family.image_token(vlm.model.config)] = -torch.inf
    tokens = said.argmax(dim=-1)[None]
    clean = whole(vlm, batch, tokens, lambda here: here.output(here.scores))
    other = whole(vlm, batch, tokens, Second(layer, kept))
    assert (clean - other).abs().max() > 1e-3
    close(found, 2.5 * clean - 1.5 * other)


def test_a_picture_of_any_size_keeps_its_share_and_never_nothing():
    seen = torch.tensor([[0.1, 0.4, 0.2, 0.3, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2]])
    image = torch.tensor([[False, True, True, True, True], [True, True, False, False, False]])
    assert most_seen(seen, image, 0.5).tolist() == [
        [False, True, False, True, False],
        [False, True, False, False, False],
    ]
    assert most_seen(seen, image, 0.0).sum(dim=1).tolist() == [3, 1]
    assert not most_seen(seen, image, 1.0).any()


def test_a_layer_behind_which_none_is_left_is_refused():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    with pytest.raises(IncompatibleDecodersError, match="sid cannot act: layer 2 chooses what later layers hide"):
        method_of("sid:layer=2").plan(vlm, batch, vlm.layout(batch))
