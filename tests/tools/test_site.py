"""The documentation's pages: what is generated of them, and that their commands and messages exist."""

import ast
import re
from pathlib import Path

import click
import pytest
import torch

from tools.site import links, notebooks, walk
from tools.site.drawing import attention
from tools.site.formula import fence
from tools.site.method import EFFECTS, completed, kind
from tools.site.pictures import CLEAN, GROUPS, HABIT, PICTURES, SEEN
from tools.site.shares import cut, mixed, moved, normal
from tools.site.tables import tables
from vlmfix.cli import cli
from vlmfix.decoders.index import HOMES, check, own
from vlmfix.decoders.logits.vcd import ImageContrast

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def page(name):
    return (DOCS / "methods" / f"{name}.md").read_text()


def rest_of(text, heading):
    return text.partition(f"## {heading}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("name", HOMES)
def test_each_method_has_a_page_that_begins_with_the_sentence_of_the_list(name):
    listed = {row[0]: row[1] for row in next(tables((DOCS / "methods.md").read_text())).rows}
    sentence = listed[f"[`{name}`](methods/{name}.md)"]
    opening = " ".join(page(name).split("\n\n")[1].split())
    assert opening == f"{sentence[0].upper()}{sentence[1:]}."
    made = completed(name, page(name))
    parameters = rest_of(made, "Parameters")
    assert all(f"| `{one.name}` |" in parameters for one in own()[name].parameters)
    assert "<svg" in rest_of(made, "What it changes")
    assert own()[name].cost[1:] in rest_of(made, "Cost")
    assert "**works**" in rest_of(made, "Where it works")


@pytest.mark.parametrize("name", [name for name in HOMES if name != "greedy"])
def test_a_page_says_what_was_measured_what_was_not_and_why_not(name):
    measured = rest_of(completed(name, page(name)), "Measured")
    found = tables((DOCS / EFFECTS).read_text())
    rows = [(table.head, table.of(name)) for table in found if table.of(name)]
    figures = [row[head.index("CHAIR_i ↓")] for head, row in rows if "CHAIR_i ↓" in head]
    reasons = [row[1] for head, row in rows if "why figures are missing" in head]
    assert all(cell in measured for cell in figures + reasons)
    assert ("Not measured yet" in measured) == (not figures and not reasons)


def test_what_others_published_and_what_it_costs_is_on_the_page():
    made = completed("vcd", page("vcd"))
    assert "| VISTA | greedy | 46.4 | 47.4 | +1.0 | copied |" in made
    assert "| ONLY | sampling, up to 128 tokens | 26.2 | 20 | -6.2 | second hand |" in completed("only", page("only"))
    (costs,) = (one.of("vcd") for one in tables((DOCS / "performance.md").read_text()) if "weights %" in one.head)
    assert f"| {' | '.join(costs[1:6])} |" in made
    assert "the released sampler seeds nothing" in rest_of(made, "How it differs from the paper and its code").lower()


def test_where_a_parameter_does_nothing_is_on_the_page():
    assert "in [0, 1]. Does nothing with `when=always`." in completed("vcd", page("vcd"))


def test_a_page_under_another_title_is_refused():
    with pytest.raises(ValueError, match="must begin with"):
        completed("vcd", page("spin"))


def test_methods_are_grouped_by_what_they_change():
    assert [kind(name) for name in ("greedy", "beam", "vcd", "spin", "carve")] == [
        *("Choice of tokens", "Choice of tokens"),
        *("Logits", "Attention and heads", "The picture"),
    ]


def test_the_picture_of_a_contrast_is_what_the_decoder_computes():
    rule = ImageContrast(branches=(), rows=torch.ones(1), contrast=1.0, plausibility=0.1)
    clean, habit = torch.tensor([CLEAN]).log(), torch.tensor([HABIT]).log()
    scores = rule.fuse(clean, habit[None], clean).softmax(dim=-1)[0].tolist()
    assert cut(mixed((2, CLEAN), (-1, HABIT)), CLEAN, 0.1) == pytest.approx(scores, abs=1e-6)
    assert "76%" in PICTURES["vcd"]()[2]
    assert round(scores[0], 2) == 0.76


def test_moved_attention_keeps_its_sum_and_goes_where_it_is_said():
    before = normal(SEEN)
    after = moved(before, [0, 3], 0.4, range(4, 11))
    assert sum(after) == pytest.approx(1)
    assert after[0] == pytest.approx(0.4 * before[0])
    assert after[7] / before[7] == pytest.approx(after[5] / before[5])
    assert after[11:] == before[11:]
    drawn = attention(before, after, GROUPS, "a row")
    assert drawn.count('class="before"') == drawn.count('class="after"') == len(SEEN) + 1  # and the legend


def test_every_formula_becomes_mathml_without_rest():
    for name in HOMES:
        found = re.findall(r"```math\n(.*?)```", page(name), re.DOTALL)
        assert found
        for source in found:
            made = fence(source, "math", "math", {}, None)
            assert made.startswith('<div class="math"><math ')
            assert "\\" not in re.sub(r"<[^>]*>", "", made)


def test_broken_links_and_requests_to_elsewhere_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="b.html#there">b</a><a href="c.html">c</a><a href="https://example.org">out</a>'
        '<a href="#top">top</a><a href="#gone">gone</a><img src="https://example.org/x.png">'
    )
    (tmp_path / "b.html").write_text('<h2 id="here"></h2><script src="//example.org/x.js"></script>')
    (tmp_path / "a.css").write_text("@import 'https://example.org/f.css';")
    assert set(links.problems(tmp_path)) == {
        "a.html fetches https://example.org/x.png",
        "a.html links to b.html#there, and that page has no such place",
        "a.html links to c.html, which is not there",
        "a.html links to #gone, and that page has no such place",
        "b.html fetches //example.org/x.js",
        "a.css fetches https://example.org/f.css",
    }


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_command_of_the_pages_exists_with_its_options(file):
    for words in walk.commands(file.read_text()):
        parsed(words)


def test_the_generated_commands_exist_with_their_options():
    found = [words for name in HOMES for words in walk.commands(completed(name, page(name)))]
    assert len(found) > 3 * len(HOMES)
    for words in found:
        parsed(words)


def parsed(words):
    """Reads a command line as click does, without running it."""
    command, context = cli, click.Context(cli, info_name="vlmfix")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        if command is not cli and words[0] not in command.commands:
            return  # a benchmark of one's own
        command = command.commands[words[0]]
        context, words = click.Context(command, parent=context, info_name=words[0]), words[1:]
    values, _, _ = command.make_parser(context).parse_args(list(words))
    given = values.get("decoder") or ()
    for spec in [given] if isinstance(given, str) else given:
        if re.fullmatch(r"[a-z@][\w@:+.=,/-]*", spec) and ".py" not in spec and ".toml" not in spec:
            check(spec)


def test_blocks_that_are_to_run_are_read_in_order():
    text = "<!-- runs -->\n```\nvlmfix a\n```\n\n```\nvlmfix b\n```\n\n<!-- runs -->\n```sh\nvlmfix c \\\n  d\n```\n"
    assert walk.blocks(text) == ["vlmfix a\n", "vlmfix c \\\n  d\n"]
    assert list(walk.commands(text)) == [["a"], ["b"], ["c", "d"]]


def test_messages_that_troubleshooting_explains_are_given_somewhere():
    said = "\0".join(
        node.value
        for file in (ROOT / "vlmfix").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    headings = re.findall(r"^### (.*)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) > 30
    for message in re.findall(r"`([^`]*)`", " ".join(headings)):
        for part in re.split(r"\.\.\.", message):
            assert part.strip(" '") in said, message


@pytest.mark.parametrize("file", sorted(notebooks.FOLDER.glob("*.ipynb")), ids=lambda file: file.stem)
def test_a_notebook_runs_and_prints_what_it_shows(file, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shown = notebooks.nbformat.read(file, as_version=4)
    made = notebooks.executed(file)
    code = [cell for cell in made.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert [bool(cell.outputs) for cell in code] == [bool(c.outputs) for c in shown.cells if c.cell_type == "code"]
    assert "```python\n" in notebooks.page_of(file.read_bytes(), file.name)
