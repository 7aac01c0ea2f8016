"""Which decoders work with a model, tried out, and what the machine and its versions have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image
from torch import nn

from vlmfix.attention.kernel import PLAN
from vlmfix.card import device_name, machine, versions
from vlmfix.decoders import DECODERS, Decoder, parse
from vlmfix.decoders.support import support
from vlmfix.errors import PluginError, VlmfixError
from vlmfix.evals.tasks import TASKS
from vlmfix.generation import VLM, load
from vlmfix.heads.profilers import PROFILERS
from vlmfix.insight.sinks import sink_rate
from vlmfix.models.families import FAMILIES
from vlmfix.upstream import contracts
from vlmfix.upstream.attention import window
from vlmfix.upstream.defaults import undisturbed
from vlmfix.upstream.versions import untested

TOKENS = 2
"""Tokens that each decoder generates: one from the prompt's pass, one from a decoding step."""
WAYS = ("plain", "beams", "static cache")
"""The ways in which a decoder is tried."""
QUESTION = "What is in this picture?"


def diagnose(
    model: str,
    *,
    revision: str | None = None,
    decoders: Sequence[str] = (),
    loader: Callable[..., VLM] = load,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Loads a model, probes what vlmfix relies on, and lets decoders generate two tokens in three ways.

    Args:
        model: ``tiny``, a Hub id or a local directory.
        revision: Branch, tag or commit on the Hub.
        decoders: Specifications of those to try; every known one when there is none.
        loader: Loads the model; ``vlmfix.load`` unless a test gives another.
        progress: Called with the number of decoders that were tried, and how many there are.

    Returns:
        ``versions``; ``untested``, those among them that vlmfix was not tested with; ``machine``; ``model`` (id,
        revision, family, layers, dtype, device); ``checkpoint``, see ``Checkpoint.reading``; ``sinks``, with the share
        of heads that rest on the first token as ``rate``, or None and the ``reason``; ``contracts``, a list of
        ``name``, ``protects`` and ``reason``, which is None where it holds; ``decoders``, which maps each name to None,
        or to the reason why it does not work; ``refused``, sentences about names of other distributions that are not
        used; ``ways``, which maps each name to the same for ``plain``, ``beams`` and ``static cache``; ``support``,
        which maps the names of vlmfix's own to what was found beforehand with a tiny model of the family, see
        ``docs/support.md``; ``reach``, which maps each name to the tokens up to which it works, where a sliding window
        limits it, or to None.

    Raises:
        UnsupportedModelError: The model's family is not known.
        DataError: The model cannot be loaded.
        UsageError: A specification is not understood.
    """
    for spec in decoders:
        parse(spec)  # what is wrong with one is said before the model is loaded
    vlm = loader(model, revision=revision)
    ways: dict[str, dict[str, str | None]] = {}
    reach: dict[str, int | None] = {}
    specs = list(dict.fromkeys(decoders)) or list(DECODERS)
    for number, spec in enumerate(specs):
        progress(number, len(specs))
        with met(vlm) as windows:
            ways[spec] = _tried(vlm, spec)
        reach[spec] = min(windows) - 1 if windows else None
    progress(len(specs), len(specs))
    return {
        "versions": versions(),
        "untested": untested(),
        "machine": machine(),
        "checkpoint": vlm.reading,
        "model": {
            "id": model,
            "revision": vlm.revision,
            "family": vlm.family.title,
            "layers": vlm.layers,
            "dtype": str(vlm.model.dtype).removeprefix("torch."),
            "device": device_name(vlm.device),
        },
        "sinks": _sinks(vlm),
        "contracts": [asdict(finding) for finding in contracts.examined()],
        "refused": [sentence for table in (DECODERS, FAMILIES, PROFILERS, TASKS) for sentence in table.refused()],
        "decoders": {name: found["plain"] for name, found in ways.items()},
        "ways": ways,
        "support": {name: support()[name].of(vlm.model.config.model_type) for name in specs if name in support()},
        "reach": reach,
    }


def _sinks(vlm: VLM) -> dict[str, Any]:
    rates: list[float] = []

    def measure() -> None:
        rates.append(sink_rate(vlm))

    reason = _reason(measure)
    return {"rate": rates[0] if rates else None, "reason": reason}


def _tried(vlm: VLM, spec: str) -> dict[str, str | None]:
    try:
        return tried(vlm, parse(spec))
    except PluginError as error:  # it stops nothing but itself
        return dict.fromkeys(WAYS, error.message)


def tried(vlm: VLM, decoder: Decoder) -> dict[str, str | None]:
    """Lets a decoder generate two tokens about a grey picture in each way of running it.

    Args:
        vlm: The model.
        decoder: The decoder.

    Returns:
        Each of ``WAYS`` with None, or with the reason why it does not work.
    """
    own = decoder.strategy.num_beams if decoder.strategy else 1
    runs: tuple[Callable[[], str | None], ...] = (
        lambda: _generate(vlm, decoder, 1),
        lambda: _generate(vlm, decoder, max(own, 2)),
        lambda: _with_static_cache(vlm, decoder),
    )
    reason = _reason(lambda: decoder.check(vlm))
    return {way: reason or _reason(run) for way, run in zip(WAYS, runs, strict=True)}


@contextmanager
def met(vlm: VLM) -> Iterator[list[int]]:
    """Collects the sliding windows of layers whose attention is edited or read inside the block."""
    windows: list[int] = []
    with ExitStack() as block:
        for module in vlm.family.attention_modules(vlm.model):
            size = window(module)

            def note(module: nn.Module, args: object, size: int | None = size) -> None:
                if size is not None and getattr(module, PLAN, None) is not None:
                    windows.append(size)

            block.enter_context(module.register_forward_pre_hook(note))
        yield windows


def _reason(run: Callable[[], str | None]) -> str | None:
    """What a function says against a decoder, or what it fails with, in one line; None when it has nothing to say."""
    try:
        return run()
    except VlmfixError as error:
        return error.message
    except Exception as error:  # an error of another package is the finding
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _generate(vlm: VLM, decoder: Decoder, beams: int) -> str | None:
    (answer,) = vlm.generate([_picture()], QUESTION, decoder=decoder, max_new_tokens=TOKENS, num_beams=beams)
    return "its scores are not numbers" if answer.finish == "nan" else None


@torch.no_grad()
def _with_static_cache(vlm: VLM, decoder: Decoder) -> str | None:
    """Runs decoding steps as they are, not compiled, which would take a minute for each decoder."""
    batch, decoding, model = vlm.encode([QUESTION], [[_picture()]]), decoder.decoding, vlm.model
    generate: Any = model.generate
    own = decoding.strategy.num_beams if decoding.strategy else 1
    with decoding.applied(vlm, batch) as arguments, undisturbed(model):
        options = {"num_beams": own, "do_sample": False, **arguments, "disable_compile": True}
        generate(**batch, **options, max_new_tokens=TOKENS, cache_implementation="static")
    return None


def _picture() -> Image.Image:
    return Image.new("RGB", (448, 448), (128, 128, 128))
