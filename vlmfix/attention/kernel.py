"""Computes attention with edits, in the one attention function that vlmfix registers.

A plan lives as an attribute on each edited attention module, and only there: an attribute can be traced by
``torch.compile`` and leaves nothing behind. A module without one gets plain SDPA.

Cost: bias and output edits stay on SDPA. Score and weight edits, and any edit in prefill, recompute only the query
rows that they edit and overwrite their output, so memory grows with K and not with K squared. Edits of every row of the
prompt come in blocks of rows for the same reason. Nothing is recomputed for output edits of all rows, nor for biases
that are products of a row's and a key's number. A cache edit costs one row of weights in each decoding step.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vlmfix.attention.edit import (
    BiasEdit,
    CacheEdit,
    Column,
    ColumnReading,
    OutputEdit,
    PartEdit,
    ProductBias,
    PromptCacheEdit,
    ResidualEdit,
    ScoreEdit,
    Site,
    SplitEdit,
    WeightEdit,
)
from vlmfix.attention.layers import LayerPlan
from vlmfix.attention.rows import Block, Step, chosen, kept, read, total_bias
from vlmfix.attention.whole import ALIGNED, Whole
from vlmfix.errors import UnsupportedAttentionError, WindowError
from vlmfix.upstream import attention as upstream
from vlmfix.upstream.compiling import compiled, of_any_size

NAME = "vlmfix"
"""Name of the attention function in transformers' registries."""
HEADROOM = 65536
"""Keys past the prompt for which masks are kept ready, so that a decoding step takes a view and pads nothing."""
STRONGEST = 1e4
"""Size of a bias that stands for an infinite one, where 0 times infinity would be no number."""
PLAN = "_vlmfix_plan"
"""Attribute of an attention module, and of its layer, that holds the plan."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Computes SDPA with the edits of the module's plan.

    Args:
        module: Attention module of the text decoder.
        query: (B, H, Q, D) after rotary embedding.
        key: (B, G, K, D), cache included; K is the capacity with a static cache.
        value: (B, G, K, D).
        attention_mask: (B, 1, Q, K) bool, True where a query may look, or None when that is plain causality.
        scaling: Factor on the scores; None is 1 / sqrt(D).
        dropout: Passed to SDPA.
        **kwargs: Passed to SDPA.

    Returns:
        (B, Q, H, D) head outputs, and None for the weights.

    Raises:
        UnsupportedAttentionError: The keys cannot be told apart (a rolled sliding window, a chunked prompt).
    """
    plan: LayerPlan | None = getattr(module, PLAN, None)
    if plan is None:
        plain = upstream.sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return plain, None
    plan.acted = True
    _check_window(module, query, key)
    hidden, plan.hidden = plan.hidden, None
    call = Call(
        module=module,
        query=query,
        key=key,
        value=value,
        mask=attention_mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        hidden=hidden,
        kwargs=kwargs,
    )
    return (_prefill(plan, call) if query.shape[2] > 1 else _decode(plan, call)), None


@dataclass(frozen=True, eq=False)
class Call:
    """Holds the arguments that transformers gave the attention function; see ``attention``."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    module: nn.Module | None = None
    hidden: Tensor | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def of(self, queries: slice, keys: int) -> Call:
        """Returns the call for some of its queries, over the first ``keys`` keys."""
        return replace(
            self,
            query=self.query[:, :, queries],
            key=self.key[:, :, :keys],
            value=self.value[:, :, :keys],
            mask=None if self.mask is None else self.mask[:, :, queries, :keys],
            hidden=None if self.hidden is None else self.hidden[:, queries],
        )

    def sdpa(self, **more: Any) -> Tensor:
        """Computes plain SDPA of all rows, (B, Q, H, D)."""
        if self.module is None:
            raise RuntimeError("SDPA is called by a module")
        return upstream.sdpa(
            self.module, self.query, self.key, self.value, self.mask, scaling=self.scale, **more, **self.kwargs
        )


def _prefill(plan: LayerPlan, call: Call) -> Tensor:
    if plan.rows.device != call.query.device:
        raise UnsupportedAttentionError(
            f"layer {plan.layer} is on {call.query.device} and the model's inputs are on {plan.rows.device}",
            "load the model onto one device, which edits of attention need",
        )
    length = plan.start + call.query.shape[2]
    if length < plan.prompt:
        raise UnsupportedAttentionError(
            f"a pass over {length} tokens of a prompt of {plan.prompt}",
            "attention edits need the prompt in one piece: no chunked prefill",
        )
    if (plan.stores or plan.rewrites) and length > plan.prompt:
        return _one_by_one(plan, call, length)
    rows = plan.rows
    if length > plan.prompt:  # a pass without a cache: rows past the prompt are decode rows, all edited
        rows = torch.cat([rows, torch.arange(plan.prompt, length, device=rows.device)])
    own = rows - plan.start  # (R,) among the queries of this pass
    every = _every(call, length)
    whole = _whole(plan, call, length)
    products = plan.products and length == plan.prompt
    some = rows[None], every[1] if products or whole else _allowed(call, own, length)
    sites = [_site(plan, step, call, length, *(every if step.edit.rows == "all" else some)) for step in plan.steps]
    plan.sites = sites if plan.steers else None
    kept = _rewritten(plan, sites, call, length) if plan.rewrites else None
    if kept is not None and any(step.edit.predicts for step in plan.steps if isinstance(step.edit, PromptCacheEdit)):
        if rows.shape[0] == 0:
            last = kept.of(slice(-1, None), length).sdpa()
            output = torch.cat([call.sdpa()[:, :-1], last], dim=1)
        else:  # in this order, so that readings keep what they see of the prompt as it was
            last = _attended(plan, sites, kept, own, some[1], length)[:, -1:]
            output = torch.cat([_attended(plan, sites, call, own, some[1], length)[:, :-1], last], dim=1)
    else:
        output = _attended(plan, sites, call, own, some[1], length)
    if kept is not None:
        _keep_prompt(call, kept)
    for step, site in zip(plan.steps, sites, strict=True):
        if isinstance(step.edit, CacheEdit):
            step.edit.begin(site)
    return _outputs(plan, sites, output, own)


def _attended(plan: LayerPlan, sites: list[Site], call: Call, own: Tensor, allowed: Tensor, length: int) -> Tensor:
    """Computes the prompt's attention with all edits of scores and weights, (B, Q, H, D)."""
    if own.shape[0] == 0:
        return call.sdpa()
    if plan.products and length == plan.prompt:
        return _with_products(plan, sites, call, own)
    if whole := _whole(plan, call, length):
        return _in_parts(plan, sites, call.sdpa(), whole, own)
    return _weighted(plan, sites, call, call.sdpa(), own, allowed)


def _rewritten(plan: LayerPlan, sites: list[Site], call: Call, length: int) -> Call:
    """Returns the call over what edits keep of the prompt's keys and values, which are copies."""
    columns = Column(call.key[:, :, :length], call.value[:, :, :length])
    for step, site in zip(plan.steps, sites, strict=True):
        if isinstance(step.edit, PromptCacheEdit):
            live = step.live[:, None, None, None]
            new = step.edit.kept(site, columns)
            columns = Column(
                torch.where(live, new.keys.to(columns.keys.dtype), columns.keys),
                torch.where(live, new.values.to(columns.values.dtype), columns.values),
            )
    rest = call.key.shape[2] - length  # the free room of a static cache
    if rest:
        columns = Column(
            torch.cat([columns.keys, call.key[:, :, length:]], dim=2),
            torch.cat([columns.values, call.value[:, :, length:]], dim=2),
        )
    return replace(call, key=columns.keys, value=columns.values)


def _keep_prompt(call: Call, kept: Call) -> None:
    """Writes what is kept of the prompt into the cache, whose own memory the keys and values are."""
    _refuse_gradients(call)
    call.key.copy_(kept.key)
    call.value.copy_(kept.value)


def _one_by_one(plan: LayerPlan, call: Call, length: int) -> Tensor:
    """Computes a pass without a cache, (B, Q, H, D), row by row behind the prompt: each sees what edits kept."""
    key, value = call.key.clone(), call.value.clone()  # which the edits write into
    whole = replace(call, key=key, value=value)
    outputs = [_prefill(plan, whole.of(slice(0, plan.prompt), plan.prompt))]
    outputs += [_decode(plan, whole.of(slice(end - 1, end), end)) for end in range(plan.prompt + 1, length + 1)]
    if plan.steers:
        rows = _every(call, length)
        plan.sites = [_site(plan, step, call, length, *rows) for step in plan.steps]
    return torch.cat(outputs, dim=1)


def _with_products(plan: LayerPlan, sites: list[Site], call: Call, own: Tensor) -> Tensor:
    """Computes SDPA of all rows, (B, Q, H, D), each product of a row's and a key's number as one more dimension."""
    kind, size = call.query.dtype, call.query.shape[-1]
    exact = torch.promote_types(kind, torch.float32)
    most = min(STRONGEST, torch.finfo(kind).max * call.scale / 2)
    factors: list[tuple[Tensor, Tensor]] = []
    for step, site in zip(plan.steps, sites, strict=True):
        if isinstance(step.edit, ProductBias):
            rows, keys = step.edit.factors(site)
            rows = torch.where(site.acts[:, None], rows, 0.0).to(kind)  # (B, 1 or H, R)
            keys = keys.to(exact).clamp(-most, most) / call.scale  # (B, K)
            factors.append((rows, keys.to(kind)))
    wider = -(-len(factors) // ALIGNED) * ALIGNED
    query, key, value = (pad(part, (0, wider)) for part in (call.query, call.key, call.value))
    for place, (rows, keys) in enumerate(factors, size):
        query[:, :, own, place] = rows.expand(-1, query.shape[1], -1)
        key[:, :, : keys.shape[1], place] = keys[:, None]
    return replace(call, query=query, key=key, value=value).sdpa()[..., :size]


def _whole(plan: LayerPlan, call: Call, length: int) -> Whole | None:
    """Returns the attention of a whole pass for edits that need no weights; None if they do, or gradients are off."""
    queries = call.query.shape[2]
    causal = call.mask is None and queries == length
    if not plan.parts or not (causal or call.mask is not None):
        return None
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return None  # no gradient
    mask = None if call.mask is None else call.mask[..., :length].bool()
    return Whole(call.query, call.key[:, :, :length], call.value[:, :, :length], mask, call.scale)


def _in_parts(plan: LayerPlan, sites: list[Site], output: Tensor, whole: Whole, own: Tensor) -> Tensor:
    """Lets columns be read, and changes the parts of ``output`` (B, Q, H, D) that edits of the prompt's rows want."""
    for step, site in zip(plan.steps, sites, strict=True):
        rows = torch.zeros(output.shape[:2], dtype=torch.bool, device=output.device)  # (B, Q)
        if isinstance(step.edit, ColumnReading):
            rows[:, own] = step.edit.counts(site)
            step.edit.add(site, whole.column_sums(rows), whole.seeing(rows))
        elif isinstance(step.edit, PartEdit):
            rows[:, own] = site.acts
            apart = step.edit.keys(site)
            others, rest, own_share = whole.without(apart)
            factor, of_others = step.edit.factors(own_share, rest)
            new = (factor * (output - others) + of_others * others).to(output.dtype)
            changes = rows[:, :, None] & apart.any(dim=-1)[:, None]  # (B, Q, H)
            output = torch.where(changes[..., None], new, output)
    return output


def _allowed(call: Call, own: Tensor, length: int) -> Tensor:
    """Returns the keys that some query rows of the pass may see, (1 or B, 1, R, K) bool; ``own`` (R,)."""
    if call.mask is None:
        start = length - call.query.shape[2]
        return (torch.arange(length, device=own.device) <= (own + start)[:, None])[None, None]  # (1, 1, R, K)
    return call.mask[:, :, own, :length].bool()


def _every(call: Call, length: int) -> tuple[Tensor, Tensor]:
    """Returns the positions of all rows in prefill, (1, Q), and the keys the last may see, (1 or B, 1, 1, K)."""
    last = torch.tensor([call.query.shape[2] - 1], device=call.query.device)
    return torch.arange(length, device=call.query.device)[None], _allowed(call, last, length)


def _weighted(plan: LayerPlan, sites: list[Site], call: Call, output: Tensor, own: Tensor, allowed: Tensor) -> Tensor:
    """Recomputes the rows that bias, score and weight edits change or readings read; returns (B, Q, H, D)."""
    changes = (BiasEdit, ScoreEdit, WeightEdit, SplitEdit)
    acts = [site.acts for site, step in zip(sites, plan.steps, strict=True) if isinstance(step.edit, changes)]
    if not acts and not plan.reads:
        return output
    length = allowed.shape[-1]
    key, value = call.key[:, :, :length], call.value[:, :, :length]  # a static cache holds more, to the right
    blocks = Block(call.query[:, :, own], key, value, allowed, call.scale, plan.steps, sites).split()
    if plan.reads and (len(blocks) > 1 or not acts):
        read(plan.steps, blocks)
    if not acts:
        return output
    new = torch.cat([block.output(reads=len(blocks) == 1) for block in blocks], dim=1)  # (B, R, H, D)
    touched = torch.stack(acts).any(dim=0)[:, :, None, None]  # (B, R, 1, 1)
    return output.index_copy(1, own, torch.where(touched, new, output[:, own]))


def _decode(plan: LayerPlan, call: Call) -> Tensor:
    if plan.fused is not None and call.mask is not None:
        return _decode_fused(plan, plan.fused, call, call.mask)
    queries, allowed = _newest(call)
    sites = [_site(plan, step, call, call.key.shape[2], queries, allowed) for step in plan.steps]
    plan.sites = sites if plan.steers else None
    block = Block(call.query, call.key, call.value, allowed, call.scale, plan.steps, sites)
    weights = block.weights(reads=False) if plan.materialises or plan.stores else None
    if weights is not None and plan.materialises:
        output = block.outputs(weights)
    else:
        bias = total_bias(plan.steps, sites)
        output = call.sdpa() if bias is None else call.sdpa(position_bias=bias.to(call.query.dtype))
    if weights is not None and plan.stores:
        _store(call, queries, _kept(plan.steps, sites, weights, call.key, call.value, queries))
    return _outputs(plan, sites, output).contiguous()


def _kept(
    steps: tuple[Step, ...], sites: list[Site], weights: Tensor, key: Tensor, value: Tensor, queries: Tensor
) -> Column:
    """Computes the key and value that the edits keep of a decoding step's token."""
    column = queries[0]  # (1,), the same in all rows, whose prompts are padded on the left
    newest, before = (Column(key.index_select(2, at), value.index_select(2, at)) for at in (column, column - 1))
    return kept(steps, sites, weights, newest, before)


def _store(call: Call, queries: Tensor, column: Column) -> None:
    """Writes what is kept of the newest token into the cache, whose own memory the keys and values are."""
    _refuse_gradients(call)
    call.key.index_copy_(2, queries[0], column.keys)
    call.value.index_copy_(2, queries[0], column.values)


def _refuse_gradients(call: Call) -> None:
    if call.key.requires_grad or call.value.requires_grad:
        raise UnsupportedAttentionError(
            "gradients are wanted through a KV cache that is edited", "run the model under torch.no_grad()"
        )


def _newest(call: Call) -> tuple[Tensor, Tensor]:
    """Returns the newest token's place among the keys, (1 or B, 1), and the keys it may see, (1 or B, 1, 1, K)."""
    length, device = call.key.shape[2], call.key.device
    if call.mask is None:
        queries = torch.full((1, 1), length - 1, device=device)
        return queries, torch.ones((1, 1, 1, length), dtype=torch.bool, device=device)
    allowed = call.mask[:, :1, -1:].bool()  # (B, 1, 1, K)
    # With a static cache K is the capacity: the last key that the query may see is its own.
    return length - 1 - allowed[:, 0, :, :].int().flip(-1).argmax(-1), allowed


def _decode_fused(plan: LayerPlan, kind: Hashable, call: Call, mask: Tensor) -> Tensor:
    query, key = of_any_size(call.query, 0), of_any_size(call.key, 0, 2)
    value, mask = of_any_size(call.value, 0, 2), of_any_size(mask, 0, 3)
    if plan.steers:
        place = _newest(call)
        plan.sites = [_site(plan, step, call, key.shape[2], *place) for step in plan.steps]
    if plan.materialises or plan.biases or plan.stores:
        row: tuple[Tensor, Column | None] = compiled(_fused_row, kind)(plan.steps, query, key, value, mask, call.scale)
        if row[1] is not None:
            _store(call, _newest(call)[0], row[1])
        return row[0]
    if not any(isinstance(step.edit, OutputEdit) for step in plan.steps):
        return call.sdpa().contiguous()
    output = of_any_size(call.sdpa(), 0)
    new: Tensor = compiled(_fused_outputs, kind)(plan.steps, query, key, value, mask, call.scale, output)
    return new


def _fused_row(
    steps: tuple[Step, ...], query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Column | None]:
    """Computes the head outputs of a decoding step, (B, 1, H, D), from tensors alone, without the layer's number.

    It returns beside them what cache edits keep of the newest token.
    """
    call = Call(query=query, key=key, value=value, mask=mask, scale=scale)
    plan = LayerPlan(layer=None, rows=query, prompt=0, steps=steps)
    queries, allowed = _newest(call)
    sites = [_site(plan, step, call, key.shape[2], queries, allowed) for step in steps]
    block = Block(query, key, value, allowed, scale, steps, sites)
    weights = block.weights(reads=False)
    output = _outputs(plan, sites, block.outputs(weights)).contiguous()
    return output, _kept(steps, sites, weights, key, value, queries) if plan.stores else None


def _fused_outputs(
    steps: tuple[Step, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    output: Tensor,
) -> Tensor:
    """Applies output edits to SDPA's ``output`` (B, 1, H, D) of a decoding step, without the layer's number."""
    call = Call(query=query, key=key, value=value, mask=mask, scale=scale)
    plan = LayerPlan(layer=None, rows=query, prompt=0, steps=steps)
    queries, allowed = _newest(call)
    sites = [_site(plan, step, call, key.shape[2], queries, allowed) for step in steps]
    return _outputs(plan, sites, output).contiguous()


def _site(plan: LayerPlan, step: Step, call: Call, length: int, queries: Tensor, allowed: Tensor) -> Site:
    rows, heads, count, _ = call.query.shape
    if rows != step.live.shape[0]:
        raise UnsupportedAttentionError(
            f"the edits were made for {step.live.shape[0]} rows, the model runs {rows}",
            "with beam search, give num_beams to decoder.applied(...)",
        )
    acts = step.live[:, None]  # (B, 1)
    if count > 1 and step.edit.rows == "all":
        acts = acts.expand(-1, length)  # (B, Q)
    elif count > 1:
        later = acts.expand(-1, queries.shape[1] - step.prompt_rows.shape[1])
        acts = torch.cat([step.prompt_rows & acts, later], dim=1)  # (B, R)
    return Site(
        number=plan.layer,
        heads=heads,
        tokens=plan.prompt,
        prefill=count > 1,
        queries=queries,
        allowed=allowed,
        image_keys=step.image_keys[:, :length],
        text_keys=step.text_keys[:, :length],
        answer_keys=step.answer_keys[:, :length],
        acts=acts,
        live=step.live_rows,
        hidden=call.hidden,
        memory=step.memory,
    )


def _outputs(plan: LayerPlan, sites: list[Site], output: Tensor, own: Tensor | None = None) -> Tensor:
    """Applies output edits; in prefill ``own`` (R,) are the rows for edits that do not act on all rows."""
    for step, site in zip(plan.steps, sites, strict=True):
        if not isinstance(step.edit, OutputEdit):
            continue
        acts = site.acts[:, :, None, None]
        if own is None or step.edit.rows == "all":
            output = chosen(step, site, acts, step.edit.output(site, output).to(output.dtype), output)
        elif own.shape[0] > 0:
            before = output[:, own]  # (B, R, H, D)
            new = chosen(step, site, acts, step.edit.output(site, before).to(output.dtype), before)
            output = output.index_copy(1, own, new)
    return output


def steered(plan: LayerPlan, place: str, stream: Tensor, entered: Tensor | None = None) -> Tensor:
    """Applies the residual edits of a place to what comes out there.

    Args:
        plan: The layer's plan, whose attention has been computed.
        place: See ``ResidualEdit``.
        stream: (B, Q, hidden size).
        entered: (B, Q, hidden size), what an MLP made it of.

    Returns:
        (B, Q, hidden size), in the type of ``stream``.
    """
    for step, site in zip(plan.steps, plan.sites or (), strict=False):
        if isinstance(step.edit, ResidualEdit) and step.edit.place == place:
            own = site if entered is None else replace(site, entered=entered)
            new = step.edit.stream(own, stream).to(stream.dtype)
            stream = torch.where(site.acts[..., None], new, stream) if step.mixed else new
    return stream


def _check_window(module: nn.Module, query: Tensor, key: Tensor) -> None:
    window = upstream.window(module)
    if window is not None and key.shape[2] >= window:
        raise WindowError(
            f"{key.shape[2]} keys reach the sliding window of {window} in layer {getattr(module, 'layer_idx', '?')}",
            "shorten the prompt, or edit only layers without a window (layers=...)",
        )
    if query.shape[2] > 1 and key.shape[2] < query.shape[2]:
        raise UnsupportedAttentionError("there are fewer keys than queries", "edits need a text decoder with a cache")
