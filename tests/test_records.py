import fcntl
import os
import subprocess
import sys

import pytest

from vlmfix.errors import DataError, UsageError
from vlmfix.records import JsonLines, read_json, read_lines, replace_json


def test_lines_come_back_in_order(tmp_path):
    path = tmp_path / "a.jsonl"
    with JsonLines(path) as lines:
        lines.append({"n": 1, "text": "ein Käse\u2028\n"})
        lines.append({"n": 2})
    with JsonLines(path) as lines:
        lines.append({"n": 3})
        assert [record["n"] for record in lines] == [1, 2, 3]
    assert path.read_bytes().count(b"\n") == 3
    assert "Käse" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("rest", [b'{"n": 2, "te', b"\x00" * 5000, b'{"n": "' + b"x" * 200_000])
def test_an_unfinished_last_line_is_cut_off(tmp_path, rest):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n' + rest)
    assert list(read_lines(path)) == [{"n": 1}]
    with JsonLines(path) as lines:
        lines.append({"n": 3})
    assert path.read_bytes() == b'{"n": 1}\n{"n": 3}\n'


def test_a_file_of_one_unfinished_line_is_emptied(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{")
    JsonLines(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("line", [b"nonsense\n", b"[1]\n", b"\n"])
def test_a_finished_line_that_is_no_object_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n' + line)
    with pytest.raises(DataError, match="line 2"):
        list(read_lines(path))


def test_a_name_that_is_not_text_survives(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    with JsonLines(tmp_path / "a.jsonl") as lines:
        lines.append({"image": name})
        assert [record["image"] for record in lines] == [name]


def test_another_process_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    code = f"import pathlib; from vlmfix.records import JsonLines; JsonLines(pathlib.Path({str(path)!r}))"
    with JsonLines(path):
        with pytest.raises(UsageError, match="another process"):
            JsonLines(path)
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "another process is writing" in other.stderr
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    write = os.write
    with JsonLines(path) as lines:
        lines.append({"n": 1})
        monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:4]))
        with pytest.raises(DataError, match="wrote 4 of 9 bytes"):
            lines.append({"n": 2})
        assert path.read_bytes() == b'{"n": 1}\n'


def test_lines_that_are_not_kept_leave(tmp_path):
    path = tmp_path / "a.jsonl"
    with JsonLines(path) as lines:
        for n in range(5):
            lines.append({"n": n, "text": "Käse"})
        lines.keep(lambda record: record["n"] % 2 == 0)
        assert [record["n"] for record in lines] == [0, 2, 4]
        lines.append({"n": 5})
        with pytest.raises(UsageError, match="another process"):
            JsonLines(path)
    assert [record["n"] for record in read_lines(path)] == [0, 2, 4, 5]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]
    JsonLines(path).close()


def test_lines_stay_when_their_replacement_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    with JsonLines(path) as lines:
        lines.append({"n": 1})
        with monkeypatch.context() as patch:
            patch.setattr("vlmfix.records.os.fsync", _full)
            with pytest.raises(DataError, match="cannot write"):
                lines.keep(lambda record: False)
        assert [record["n"] for record in lines] == [1]
    JsonLines(path).close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def _full(file):
    raise OSError(28, "No space left on device")


def test_a_file_that_was_replaced_while_it_was_opened_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    holder = JsonLines(path)
    flock = fcntl.flock

    def late(file, how):
        if how & fcntl.LOCK_NB:  # the second process, held up between opening and locking
            monkeypatch.setattr(fcntl, "flock", flock)
            holder.keep(lambda record: True)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UsageError, match="another process"):
        JsonLines(path)
    holder.close()


def test_a_document_is_replaced_whole(tmp_path):
    path = tmp_path / "run.json"
    replace_json(path, {"n": 1})
    replace_json(path, {"n": 2})
    assert read_json(path) == {"n": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]
    with pytest.raises(ValueError, match="JSON compliant"):
        replace_json(path, {"n": float("nan")})
    assert read_json(path) == {"n": 2}


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_document_that_is_no_object_is_refused(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"run\.json"):
        read_json(path)
    with pytest.raises(DataError, match="cannot read"):
        read_json(tmp_path / "missing.json")
