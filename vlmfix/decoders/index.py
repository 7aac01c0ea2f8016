"""Knows the decoders without importing any: their names, and of vlmfix's own what tables and checks say of them.

``index.json`` holds that; ``make index`` writes it from the classes, and a test compares both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfix.errors import UsageError
from vlmfix.language.grammar import Words, split
from vlmfix.language.recipe import recipe_file
from vlmfix.plugins import Table, near

if TYPE_CHECKING:
    from vlmfix.decoders.base import Decoder

Plain = bool | int | float | str | None
"""A parameter's value as JSON holds it; layers, heads and tuples are texts."""

HOMES = {
    "greedy": "vlmfix.decoders.base:Greedy",
    "sample": "vlmfix.decoders.choice.sample:Sample",
    "beam": "vlmfix.decoders.choice.beam:Beam",
    "var": "vlmfix.decoders.attention.var:VAR",
    "locore": "vlmfix.decoders.attention.locore:LocoRE",
    "vcd": "vlmfix.decoders.logits.vcd:VCD",
    "inter": "vlmfix.decoders.logits.inter:INTER",
    "sgrs": "vlmfix.decoders.logits.sgrs:SGRS",
    "carve": "vlmfix.decoders.picture.carve:CARVE",
    "vicrop": "vlmfix.decoders.picture.vicrop:ViCrop",
    "vhr": "vlmfix.decoders.attention.vhr:VHR",
    "gift": "vlmfix.decoders.attention.gift:GIFT",
    "zerotuning": "vlmfix.decoders.attention.zerotuning:ZeroTuning",
    "act": "vlmfix.decoders.attention.act:ACT",
    "spin": "vlmfix.decoders.attention.spin:SPIN",
    "adhh": "vlmfix.decoders.attention.adhh:ADHH",
    "ph3": "vlmfix.decoders.attention.ph3:PH3",
    "imbalance": "vlmfix.decoders.attention.imbalance:Imbalance",
    "apc": "vlmfix.decoders.logits.apc:APC",
    "icd": "vlmfix.decoders.logits.icd:ICD",
    "m3id": "vlmfix.decoders.logits.m3id:M3ID",
    "flb": "vlmfix.decoders.logits.flb:FLB",
    "dola": "vlmfix.decoders.logits.dola:DoLa",
    "deco": "vlmfix.decoders.logits.deco:DeCo",
    "avisc": "vlmfix.decoders.logits.avisc:AvisC",
    "sid": "vlmfix.decoders.logits.sid:SID",
    "mod": "vlmfix.decoders.logits.mod:MoD",
    "pai": "vlmfix.decoders.attention.pai:PAI",
    "vaf": "vlmfix.decoders.attention.vaf:VAF",
    "acg": "vlmfix.decoders.attention.acg:ACG",
    "kvsmooth": "vlmfix.decoders.states.kvsmooth:KVSmooth",
    "vista": "vlmfix.decoders.states.vista:VISTA",
    "vti": "vlmfix.decoders.states.vti:VTI",
    "nullu": "vlmfix.decoders.states.nullu:Nullu",
    "pti": "vlmfix.decoders.states.pti:PTI",
    "opera": "vlmfix.decoders.choice.opera:OPERA",
    "revisit": "vlmfix.decoders.logits.revisit:ReVisiT",
    "amplify": "vlmfix.decoders.attention.amplify:Amplify",
    "only": "vlmfix.decoders.logits.only:ONLY",
    "memvr": "vlmfix.decoders.states.memvr:MemVR",
}
"""Name on the command line -> module and class, of vlmfix's own methods."""

DECODERS: Table[Decoder] = Table(
    "decoder", "vlmfix.decoders", "vlmfix.decoders.base:Decoder", HOMES, needs=("name", "source", "acts_on")
)
"""Name on the command line -> method, those of other distributions included."""

INDEX = Path(__file__).with_name("index.json")


@dataclass(frozen=True)
class Parameter:
    """Describes one parameter of a decoder, for tables; ``idle`` says with what others it does nothing."""

    name: str
    default: Plain
    range: str
    search: str
    help: str
    idle: str = ""

    @property
    def meaning(self) -> str:
        """Returns what it is, and with what others it does nothing."""
        return f"{self.help}; does nothing with {self.idle}" if self.idle else self.help


@dataclass(frozen=True)
class DecoderInfo:
    """Describes one decoder, for tables.

    ``summary`` is one sentence, ``cost`` is what the class says of its cost, ``presets`` has the values of each named
    set, and ``made_by`` is the distribution and its version, or the digest of a file; empty for vlmfix's own.
    ``chooses`` is the kind of a decoder's own strategy, with its defaults: ``beams``, ``sampling``, or empty.
    """

    name: str
    made_by: str
    title: str
    summary: str
    arxiv: str
    code: str
    acts_on: str
    cost: str
    passes: int
    beams: bool
    compiles: bool
    refines: bool
    chooses: str
    parameters: tuple[Parameter, ...]
    presets: Mapping[str, Mapping[str, Plain]]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> DecoderInfo:
        """Reads a description from JSON values, as ``dataclasses.asdict`` makes them."""
        return cls(**{**values, "parameters": tuple(Parameter(**one) for one in values["parameters"])})


@cache
def own() -> Mapping[str, DecoderInfo]:
    """Describes vlmfix's own decoders, by name."""
    return {values["name"]: DecoderInfo.of(values) for values in json.loads(INDEX.read_bytes())}


def check(spec: str) -> None:
    """Checks the names in a specification without importing a decoder; values and what recipes hold are for ``parse``.

    Raises:
        UsageError: A decoder or a recipe is not known, a file of a decoder cannot be read, or a parameter of vlmfix's
            own is not known.
    """
    for words in split(spec):
        if words.recipe is None:
            DECODERS.check(words.name)
        else:
            recipe_file(words.recipe)
        if words.name in HOMES:
            check_parameters(words, [parameter.name for parameter in own()[words.name].parameters])


def check_parameters(words: Words, known: list[str]) -> None:
    """Checks the names of the parameters that a specification gives to a decoder.

    Args:
        words: The decoder with its parameters.
        known: The names that it has.

    Raises:
        UsageError: One is not known, has no value, or is given twice.
    """
    seen: set[str] = set()
    for key, equals, value in words.given:
        if key not in known or not equals:
            raise UsageError(
                f"{words.name}: {key + equals + value!r} is no parameter",
                f"{near(key, known) if key not in known else ''}write parameter=value; parameters of {words.name}: "
                f"{', '.join(known) or 'none'}",
            )
        if key in seen:
            raise UsageError(f"{words.name}: {key} is given twice", "give each parameter once")
        seen.add(key)
