"""A ViT's class token against timm's own attention maps, and where its patches lie in the picture."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from timm.utils import AttentionExtract

from tests.contracts.support import picture
from tests.decoders.made_vit import made_vit
from vlmfix.errors import DataError
from vlmfix.insight import vit
from vlmfix.insight.vit import load_vit

CPU = torch.device("cpu")
PICTURES = [picture(1, (40, 90)), picture(2, (64, 20)), picture(3, (32, 32))]


@pytest.mark.parametrize("changed", [{}, {"reg_tokens": 2}, {"qkv_bias": False, "pre_norm": True}], ids=str)
@pytest.mark.parametrize("together", [16, 2])
def test_maps_are_those_of_the_whole_attention(tmp_path, changed, together, monkeypatch):
    monkeypatch.setattr(vit, "TOGETHER", together)
    found = load_vit(str(made_vit(tmp_path / "v", **changed)), CPU)
    maps = found.maps(PICTURES)
    model = found.model
    for block in model.blocks:
        block.attn.fused_attn = False
    with torch.no_grad():
        extract = AttentionExtract(model, names=["blocks.0.attn.attn_drop", "blocks.1.attn.attn_drop"], method="hook")
        whole = extract(torch.stack([found.transform(shown) for shown in PICTURES]))
    load_vit.cache_clear()
    first, penultimate = (whole[name].sum(dim=1) for name in ("blocks.0.attn.attn_drop", "blocks.1.attn.attn_drop"))
    start = 1 + changed.get("reg_tokens", 0)
    for number, got in enumerate(maps):
        want = [first[number, 0], penultimate[number, 0], first[number, start:].sum(dim=0)]
        assert got.shape == (3, 4, 4)
        torch.testing.assert_close(got, torch.stack([row[start:].view(4, 4) for row in want]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("size", "spot", "cell"), [((96, 24), (84, 0, 95, 5), 3), ((24, 96), (0, 84, 5, 95), 12)])
def test_the_whole_picture_is_shown_and_patches_run_row_by_row(tmp_path, size, spot, cell):
    found = load_vit(str(made_vit(tmp_path / "v")), CPU)
    plain = Image.new("RGB", size, (90, 90, 90))
    spotted = plain.copy()
    spotted.paste((250, 0, 0), spot)
    pixels = torch.stack([found.transform(shown) for shown in (plain, spotted)])
    assert pixels.shape == (2, 3, 32, 32)
    with torch.no_grad():
        patches = found.model.patch_embed(pixels)
    assert (patches[0] - patches[1]).abs().sum(dim=-1).argmax() == cell


def test_a_name_is_loaded_once_and_its_digest_is_of_its_weights(tmp_path):
    one, other = (str(made_vit(tmp_path / name, depth=depth)) for name, depth in (("a", 3), ("b", 2)))
    assert load_vit(one, CPU) is load_vit(one, CPU)
    assert load_vit(one, CPU).digest() != load_vit(other, CPU).digest()
    assert load_vit(one, CPU).digest() == load_vit(str(made_vit(tmp_path / "c")), CPU).digest()


def test_what_is_no_vit_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot load the ViT 'no_such_model'"):
        load_vit("no_such_model", CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot load the ViT"):
        load_vit(str(tmp_path / "empty"), CPU)
    for name, changed in (("patches", {"class_token": False, "global_pool": "avg"}), ("shallow", {"depth": 1})):
        with pytest.raises(DataError, match="no plain ViT with a class token and two blocks"):
            load_vit(str(made_vit(tmp_path / name, **changed)), CPU)
