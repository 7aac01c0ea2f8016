"""Decoding methods, one file each, written into one table by hand."""

from __future__ import annotations

from vlmfix.decoders import spec as _spec
from vlmfix.decoders.act import ACT
from vlmfix.decoders.adhh import ADHH
from vlmfix.decoders.base import Chain, Decoder, Greedy, Source
from vlmfix.decoders.beam import Beam
from vlmfix.decoders.carve import CARVE
from vlmfix.decoders.gift import GIFT
from vlmfix.decoders.imbalance import Imbalance
from vlmfix.decoders.inter import INTER
from vlmfix.decoders.locore import LocoRE
from vlmfix.decoders.ph3 import PH3
from vlmfix.decoders.sample import Sample
from vlmfix.decoders.sgrs import SGRS
from vlmfix.decoders.spec import DecoderInfo, Parameter, describe
from vlmfix.decoders.spin import SPIN
from vlmfix.decoders.var import VAR
from vlmfix.decoders.vcd import VCD
from vlmfix.decoders.vhr import VHR
from vlmfix.decoders.vicrop import ViCrop
from vlmfix.decoders.zerotuning import ZeroTuning
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
"""Every method by its name on the command line."""


def parse(spec: str) -> Decoder:
    """Reads a decoder such as ``var:moved_fraction=0.4+locore:strength=0.15`` or ``@recipe.toml``.

    Raises:
        UsageError: Unknown name or parameter, or a value that is not allowed.
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
