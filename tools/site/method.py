"""Completes the page of a method with what is known elsewhere.

The page in ``docs/methods/`` has a sentence, the formula and what the picture shows, by hand. The picture, the
parameters, costs, figures and ways to run come from the declarations, the tables of other pages and what was tried.
"""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path

from tools.site.pictures import PICTURES
from tools.site.tables import Table, tables, written
from vlmfix.advice.published import about, published
from vlmfix.decoders.index import HOMES, DecoderInfo, Parameter, Plain, own
from vlmfix.decoders.support import WORKS, support
from vlmfix.settings import EMBEDDED

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SHOWN = "## What it changes\n"
"""The heading under which the picture is put."""
MADE_UP = "The picture's numbers are made up."
COSTS = ("rows", "first ms", "x plain", "step ms", "x plain")
"""Columns of a table of costs behind the first."""
KINDS = {
    "base": "Choice of tokens",
    "choice": "Choice of tokens",
    "logits": "Logits",
    "attention": "Attention and heads",
    "states": "KV cache and residual stream",
    "picture": "The picture",
}
"""Part of the package that a method lies in -> what it changes."""
CAPTIONS = {
    "absent, of all named (CHAIR_i ↓)": "CHAIR_i ↓",
    "answers with something absent (CHAIR_s ↓)": "CHAIR_s ↓",
    "named, of what is there (recall ↑)": "recall ↑",
    "tokens": "length",
}
"""Heading of a column -> that of the page of effects."""
EFFECTS = "effects.md"
"""The page with figures of the embedded models."""
PROFILES = {
    "adhh": "--profiler ablation --instances instances.json --captions captions.json",
    "ph3": '--profiler patching --prompt "Is there a chair in the image?"',
    "amplify": '--profiler patching --prompt "Is there a chair in the image?"',
}
"""Methods that read a profile of heads, and options of the command that makes it."""
DIRECTED = ("vti", "nullu", "pti")
"""Methods that read directions."""


def kind(name: str) -> str:
    """Returns what a method changes, as the site's navigation groups them."""
    return KINDS[HOMES[name].partition(":")[0].split(".")[2]]


def completed(name: str, page: str) -> str:
    """Adds to a method's page what is generated.

    Args:
        name: The method.
        page: What ``docs/methods/NAME.md`` holds.

    Raises:
        ValueError: The page has another title than the method, or no place for the picture.
    """
    info = own()[name]
    title = f"# {name}: {info.title}\n"
    if not page.startswith(title) or SHOWN not in page:
        raise ValueError(f"docs/methods/{name}.md must begin with {title!r} and have the heading {SHOWN!r}")
    head, _, shown = page.partition(SHOWN)
    opening, formula, rest = head.partition("## Formula\n")
    figure = f'<figure class="method">{"".join(PICTURES[name]())}</figure>'
    parts = [
        opening.rstrip(),
        facts(info),
        formula + rest.rstrip(),
        f"{SHOWN}\n{figure}\n\n{shown.strip()} {MADE_UP}",
        f"## Try it\n\n{commands(info)}",
        f"## Parameters\n\n{parameters(info)}",
        f"## Cost\n\n{cost(info)}",
        f"## Measured\n\n{measured(name)}",
        f"## Where it works\n\n{ways(name)}",
        *sources(name),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def facts(info: DecoderInfo) -> str:
    """Writes what is declared about a method, in one line."""
    beams = "it is beam search" if info.chooses == "beams" else f"beam search {'works' if info.beams else 'is refused'}"
    parts = [f"Acts on: {info.acts_on}", f"rows for a question: {info.passes}", beams]
    parts += [f"[arXiv {info.arxiv}](https://arxiv.org/abs/{info.arxiv})"] if info.arxiv else []
    parts += [f"[the authors' code]({info.code})"] if info.code else []
    return f"{' · '.join(parts)}\n{{ .facts }}"


def commands(info: DecoderInfo) -> str:
    """Writes commands to copy, with the model that comes with the package."""
    name = info.name
    read = {"heads": name in PROFILES, "directions": name in DIRECTED}
    spec = next((f"{name}:profile={file}.safetensors" for file, reads in read.items() if reads), name)
    acts = "tiny" not in _reasons(name)  # the demonstration's model
    lines = [*([f"vlmfix demo --decoder {name}"] if acts else []), f"vlmfix explain {name}"]
    model = "llava-hf/llava-1.5-7b-hf"
    if name in PROFILES:
        made = f"vlmfix profile --model {model} --images DIR --out heads.safetensors"
        lines.append(f"{made} \\\n    {PROFILES[name]}")
    if name in DIRECTED:
        made = f"vlmfix profile --model {model} --images DIR --out directions.safetensors"
        lines.append(f"{made} \\\n    --directions {name} --instances instances.json --captions captions.json")
    lines += [f"vlmfix run photos --out answers --model {model} --decoder {spec}"]
    first = next((one for one in info.parameters if one.search), None)
    if first and name != "sample":
        lines.append(
            f"vlmfix tune {name} --task chair --model {model} \\\n"
            "    --instances instances.json --captions captions.json --images DIR --out tuned"
        )
    example = f'answers = vlm.generate([picture], "Describe this image.", decoder="{spec}")'
    return "```\n" + "\n".join(lines) + f"\n```\n\n```python\n{example}\n```"


def parameters(info: DecoderInfo) -> str:
    """Writes the table of a method's parameters, and its presets."""
    if not info.parameters:
        return "It has none."
    said = _documented(info.name)
    rows = [
        (
            f"`{one.name}`",
            f"`{_plain(one.default)}`",
            _cell(one.range),
            _cell(_meaning(one, said.get(one.name, ""))),
            _cell(one.search),
        )
        for one in info.parameters
    ]
    table = written(("parameter", "default", "allowed", "meaning", "`vlmfix tune` searches"), rows)
    presets = [
        f"- `preset={name}`: {', '.join(f'`{key}={_plain(value)}`' for key, value in values.items()) or 'see above'}"
        for name, values in info.presets.items()
    ]
    return table + ("\n\n" + "\n".join(presets) if presets else "")


def _meaning(one: Parameter, said: str) -> str:
    """Writes what a parameter is, as the docstring says it where it does, and with what others it does nothing."""
    if not said:
        return one.meaning
    return f"{said} Does nothing with `{one.idle}`." if one.idle else said


def cost(info: DecoderInfo) -> str:
    """Writes what a method costs: the declaration, and rows of the tables of measurements."""
    said = f"{info.cost[:1].upper()}{info.cost[1:]}"
    row_of_method = re.compile(rf"`{re.escape(info.name)}`(, of \w+)?")
    found = [
        (f"{table.under[-1]}{row[0].partition('`,')[2]}", *row[1:6])
        for table in _tables("performance.md")
        for row in table.rows
        if table.head[1:6] == COSTS and row_of_method.fullmatch(row[0])
    ]
    if not found:
        return f"{said} Not measured yet at a large model's size: `vlmfix bench --decoder {info.name}`."
    head = ("measured", "questions at once", "first token, ms", "times plain", "a further token, ms", "times plain")
    return f"{said}\n\n{written(head, found)}\n\nHow that was measured: [what decoders cost](../performance.md)."


def measured(name: str) -> str:
    """Writes what was measured of a method with its defaults, and what others published."""
    if name == "greedy":
        return "It is what all others are held against: [effects](../effects.md)."
    rows, small, comments = [], [], []
    for table in _tables(EFFECTS):
        row = table.of(name)
        if row is None:
            continue
        model = _model(table)
        cell = dict(zip(table.head, row, strict=True))
        if "CHAIR_i ↓" in cell:
            rows.append((f"`{model}`", *(cell[head] for head in CAPTIONS.values())))
        elif "accuracy beyond `elsewhere`" in cell:
            small.append((f"`{model}`", cell["accuracy ↑"], cell["recall ↑"], cell["accuracy beyond `elsewhere`"]))
        elif table.under[-1] == "What is known of single rows":
            comments.append(re.sub(r"\]\((?=\w+\.md)", "](../", row[1]))
    parts = []
    if rows:
        parts += [
            "Captions of 500 drawn scenes by the small models that come with the package, with the defaults: the "
            "value, and after the colon the difference to plain decoding with its 95 % interval. ✓ better, ✗ worse, no "
            "mark: no clear difference. Defaults are the papers', for models a thousand times as large.",
            written(("model", *CAPTIONS), rows),
        ]
    if small:
        parts += [
            "Questions about small things; the last column is what it gains beyond a window at a random place.",
            written(("model", "accuracy ↑", "recall ↑", "beyond a random place"), small),
        ]
    if reasons := _reasons(name):
        parts.append(
            "It cannot act on a model that comes with the package:\n\n"
            + "\n".join(f"- `{model}`: {why}" for model, why in reasons.items())
        )
    parts += comments
    if parts:
        parts.append(
            f"Revision, machine and command: [effects](../{EFFECTS}#figures). On your model: "
            "[evaluations](../evaluations.md)."
        )
    else:
        parts.append(
            "**Not measured yet** on the models that come with the package. How to measure it on yours: "
            "[evaluations](../evaluations.md)."
        )
    return "\n\n".join([*parts, *_elsewhere(name)])


def _model(table: Table) -> str:
    """Returns the embedded model that a table of the page of effects is about."""
    named = (one.strip("`") for one in table.under)
    return next((one for one in named if one in EMBEDDED), "")


def _reasons(name: str) -> dict[str, str]:
    """Reads why a method has no figures, by model."""
    told = [table for table in _tables(EFFECTS) if table.head[-1] == "why figures are missing"]
    found = [(table, table.of(name)) for table in told]
    return {_model(table): row[1] for table, row in found if row}


def _elsewhere(name: str) -> list[str]:
    found = published([name])
    if not found:
        return []
    model, task = about()
    rows = [
        (one.source, one.way, f"{one.plain:g}", f"{one.mitigated:g}", f"{one.change:+.1f}", one.how) for one in found
    ]
    head = ("published by", "decoding", "plain", f"{name}", "difference", "known")
    return [
        "### What others published",
        f"{model}, {task}, in per cent. Nothing of it was measured here, sources contradict each other, and a row is "
        "comparable with its own plain figure alone; look it up in the paper before you quote it.",
        written(head, rows),
    ]


def ways(name: str) -> str:
    """Writes in which ways to run a method was found to work, over all families."""
    tried = support()[name]
    lines = []
    for way, verdicts in tried.found.items():
        by_verdict: dict[str, list[str]] = {}
        for family, verdict in verdicts.items():
            by_verdict.setdefault(verdict, []).append(family)
        most = max(by_verdict, key=lambda verdict: len(by_verdict[verdict]))
        said = [
            verdict + ("" if verdict == most else f" (with {', '.join(f'`{one}`' for one in families)})")
            for verdict, families in sorted(by_verdict.items(), key=lambda entry: entry[0] != most)
        ]
        lines.append((way, _cell("; ".join(said).replace(WORKS, "**works**", 1) if most == WORKS else "; ".join(said))))
    spec = "" if tried.spec == name else f" Tried as `{tried.spec}`, so that it acts on a tiny model."
    return (
        f"With all {len(next(iter(tried.found.values())))} families, unless one is named, and with prompts and "
        f"pictures of different lengths in one batch.{spec}\n\n{written(('way to run', 'found'), lines)}\n\n"
        "What the ways are: [support](../support.md)."
    )


def sources(name: str) -> list[str]:
    """Writes where a method comes from, and how it differs from the paper and the released code."""
    said = _docstring(name)
    found = []
    if differs := _section(said, "Differs"):
        found.append(f"## How it differs from the paper and its code\n\n{differs[:1].upper()}{differs[1:]}")
    if source := _section(said, "Source"):
        found.append(f"## Source\n\n{source[:1].upper()}{source[1:]}")
    return found


def _section(docstring: str, title: str) -> str:
    found = re.search(rf"^\*{title}\*: (.*?)(?=^\*[A-Z]\w+\*: |^\w+:$|\Z)", docstring, re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def _documented(name: str) -> dict[str, str]:
    """Reads what the docstring of a method says of its parameters."""
    found = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", _docstring(name), re.MULTILINE | re.DOTALL)
    entries = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w+: |\Z)", found[1], re.MULTILINE | re.DOTALL) if found else []
    return {key: " ".join(said.split()) for key, said in entries}


@cache
def _docstring(name: str) -> str:
    module, _, wanted = HOMES[name].partition(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == wanted)
    return inspect.cleandoc(ast.get_docstring(found) or "")


@cache
def _tables(page: str) -> tuple[Table, ...]:
    return tuple(tables((DOCS / page).read_text(encoding="utf-8")))


def _plain(value: Plain) -> str:
    """Writes a value as a specification has it."""
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else "none" if value is None else str(value)


def _cell(words: str) -> str:
    return words.replace("|", "\\|")
