import fcntl
import os
import subprocess
import sys

import pytest

from vlmfix.errors import DataError, UsageError
from vlmfix.files import plain_name
from vlmfix.parsing import escaped
from vlmfix.records import JsonLines, count_lines, is_held, read_json, read_lines, replace_json
from vlmfix.shapes import COUNT, NUMBER, TEXT, fields, list_of


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


def test_who_looks_on_disturbs_nobody(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    assert (is_held(path), count_lines(path)) == (False, 0)
    with JsonLines(path) as lines:
        lines.append({"n": 1})
        assert is_held(path)
    path.write_bytes(path.read_bytes() + b'{"n": 2')
    assert (is_held(path), count_lines(path)) == (False, 1)
    with path.open("rb") as looking:  # as another process does while it asks
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr("time.sleep", lambda seconds: fcntl.flock(looking, fcntl.LOCK_UN))
        JsonLines(path).close()
    os.mkfifo(tmp_path / "pipe")
    for ask in (is_held, count_lines):
        with pytest.raises(DataError, match="it is not a file"):
            ask(tmp_path / "pipe")


def test_nothing_is_cut_off_before_the_file_is_claimed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{")
    JsonLines(path).close()
    assert path.read_bytes() == b"{"
    with JsonLines(path) as lines:
        assert not lines.is_empty
        lines.claim()
        assert lines.is_empty
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense\n",
        b"[1]\n",
        b"\n",
        b'{"n": NaN}\n',
        b'{"n": 1e999}\n',
        b'{"n": ' + b"9" * 5000 + b"}\n",
        b"[" * 100_000 + b"\n",
        b'{"n": ' + b"[" * 100 + b"]" * 100 + b"}\n",
        b'{"n": "\xff"}\n',
    ],
)
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


@pytest.mark.parametrize("text", ["{", "[]", "", "[" * 100_000, '{"n": -Infinity}'])
def test_a_document_that_is_no_object_is_refused(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"run\.json"):
        read_json(path)
    with pytest.raises(DataError, match="cannot read"):
        read_json(tmp_path / "missing.json")


def test_what_is_no_file_is_neither_read_nor_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "device", "folder"):
        with pytest.raises(DataError, match=f"{name}: it is not a file"):
            read_json(tmp_path / name)
        with pytest.raises(DataError, match=f"{name}: it is not a file"):
            list(read_lines(tmp_path / name))
        with pytest.raises(DataError, match=f"{name}: it is not a file"):
            replace_json(tmp_path / name, {})
        with pytest.raises(DataError, match=name):
            JsonLines(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device", "folder", "pipe"]


def test_fields_are_checked_with_the_line_and_the_place(tmp_path):
    shape = fields({"n": COUNT, "of": list_of(fields({"a": TEXT}))}, {"seconds": NUMBER.or_null()})
    path = tmp_path / "a.jsonl"
    for line, said in (
        ('{"of": []}', "line 1 of .*a.jsonl has no n"),
        ('{"n": true, "of": []}', "a.jsonl: n is True, not a whole number from 0"),
        ('{"n": 1.0, "of": []}', "a.jsonl: n is 1.0, not a whole number"),
        (f'{{"n": {"9" * 400}, "of": []}}', "a.jsonl: n is a number beyond all counts"),
        ('{"n": 1, "of": {}}', "a.jsonl: of is {}, not a list"),
        ('{"n": 1, "of": [{"a": ""}, 7]}', r"a.jsonl: of\[2\] is 7, not an object"),
        ('{"n": 1, "of": [{"a": null}]}', r"a.jsonl: of\[1\].a is None, not a text"),
        ('{"n": 1, "of": [], "seconds": 1e300}', "a.jsonl: seconds is 1e\\+300, not a number"),
    ):
        path.write_text(f"{line}\n")
        with pytest.raises(DataError, match=said):
            list(read_lines(path, shape))
    path.write_text('{"n": 1, "of": [{"a": "x", "b": {}}], "seconds": null, "more": [1]}\n')
    assert len(list(read_lines(path, shape))) == 1


def test_nothing_is_written_through_links(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (tmp_path / "a.jsonl").symlink_to(mine)
    with pytest.raises(DataError, match=r"a\.jsonl is a link"):
        JsonLines(tmp_path / "a.jsonl")
    (tmp_path / "run.json").symlink_to(mine)
    (tmp_path / ".run.json.new").symlink_to(mine)
    replace_json(tmp_path / "run.json", {"n": 1})
    assert read_json(tmp_path / "run.json") == {"n": 1}
    assert mine.read_text() == "precious"


def test_drafts_are_removed_and_nothing_that_is_like_them(tmp_path):
    path = tmp_path / "a.jsonl"
    strange = [".a.jsonl.new", ".a.jsonl.vlmfix-1", "a.jsonl.vlmfix-12345678", ".b.vlmfix-12345678"]
    for name in [*strange, ".a.jsonl.vlmfix-12345678"]:
        (tmp_path / name).write_text(name)
    with JsonLines(path) as lines:
        lines.claim()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*strange, "a.jsonl"])
    assert all((tmp_path / name).read_text() == name for name in strange)


def test_a_failing_disk_is_told_in_words(tmp_path, monkeypatch):
    with JsonLines(tmp_path / "a.jsonl") as lines, monkeypatch.context() as patch:
        patch.setattr("vlmfix.records.os.fsync", _full)
        with pytest.raises(DataError, match=r"cannot write .*a\.jsonl: No space left on device"):
            lines.sync()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("vcd:contrast=0.5", "vcd:contrast=0.5"),
        ("folder/recipe", "folder_recipe"),
        ("a b|c\u00e9", "a b|c\u00e9"),
    ],
)
def test_names_that_files_can_have_stay(text, name):
    assert plain_name(text) == name


def test_other_names_become_names_of_files(tmp_path):
    texts = [
        "",
        ".",
        "..",
        ".hidden",
        "a\nb",
        "a\0b",
        "x" * 300,
        "x" * 301,
        "\u00e9" * 200,
        "\U0001f600" * 80,
        "\ud800",
        "\udce9",
    ]
    names = [plain_name(text) for text in texts]
    for name in names:
        (tmp_path / name).write_text("")
        assert name.isprintable()
        assert not name.startswith(".")
    assert len(set(names)) == len(texts)
    assert plain_name("x" * 300).startswith("x" * 200)
    assert len(os.fsencode(plain_name("x" * 300, room=143))) <= 143


def test_control_characters_are_shown_and_not_obeyed():
    assert escaped("a\x1b[31mb\u202ec\x9bd\udce9\n\t\x7f") == r"a\u001b[31mb\u202ec\u009bd\udce9\n\t\u007f"
    assert escaped("one\ntwo\tthree\r", lines=True) == "one\ntwo\tthree\\r"
    plain = "na\u00efve \u65e5\u672c \U0001f469\u200d\U0001f52c \u3000"
    assert escaped(plain) == plain
