"""Attention with edits, written slowly: float64, one row, head and query at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(query, key, value, allowed, scale, *, bias=None, scores=None, weights=None, output=None) -> Tensor:
    """Softmax attention with one function per stage.

    Args:
        query: (B, H, Q, D).
        key: (B, G, K, D).
        value: (B, G, K, D).
        allowed: (B, Q, K) bool.
        scale: Factor on the scores.
        bias: f(b, h, q) -> (K,) added to the scores.
        scores: f(b, h, q, row) -> new row of scores.
        weights: f(b, h, q, row) -> new row of weights.
        output: f(b, h, q, vector) -> new head output.

    Returns:
        (B, Q, H, D) float64.
    """
    rows, heads, queries, width = query.shape
    group = heads // key.shape[1]
    result = torch.zeros(rows, queries, heads, width, dtype=torch.float64)
    for b in range(rows):
        for h in range(heads):
            keys, values = key[b, h // group].double(), value[b, h // group].double()
            for q in range(queries):
                row = keys @ query[b, h, q].double() * scale
                row = row if scores is None else scores(b, h, q, row)
                row = row if bias is None else row + bias(b, h, q)
                row = row.masked_fill(~allowed[b, q], float("-inf")).softmax(dim=0)
                row = row if weights is None else weights(b, h, q, row) * allowed[b, q]
                vector = row @ values
                result[b, q, h] = vector if output is None else output(b, h, q, vector)
    return result
