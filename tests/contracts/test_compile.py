"""Compiled decoding gives the eager logits, and a session costs no more graphs than the plain model.

That is one, but for Gemma 3: its sliding cache counts tokens in Python, which costs the plain model a second one too.
"""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig

from tests.contracts.support import PICTURES, PROMPTS, STRONG, batch_of, close, few, logits, method_of, plain, vlm_of
from tests.tiny import TINY

GRAPHS: list[int] = []
SESSIONS = (("qwen2_5_vl", "chain"), ("gemma3", "locore"))
"""Edits and branches, and edits beside a sliding window."""


def count(graph, inputs):
    """A backend that counts the graphs it is given and runs them as they are."""
    GRAPHS.append(len(graph.graph.nodes))
    return graph.forward


def compiled(vlm, batch, spec, **options):
    config = CompileConfig(fullgraph=True, backend=count, mode=None)
    config._compile_all_devices = True
    return logits(vlm, batch, spec, cache_implementation="static", compile_config=config, steps=4, **options)


@pytest.fixture(scope="module", autouse=True)
def _nothing_left():
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch.compiler.reset()
    GRAPHS.clear()


def forget_compiled(vlm):
    for name in ("_compiled_call", "_last_compile_config", "_previous_max_cache_length"):
        vlm.model.__dict__.pop(name, None)


ALIKE = {name: spec for name, spec in STRONG.items() if method_of(spec).compiles}
"""Methods of which all steps are one computation; transformers is told not to compile the others."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in few(ALIKE) else pytest.mark.product) for name in ALIKE]
)
def test_every_kind_of_method_is_one_graph_and_gives_the_eager_logits(name):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    forget_compiled(vlm)
    try:
        first = compiled(vlm, batch, STRONG[name])
        assert len(GRAPHS) == 1
        second = compiled(vlm, batch, STRONG[name])
        assert len(GRAPHS) == 1
    finally:
        forget_compiled(vlm)
    close(first, logits(vlm, batch, STRONG[name], steps=4))
    close(second, first, 0)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=() if (family, name) in SESSIONS else pytest.mark.product)
        for family in TINY
        for name in ("chain", "locore")
    ],
)
def test_a_session_costs_one_graph_and_leaving_and_entering_it_none(family, name):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    forget_compiled(vlm)
    try:
        unmitigated = compiled(vlm, batch, "greedy")
        alone = len(GRAPHS)
        assert alone == (2 if family == "gemma3" else 1)
        first = compiled(vlm, batch, STRONG[name])
        assert len(GRAPHS) <= 2 * alone
        second = compiled(vlm, batch, STRONG[name])
        again = compiled(vlm, batch, "greedy")
        assert len(GRAPHS) <= 2 * alone
    finally:
        forget_compiled(vlm)
    close(first, logits(vlm, batch, STRONG[name], steps=4))
    close(second, first, 0)
    close(unmitigated, plain(vlm, batch, steps=4))
    close(again, unmitigated, 0)


def test_a_shared_prompt_costs_no_graph():
    vlm = vlm_of("llava")
    apart, together = batch_of(vlm), vlm.encode(PROMPTS, [PICTURES[1]] * 2)
    forget_compiled(vlm)
    try:
        compiled(vlm, apart, STRONG["chain"])
        before = len(GRAPHS)
        shared = compiled(vlm, together, STRONG["chain"])
        assert (before, len(GRAPHS)) == (1, 1)
    finally:
        forget_compiled(vlm)
    close(shared, logits(vlm, together, STRONG["chain"], steps=4))
