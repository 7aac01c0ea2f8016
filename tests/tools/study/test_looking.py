"""Where a model looks: shares that add up, for either embedded model, which is left as it was."""

from __future__ import annotations

import pytest

from tools.study.embedded import draw
from tools.study.looking import looking
from vlmfix.generation import load

CAPTION = "There is a cup on the left."


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen"])
def test_shares_of_attention_add_up_and_the_model_is_left_as_it_was(name: str) -> None:
    vlm = load(name, device="cpu")
    parts = (vlm.model.config.text_config, vlm.model.config.vision_config)
    before = [part._attn_implementation for part in parts]
    found = looking(vlm, draw(1, 31, "cpu").pictures, [CAPTION])
    mass = found["mass"]
    assert [sum(layer) for layer in zip(*mass.values(), strict=True)] == pytest.approx([1] * 8, abs=1e-3)
    assert max(mass["image"]) > 0.4  # a caption is written from the picture
    assert all(
        0 < first < all_before for first, all_before in zip(found["first token"], mass["beginning"], strict=True)
    )
    assert [part._attn_implementation for part in parts] == before
    width = vlm.model.config.text_config.hidden_size
    assert all(1 <= ratio <= width**0.5 for layers in found["largest"].values() for ratio in layers)
