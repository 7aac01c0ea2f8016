"""Which arms a measurement has: plain decoding, the decoders that are named, or every method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vlmfix.bench import reference
from vlmfix.bench.measure import Arm, ours
from vlmfix.decoders import DECODERS, Chain, Decoder, Greedy, parse
from vlmfix.errors import UsageError
from vlmfix.generation import VLM


def arms_of(vlm: VLM, specs: Sequence[str], *, beside: bool = False) -> list[Arm]:
    """The arms of a measurement; plain greedy is always among them, and comes first.

    Args:
        vlm: The model.
        specs: Decoders as the command line writes them; without any, vlmfix's own, with ``suited`` parameters.
        beside: Adds stock transformers and the released way; see ``reference.arms_beside``.

    Raises:
        UsageError: A decoder is not known, or named twice.
        DataError: A recipe cannot be read.
    """
    named: dict[str, Decoder] = {Greedy.name: Greedy()}
    for spec in specs or suited(vlm):
        decoder = parse(spec)
        if isinstance(decoder, Greedy):
            continue
        if decoder in named.values():
            raise UsageError(f"--decoder {spec} is given twice", "give each decoder once")
        named[spec] = decoder
    short = {spec: _short(decoder) for spec, decoder in named.items()}
    taken = Counter(short.values())
    labels = {spec: label if taken[label] == 1 else spec for spec, label in short.items()}
    found = [ours(labels[spec], decoder) for spec, decoder in named.items()]
    if beside:
        found += reference.arms_beside({labels[spec]: decoder for spec, decoder in named.items()})
    return found


def _short(decoder: Decoder) -> str:
    """What a decoder is called without its parameters."""
    return "+".join(part.name for part in (decoder.decoders if isinstance(decoder, Chain) else (decoder,)))


def suited(vlm: VLM) -> list[str]:
    """Every method of vlmfix, with parameters by which it acts on a model that nobody knows heads, sinks or layers of.

    Args:
        vlm: The model.
    """
    count = vlm.heads
    some = f"L2H{count // 8}/L4H{count // 3}/L6H{count - 1}"
    given = {
        "var": "var:sink_dims=0/1,sink_threshold=2,min_visual_mass=0",
        "vhr": "vhr:alpha=2,layers=1/4:",
        "gift": "gift:alpha=5,saliency_layers=3,layers=4:6,words=all",
        "zerotuning": f"zerotuning:heads={'/'.join(map(str, range(count)))}",
        "act": "act:heads=all",
        "spin": "spin:kept_share=0.95,suppression=0.08,layers=all",
        "adhh": f"adhh:heads={some}",
        "ph3": f"ph3:heads={some}",
        "amplify": f"amplify:heads={some}",
    }
    return [given.get(name, name) for name in DECODERS.homes]
