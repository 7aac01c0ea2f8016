"""VAF against the slow way of its formula."""

from __future__ import annotations

import pytest
import torch

from tests.contracts.support import close
from tests.decoders.whole import both_ways
from vlmfix.decoders import VAF
from vlmfix.decoders.attention.vaf import middle


def scaled(image, system, layers, *, safe):
    def edit(here):
        if here.layer not in layers:
            return here.output(here.scores)
        factor = 1 + (image - 1) * here.image.double() + (system - 1) * here.before.double()
        new = here.scores + (factor - 1) * here.scores.abs() if safe else factor * here.scores
        return here.output(torch.where(here.text[:, None], new, here.scores))

    return edit


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("preset", ["safe", "official-code"])
def test_scores_of_text_rows_are_scaled(family, preset):
    safe = preset == "safe"
    method = VAF(preset=preset, image=2, system=0.3, layers=":2")
    found, expected = both_ways(method, scaled(2, 0.3, (0, 1), safe=safe), family)
    close(found, expected)
    for other in (scaled(2, 0.3, (0, 1), safe=not safe), scaled(2, 1, (0, 1), safe=safe)):
        assert (expected - both_ways(method, other, family)[1]).abs().nan_to_num().max() > 1e-3


@pytest.mark.parametrize(("count", "layers"), [(32, "9:15"), (8, "2:4"), (28, "8:13"), (3, "1:2"), (1, "0:1")])
def test_the_layers_scale_with_the_depth(count, layers):
    assert str(middle(count)) == layers
    assert middle(count).resolve(count)
