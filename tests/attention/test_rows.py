"""Rows of the prompt in blocks: the same numbers as at once, whatever the edits, and bounded memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from tests.contracts.support import STRONG, batch_of, close, logits, vlm_of
from vlmfix.attention import kernel, rows
from vlmfix.attention.edit import PromptReading, Rows, WeightEdit
from vlmfix.attention.session import edited
from vlmfix.decoders import Chain, DecodingPlan, Greedy, parse

ACT = STRONG["act"]
VAR = STRONG["var"].replace("moved_fraction=1", "moved_fraction=0.5")  # all of it, and the heads that gift sorts tie
CHAINS = {
    "search and edit": ACT,
    "two searches": f"{ACT}+{ACT},spared=first-sink",
    "all at once": STRONG["chain-attention"],
    "with edits of few rows": f"zerotuning:gain=20+{VAR}+{STRONG['gift']}+{ACT}+locore:strength=2",
    "with branches": f"{ACT}+vcd:plausibility=0",
}


@pytest.fixture
def seen(monkeypatch):
    """Small blocks; holds the largest number of weights that was in hand, and how many blocks there were."""
    monkeypatch.setattr(rows, "BLOCK", 4000)
    monkeypatch.setattr(kernel, "_whole", lambda *_: None)  # which needs no blocks
    found, original = [], rows.Block.output

    def output(block, *, reads):
        found.append((block.query.shape[0] * block.query.shape[1] * block.query.shape[2] * block.key.shape[2], block))
        return original(block, reads=reads)

    monkeypatch.setattr(rows.Block, "output", output)
    return found


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("name", CHAINS)
def test_blocks_change_nothing(family, name, seen, monkeypatch):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    in_blocks = logits(vlm, batch, CHAINS[name])
    assert any(block.sites[0].block > 1 for _, block in seen)
    monkeypatch.setattr(rows, "BLOCK", 1 << 30)
    close(in_blocks, logits(vlm, batch, CHAINS[name]))


def test_memory_grows_with_the_keys_and_not_with_their_square(seen):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    assert 2 * 8 * batch.length**2 > 10 * rows.BLOCK  # what all rows at once would take
    logits(vlm, batch, CHAINS["search and edit"], steps=1)
    assert max(weights for weights, _ in seen) <= rows.BLOCK


def test_without_blocks_the_numbers_are_the_same(monkeypatch):
    """A search and an edit in three families, one of them with rows that see keys behind them."""
    for family in ("llava", "qwen2_5_vl", "gemma3"):
        vlm = vlm_of(family)
        batch = batch_of(vlm)
        whole = logits(vlm, batch, ACT)
        with monkeypatch.context() as patched:
            patched.setattr(kernel, "_whole", lambda *_: None)
            in_blocks = logits(vlm, batch, ACT)
        close(whole, in_blocks)
        assert not torch.allclose(whole, logits(vlm, batch), atol=1e-3)


def test_a_block_holds_at_least_one_row(seen, monkeypatch):
    monkeypatch.setattr(rows, "BLOCK", 1)
    vlm = vlm_of("llava")
    batch = batch_of(vlm, [0])
    tiny = logits(vlm, batch, CHAINS["search and edit"], steps=1)
    monkeypatch.setattr(rows, "BLOCK", 1 << 30)
    close(tiny, logits(vlm, batch, CHAINS["search and edit"], steps=1))


@dataclass(frozen=True, eq=False, kw_only=True)
class Columns(PromptReading):
    """Sums attention to each key over the rows of a prompt, block by block."""

    rows: ClassVar[Rows] = "prompt"
    blockwise: ClassVar[bool] = True
    blocks: list = field(default_factory=list)

    def read(self, site, weights):
        if site.block == 0:
            self.blocks.clear()
        self.blocks.append((weights * site.acts[:, None, :, None]).sum(dim=2))


@dataclass(frozen=True, eq=False, kw_only=True)
class Halved(WeightEdit):
    rows: ClassVar[Rows] = "prompt"
    blockwise: ClassVar[bool] = True

    def weights(self, site, weights):
        return weights / 2


@dataclass(frozen=True, eq=False, kw_only=True)
class LastRow(PromptReading):
    rows: ClassVar[Rows] = "last"
    seen: list = field(default_factory=list)

    def read(self, site, weights):
        self.seen.append(weights[:, :, site.predicting])


@torch.no_grad()
@pytest.mark.parametrize("block", [4000, 1 << 30])
def test_readings_alone_and_behind_an_edit(block, monkeypatch):
    """Each reads every row once at its place; one that wants its rows at once gets them in the last block."""
    monkeypatch.setattr(rows, "BLOCK", block)
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    before, after, last = Columns(), Columns(), LastRow()
    for edits in ((before, last), (before, Halved(), after, last)):
        with edited(vlm, vlm.layout(batch), edits):
            vlm.model(**batch, use_cache=False)
        real = batch.attention_mask.sum(dim=1)[:, None].float()
        close(torch.stack(before.blocks).sum(dim=(0, 3)), real.expand(-1, 8))
    close(torch.stack(after.blocks).sum(dim=(0, 3)), real.expand(-1, 8) / 2)
    assert (len(before.blocks) > 1) == (block == 4000)
    whole, halved = last.seen[:3], last.seen[3:]
    close(torch.stack(whole).sum(dim=-1), torch.ones(3, 2, 8))
    close(torch.stack(halved).sum(dim=-1), torch.full((3, 2, 8), 0.5))


def test_every_token_of_a_prompt_is_edited_and_no_padding(monkeypatch):
    vlm = vlm_of("llava_next")  # its pictures hold tokens that are neither patches nor text
    batch = batch_of(vlm)
    acted = []

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Watch(Halved):
        def weights(self, site, weights):
            acted.append(torch.zeros_like(batch.attention_mask).index_add(1, site.queries[0], site.acts.long()))
            return weights

    class Watching(Greedy):
        def plan(self, vlm, batch, layout):
            return DecodingPlan(edits=(Watch(),))

    logits(vlm, batch, Chain(decoders=(Watching(), parse("greedy"))), steps=1)
    for rows_acted in acted:
        assert torch.equal(rows_acted, batch.attention_mask)
