"""Which decoders are measured, and how the search for better parameters begins."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tools.study.small import Elsewhere
from vlmfix.decoders import DECODERS, Chain, Decoder, parse
from vlmfix.errors import UsageError
from vlmfix.evals.record import PLAIN
from vlmfix.evals.tuning.search import Space
from vlmfix.language.parameters import ranges, written

CHAINS = (
    "vcd+vhr",
    "vcd+spin",
    "vcd+adhh",
    "vcd+spin+adhh",
    "vcd+gift",
    "vcd+zerotuning",
    "vcd+act:heads=all",
)
"""A contrast with each kind of edit: of head outputs that add and that take away, of weights, of biases, of sinks."""
FURTHER = ("act:heads=all", "vcd:agreement=0.05")
"""Ways that are not the default: heads where none are published, and MoD's choice for each picture."""
NOISE, PURE = "vcd:noise_step=900,plausibility=0.1", "vcd:noise_step=999,plausibility=0.1"
"""VCD with little and with nothing left of the picture, which cost the least recall on tuning scenes; its contrast is
left open."""
BEGUN: Mapping[str, Sequence[str]] = {
    "act": ("act:heads=all", "act:preset=official-code,heads=all"),
    "vcd+vhr": (f"{NOISE}+vhr",),
    "vcd+spin": (f"{NOISE}+spin:kept_share=0.95", f"{PURE}+spin:kept_share=0.95"),
    "vcd+adhh": (f"{NOISE}+adhh", f"{PURE}+adhh"),
    "vcd+spin+adhh": (f"{NOISE}+spin:kept_share=0.95+adhh",),
    "vcd+gift": (f"{NOISE}+gift",),
    "vcd+zerotuning": (f"{NOISE}+zerotuning",),
    "vcd+act:heads=all": (f"{NOISE}+act:heads=all,preset=official-code",),
}
"""Where a search begins that must say something: heads where none are published; in chains, what would make the space
too large to search."""

LISTED: Mapping[str, Sequence[str]] = {
    "beam+vcd+spin": tuple(
        f"beam+vcd:contrast={contrast},noise_step=900,plausibility=0.1+spin:kept_share=0.95,suppression={suppression}"
        for contrast, suppression in ((0.1, 0.6), (0.12, 0.5), (0.15, 0.5))
    )
}
"""Chains with beams by name: a trial takes minutes, so a few specifications are tried and nothing is searched."""


@dataclass(frozen=True)
class Arm:
    """One row of the tables.

    Attributes:
        name: Of the row, and of the run's arm.
        spec: What is run.
    """

    name: str
    spec: str

    @property
    def decoder(self) -> Decoder:
        """What is run."""
        return parse(self.spec)


def arms(only: Sequence[str] = ()) -> list[Arm]:
    """Every decoder with its defaults, then the chains.

    Args:
        only: Specifications to take instead; empty for all.
    """
    return [Arm(spec, spec) for spec in only or (*DECODERS.homes, *CHAINS) if spec != PLAIN]


def variants(only: Sequence[str] = ()) -> list[Arm]:
    """Ways of decoders that are measured beside their defaults and that nothing is searched for.

    Args:
        only: Specifications that were asked for instead; then there are none.
    """
    gated = [f"{name}:when=uncertain" for name in DECODERS.homes if "when" in ranges(type(parse(name)))]
    return [] if only else [Arm(spec, spec) for spec in (*FURTHER, *gated)]


def listed(only: Sequence[str] = ()) -> list[Arm]:
    """Chains whose parameters are chosen from a list; they are not measured with their defaults.

    Args:
        only: Specifications that were asked for instead; then there are none.
    """
    return [] if only else [Arm(name, name) for name in LISTED]


def small_arms(found: Sequence[Arm]) -> list[Arm]:
    """Those that refine pictures, under each of their presets."""
    refining = [arm for arm in found if arm.decoder.refines]
    presets = [
        Arm(spec, spec)
        for arm in refining
        for spec in (f"{arm.name}:preset={preset}" for preset in others(arm.decoder))
        if arm.spec in DECODERS
    ]
    return [*refining, *presets]


def others(decoder: Decoder) -> list[str]:
    """Presets of a decoder beside the one that it has."""
    return [preset for preset in decoder.presets if preset != decoder.parameters()["preset"]]


def control(arm: str) -> str:
    """Name of an arm's control."""
    return f"elsewhere {arm}"


def with_controls(found: Sequence[Arm]) -> dict[str, Decoder]:
    """Refining decoders and their controls, by name."""
    own = {arm.name: arm.decoder for arm in found}
    return own | {control(name): Elsewhere(decoder=decoder) for name, decoder in own.items()}


def starts(arm: Arm) -> list[str]:
    """Where the search for an arm's parameters begins: as it is, and at each further preset; nowhere if it has none.

    For a chain with a list, the list.
    """
    if arm.name in LISTED:
        return list(LISTED[arm.name])
    presets = others(arm.decoder) if arm.spec in DECODERS else []
    further = [f"{arm.spec}:preset={preset}" for preset in presets if _differs(arm.decoder, preset)]
    specs = BEGUN.get(arm.spec, (arm.spec, *further))
    return [spec for spec in specs if _open(spec)]


def _differs(decoder: Decoder, preset: str) -> bool:
    """Whether a preset says something that the search would not find by itself."""
    searched = {name for name, allowed in ranges(type(decoder)).items() if allowed.search}
    said = decoder.presets[preset].keys()
    return not said or not said <= searched


def _open(spec: str) -> bool:
    try:
        Space.of(spec)
    except UsageError:
        return False
    return True


def brief(decoder: Decoder) -> str:
    """A decoder as a person would write it: without what its preset or its defaults say."""
    if isinstance(decoder, Chain):
        return "+".join(brief(part) for part in decoder.decoders)
    own, base = decoder.parameters(), type(decoder)().parameters()
    if own.get("preset") != base.get("preset"):
        base = {**parse(f"{decoder.name}:preset={own['preset']}").parameters(), "preset": base["preset"]}
    late = {name: getattr(type(decoder)(), name) for name in own.keys() - base.keys()}  # which stand where one is set
    given = ",".join(f"{name}={written(value)}" for name, value in own.items() if value != (base | late)[name])
    return f"{decoder.name}:{given}" if given else decoder.name


def tuned(arm: str, spec: str) -> str:
    """Name of an arm with parameters that a search chose: another choice has another name."""
    return f"tuned-{arm}-{hashlib.sha256(spec.encode()).hexdigest()[:6]}"
