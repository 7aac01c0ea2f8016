"""Drafts that a kill has left go with the next writing of their file; what anybody else has or writes stays."""

import errno
import os
import signal

import pytest

from vlmfix.errors import DataError
from vlmfix.files import replacing

ABANDONED = ".a.json.vlmfix-0123abcd"


def test_the_next_writing_removes_what_a_kill_has_left(tmp_path):
    path = tmp_path / "a.json"
    child = os.fork()
    if child == 0:
        with replacing(path) as file:
            file.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.json.vlmfix-")
    with replacing(path) as file:
        file.write(b"whole")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.json", b"whole")]


def test_what_somebody_is_writing_stays(tmp_path):
    path = tmp_path / "a.json"
    with replacing(path) as first:
        first.write(b"first")
        with replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.json", b"first")]


@pytest.mark.parametrize(
    "name", [".b.json.vlmfix-0123abcd", ".a.json.vlmfix-mine", ".a.json.new", "a.json.vlmfix-0123abcd"]
)
def test_other_files_stay(tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    with replacing(tmp_path / "a.json") as file:
        file.write(b"x")
    assert (tmp_path / name).read_bytes() == b"mine"


def test_links_and_folders_with_such_a_name_are_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"mine")
    (tmp_path / ABANDONED).symlink_to("nowhere")
    (tmp_path / ABANDONED.replace("0", "1")).mkdir()
    with replacing(tmp_path / "a.json") as file:
        file.write(b"x")
    assert (tmp_path / "elsewhere").read_bytes() == b"mine"
    assert (tmp_path / ABANDONED.replace("0", "1")).is_dir()


def test_where_one_writer_has_tidied_up_nothing_is_looked_for(tmp_path):
    (tmp_path / ABANDONED).write_bytes(b"half")
    with replacing(tmp_path / "a.json", tidied=True) as file:
        file.write(b"x")
    assert (tmp_path / ABANDONED).exists()


def test_what_cannot_be_written_leaves_the_file_and_no_draft(tmp_path):
    (tmp_path / "a.json").write_bytes(b"before")

    def write():
        with replacing(tmp_path / "a.json") as file:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DataError, match="No space left"):
        write()
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.json", b"before")]
