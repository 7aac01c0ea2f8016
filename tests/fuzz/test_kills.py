"""Killed, or out of room, at any write and rename, a command goes on to what it would have written undisturbed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.commands import COMMANDS, inputs

KILLED = -9
TIMES = {"started", "updated", "sessions", "peak_memory", "progress"}
"""What a card says of the starts and not of the answers."""
NOTES = b"a file of somebody else, without a last line break"


class Victim:
    """The process that forks for every start; see ``victim.py``."""

    def __init__(self, base):
        self.base, self.log = base / "world", base / "log"
        self.base.mkdir()
        inputs(self.base)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(base / "cache"),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.victim"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
        assert self.process.stdout.readline() == "ready\n"

    def start(self, arguments, out, *, fault="", at=-1):
        """Starts a command; gives its exit code, and the steps of one that came to its end."""
        given = [part.format(base=self.base, out=out) for part in arguments.split()]
        order = {"arguments": given, "base": str(out), "fault": fault, "at": at, "log": str(self.log)}
        self.process.stdin.write(f"{json.dumps(order)}\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        *said, steps = self.log.read_text(errors="replace").split("\n") if code != KILLED else (["killed", "[]"])
        return code, json.loads(steps), said

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    victim = Victim(tmp_path_factory.mktemp("kills"))
    yield victim
    victim.close()


def finished(folder):
    """What a folder holds, apart from times and from the paths of the folder itself."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _content(path):
    content = path.read_bytes()
    if path.name == "maps.jsonl":  # what was cut off stands there again
        return set(content.splitlines())
    if path.name == "failed.jsonl":  # of pictures that are answered apart none is opened ahead, and fails before others
        return sorted(content.splitlines())
    if path.name in ("card.json", "run.json"):
        return {name: value for name, value in json.loads(content).items() if name not in TIMES}
    if path.name == "recipe.toml":
        return re.sub(rb"(?m)^date = .*$", b"", content)
    return content


def chosen(steps, places):
    """(step, fault) to try: a kill and another fault at every step, or one fault at each of some that are spread."""
    if places == len(steps):
        return [(at, fault) for at, step in enumerate(steps) for fault in ("kill", other(step, at))]
    spread = [(2 * number + 1) * len(steps) // (2 * places) for number in range(places)]
    return [(at, "kill" if turn % 2 else other(steps[at], turn)) for turn, at in enumerate(spread)]


def other(step, turn):
    """A fault in turn: only what needs room meets a full disk, and only a write can be half done."""
    kinds = {"write": ("torn", "full", "io"), "open": ("full", "io"), "mkdir": ("full", "io")}
    found = kinds.get(step.split()[0], ("io",))
    return found[turn % len(found)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_step(victim, tmp_path, name, rounds):
    command, begun, whole = COMMANDS[name], tmp_path / "begun", tmp_path / "out"
    begun.mkdir()
    for arguments in command.before:
        assert victim.start(arguments, begun)[0] == 0
    shutil.copytree(begun, whole)
    code, steps, said = victim.start(command.arguments, whole)
    assert code in (0, 1), said  # 1 where every question that was left has failed
    wanted = finished(whole)
    struck, wrong = 0, []
    for at, fault in chosen(steps, len(steps) if rounds.long else command.places):
        struck += 1
        try:
            strike(victim, command, begun, whole, wanted, fault, at)
        except AssertionError as error:
            wrong.append(f"{fault} at step {at}, {steps[at]}: {error}")
    rounds.note(f"{name}: {struck} faults at {len(steps)} steps")
    assert not wrong, "\n".join(wrong)


def strike(victim, command, begun, out, wanted, fault, at):
    """Lets a fault happen to a start, and starts again.

    Raises:
        AssertionError: Something is lost, or the second start does not make it whole.
    """
    shutil.rmtree(out)
    shutil.copytree(begun, out)
    code, _, said = victim.start(command.arguments, out, fault=fault, at=at)
    if fault in ("kill", "torn"):
        assert code == KILLED, f"it ended with {code}: {said}"
    else:
        complaint = [line for line in said if line.startswith(("vlmfix: ", "hint: "))]
        assert code == 0 or (code == 1 and "--debug" not in complaint[-1]), f"it ended with {code}: {said}"
    kept, notes = answers(out), out / "notes.jsonl"
    assert not lost(answers(begun), kept), "answers of an earlier start are lost"
    if not command.begun or (out / command.begun).exists():
        notes.write_bytes(NOTES)
    code, _, said = victim.start(command.arguments, out)
    assert code in (0, 1), f"the second start ended with {code}: {said}"
    if notes.exists():
        assert notes.read_bytes() == NOTES, "a file of somebody else was changed"
        notes.unlink()
    found = finished(out)
    assert sorted(found) == sorted(wanted), f"left {sorted(found.keys() ^ wanted.keys())}"
    differing = [
        f"{name}: {found[name]!r:.800} for {wanted[name]!r:.800}" for name in wanted if found[name] != wanted[name]
    ]
    assert not differing, f"what was written differs: {differing}"
    assert not lost(kept, answers(out)), "answers of the first start are lost"


def answers(folder):
    """The whole lines with an answer, by file."""
    return {
        path.relative_to(folder): [
            line for line in path.read_bytes().split(b"\n")[:-1] if b'"failed"' not in line and b'"answer"' in line
        ]
        for path in folder.rglob("answers.jsonl")
    }


def lost(before, now):
    return {path: lines for path, lines in before.items() if now.get(path, [])[: len(lines)] != lines}
