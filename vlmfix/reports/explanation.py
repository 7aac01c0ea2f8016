"""What a decoder or a chain does, said before anything runs: from its declarations, and from its plan for a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from vlmfix.decoders.index import DecoderInfo, Plain, check
from vlmfix.decoders.support import WORKS, support
from vlmfix.errors import DataError, UsageError
from vlmfix.files import path_of
from vlmfix.language.grammar import Words, split
from vlmfix.language.recipe import read_recipe
from vlmfix.terminal import rendered

ROWS = {
    "text": "the prompt's text behind a picture, and every generated token",
    "last": "the prompt's last row, which predicts the first token, and every generated token",
    "prompt": "all rows of the prompt, the picture's too, and every generated token",
    "all": "all rows of the prompt, the picture's too, and every generated token",
    "none": "generated tokens alone",
    "cached": "none of their own: what the cache keeps of the prompt, for generated tokens",
}
"""Rows that an edit acts on, in words."""
PICTURES = {"same": "the same picture", "other": "another picture", "none": "no picture"}
"""What a branch sees, in words."""


def words_of(spec: str) -> list[Words]:
    """Takes a specification apart, with the decoder of each recipe in the recipe's place.

    Raises:
        DataError: A recipe cannot be read, or names another.
        UsageError: A recipe names a decoder or a parameter that is not known.
    """
    found: list[Words] = []
    for words in split(spec):
        if words.recipe is None:
            found.append(words)
            continue
        written = read_recipe(path_of(words.recipe))["decoder"]
        check(written)
        inner = list(split(written))
        if any(one.recipe is not None for one in inner):
            raise DataError(f"the recipe {words.recipe} names a recipe", "write the decoder's parameters out")
        found += inner
    return found


def declared(parts: Sequence[tuple[Words, DecoderInfo]]) -> dict[str, Any]:
    """Says what the declarations of a chain's parts know; needs none of the decoders.

    Args:
        parts: The parts in order, as they are written and as they are described.

    Returns:
        ``parts``, a list of ``name``, ``title``, ``summary``, ``acts_on``, ``cost``, ``made_by``, ``parameters`` (those
        that differ from the defaults: ``name``, ``value``, ``default`` and ``meaning``) and ``tried`` (way to run ->
        finding -> families, see ``docs/support.md``; of vlmfix's own alone); ``rows`` per sample; ``beams`` and
        ``compiles``, whether they work; ``conflicts``, a sentence for each.

    Raises:
        UsageError: A part names a preset that its decoder does not have.
    """
    values = [_values(words, info) for words, info in parts]
    rows, beams = 1, 1
    for (_, info), given in zip(parts, values, strict=True):
        if info.chooses == "beams":
            beams = _count(given.get("num_beams"), info.passes)
        else:
            rows += info.passes - 1
    infos = [info for _, info in parts]
    return {
        "parts": [_part(info, given) for info, given in zip(infos, values, strict=True)],
        "rows": rows * beams,
        "beams": all(info.beams for info in infos),
        "compiles": all(info.compiles for info in infos),
        "conflicts": list(_conflicts(infos, beams)),
    }


def _part(info: DecoderInfo, values: Mapping[str, str]) -> dict[str, Any]:
    differing = [one for one in info.parameters if not _equal(values[one.name], one.default)]
    tried = support().get(info.name) if not info.made_by else None
    return {
        "name": info.name,
        "title": info.title,
        "made_by": info.made_by,
        "summary": info.summary,
        "acts_on": info.acts_on,
        "cost": info.cost,
        "parameters": [
            {"name": one.name, "value": values[one.name], "default": _written(one.default), "meaning": one.meaning}
            for one in differing
        ],
        "tried": {} if tried is None else {way: _gathered(found) for way, found in tried.found.items()},
    }


def _values(words: Words, info: DecoderInfo) -> dict[str, str]:
    """All parameters as they are written: given, of the preset that is given, or the defaults."""
    given = {name: value for name, _, value in words.given}
    preset: Mapping[str, Plain] = {}
    if info.presets and "preset" in given:
        if given["preset"] not in info.presets:
            raise UsageError(
                f"{info.name}: preset={given['preset']!r} is not allowed", f"allowed: {' | '.join(info.presets)}"
            )
        preset = info.presets[given["preset"]]
    return {one.name: given.get(one.name, _written(preset.get(one.name, one.default))) for one in info.parameters}


def _conflicts(infos: Sequence[DecoderInfo], beams: int) -> Iterator[str]:
    refiners = [place for place, info in enumerate(infos) if info.refines]
    choosing = [info.name for info in infos if info.chooses]
    if len(refiners) > 1:
        yield f"{' and '.join(infos[place].name for place in refiners)} both refine the pictures"
    elif refiners and refiners[0] > 0:
        yield f"{infos[refiners[0]].name} refines the pictures before decoding begins, so it must come first"
    if len(choosing) > 1:
        yield f"{' and '.join(choosing)} both choose the tokens"
    elif beams > 1:
        yield from (f"{info.name} does not work with beam search" for info in infos if not info.beams)


def explanation_text(explanation: Mapping[str, Any]) -> str:
    """Returns an explanation as people read it.

    Args:
        explanation: ``declared``, with ``spec``, and with ``model`` where one was asked about: see ``vlmfix.planned``.
    """
    parts: list[RenderableType] = [Text(explanation["spec"], style="bold")]
    model = explanation["model"]
    for place, part in enumerate(explanation["parts"]):
        family = model["type"] if model else None
        parts += ["", *_part_text(part, family, model["parts"][place] if model else None)]
    parts += ["", *(_indented(line, 0) for line in (*_together(explanation), *(_model(model) if model else ())))]
    lines = rendered(*parts).splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _part_text(
    part: Mapping[str, Any], family: str | None, planned: Mapping[str, Any] | None
) -> Iterator[RenderableType]:
    made = f" (from {part['made_by']})" if part["made_by"] else ""
    yield Text(f"{part['name']}: {part['title']}{made}", style="bold")
    yield _indented(part["summary"])
    for one in part["parameters"]:
        meaning = f": {one['meaning']}" if one["meaning"] else ""
        yield _indented(f"{one['name']}={one['value']} in place of {one['default']}{meaning}")
    yield _indented(f"Acts on: {part['acts_on']}.")
    if part["cost"]:
        yield _indented(f"Costs: {part['cost']}")
    if planned is not None:
        yield from (_indented(line) for line in _planned(planned))
    yield from (_indented(line) for line in _tried(part["tried"], family))


def _planned(planned: Mapping[str, Any]) -> Iterator[str]:
    """What one part does with the model."""
    if planned["refusal"]:
        yield f"Refuses: {planned['refusal']}."
        return
    if planned["shown"]:
        yield f"Shows {_number(planned['shown'], 'picture')} in place of one."
    for edit in planned["edits"]:
        where = f"in {layers_text(edit['layers'], planned['layers'])}"
        if edit["reads"]:
            yield f"Reads attention weights of the prompt {where}, and changes nothing there."
        else:
            yield f"Changes {edit['acts_on']} {where}; rows: {ROWS[edit['rows']]}."
    if planned["tower"]:
        yield "Changes the stream of the vision tower, for every picture of the call."
    for branch in planned["branches"]:
        prompt = f"a prompt of {branch['tokens']} tokens"
        yield f"Branch: a row more per sample, with {PICTURES[branch['picture']]} and {prompt}."
    for margin in planned["margins"]:
        yield (
            f"Acts in steps whose best token leads by less than {margin:g}. Its branches run in these steps alone, "
            "and catch up in one pass; beams run them in every step."
        )
    if planned["exits"]:
        yield f"Reads the output head behind {layers_text(planned['exits'], None)}."
    if planned["gate"]:
        asked = f", from what they owe in {layers_text(planned['asks'], planned['layers'])}" if planned["asks"] else ""
        yield f"Chooses the tokens itself{asked}."


def _tried(tried: Mapping[str, Mapping[str, Sequence[str]]], family: str | None) -> Iterator[str]:
    """What was found on tiny models: where it works, and why not elsewhere; of one family, or of all."""
    cells = {
        way: {verdict: names for verdict, names in found.items() if family is None or family in names}
        for way, found in tried.items()
    }
    cells = {way: found for way, found in cells.items() if found}
    if not cells:
        return
    fine = [way for way, found in cells.items() if list(found) == [WORKS]]
    models = "tiny models of every family" if family is None else f"a tiny {family}"
    yield f"Tried alone on {models}, works: {', '.join(fine) or 'nothing'}."
    for way, found in cells.items():
        for verdict, names in found.items():
            if verdict != WORKS:
                where = "" if len(found) == 1 else f" with {', '.join(names)}"
                yield f"{way.capitalize()}{where}: {verdict}."


def _together(explanation: Mapping[str, Any]) -> Iterator[str]:
    rows, model = explanation["rows"], explanation["model"]
    if model is None:
        changed = any(part["parameters"] for part in explanation["parts"])
        yield f"Rows per sample: {rows}{' with the defaults of its parts' if changed and rows > 1 else ''}."
        yield f"Beam search {_works(explanation['beams'])}; compiled decoding {_works(explanation['compiles'])}."
        yield "Layers, prompt lengths, memory and what is refused depend on the model: --model says them."
    for sentence in explanation["conflicts"]:
        yield f"Conflict: {sentence}."
    if len(explanation["parts"]) > 1:
        yield "Edits act in this order, and so do the rules that fuse logits."


def _model(model: Mapping[str, Any]) -> Iterator[str]:
    size = f"{_number(model['layers'], 'layer')}, {_number(model['heads'], 'head')}, {model['dtype']}"
    yield f"With {model['id']}: {model['family']}, {size}."
    total = model["total"]
    if total is None:
        yield "Rows, memory and passes are not reckoned, since something is refused."
        return
    rows, beams = _number(total["rows"], "row"), f", with {total['beams']} beams" if total["beams"] > 1 else ""
    yield f"A question about a made-up picture has {total['prompt']} tokens: {rows} of {total['padded']}{beams}."
    last = ", its last token twice" if total["last_token_twice"] else ""
    yield (
        f"Passes, beside those that a part's costs name: {_number(total['pictures'], 'version')} of the picture "
        f"through the vision tower, the prompt once through the text decoder{last}, and then {rows} for every token."
    )
    yield (
        f"Keys and values of a sample with {_number(total['max_new_tokens'], 'new token')}: "
        f"{_bytes(total['bytes'])} ({_bytes(total['bytes_per_token'])} per row and token)."
    )
    for name, title in FACTS.items():
        reasons = total[name]
        yield f"{title}: {'no, because ' + ', and '.join(reasons) if reasons else 'yes'}."


FACTS = {
    "recorded": "Decoding steps are recorded on a GPU",
    "compiled": "Steps of a static cache are compiled",
    "beams_work": "Beam search works",
    "shares": "Rows about one picture share their prompt's beginning",
    "pieces": "Long prompts pass in pieces",
}
"""What is said of a whole call, each with the reasons against it."""


def layers_text(layers: Sequence[int], count: int | None) -> str:
    """Returns layer numbers in words.

    Args:
        layers: The numbers, in order.
        count: How many layers the model has; None leaves out that they are all of them.
    """
    if not layers:
        return "no layer"
    if count is not None and len(layers) == count:
        return f"all {count} layers"
    runs: list[list[int]] = []
    for number in layers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    of = "" if count is None else f" of {count}"
    return f"layer {text}{of}" if len(layers) == 1 else f"layers {text}{of}"


def _gathered(found: Mapping[str, str]) -> dict[str, list[str]]:
    return {
        verdict: [family for family in found if found[family] == verdict] for verdict in dict.fromkeys(found.values())
    }


def _indented(line: str, by: int = 2) -> RenderableType:
    return Padding(Text(line), (0, 0, 0, by), expand=False)


def _equal(text: str, default: Plain) -> bool:
    if isinstance(default, int | float) and not isinstance(default, bool):
        try:
            return float(text) == default
        except ValueError:
            return False
    return text == _written(default)


def _written(value: Plain) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _count(text: str | None, default: int) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() else default


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _works(flag: bool) -> str:
    return "works" if flag else "does not work"


def _bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
