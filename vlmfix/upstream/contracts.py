"""What vlmfix relies on of transformers and torch: each point with a probe on two-layer random models.

The probes are tests, ``vlmfix doctor`` prints what they found, and where the installed versions are not among those
tested, the first model that is loaded runs them once. All together take less than two seconds on a CPU.

Shape letters (``docs/notation.md``): B rows, T prompt tokens, H query heads, G key/value heads, Q query rows, K keys,
D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vlmfix.errors import VlmfixError
from vlmfix.upstream import names, probes
from vlmfix.upstream.bench import Bench
from vlmfix.upstream.versions import installed, logger, remedy, untested

EDITS = ("var", "locore", "gift", "zerotuning", "act", "spin", "adhh", "ph3", "vhr", "imbalance", "carve", "vicrop")
"""Decoders that edit or read attention; ``profile`` and ``grounding`` do too."""
BRANCHES = ("vcd", "inter")
"""Decoders that contrast logits."""
EVERYTHING = "everything"


@dataclass(frozen=True)
class Contract:
    """Something that vlmfix relies on.

    Attributes:
        name: What it is about, in a few words.
        protects: Decoders and commands that do not work without it, or what is lost.
        probe: Tries it; raises when it does not hold.
    """

    name: str
    protects: tuple[str, ...]
    probe: Callable[[Bench], None]

    def broken(self, bench: Bench) -> str | None:
        """Why it does not hold, in one sentence, or None when it does."""
        try:
            with torch.random.fork_rng(devices=[]):
                self.probe(bench)
        except VlmfixError as error:
            return error.message
        except Exception as error:  # whatever another version does instead is the finding
            lines = str(error).strip().splitlines()
            return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        return None


@dataclass(frozen=True)
class Finding:
    """What a probe found.

    Attributes:
        name: Name of the contract.
        protects: What it protects.
        reason: Why it does not hold, or None when it does.
    """

    name: str
    protects: tuple[str, ...]
    reason: str | None


CONTRACTS = (
    Contract("cache argument", (EVERYTHING, "shared beginnings"), probes.cache_argument),
    Contract("attention function", (*EDITS, "sgrs", "profile", "grounding"), probes.attention_function),
    Contract("attention masks", (*EDITS, *BRANCHES, "sgrs", "profile", "grounding"), probes.masks),
    Contract("bias on attention scores", ("locore", "zerotuning"), probes.position_bias),
    Contract("signs of other mathematics", (*EDITS, "sgrs", "profile", "grounding"), probes.other_mathematics),
    Contract("residual stream", ("var", "gift", "profile"), probes.residual_stream),
    Contract("features of pictures", (*BRANCHES, "repeated pictures"), probes.picture_features),
    Contract("positions of the prompt", (EVERYTHING,), probes.prompt_positions),
    Contract("layers of a cache", ("sgrs", "vicrop", "profile", "grounding", "shared beginnings"), probes.cache_layers),
    Contract("sliding windows of a cache", ("shared beginnings",), probes.sliding_cache),
    Contract("static cache", (*BRANCHES, *EDITS), probes.static_cache),
    Contract("cache with room", (EVERYTHING, "recorded steps"), probes.roomy_cache),
    Contract("output head", ("dola", "deco"), probes.output_head),
    Contract("output projection", ("export",), probes.output_projection),
    Contract("norms of a text decoder", ("recorded steps",), probes.decoder_norms),
    Contract("loops of another's", ("sgrs", "vicrop", "grounding"), probes.decoding_loop),
    Contract("generation settings", (EVERYTHING,), probes.generation_settings),
    Contract("rotary embeddings", ("shared beginnings",), probes.rotary),
    Contract(
        "geometry of tiles", ("every decoder on LLaVA-NeXT, LLaVA-OneVision, InternVL, Qwen2.5-VL",), probes.tiles
    ),
    Contract("processors", (EVERYTHING, "repeated pictures"), probes.processor),
    Contract("wrappers around models", (EVERYTHING,), probes.wrapped_models),
    Contract("memory of tensors", ("bench",), probes.memory_of_tensors),
    Contract("errors of memory", ("smaller batches when memory runs out",), probes.memory_errors),
)
"""Everything that is relied on."""


def examined(contracts: Sequence[Contract] = CONTRACTS) -> list[Finding]:
    """Runs probes, one after the other.

    Args:
        contracts: What to probe.
    """
    bench = Bench()
    return [Finding(one.name, one.protects, one.broken(bench)) for one in contracts]


def fault() -> str | None:
    """What the installed versions break, in one line that says what installs others; None when all contracts hold."""
    broken = [finding for finding in examined() if finding.reason is not None]
    if not broken:
        return None
    names_of_broken = ", ".join(finding.name for finding in broken)
    lost = list(dict.fromkeys(name for finding in broken for name in finding.protects))
    affected = EVERYTHING if EVERYTHING in lost else ", ".join(lost)
    versions = " and ".join(untested()) or f"transformers {installed('transformers')}"
    return (
        f"{versions} breaks {len(broken)} of {len(CONTRACTS)} things that vlmfix builds on ({names_of_broken}); "
        f"affected: {affected}; {remedy()}"
    )


@functools.cache
def first_use() -> None:
    """Probes an installation whose versions were not tested, once in a process, and logs one line when it finds fault.

    Tested versions are taken as they are.
    """
    if untested() and (found := fault()):
        logger.warning("vlmfix: %s", found)


def check_model(model: nn.Module, decoder: nn.Module) -> None:
    """Refuses a model whose padding could not be hidden, whatever decodes.

    Args:
        model: The model.
        decoder: Its text decoder.

    Raises:
        UpstreamError: One of them takes a mask under no known name.
    """
    first_use()
    for module in (model, decoder):
        names.name_of(type(module), "mask")
