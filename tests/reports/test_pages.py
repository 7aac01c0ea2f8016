"""Comparisons for papers and browsers: what stands in them, and that names and notes are text there."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.evals.exam import exam
from tests.reports.test_tables import cell
from tests.view.made import parsed
from vlmfix.errors import DataError, UsageError
from vlmfix.evals.comparison.compare import compare
from vlmfix.reports.files import check_path, save_as
from vlmfix.reports.pages import report_of, tex
from vlmfix.reports.words import difference_text, value_text

NASTY = "vcd:a_b=50%,c={d}&<script>alert(1)</script>\\end{table}$x^2~#"


@pytest.fixture(scope="module")
def comparison():
    run = exam()
    return compare([exam(arms=run.answers | {NASTY: run.answers["wordy"]})], draws=2000)


def test_latex_has_every_figure_and_no_sign_of_its_own(comparison):
    text = report_of(comparison).latex()
    assert text.startswith("% vlmfix compare ")
    good = cell(comparison, "good", "easy/accuracy")
    assert f"\\textbf{{{value_text(good, good.arm.value)}}} {{\\scriptsize {difference_text(good)} [" in text
    assert "accuracy $\\uparrow$" in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == text.count(r"\begin{tabular}") == 2
    for table in re.findall(r"\\midrule\n(.*?)\\bottomrule", text, re.DOTALL):
        columns = len(re.search(r"\{l(r+)\}", text)[1]) + 1 if "easy" in table else 2
        assert all(
            len(re.findall(r"(?<!\\)&", line)) == columns - 1
            for line in table.splitlines()
            if line.endswith("\\\\") and "multicolumn" not in line
        )
    assert "script" in text
    assert r"vcd:a\_b=50\%,c=\{d\}\&\textless{}script\textgreater{}" in text
    assert r"\textbackslash{}end\{table\}\$x\textasciicircum{}2\textasciitilde{}\#" in text
    assert tex("a\nb") == "a\\textbackslash{}nb"


def test_a_page_has_tables_plot_and_nothing_from_elsewhere(comparison):
    text = report_of(comparison, draws=True).page()
    tree = parsed(text)
    rows = [row for row in tree.all("tr") if not row.attributes.get("class")]
    assert any("good" in row.text for row in rows)
    assert {node.attributes["class"] for node in tree.all("td") if "class" in node.attributes} <= {"better", "worse"}
    assert any(node.attributes.get("class") == "better" for node in tree.all("td"))
    (plot,) = tree.all("img")
    assert plot.attributes["src"].startswith("data:image/svg+xml;base64,")
    assert not list(tree.all("script"))
    assert "<script>" not in text
    assert NASTY in tree.text
    assert not re.search(r"https?://", re.sub(r"base64,[\w+/=]+", "", text))


def test_without_arms_there_is_no_plot(comparison):
    alone = replace(comparison, arms=())
    assert not list(parsed(report_of(alone, draws=True).page()).all("img"))
    assert r"\begin{tabular}" in report_of(alone).latex()


def test_files_are_written_by_their_names_and_only_over_ones_own(comparison, tmp_path):
    beginnings = {".tex": b"% vlmfix", ".html": b"<!doctype", ".svg": b"<?xml", ".pdf": b"%PDF", ".png": b"\x89PNG"}
    for ending, beginning in beginnings.items():
        path = tmp_path / f"a{ending}"
        for _ in range(2 if ending == ".tex" else 1):
            save_as(comparison, path)
        assert path.read_bytes().startswith(beginning)
        check_path(path)
        path.write_text("mine")
        with pytest.raises(DataError, match="is there and is no"):
            check_path(path)
    with pytest.raises(UsageError, match=r"ends in none of \.tex, \.html, \.png, \.pdf, \.svg"):
        check_path(tmp_path / "a.docx")
    with pytest.raises(UsageError, match="no differences to draw"):
        save_as(replace(comparison, arms=()), tmp_path / "b.svg")
