"""Runs on Ray: what actors do, without a cluster, and on one whose actors, nodes and driver are killed (-m cluster)."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from tests.jobs.fake import FakeVLM, colour, draw
from tests.jobs.folder.asked import WHAT, answers, failures
from tests.jobs.folder.test_deaths import POISON, Deadly
from tests.processes import ended
from vlmfix import extras
from vlmfix.errors import DataError, MissingExtraError, SystematicError, UsageError
from vlmfix.jobs.folder import Questions, ray_folder, run
from vlmfix.jobs.folder.actor import Actor, Task
from vlmfix.jobs.folder.job import known_settings
from vlmfix.jobs.folder.joined import MergedFolder
from vlmfix.jobs.folder.on_ray import run_on_ray
from vlmfix.jobs.folder.ray_folder import RayFolder, identity
from vlmfix.jobs.journal import DEATHS, DIED
from vlmfix.jobs.status import read_on_ray
from vlmfix.records import read_json
from vlmfix.settings import Settings
from vlmfix.sources import source_of

parquet = pytest.importorskip("pyarrow.parquet")
COUNT = 20


@pytest.fixture
def pictures(tmp_path):
    folder = draw(tmp_path / "in", COUNT)
    (folder / "0007.png").write_bytes(b"")
    return folder


@pytest.fixture(autouse=True)
def _blocks(monkeypatch):
    monkeypatch.setattr(ray_folder, "BLOCK", 8)


def planned(pictures, out, questions, vlm):
    """A folder with its plan, what an actor needs, and the number of questions."""
    from vlmfix.decoders import parse

    source, settings = source_of(pictures), Settings()
    folder = RayFolder(out)
    known = known_settings(source, questions, settings, parse("greedy"), None)
    folder.claim(known)
    sample, total = folder.plan(source, questions)
    return (
        folder,
        Task(known, None, settings, 4, folder.base(source), out, vlm.load, lambda text: (), sample),
        total,
    )


def work(folder, task, left_out=()):
    actor = Actor(task)
    for place in sorted(folder.questions.iterdir()):
        if place.stem not in left_out:
            parquet.write_table(actor(parquet.read_table(place)), folder.answers / place.name)


def joined(folder, total):
    with MergedFolder(folder.out, read_json(folder.folder / "settings.json")["settings"]) as merged:
        return folder.join(merged, total, 0, ())


@pytest.mark.parametrize("prompts", [("What?",), ("A?", "B?")])
def test_actors_make_what_a_run_makes(tmp_path, pictures, prompts):
    os.rename(pictures / "0009.png", os.fsencode(pictures) + b"/caf\xe9.png")
    questions, vlm = Questions(everywhere=prompts, about={"prompt": "?", "prompts": None}), FakeVLM(broken=[colour(3)])
    folder, task, total = planned(pictures, tmp_path / "out", questions, vlm)
    work(folder, task)
    found = read_on_ray(folder.out)
    assert (found.running, found.total, found.left, found.failed) == (False, total, 0, 2 * len(prompts))
    assert [(worker.state, worker.answers) for worker in found.workers] == [("ended", found.answers)]
    end = joined(folder, total)
    run(pictures, tmp_path / "one", questions=questions, settings=Settings(), batch_size=4, loader=vlm.load)
    assert answers(tmp_path / "out") == answers(tmp_path / "one")
    assert sorted(map(str, failures(tmp_path / "out"))) == sorted(map(str, failures(tmp_path / "one")))
    assert (end.total, end.done) == (COUNT * len(prompts), COUNT * len(prompts))
    ours, one = read_json(tmp_path / "out" / "run.json"), read_json(tmp_path / "one" / "run.json")
    assert (ours["settings"], ours["totals"], ours["finished"]) == (one["settings"], one["totals"], True)
    rows = [row for path in folder.answers.iterdir() for row in parquet.read_table(path).to_pylist()]
    assert {row["id"] for row in rows} >= {identity("0001.png", prompt) for prompt in prompts}
    assert {row["failed"] for row in rows} == {None, "empty file", "the model's output was not a number"}


def test_what_trouble_leaves_open_is_not_written(tmp_path, pictures):
    vlm = FakeVLM(fails=lambda batch: OSError(errno.EIO, "x") if colour(4) in [c for c, _ in batch] else None)
    folder, task, total = planned(pictures, tmp_path / "out", WHAT, vlm)
    work(folder, task)
    end = joined(folder, total)
    assert (end.done, read_json(tmp_path / "out" / "run.json")["finished"]) == (COUNT - 1, False)
    assert "0004.png" not in {line["image"] for line in [*answers(folder.out), *failures(folder.out)]}


def test_an_odd_picture_is_told_from_a_model_that_answers_nothing(tmp_path, pictures):
    odd = FakeVLM(fails=lambda batch: RuntimeError("odd") if colour(19) in [c for c, _ in batch] else None)
    folder, task, total = planned(pictures, tmp_path / "out", WHAT, odd)
    work(folder, task)
    joined(folder, total)
    assert {"image": "0019.png", "reason": "RuntimeError: odd", "prompt": "What?"} in failures(folder.out)
    folder, task, _ = planned(pictures, tmp_path / "other", WHAT, FakeVLM(fails=lambda batch: RuntimeError("gone")))
    with pytest.raises(SystematicError):
        work(folder, task)


def test_a_row_that_was_written_twice_counts_once(tmp_path, pictures):
    folder, task, total = planned(pictures, tmp_path / "out", WHAT, FakeVLM())
    work(folder, task)
    first = min(folder.answers.iterdir())
    first.with_name("again.parquet").write_bytes(first.read_bytes())
    assert (joined(folder, total).done, len(answers(folder.out))) == (COUNT, COUNT - 1)
    first.write_bytes(b"torn")
    with pytest.raises(DataError, match="is no whole Parquet file"):
        joined(folder, total)


def test_actors_of_another_kind_are_refused(tmp_path, pictures, monkeypatch):
    folder, task, _ = planned(pictures, tmp_path / "out", WHAT, FakeVLM())
    Actor(task)
    monkeypatch.setattr(FakeVLM, "revision", "other")
    with pytest.raises(UsageError, match="weights was 'commit:"):
        Actor(task)
    with pytest.raises(UsageError, match="seed was 0, now 1"):
        folder.claim(dict(task.known) | {"seed": 1})


def answered(pictures, out, vlm, batch_size=4):
    """Answers the first block in a process of its own, as Ray lets an actor do, and notes what was written."""
    folder, task, _ = planned(pictures, out, WHAT, vlm)
    work(folder, replace(task, batch_size=batch_size), left_out=("00000001", "00000002"))


def poisoned(pictures, out, number, batch_size=4):
    answered(pictures, out, Deadly((number,)), batch_size)


def interrupted(pictures, out, batch):
    answered(pictures, out, Deadly(batch=batch))


@pytest.mark.parametrize(("number", "rows"), [(0, 4), (5, None)])
def test_a_picture_on_which_actors_die_is_given_up(tmp_path, pictures, number, rows):
    deaths = 0
    while (code := ended(poisoned, pictures, tmp_path / "out", number, rows)) == -signal.SIGKILL:
        deaths += 1
    folder = RayFolder(tmp_path / "out")
    rows = [row for path in folder.answers.iterdir() for row in parquet.read_table(path).to_pylist()]
    assert (code, deaths) == (0, 1 + DEATHS)
    assert len(rows) == len({row["id"] for row in rows}) == COUNT
    assert [row["image"] for row in rows if row["failed"] == DIED] == [f"{number:04d}.png"]
    assert not list(folder.begun.iterdir())


def test_actors_that_are_killed_cost_no_picture(tmp_path, pictures):
    for batch in (1, 0, 1, 0):
        assert ended(interrupted, pictures, tmp_path / "out", batch) == -signal.SIGKILL
    assert ended(interrupted, pictures, tmp_path / "out", 100) == 0
    folder = RayFolder(tmp_path / "out")
    rows = [row for path in folder.answers.iterdir() for row in parquet.read_table(path).to_pylist()]
    assert [row["image"] for row in rows if row["failed"]] == ["0007.png"]
    assert not list(folder.begun.iterdir())


def test_the_extra_is_named(tmp_path, pictures, monkeypatch, vlmfix):
    monkeypatch.setitem(extras.EXTRAS, "ray", ("no_such_module",))
    with pytest.raises(MissingExtraError, match=r"vlmfix\[ray\]"):
        run_on_ray(pictures, tmp_path / "out", address="ray", questions=WHAT, settings=Settings())
    options = ("run", pictures, "--out", tmp_path / "out", "--on")
    assert vlmfix(*options, "ray")[0] == 1
    for more, words in (
        (("spark",), "there is no such place"),
        (("ray", "--steal"), "--on does not go with --steal"),
        (("ray", "--shard", "0/2"), "--shard does not go with --on"),
        (("ray", "--devices", "cpu"), "--devices does not go with --on"),
    ):
        code, _, told = vlmfix(*options, *more)
        assert (code, words in told) == (2, True)
    assert not (tmp_path / "out").exists()


# -- on a cluster of this machine

POISONED = """
import sys
from pathlib import Path
from tests.jobs.folder.test_deaths import deadly
from vlmfix.jobs.folder import Questions, ray_folder
from vlmfix.jobs.folder.on_ray import run_on_ray
from vlmfix.settings import Settings
ray_folder.BLOCK = 8
pictures, out = map(Path, sys.argv[1:])
asked, settings = Questions.text("What?"), Settings()
run_on_ray(pictures, out, address="ray", questions=asked, settings=settings, batch_size=2, loader=deadly)
"""
DRIVER = """
import sys
from vlmfix import cli
from vlmfix.jobs.folder import ray_folder
ray_folder.BLOCK = 8
sys.argv = ["vlmfix", *sys.argv[1:]]
cli.main()
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    from vlmfix.world import coco

    base = tmp_path_factory.mktemp("drawn")
    coco.make(base, count=80, seed=5)
    (base / "images" / "broken.png").write_bytes(b"broken")
    return base / "images"


@contextlib.contextmanager
def driver(pictures, out, **environment):
    options = ["run", pictures, "--out", out, "--on", "ray", "--max-new-tokens", 12, "--batch-size", 2]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", **environment}
    env["PYTHONPATH"] = os.pathsep.join([os.getcwd(), env.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, "-c", DRIVER, *map(str, options)], env=env, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(check, process, seconds=200):
    ends = time.monotonic() + seconds
    while not check():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < ends
        time.sleep(0.05)


def held(pictures, out, whole):
    if not whole.exists():
        run(pictures, whole, questions=Questions.text(), settings=Settings(max_new_tokens=12), batch_size=2)
    ours = {line["image"]: line["answer"] for line in answers(out)}
    assert ours == {line["image"]: line["answer"] for line in answers(whole)}
    assert (len(answers(out)), [line["image"] for line in failures(out)]) == (80, ["broken.png"])
    assert read_json(out / "run.json")["finished"]


@pytest.mark.cluster
def test_a_killed_actor_and_a_killed_driver_lose_nothing(tmp_path, drawn):
    pytest.importorskip("ray")
    out, folder = tmp_path / "out", RayFolder(tmp_path / "out")
    with driver(drawn, out) as process:
        until(lambda: folder.written() >= 8, process)
        for place in folder.workers.iterdir():  # every actor that there is
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(re.search(r"-(\d+)-[0-9a-f]{8}\.json$", place.name)[1]), signal.SIGKILL)
        killed = folder.written()
        until(lambda: folder.written() > killed + 8, process)
    before = folder.written()
    assert before < 81
    with driver(drawn, out) as process:
        told = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 0, told
    assert "Traceback" not in told
    held(drawn, out, tmp_path / "whole")
    asked = sum(len(parquet.read_table(path)) for path in folder.answers.glob("*.parquet"))
    assert asked == 81  # Ray's checkpoints have kept what was written from being asked again


@pytest.mark.cluster
def test_a_killed_node_loses_nothing(tmp_path, drawn):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    out, folder = tmp_path / "out", RayFolder(tmp_path / "out")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        node = cluster.add_node(num_cpus=2)
        with driver(drawn, out, RAY_ADDRESS=cluster.address) as process:
            until(lambda: folder.written() >= 8, process)
            cluster.remove_node(node, allow_graceful=False)
            told = process.communicate(timeout=300)[1].decode()
        assert process.returncode == 0, told
    finally:
        cluster.shutdown()
    held(drawn, out, tmp_path / "whole")


@pytest.mark.cluster
def test_a_picture_on_which_actors_die_ends_no_run(tmp_path, pictures):
    pytest.importorskip("ray")
    out = tmp_path / "out"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.getcwd()}
    driver = subprocess.run([sys.executable, "-c", POISONED, pictures, out], env=env, capture_output=True, timeout=400)
    assert driver.returncode == 0, driver.stderr.decode()
    reasons = {line["image"]: line["reason"] for line in failures(out)}
    assert reasons == {"0007.png": "empty file", f"{POISON:04d}.png": DIED}
    assert len(answers(out)) == COUNT - 2
    assert not (out / "ray" / "begun").exists()
