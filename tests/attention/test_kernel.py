"""The kernel against slow float64 attention, on random tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import nn

from tests.attention.reference import attention as reference
from vlmfix.attention.edit import (
    BiasEdit,
    LayerSet,
    OutputEdit,
    ProductBias,
    PromptReading,
    Rows,
    ScoreEdit,
    WeightEdit,
)
from vlmfix.attention.kernel import HEADROOM, PLAN, attention
from vlmfix.attention.layers import LayerPlan
from vlmfix.attention.rows import Step
from vlmfix.errors import UnsupportedAttentionError, UsageError

B, H, G, T, D = 3, 6, 2, 7, 8
SCALE = 0.3


@dataclass(frozen=True, eq=False, kw_only=True)
class Bias(BiasEdit):
    table: torch.Tensor  # (H, K), another bias for every head and key

    def bias(self, site):
        # a position that moved all keys of a row alike would be lost in the softmax
        return self.table[None, :, None, : site.allowed.shape[-1]] * (1 + site.queries[:, None, :, None] * 0.1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Product(ProductBias):
    """The same for two heads in three, as a product; one key is hidden from rows that also see another."""

    def factors(self, site):
        rows = (1 + site.queries[:, None] * 0.1) * (torch.arange(H)[None, :, None] % 3 > 0)  # (1, H, R)
        keys = TABLE[:1, : site.allowed.shape[-1]].clone()
        keys[:, 4] = -torch.inf
        return rows, keys.expand(B, -1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Scores(ScoreEdit):
    def scores(self, site, scores):
        heads = torch.arange(1, H + 1)[None, :, None, None]
        return scores * (1 + 0.2 * heads) * torch.where(site.image_keys[:, None, None], 1.5, 1.0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Weights(WeightEdit):
    def weights(self, site, weights):
        return weights * 0.5 + 0.1  # puts weight on every key, masked ones too


@dataclass(frozen=True, eq=False, kw_only=True)
class Output(OutputEdit):
    def output(self, site, output):
        return output * torch.arange(1, H + 1)[None, None, :, None]


@dataclass(frozen=True, eq=False, kw_only=True)
class Shift(OutputEdit):
    rows: ClassVar[Rows] = "all"

    def output(self, site, output):
        return output + torch.arange(1, H + 1)[None, None, :, None] * (site.queries[:, :, None, None] + 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Look(PromptReading):
    seen: list = field(default_factory=list)

    def read(self, site, weights):
        self.seen.append((site, weights))


class Module(nn.Module):
    num_key_value_groups = H // G
    is_causal = True


def plan(edits, *, live, image):
    """Rows 3, 5 and 6 of the prompt are edited; row 5 only in the first sample."""
    rows = torch.tensor([3, 5, 6])
    which = torch.ones(B, 3, dtype=torch.bool)
    which[1:, 1] = False
    keys, text = (nn.functional.pad(mask, (0, HEADROOM)) for mask in (image, ~image))
    steps = tuple(Step(edit, which, live, keys, text, torch.arange(T + HEADROOM)[None] >= T) for edit in edits)
    return LayerPlan(layer=4, rows=rows, prompt=T, steps=steps)


def tensors(queries, keys, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, H, queries, D, generator=generator)
    key, value = (torch.randn(B, G, keys, D, generator=generator) for _ in range(2))
    return query, key, value


TABLE = torch.linspace(-1, 1, H * 12).view(H, 12)
LIVE = torch.tensor([True, True, False])
IMAGE = torch.zeros(B, T, dtype=torch.bool)
IMAGE[:, 1:3] = True
IMAGE[1, 3] = True

KINDS = {
    "bias": [Bias(table=TABLE)],
    "scores": [Scores()],
    "weights": [Weights()],
    "output": [Output()],
    "all": [Scores(), Bias(table=TABLE), Weights(), Output()],
    "bias+output": [Bias(table=TABLE), Output()],
}


def slow(kind, query, key, value, allowed, acts, positions):
    """The same edits in the reference; ``acts`` (B, Q) bool, ``positions`` (Q,) of the queries."""
    kinds = {type(edit) for edit in KINDS[kind]}
    shown = torch.nn.functional.pad(IMAGE, (0, key.shape[2] - T))

    def bias(b, h, q):
        row = TABLE[h, : key.shape[2]].double() * (1 + positions[q] * 0.1)
        return row if acts[b, q] else torch.zeros_like(row)

    def scores(b, h, q, row):
        return row * (1 + 0.2 * (h + 1)) * torch.where(shown[b], 1.5, 1.0) if acts[b, q] else row

    def weights(b, h, q, row):
        return row * 0.5 + 0.1 if acts[b, q] else row

    def output(b, h, q, vector):
        return vector * (h + 1) if acts[b, q] else vector

    return reference(
        query,
        key,
        value,
        allowed,
        SCALE,
        bias=bias if Bias in kinds else None,
        scores=scores if Scores in kinds else None,
        weights=weights if Weights in kinds else None,
        output=output if Output in kinds else None,
    )


def edited_rows(queries):
    acts = torch.zeros(B, queries, dtype=torch.bool)
    acts[:, [3, 6]] = True
    acts[0, 5] = True
    acts[:, T:] = True
    return acts & LIVE[:, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("capacity", [T, 12], ids=["dynamic", "static"])
def test_prefill(kind, masked, capacity):
    query, key, value = tensors(T, capacity)
    causal = torch.ones(T, capacity, dtype=torch.bool).tril()
    allowed = causal.expand(B, -1, -1).clone()
    if masked:
        allowed[1, :, 0] = False
        allowed[2, :, :2] = False
    module = Module()
    setattr(module, PLAN, plan(KINDS[kind], live=LIVE, image=IMAGE))
    mask = allowed[:, None] if masked else None
    got, _ = attention(module, query, key, value, mask, scaling=SCALE)
    want = slow(kind, query, key, value, allowed, edited_rows(T), range(T))
    sees = allowed.any(dim=-1)  # a padding query that sees nothing has no defined output
    torch.testing.assert_close(got.double()[sees], want[sees], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("masked", [False, True], ids=["unpadded", "padded"])
def test_decode(kind, static, masked):
    length, capacity = 9, 12 if static else 9
    query, key, value = tensors(1, capacity)
    allowed = (torch.arange(capacity) < length).expand(B, 1, -1).clone()
    if masked:
        allowed[1, :, 0] = False
    module = Module()
    setattr(module, PLAN, plan(KINDS[kind], live=LIVE, image=IMAGE))
    mask = allowed[:, None] if masked or static else None
    got, _ = attention(module, query, key, value, mask, scaling=SCALE)
    want = slow(kind, query, key, value, allowed, LIVE[:, None], [length - 1])
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def edited(edits, query, key, value, mask):
    module = Module()
    setattr(module, PLAN, plan(edits, live=LIVE, image=IMAGE))
    return attention(module, query, key, value, mask, scaling=SCALE)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", [T, 12], ids=["dynamic", "static"])
@pytest.mark.parametrize("queries", [T, T + 2], ids=["prompt", "without a cache"])
def test_an_edit_of_all_rows_comes_in_its_turn(kind, capacity, queries):
    """What a shift makes of the kind's own result, and what the kind makes of a shifted one."""
    query, key, value = tensors(queries, max(capacity, queries))
    allowed = torch.ones(queries, key.shape[2], dtype=torch.bool).tril().expand(B, -1, -1)
    acts = edited_rows(queries)
    want = slow(kind, query, key, value, allowed, acts, range(queries))
    shift = torch.arange(1, H + 1)[None, None, :, None] * torch.arange(1, queries + 1)[None, :, None, None]
    shift = shift * LIVE[:, None, None, None]  # (B, Q, H, 1)
    got = edited([*KINDS[kind], Shift()], query, key, value, None)
    torch.testing.assert_close(got.double(), want + shift, atol=1e-4, rtol=1e-5)
    got = edited([Shift(), *KINDS[kind]], query, key, value, None)
    gained = any(isinstance(edit, Output) for edit in KINDS[kind])
    gain = torch.where(acts[:, :, None, None], torch.arange(1, H + 1)[None, None, :, None], 1) if gained else 1
    torch.testing.assert_close(got.double(), want + shift * gain, atol=1e-4, rtol=1e-5)


def test_an_edit_of_all_rows_in_decoding():
    query, key, value = tensors(1, 9)
    allowed = torch.ones(B, 1, 9, dtype=torch.bool)
    want = slow("bias", query, key, value, allowed, LIVE[:, None], [8])
    want += 9 * torch.arange(1, H + 1)[None, None, :, None] * LIVE[:, None, None, None]
    got = edited([*KINDS["bias"], Shift()], query, key, value, None)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_a_reading_sees_the_prompts_weights_and_changes_no_bit():
    query, key, value = tensors(T, T)
    allowed = torch.ones(T, T, dtype=torch.bool).tril().expand(B, -1, -1).clone()
    allowed[2, :, 0] = False
    look = Look()
    got = edited([look], query, key, value, allowed[:, None])
    assert torch.equal(got, attention(Module(), query, key, value, allowed[:, None], scaling=SCALE)[0])
    ((site, weights),) = look.seen
    assert site.queries.tolist() == [[3, 5, 6]]
    assert site.queries[0, site.predicting] == T - 1
    scores = query.double() @ key.double().repeat_interleave(H // G, dim=1).transpose(2, 3) * SCALE
    want = scores.masked_fill(~allowed[:, None], float("-inf")).softmax(-1)[:, :, [3, 5, 6]]
    torch.testing.assert_close(weights.double(), want, atol=1e-6, rtol=1e-5)
    edited([look], query[:, :, :1], key, value, None)
    assert len(look.seen) == 1


def test_a_reading_reads_in_its_turn():
    query, key, value = tensors(T, T)
    first, last = Look(), Look()
    edited([first, Weights(), last], query, key, value, None)
    before, after = first.seen[0][1], last.seen[0][1]
    site = last.seen[0][0]
    want = torch.where(site.acts[:, None, :, None], (before * 0.5 + 0.1) * site.allowed, before)
    torch.testing.assert_close(after, want)


def test_what_is_known_of_samples_reaches_their_beams_and_no_contrast_row():
    look = Look()
    edited([look], *tensors(T, T), None)  # two live rows, two beams of one sample, and a contrast row
    assert look.seen[0][0].spread(torch.tensor([[5.0, 6.0]])).tolist() == [[5, 6], [5, 6], [0, 0]]
    assert look.seen[0][0].spread(torch.tensor([3, 4])).tolist() == [3, 4, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_past_the_prompt_are_edited_in_a_pass_without_a_cache(kind):
    query, key, value = tensors(T + 2, T + 2)
    allowed = torch.ones(T + 2, T + 2, dtype=torch.bool).tril().expand(B, -1, -1)
    module = Module()
    setattr(module, PLAN, plan(KINDS[kind], live=LIVE, image=IMAGE))
    got, _ = attention(module, query, key, value, None, scaling=SCALE)
    want = slow(kind, query, key, value, allowed, edited_rows(T + 2), range(T + 2))
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_bias_on_sdpa_equals_the_same_bias_on_materialised_scores():
    class AsScores(ScoreEdit):
        def scores(self, site, scores):
            return scores + KINDS["bias"][0].bias(site)

    query, key, value = tensors(T, T)
    outputs = []
    for edit in (KINDS["bias"][0], AsScores()):
        module = Module()
        setattr(module, PLAN, plan([edit], live=LIVE, image=IMAGE))
        outputs.append(attention(module, query, key, value, None, scaling=SCALE)[0])
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("capacity", [T, 12], ids=["dynamic", "static"])
def test_a_product_is_the_same_bias_without_a_row_computed_anew(kind, masked, capacity, monkeypatch):
    """Two of them at once, and an edit of outputs behind them, against the biases in float64."""
    query, key, value = (part.to(kind) for part in tensors(T, capacity))
    allowed = torch.ones(T, capacity, dtype=torch.bool).tril().expand(B, -1, -1).clone()
    if masked:
        allowed[1, :, 0] = False
        allowed[2, :, :2] = False
    acts = edited_rows(T)
    keys = TABLE[0, :capacity].double()
    keys[4] = -torch.inf

    def bias(b, h, q):
        return 2 * keys * (1 + q * 0.1) if acts[b, q] and h % 3 else torch.zeros_like(keys)

    def output(b, h, q, vector):
        return vector * (h + 1) if acts[b, q] else vector

    want = reference(query, key, value, allowed, SCALE, bias=bias, output=output)
    module = Module()
    setattr(module, PLAN, plan([Product(), Product(), Output()], live=LIVE, image=IMAGE))
    monkeypatch.setattr("vlmfix.attention.kernel.Block", None)
    got, _ = attention(module, query, key, value, allowed[:, None] if masked else None, scaling=SCALE)
    sees = allowed.any(dim=-1)
    accuracy = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[kind]
    torch.testing.assert_close(got.double()[sees], want[sees], atol=accuracy, rtol=accuracy)


def test_prefill_memory_grows_with_the_prompt_and_not_with_its_square():
    """Counts the largest tensor that the edited pass makes beside SDPA's own."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.numel())
            return result

    sizes = []
    for length in (512, 1024):
        image = torch.zeros(1, length, dtype=torch.bool)
        image[:, 1:-10] = True
        rows = torch.arange(length - 10, length)
        module = Module()
        every = torch.ones(1, 10, dtype=torch.bool)
        step = Step(Weights(), every, torch.ones(1, dtype=torch.bool), image, ~image, torch.zeros_like(image))
        setattr(module, PLAN, LayerPlan(layer=0, rows=rows, prompt=length, steps=(step,)))
        query, key = torch.randn(1, H, length, D), torch.randn(1, G, length, D)
        with Largest() as largest:
            attention(module, query, key, key, None, scaling=SCALE)
        sizes.append(largest.size)
    assert sizes[1] <= 2 * sizes[0]
    assert sizes[1] < 1024 * 1024


def test_a_module_without_a_plan_gets_sdpa():
    query, key, value = tensors(T, T)
    allowed = torch.ones(T, T, dtype=torch.bool).tril().expand(B, -1, -1)
    got, _ = attention(Module(), query, key, value, None, scaling=SCALE)
    torch.testing.assert_close(got.double(), reference(query, key, value, allowed, SCALE), atol=1e-5, rtol=1e-5)


def test_a_rolled_window_is_refused():
    query, key, value = tensors(1, T)
    module = Module()
    module.sliding_window = T
    setattr(module, PLAN, plan(KINDS["bias"], live=LIVE, image=IMAGE))
    with pytest.raises(UnsupportedAttentionError, match="sliding window of 7"):
        attention(module, query, key, value, None)


def test_a_layer_on_another_device_is_refused():
    module, elsewhere = Module(), plan(KINDS["bias"], live=LIVE, image=IMAGE)
    elsewhere.rows = elsewhere.rows.to("meta")
    setattr(module, PLAN, elsewhere)
    with pytest.raises(UnsupportedAttentionError, match="layer 4 is on cpu and the model's inputs are on meta"):
        attention(module, *tensors(T, T), None)


def test_another_number_of_rows_is_refused():
    query, key, value = tensors(1, T)
    module = Module()
    setattr(module, PLAN, plan(KINDS["bias"], live=LIVE, image=IMAGE))
    with pytest.raises(UnsupportedAttentionError, match="made for 3 rows, the model runs 2"):
        attention(module, query[:2], key[:2], value[:2], None)


@pytest.mark.parametrize(
    ("spec", "count", "layers"),
    [
        ("all", 3, {0, 1, 2}),
        ("2:-1", 6, {2, 3, 4}),
        ("9:15", 12, {9, 10, 11}),
        ("-1", 4, {3}),
        ("0/2:4/-1", 8, {0, 2, 3, 7}),
        ("7", 4, set()),
        (":", 2, {0, 1}),
    ],
)
def test_layer_sets(spec, count, layers):
    assert LayerSet(spec).resolve(count) == layers


@pytest.mark.parametrize("spec", ["", "2-5", "a", "1//2", "1:2:3", "1,2"])
def test_layer_sets_that_make_no_sense(spec):
    with pytest.raises(UsageError, match="not understood"):
        LayerSet(spec)
