"""Decoding methods, one file each, written into one table by hand."""

from __future__ import annotations

from vlmfix.decoders import spec as _spec
from vlmfix.decoders.base import Chain, Decoder, DecodingPlan, Greedy, Source
from vlmfix.decoders.carve import CARVE
from vlmfix.decoders.gift import GIFT
from vlmfix.decoders.inter import INTER
from vlmfix.decoders.locore import LocoRE
from vlmfix.decoders.sgrs import SGRS
from vlmfix.decoders.spec import DecoderInfo, Parameter, describe
from vlmfix.decoders.var import VAR
from vlmfix.decoders.vcd import VCD
from vlmfix.decoders.vhr import VHR
from vlmfix.decoders.vicrop import ViCrop

DECODERS: dict[str, type[Decoder]] = {
    decoder.name: decoder for decoder in (Greedy, VAR, LocoRE, VCD, INTER, SGRS, CARVE, ViCrop, VHR, GIFT)
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
    "CARVE",
    "DECODERS",
    "GIFT",
    "INTER",
    "SGRS",
    "VAR",
    "VCD",
    "VHR",
    "Chain",
    "Decoder",
    "DecoderInfo",
    "DecodingPlan",
    "Greedy",
    "LocoRE",
    "Parameter",
    "Source",
    "ViCrop",
    "describe",
    "parse",
]
