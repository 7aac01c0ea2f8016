"""Lists the decoding methods, of which each has its file, in one table."""

from __future__ import annotations

from vlmfix.decoders import spec as _spec
from vlmfix.decoders.attention.act import ACT
from vlmfix.decoders.attention.adhh import ADHH
from vlmfix.decoders.attention.gift import GIFT
from vlmfix.decoders.attention.imbalance import Imbalance
from vlmfix.decoders.attention.locore import LocoRE
from vlmfix.decoders.attention.ph3 import PH3
from vlmfix.decoders.attention.spin import SPIN
from vlmfix.decoders.attention.var import VAR
from vlmfix.decoders.attention.vhr import VHR
from vlmfix.decoders.attention.zerotuning import ZeroTuning
from vlmfix.decoders.base import Chain, Decoder, Greedy, Source
from vlmfix.decoders.choice.beam import Beam
from vlmfix.decoders.choice.sample import Sample
from vlmfix.decoders.logits.inter import INTER
from vlmfix.decoders.logits.sgrs import SGRS
from vlmfix.decoders.logits.vcd import VCD
from vlmfix.decoders.picture.carve import CARVE
from vlmfix.decoders.picture.vicrop import ViCrop
from vlmfix.decoders.spec import DecoderInfo, Parameter, describe
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.decoding.strategy import Strategy

DECODERS: dict[str, type[Decoder]] = {
    decoder.name: decoder
    for decoder in (
        Greedy,
        Sample,
        Beam,
        VAR,
        LocoRE,
        VCD,
        INTER,
        SGRS,
        CARVE,
        ViCrop,
        VHR,
        GIFT,
        ZeroTuning,
        ACT,
        SPIN,
        ADHH,
        PH3,
        Imbalance,
    )
}
"""Name on the command line -> method."""


def parse(spec: str) -> Decoder:
    """Reads a decoder such as ``var:moved_fraction=0.4+locore:strength=0.15`` or ``@recipe.toml``.

    Raises:
        UsageError: A name or a parameter is unknown, or a value is not allowed.
        DataError: A recipe cannot be read.
    """
    return _spec.parse(spec, DECODERS)


__all__ = [
    "ACT",
    "ADHH",
    "CARVE",
    "DECODERS",
    "GIFT",
    "INTER",
    "PH3",
    "SGRS",
    "SPIN",
    "VAR",
    "VCD",
    "VHR",
    "Beam",
    "Chain",
    "Decoder",
    "DecoderInfo",
    "DecodingPlan",
    "Greedy",
    "Imbalance",
    "LocoRE",
    "Parameter",
    "Sample",
    "Source",
    "Strategy",
    "ViCrop",
    "ZeroTuning",
    "describe",
    "parse",
]
