"""Gives the decoding methods by name and by class; each has its file, and is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmfix.decoders.index import DECODERS, HOMES, DecoderInfo, Parameter

if TYPE_CHECKING:
    from vlmfix.decoders.attention.acg import ACG
    from vlmfix.decoders.attention.act import ACT
    from vlmfix.decoders.attention.adhh import ADHH
    from vlmfix.decoders.attention.amplify import Amplify
    from vlmfix.decoders.attention.gift import GIFT
    from vlmfix.decoders.attention.imbalance import Imbalance
    from vlmfix.decoders.attention.locore import LocoRE
    from vlmfix.decoders.attention.pai import PAI
    from vlmfix.decoders.attention.ph3 import PH3
    from vlmfix.decoders.attention.spin import SPIN
    from vlmfix.decoders.attention.vaf import VAF
    from vlmfix.decoders.attention.var import VAR
    from vlmfix.decoders.attention.vhr import VHR
    from vlmfix.decoders.attention.zerotuning import ZeroTuning
    from vlmfix.decoders.base import Decoder, Greedy, Source
    from vlmfix.decoders.chain import Chain
    from vlmfix.decoders.choice.beam import Beam
    from vlmfix.decoders.choice.opera import OPERA
    from vlmfix.decoders.choice.sample import Sample
    from vlmfix.decoders.logits.apc import APC
    from vlmfix.decoders.logits.avisc import AvisC
    from vlmfix.decoders.logits.deco import DeCo
    from vlmfix.decoders.logits.dola import DoLa
    from vlmfix.decoders.logits.flb import FLB
    from vlmfix.decoders.logits.icd import ICD
    from vlmfix.decoders.logits.inter import INTER
    from vlmfix.decoders.logits.m3id import M3ID
    from vlmfix.decoders.logits.mod import MoD
    from vlmfix.decoders.logits.only import ONLY
    from vlmfix.decoders.logits.revisit import ReVisiT
    from vlmfix.decoders.logits.sgrs import SGRS
    from vlmfix.decoders.logits.sid import SID
    from vlmfix.decoders.logits.vcd import VCD
    from vlmfix.decoders.picture.carve import CARVE
    from vlmfix.decoders.picture.vicrop import ViCrop
    from vlmfix.decoders.spec import describe
    from vlmfix.decoders.states.kvsmooth import KVSmooth
    from vlmfix.decoders.states.memvr import MemVR
    from vlmfix.decoders.states.nullu import Nullu
    from vlmfix.decoders.states.pti import PTI
    from vlmfix.decoders.states.vista import VISTA
    from vlmfix.decoders.states.vti import VTI
    from vlmfix.decoding.plan import DecodingPlan
    from vlmfix.decoding.strategy import Strategy
else:
    _CLASSES = {name: module for module, _, name in (home.partition(":") for home in HOMES.values())}
    _REST = {
        "Chain": "vlmfix.decoders.chain",
        "Decoder": "vlmfix.decoders.base",
        "DecodingPlan": "vlmfix.decoding.plan",
        "Source": "vlmfix.decoders.base",
        "Strategy": "vlmfix.decoding.strategy",
        "describe": "vlmfix.decoders.spec",
    }

    def __getattr__(name: str) -> Any:  # noqa: ANN401
        home = (_CLASSES | _REST).get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(home), name)


def parse(spec: str, *, files: bool = True) -> Decoder:
    """Reads a decoder such as ``var:moved_fraction=0.4+locore:strength=0.15``, ``@keep-recall`` or ``mine.py:Mine``.

    Args:
        spec: The decoder; ``@`` and a path is a recipe in a file, ``@`` and a name one that comes with the package; a
            class in a file is named by the file's path and its name, and the file is run.
        files: Whether it may name files of recipes and of classes; give False for what a stranger wrote.

    Raises:
        UsageError: A name or a parameter is unknown, or a value is not allowed.
        DataError: A recipe cannot be read.
        PluginError: A decoder of another distribution, or in a file, cannot be used.
    """
    from vlmfix.decoders import spec as language  # it needs torch, and names are wanted without

    if not files:
        language.refuse_files(spec)
    return language.parse(spec, DECODERS)


__all__ = [
    "ACG",
    "ACT",
    "ADHH",
    "APC",
    "CARVE",
    "DECODERS",
    "FLB",
    "GIFT",
    "ICD",
    "INTER",
    "M3ID",
    "ONLY",
    "OPERA",
    "PAI",
    "PH3",
    "PTI",
    "SGRS",
    "SID",
    "SPIN",
    "VAF",
    "VAR",
    "VCD",
    "VHR",
    "VISTA",
    "VTI",
    "Amplify",
    "AvisC",
    "Beam",
    "Chain",
    "DeCo",
    "Decoder",
    "DecoderInfo",
    "DecodingPlan",
    "DoLa",
    "Greedy",
    "Imbalance",
    "KVSmooth",
    "LocoRE",
    "MemVR",
    "MoD",
    "Nullu",
    "Parameter",
    "ReVisiT",
    "Sample",
    "Source",
    "Strategy",
    "ViCrop",
    "ZeroTuning",
    "describe",
    "parse",
]
