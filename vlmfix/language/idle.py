"""Parameters that do nothing under the values of others: what they are then, and the refusal of any other value.

Which they are is declared with the parameter; see ``Range.idle``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlmfix.errors import UsageError
from vlmfix.language.parameters import Given, Range, Value, ranges, settled, written


def refuse_idle(
    decoder: Any,  # noqa: ANN401 (a dataclass with a name)
    values: Mapping[str, Value],
    preset: Mapping[str, Value],
) -> None:
    """Refuses a value that nothing asks.

    Args:
        decoder: The class.
        values: The values of all its parameters, as of ``settled``.
        preset: See ``settled``.

    Raises:
        UsageError: A parameter that does nothing has another value than its own.
    """
    for name, own in without_idle(decoder, values, preset).items():
        allowed: Range = ranges(decoder)[name]
        case = allowed.idle_case(values)
        if case is not None and values[name] != own:
            why = " and ".join(f"{other}={written(values[other])}" for other in case)
            remedies = " or ".join(_remedies(decoder, allowed, case))
            raise UsageError(
                f"{decoder.name}: {name}={written(values[name])} does nothing with {why}",
                f"leave {name} out, or give {remedies}",
            )


def without_idle(
    decoder: Any,  # noqa: ANN401 (a dataclass with a name)
    values: Mapping[str, Value],
    preset: Mapping[str, Value],
) -> dict[str, Value]:
    """Gives parameters that do nothing their own values: the preset's, else the defaults.

    Args:
        decoder: The class.
        values: The values of all its parameters, as of ``settled``.
        preset: See ``settled``.

    Returns:
        All values.
    """
    idle = {name for name, allowed in ranges(decoder).items() if allowed.idle_case(values) is not None}
    if not idle:
        return dict(values)
    own = settled(decoder, {}, preset)
    return {name: own[name] if name in idle else value for name, value in values.items()}


def _remedies(decoder: type, allowed: Range, case: Mapping[str, Any]) -> Iterator[str]:
    """Yields, for each parameter of the case in which another does nothing, what to give so that this one acts."""
    for other, value in case.items():
        kind = ranges(decoder)[other]
        if value is Given:
            yield f"{other}=none"
        elif kind.choices or kind.kind is bool:
            idle = [one[other] for one in allowed.idle if one.keys() == {other}] + [value]
            yield f"{other}={' or '.join(written(one) for one in kind.choices or (True, False) if one not in idle)}"
        else:
            yield f"another {other}"
