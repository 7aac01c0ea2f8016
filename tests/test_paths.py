"""Paths that no file can have are told as wrong, and never end in an error of the operating system."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from vlmfix.asked import pictures_of
from vlmfix.errors import DataError, VlmfixError
from vlmfix.evals.record import read_run
from vlmfix.heads.profile import load_profiles
from vlmfix.images import find
from vlmfix.jobs.export import export
from vlmfix.models.conversation import conversation
from vlmfix.models.loading import configuration
from vlmfix.sources import source_of

PACKAGE = Path(__file__).parent.parent / "vlmfix"
RAISING = {"exists", "is_dir", "is_file", "is_symlink", "resolve"}
"""Questions of pathlib that raise for names that are too long, or for links in a circle."""
COMMANDS = (
    ("ask", "ODD", "what?"),
    ("ask", "ODD/a.png", "what?"),
    ("run", "ODD", "--out", "OUT"),
    ("run", "HERE", "--out", "OUT", "--model", "ODD"),
    ("status", "ODD"),
    ("merge", "ODD"),
    ("convert", "ODD", "--format", "csv"),
    ("view", "ODD", "--out", "OUT"),
    ("compare", "ODD", "ODD"),
    ("reproduce", "ODD"),
    ("eval", "score", "ODD"),
    ("eval", "pope", "--questions", "ODD", "--images", "ODD", "--out", "OUT"),
    ("eval", "clipscore", "--images", "ODD", "--out", "OUT"),
    ("profile", "--images", "ODD", "--out", "OUT.safetensors"),
    ("profile", "--images", "HERE", "--out", "ODD/x.safetensors"),
    ("profile", "show", "ODD"),
    ("export", "ODD", "--decoder", "ph3", "--out", "OUT"),
    ("serve", "--allow", "ODD"),
    ("world", "ODD/x"),
)


@pytest.fixture(params=["long", "circle", "deep"])
def odd(request, tmp_path):
    """A path that nothing can lie at, or a link that leads to itself."""
    if request.param == "circle":
        (tmp_path / "circle").symlink_to(tmp_path / "circle")
    return tmp_path / {"long": "n" * 300, "circle": "circle", "deep": "d/" * 3000}[request.param]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: "-".join(command[:2]))
def test_commands_say_it_in_a_sentence(vlmfix, tmp_path, odd, command):
    places = {"ODD": str(odd), "OUT": str(tmp_path / "out"), "HERE": str(tmp_path)}
    code, _, err = vlmfix(
        *(places.get(word, word.replace("ODD", str(odd)).replace("OUT", str(tmp_path / "out"))) for word in command)
    )
    assert code in (1, 2)
    assert not any(kind in err for kind in ("OSError", "RuntimeError", "ValueError"))


def test_python_says_so_of_a_zero_byte():
    for read in (find, source_of, conversation, lambda path: export(path, "csv"), read_run, load_profiles):
        with pytest.raises(VlmfixError):
            list(read(Path("a\0b")))


def test_python_says_it_in_a_sentence(odd):
    for given in (odd, str(odd)):
        with pytest.raises(DataError):
            pictures_of([given])
    with pytest.raises(DataError):
        list(source_of(odd))
    with pytest.raises(DataError):
        configuration(str(odd), None)


def test_no_question_about_a_path_raises():
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text())
        caught = {
            id(inner)
            for block in ast.walk(tree)
            if isinstance(block, ast.Try)
            and any("OSError" in ast.unparse(one.type) for one in block.handlers if one.type)
            for statement in block.body
            for inner in ast.walk(statement)
        }
        found += [
            f"{file.relative_to(PACKAGE)}:{call.lineno}: {ast.unparse(call)}"
            for call in ast.walk(tree)
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in RAISING
            if not call.args and id(call) not in caught
        ]
    assert found == []  # os.path's questions and files.resolved do not raise
