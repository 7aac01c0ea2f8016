"""How the tools end."""

import click
import pytest

from tools.entry import run
from vlmfix.commands.options import INTERRUPTED
from vlmfix.errors import DataError, UsageError


def ending(error):
    @click.command()
    @click.option("--count", type=int)
    def command(count):
        if error is not None:
            raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("no such thing", "take another"), 2, "error: no such thing (take another)\n"),
        (DataError("the file is gone", "find it"), 1, "error: the file is gone (find it)\n"),
        (click.BadParameter("too small"), 2, "too small"),
        (KeyboardInterrupt(), INTERRUPTED, "stopped"),
    ],
)
def test_one_line_and_a_code(monkeypatch, capsys, error, code, said):
    monkeypatch.setattr("sys.argv", ["module"])
    with pytest.raises(SystemExit) as ended:
        run(ending(error))
    assert ended.value.code == code
    assert said in capsys.readouterr().err


def test_wrong_use_is_told(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["module", "--count", "many"])
    with pytest.raises(SystemExit) as ended:
        run(ending(None))
    assert ended.value.code == 2
    assert "'many'" in capsys.readouterr().err


def test_what_ends_well_says_nothing(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["module", "--count", "2"])
    run(ending(None))
    assert capsys.readouterr() == ("", "")
