"""The command line as a process: signals, streams that are full, closed or left, and exit codes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from PIL import Image

from tests.jobs.fake import draw
from tests.processes import command, started
from vlmfix.records import read_json, read_lines


def test_a_real_interrupt_and_a_quiet_terminal(tmp_path, model):
    pictures, out = draw(tmp_path / "in", 400), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "vlmfix",
        "run",
        pictures,
        "--out",
        out,
        "--model",
        model,
        "--decoder",
        "greedy",
        "--batch-size",
        "2",
    ]
    # a shell starts its background jobs deaf to Ctrl-C, and a process inherits that from whoever runs the tests
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, heard)
    until = time.monotonic() + 120
    while time.monotonic() < until and not (out / "answers.jsonl").exists():
        time.sleep(0.05)
    while time.monotonic() < until and not (out / "answers.jsonl").stat().st_size:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed == ""
    lines = told.splitlines()
    assert lines[0] == f"vlmfix: loading {model}"
    assert lines[-1] == f"vlmfix: stopped; what is done is in {out}. The same command goes on from there."
    assert all(line.startswith("vlmfix: ") for line in lines)
    card = read_json(out / "run.json")
    assert card["finished"] is False
    assert card["totals"]["answers"] == len(list(read_lines(out / "answers.jsonl")))


def asking(tmp_path, stdout=None):
    """`vlmfix ask` in a process of its own, about a question with a long answer."""
    Image.effect_noise((512, 512), 90).save(tmp_path / "a.png")  # of a drawn scene's size, so nothing is said of it
    question = ("Please describe this image in detail.", "--max-new-tokens", "2000", "--decoder", "sample")
    return started(command, "ask", tmp_path / "a.png", *question, stdout=stdout)


@pytest.mark.parametrize("pause", [None, 0.01], ids=["once", "twice"])
def test_an_answer_is_interrupted_and_nothing_aborts(tmp_path, pause):
    with asking(tmp_path) as (process, stdout, stderr):
        assert stdout.read(1)  # words appear
        os.kill(process.pid, signal.SIGINT)
        if pause is not None:
            time.sleep(pause)
            with suppress(ProcessLookupError):  # it has ended by then
                os.kill(process.pid, signal.SIGINT)
        told = stderr.read().decode()
        process.join(60)
        assert process.exitcode == 130
    assert [line for line in told.splitlines() if line] in (
        ["vlmfix: loading tiny", "vlmfix: stopped"],
        ["vlmfix: loading tiny"],  # the second came before the first was answered
    )


def test_an_answer_that_cannot_be_written_is_one_line_and_a_reader_who_leaves_none(tmp_path):
    with asking(tmp_path, "/dev/full") as (process, _, stderr):
        assert stderr.read().decode().splitlines() == [
            "vlmfix: loading tiny",
            "vlmfix: cannot write the output: No space left on device",
            "hint: free some space, or write elsewhere",
        ]
        process.join(60)
        assert process.exitcode == 1
    with asking(tmp_path) as (process, stdout, stderr):
        assert stdout.read(1)
        stdout.close()
        assert stderr.read() == b"vlmfix: loading tiny\n"
        process.join(60)
        assert process.exitcode == 1


def test_a_process_may_end_with_a_stream_half_read():
    script = (
        "import vlmfix; from PIL import Image; vlm = vlmfix.load('tiny'); shown = Image.new('RGB', (60, 60), 'red')\n"
        "pieces = vlm.stream(shown, 'What?', decoder='sample', max_new_tokens=2000)\n"
        "print(bool(next(pieces)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def written(asked, stdout):
    """A short output in a process that keeps it in a buffer, as processes do."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "vlmfix", asked]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=environment)


@pytest.mark.parametrize("asked", ["--version", "--help"])
def test_a_full_device_is_one_line(asked):
    with open("/dev/full", "w") as full:
        done = written(asked, full)
    assert done.returncode == 1
    assert done.stderr == (
        "vlmfix: cannot write the output: No space left on device\nhint: free some space, or write elsewhere\n"
    )


def test_a_reader_that_leaves_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as left:
        done = written("--help", left)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_long_output_that_is_full_is_told_in_words():
    with started(command, "decoders", "--json", stdout="/dev/full") as (process, _, stderr):
        told = stderr.read().decode()
        process.join(60)
    assert (process.exitcode, told) == (
        1,
        "vlmfix: cannot write the output: No space left on device\nhint: free some space, or write elsewhere\n",
    )


def test_closed_streams_take_no_place_of_files():
    closed = f"{sys.executable} -m vlmfix --help <&- >&- 2>&-; echo $?"
    done = subprocess.run(["bash", "-c", closed], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")
