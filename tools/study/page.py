"""The page of effects: tables between two marks of a Markdown file, whose other parts stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.study.results import NOT_YET, reach
from vlmfix.errors import DataError

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
TITLE = "# Effects"
MARKS = {"better": " ✓", "worse": " ✗"}
SHIFTED = "†"
NONE = "-"
CAPTIONS = {"chair_s": "CHAIR_s ↓", "chair_i": "CHAIR_i ↓", "recall": "recall ↑", "length": "length"}
CHANGED = "other captions than plain"
SPLITS = ("random", "popular", "adversarial")
POPE = {
    **{f"{split}/f1": f"F1, {split} ↑" for split in SPLITS},
    **{f"{split}/yes_ratio": f"yes-ratio, {split}" for split in SPLITS},
}
SMALL = {"small/accuracy": "accuracy ↑", "small/recall": "recall ↑", "small/yes_ratio": "yes-ratio"}
LARGE = 10.0
CAPTIONED = {"defaults", "tuned"}
COMPARED = CAPTIONED | {"small"}
EXAMS = {"chair": "captions", "pope": "POPE", "small": "small things"}


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Puts the results into a page; see `put`.

    Args:
        path: The page; made when it is missing.
        results: See :func:`tools.study.results.results`.
    """
    put(path, text(results))


def put(path: Path, content: str) -> None:
    """Puts a text between the marks of a page; what is outside the marks stays as it is.

    Args:
        path: The page; made when it is missing.
        content: Markdown.

    Raises:
        DataError: The page has no marks, or cannot be written.
    """
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else f"{TITLE}\n\n{BEGIN}\n{END}\n"
        start, begun, rest = before.partition(BEGIN)
        _, ended, after = rest.partition(END)
        if not begun or not ended:
            raise DataError(f"{path} has no lines {BEGIN} and {END}", "put them where the figures belong")
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.new")
        draft.write_text(f"{start}{BEGIN}\n\n{content}\n{END}{after}", encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}", "choose another --page") from error


def text(results: Mapping[str, Any]) -> str:
    """The part between the marks."""
    blocks = [*_head(results)]
    for model, found in results["models"].items():
        blocks += [f"## `{model}`", *_model(results, found)]
    return "\n\n".join(blocks) + "\n"


def _head(results: Mapping[str, Any]) -> Iterator[str]:
    limits, goal, stages = results["limits"], results["goal"], results["stages"]
    yield f"```sh\n{results['command']}\n```"
    yield f"{results['count']} scenes of seed {results['seed']}, which nobody trained or tuned on."
    if not COMPARED.isdisjoint(stages):
        yield from _reading(results)
    if "tuned" in stages:
        yield (
            f"Parameters are chosen on {results['tuning_count']} scenes of seed {results['tuning_seed']}, with as many "
            "trials for each decoder or chain as its row says. A search wants the smallest CHAIR_i with recall down "
            f"by no more than {limits['max_recall_loss']:g}, captions no more than "
            f"{limits['max_length_loss']:.0%} shorter and POPE's mean F1 down by no more than "
            f"{limits['max_f1_loss']:g}; for methods that refine the picture, the highest accuracy about small things. "
            "Of a chain with beams a few specifications are tried and nothing is searched."
        )
    if not CAPTIONED.isdisjoint(stages):
        yield (
            f"The goal is CHAIR_i at {goal['chair_i']:g} of plain decoding's or below, with recall down by no more "
            f"than {goal['recall_loss']:g} on the reported scenes."
        )


def _reading(results: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "A cell holds the value and, after the colon, the difference to plain greedy decoding with its 95 % interval: "
        f"paired bootstrap over pictures, {results['draws']:,} draws or more. ✓ better, ✗ worse: p < 0.05 when the "
        "two decoders' results are swapped by pictures, corrected for all merits and for all rows of the model, and an "
        "interval without zero. †: yes-ratio or length beside it has an interval without zero as well."
    )


def _model(results: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
    if not model["rows"]:
        yield f"Plain decoding: {NOT_YET}."
        return
    stages = results["stages"]
    used = [f"{EXAMS[name]} on {', '.join(devices)}" for name, devices in model["devices"].items() if devices]
    said = "; ".join([*used, *model["versions"]])
    yield f"{model['dtype']}; {said}. Weights {model['weights'].removeprefix('sha256:')[:12]}."
    if not CAPTIONED.isdisjoint(stages):
        yield from _goal(model, stages)
    if "defaults" in stages:
        yield "### Captions and POPE, with defaults"
        yield table(["decoder", *CAPTIONS.values(), CHANGED], _rows(model, model["rows"], "captions", CAPTIONS))
        yield table(["decoder", *POPE.values()], _rows(model, model["rows"], "pope", POPE))
        yield from _without(model["rows"], _why_idle)
    if "tuned" in stages:
        yield "### With parameters chosen on the tuning scenes"
        yield table(["decoder", *CAPTIONS.values(), CHANGED], _rows(model, model["tuned"], "captions", CAPTIONS))
        yield table(["decoder", *POPE.values()], _rows(model, model["tuned"], "pope", POPE))
        yield from _without(model["tuned"], _why_untuned)
        yield from _chosen(model)
    if "small" in stages and model["small"] is not None:
        yield "### Small things"
        yield from _small(model["small"])
    if "speed" in stages:
        yield "### Time"
        yield _times(model)


def _goal(model: Mapping[str, Any], stages: Sequence[str]) -> Iterator[str]:
    rows = [row for row in reach(model) if row["kind"] in stages]
    reached = [row for row in rows if row["reached"]]
    if reached:
        yield f"The goal is reached by {_listed(reached)}."
    else:
        kept = [row for row in rows if row["kept"]][:3]
        yield f"Nothing reaches the goal; nearest, with recall kept: {_listed(kept)}."
    header = ["decoder", "parameters", "share of plain CHAIR_i ↓", "recall", "goal"]
    lines = [
        [
            f"`{row['name']}`",
            row["kind"],
            f"{row['share']:.2f}",
            _signed(row["recall"], 3),
            "reached" if row["reached"] else "recall kept" if row["kept"] else "",
        ]
        for row in rows
    ]
    yield table(header, lines)


def _listed(rows: Sequence[Mapping[str, Any]]) -> str:
    words = [f"`{row['name']}` ({row['kind']}, {row['share']:.2f}, recall {_signed(row['recall'], 3)})" for row in rows]
    return "; ".join(words) or "nothing"


Row = Mapping[str, Any]


def _rows(model: Mapping[str, Any], rows: Sequence[Row], exam: str, titles: Mapping[str, str]) -> Iterator[list[str]]:
    """Plain decoding, and the rows that have figures."""
    extra = exam == "captions"
    yield ["`greedy`", *(_own(model["plain"][exam][figure]) for figure in titles), *[""] * extra]
    for row in rows:
        if row[exam] is not None:
            changed = [f"{row['changed']:.2f}"] * extra
            yield [_named(row), *(_cell(row[exam][figure]) for figure in titles), *changed]


def _without(rows: Sequence[Row], why: Callable[[Row], str]) -> Iterator[str]:
    """The rows that lack figures, with the reason."""
    lines = [[_named(row), why(row)] for row in rows if row["captions"] is None or row["pope"] is None]
    if lines:
        yield table(["decoder", "why figures are missing"], lines)


def _why_idle(row: Row) -> str:
    return str(row["reason"] or row["problem"] or NOT_YET)


def _why_untuned(row: Row) -> str:
    search = row["search"]
    if row["reason"]:
        return str(row["reason"])
    return f"chosen, but {NOT_YET} on the reported scenes" if search["spec"] else _plain_is_best(search)


def _named(row: Mapping[str, Any]) -> str:
    return f"[`{row['name']}`](https://arxiv.org/abs/{row['source']})" if row["source"] else f"`{row['name']}`"


def _said(name: str, reason: str, cells: int) -> list[str]:
    return [name, reason, *[""] * (cells - 1)]


def _plain_is_best(search: Mapping[str, Any]) -> str:
    if not search["feasible"]:
        return f"none of {search['trials']} trials keeps within the limits"
    if search["turned_down"]:
        return f"the {search['turned_down']} of {search['trials']} trials that help captions harm POPE beyond its limit"
    return f"none of {search['feasible']} trials within the limits ({search['trials']} in all) beats plain decoding"


def _chosen(model: Mapping[str, Any]) -> Iterator[str]:
    """What was chosen, and how far the search went where nothing was."""
    lines = []
    for row in model["tuned"]:
        search = row["search"]
        if search is None:
            continue
        best, plain = search["chosen"] or search["furthest"], search["plain"]
        brief = search["chosen_brief"] or search["furthest_brief"]
        lines.append(
            [
                f"`{row['name']}`",
                "chosen" if search["spec"] else "lowest CHAIR_i, not chosen",
                f"`{brief}`",
                f"{number(plain['value'])} to {number(best['value'])}",
                f"{number(plain['recall'])} to {number(best['recall'])}",
                f"{search['feasible']} of {search['trials']}",
            ]
        )
    if lines:
        yield table(["search", "", "trial", "CHAIR_i, tuning", "recall, tuning", "within the limits"], lines)


def _small(small: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{small['samples']} yes/no questions about things below 48 of 512 pixels, half of them absent. `elsewhere` "
        "shows a window of the same size and shape at a random place: what a method gains beyond it is what looking at "
        "the right place is worth."
    )
    lines = [["`greedy`", *(_own(small["plain"][figure]) for figure in SMALL), ""]]
    for row in small["rows"]:
        if row["found"] is None:
            lines.append(_said(f"`{row['name']}`", NOT_YET, len(SMALL) + 1))
            continue
        against = "" if row["difference"] is None else difference(row["difference"]["small/accuracy"])
        lines.append([f"`{row['name']}`", *(_cell(row["found"][figure]) for figure in SMALL), against])
        if row["elsewhere"] is not None:
            figures = [_cell(row["elsewhere"][figure]) for figure in SMALL]
            lines.append([f"`{row['name']}`, elsewhere", *figures, ""])
    yield table(["decoder", *SMALL.values(), "accuracy beyond `elsewhere`"], lines)
    chosen = [f"`{row['name']}` is `{row['brief']}`." for row in small["rows"] if row["name"] != row["brief"]]
    idle = [f"For `{name}`, {_plain_is_best(one)}." for name, one in small["searches"].items() if not one["spec"]]
    if chosen or idle:
        yield " ".join([*chosen, *idle])


def _times(model: Mapping[str, Any]) -> str:
    speed = model["speed"]
    if not speed:
        return f"{NOT_YET.capitalize()}."
    lines = [
        [f"`{name}`", f"{found['ms']:.2f}", f"{found['plain_ms']:.2f}", f"{found['times']:.2f}"]
        for name, found in speed.items()
    ]
    how = {
        f"{found['device']}, captions of {found['rows']} pictures in one batch, prompt included, median of "
        f"{found['repeats']} calls, not compiled"
        for found in speed.values()
    }
    said = f"{'; '.join(sorted(how))}; milliseconds per token of the batch's answers."
    return said + "\n\n" + table(["decoder", "ms", "plain, before it", "times plain"], lines)


def table(header: Sequence[str], rows: Iterator[list[str]] | Sequence[list[str]]) -> str:
    """Writes a table of Markdown."""
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines)


def _own(found: Mapping[str, Any]) -> str:
    """A plain figure with its interval."""
    value = number(found["value"])
    if found["value_low"] is None:
        return value
    return f"{value} [{number(found['value_low'])}, {number(found['value_high'])}]"


def _cell(found: Mapping[str, Any]) -> str:
    value = number(found["value"])
    if found["difference"] is None:
        return value
    return f"{value}: {difference(found)}"


def difference(found: Mapping[str, Any]) -> str:
    """Writes a difference to plain decoding with its interval and mark."""
    if found["difference"] is None:
        return NONE
    decimals = _decimals(found["value"])
    said = _signed(found["difference"], decimals)
    if found["low"] is not None:
        said += f" [{_signed(found['low'], decimals)}, {_signed(found['high'], decimals)}]"
    sign = MARKS.get(found["direction"], "")
    return f"{said}{sign}{SHIFTED}" if found["shifted"] else f"{said}{sign}"


def number(value: float | None) -> str:
    """Writes a figure, with more decimals for small ones."""
    return NONE if value is None else f"{value:.{_decimals(value)}f}"


def _decimals(value: float) -> int:
    return 1 if abs(value) >= LARGE else 3


def _signed(value: float, decimals: int) -> str:
    return f"{round(value, decimals) + 0.0:+.{decimals}f}"  # adding zero turns -0.0 into 0.0
