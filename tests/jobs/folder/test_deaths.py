"""A picture on which the process itself dies costs some starts, and then itself; a kill costs no picture."""

import os
import signal

import pytest

from tests.jobs.fake import FakeVLM, colour, draw
from tests.jobs.folder.asked import WHAT, answers, failures, go
from tests.processes import ended
from vlmfix import images
from vlmfix.errors import DataError, DiedError, PassingError, SystematicError
from vlmfix.jobs import blocks
from vlmfix.jobs.blocks import BlockFolder
from vlmfix.jobs.folder import Questions, run, steal, worker
from vlmfix.jobs.folder.merge import merge
from vlmfix.jobs.journal import BEGUN, DEATHS, DIED, Journal
from vlmfix.jobs.status import read_shared
from vlmfix.records import read_json, read_lines
from vlmfix.settings import Settings

COUNT, POISON = 30, 11


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(FakeVLM):
    """Dies where it is asked about one of some pictures; or at a batch of that number, whatever is in it."""

    def __init__(self, numbers=(), *, batch=None, **options):
        super().__init__(**options)
        self.deadly, self.batch = {colour(number) for number in numbers}, batch

    def generate(self, pictures, prompts, **options):
        if len(self.batches) == self.batch or any(shown.getpixel((0, 0)) in self.deadly for shown in pictures):
            die()
        return super().generate(pictures, prompts, **options)


def start(pictures, out, numbers=(), batch=None, questions=WHAT):
    go(pictures, out, Deadly(numbers, batch=batch), questions=questions)


def shared(pictures, out, numbers=(), batch=None, questions=WHAT):
    """A worker; the leases are short, so that the next one need not wait."""
    blocks.LEASE_SECONDS, worker.PAUSE_SECONDS = 0.05, 0.01
    vlm = Deadly(numbers, batch=batch)
    steal(pictures, out, questions=questions, settings=Settings(), batch_size=4, loader=vlm.load)


def deadly(model, **how):
    """Loads a model in a process of its own, which the picture kills."""
    return Deadly((POISON,))


def opening(pictures, out, number, work=run):
    """A decoder of pictures that dies; no rows are given, so that some are opened to find out how many fit."""
    open_found = images.open_found

    def opened(file):
        if file.name == f"{number:04d}.png":
            die()
        return open_found(file)

    for module in (images, __import__("vlmfix.fitting", fromlist=["fitting"])):
        module.open_found = opened
    blocks.LEASE_SECONDS, worker.PAUSE_SECONDS = 0.05, 0.01
    work(pictures, out, questions=WHAT, settings=Settings(), batch_size=None, loader=FakeVLM().load)


def until_done(work, *arguments, most=12):
    """Starts again and again, as queues do; gives the number of deaths."""
    for deaths in range(most):
        code = ended(work, *arguments)
        if code == 0:
            return deaths
        assert code == -signal.SIGKILL
    pytest.fail("it dies for ever")


def whole(out, given_up, prompts=("What?",)):
    assert sorted((line["image"], line["prompt"]) for line in answers(out)) == [
        (f"{number:04d}.png", prompt) for number in range(COUNT) for prompt in prompts if number not in given_up
    ]
    assert [(line["image"], line["reason"], line["prompt"]) for line in failures(out)] == [
        (f"{number:04d}.png", DIED, prompt) for number in given_up for prompt in prompts
    ]
    assert read_json(out / "run.json")["finished"]
    assert not (out / BEGUN).exists()


@pytest.mark.parametrize("number", [0, POISON])
def test_a_picture_on_which_the_process_dies_is_given_up(tmp_path, number):
    pictures, out = draw(tmp_path / "in", COUNT), tmp_path / "out"
    assert until_done(start, pictures, out, (number,)) == 1 + DEATHS
    whole(out, [number])
    go(pictures, out, FakeVLM(), retry_failed=True)
    assert len(answers(out)) == COUNT


@pytest.mark.parametrize("number", [0, POISON])
def test_so_is_one_on_which_it_dies_when_it_is_opened(tmp_path, number):
    pictures, out = draw(tmp_path / "in", COUNT), tmp_path / "out"
    assert until_done(opening, pictures, out, number) == 1 + DEATHS
    whole(out, [number])


def test_two_of_them_with_two_questions_about_each(tmp_path):
    pictures, out = draw(tmp_path / "in", COUNT), tmp_path / "out"
    asked = Questions(everywhere=("A?", "B?"))
    assert until_done(start, pictures, out, (POISON, POISON + 1), None, asked) <= 1 + 2 * DEATHS
    whole(out, [POISON, POISON + 1], ("A?", "B?"))


def test_a_kill_costs_no_picture_however_often(tmp_path):
    pictures, out = draw(tmp_path / "in", COUNT), tmp_path / "out"
    for _ in range(4):
        assert ended(start, pictures, out, (), 1) == -signal.SIGKILL
    assert until_done(start, pictures, out) == 0
    whole(out, [])


def test_a_machine_that_answers_nothing_costs_no_picture_either(tmp_path):
    out = tmp_path / "out"
    go(draw(tmp_path / "in", 1), out, FakeVLM())
    pictures = draw(tmp_path / "in", 3)
    for _ in range(2 + 2 + 3):  # among others, in a batch apart, each alone; from then on, of one that was answered
        assert ended(start, pictures, out, (), 0) == -signal.SIGKILL
    journal = Journal(out / BEGUN)
    assert [journal.deaths(f"{number:04d}.png") for number in range(3)] == [None, DEATHS - 1, DEATHS - 1]
    assert until_done(start, pictures, out) == 0
    assert (len(answers(out)), len(failures(out))) == (3, 0)


def test_nothing_is_noted_where_nothing_was_ever_answered(tmp_path):
    pictures, out = draw(tmp_path / "in", 1), tmp_path / "out"
    for _ in range(3):
        assert ended(start, pictures, out, (), 0) == -signal.SIGKILL
    with pytest.raises(SystematicError, match="died again and again"):
        go(pictures, out, FakeVLM())
    assert (answers(out), failures(out)) == ([], [])
    draw(pictures, 2)
    go(pictures, out, FakeVLM())
    assert (len(answers(out)), len(failures(out))) == (2, 0)


def test_an_interruption_is_no_death(tmp_path):
    pictures, out = draw(tmp_path / "in", COUNT), tmp_path / "out"
    assert ended(start, pictures, out, (POISON,)) == ended(start, pictures, out, (POISON,)) == -signal.SIGKILL
    for _ in range(3):
        vlm = FakeVLM(fails=lambda batch: KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            go(pictures, out, vlm)
        journal = Journal(out / BEGUN)
        assert [journal.deaths(f"{number:04d}.png") for number in (7, 8, POISON, 12)] == [None, 1, 1, 0]
    vlm = FakeVLM(fails=lambda batch: OSError(5, "trouble") if colour(POISON) in [c for c, _ in batch] else None)
    with pytest.raises(PassingError):
        go(pictures, out, vlm)
    go(pictures, out, FakeVLM())
    whole(out, [])


def test_suspects_are_answered_apart(tmp_path):
    pictures, out = draw(tmp_path / "in", COUNT), tmp_path / "out"
    assert ended(start, pictures, out, (), 2) == -signal.SIGKILL
    suspects = {name for line in read_lines(out / BEGUN) for name in line["begun"]}
    suspects -= {line["image"] for line in answers(out)}
    vlm = FakeVLM()
    go(pictures, out, vlm)
    first = [shown[0] for batch in vlm.batches[: -(-len(suspects) // 4)] for shown, _ in batch]
    assert sorted(first) == sorted(int(name[:4]) for name in suspects)
    whole(out, [])


@pytest.mark.parametrize("work", [run, steal])
def test_a_process_that_answers_for_another_dies_as_well(tmp_path, work, monkeypatch):
    monkeypatch.setattr(blocks, "LEASE_SECONDS", 0.05)
    pictures, out = draw(tmp_path / "in", COUNT), tmp_path / "out"

    def again():
        work(
            pictures,
            out,
            questions=WHAT,
            settings=Settings(),
            batch_size=4,
            devices=("cpu",),
            loader=deadly,
        )

    for _ in range(1 + DEATHS):
        with pytest.raises(DiedError, match="was killed by signal 9"):
            again()
    again()
    if work is steal:
        merge(out)
    whole(out, [POISON])


# -- workers that share a run


@pytest.mark.parametrize("number", [0, POISON])
def test_no_more_than_four_workers_die_of_a_picture(tmp_path, number):
    pictures, out = draw(tmp_path / "in", COUNT), tmp_path / "out"
    assert until_done(shared, pictures, out, (number,)) == 1 + DEATHS
    assert read_shared(out).reasons == {DIED: 1}
    merge(out)
    whole(out, [number])
    assert not list(out.rglob(BEGUN))


def test_nor_of_one_on_which_they_die_when_it_is_opened(tmp_path):
    pictures, out = draw(tmp_path / "in", COUNT), tmp_path / "out"
    assert until_done(opening, pictures, out, 0, steal) == 1 + DEATHS
    merge(out)
    whole(out, [0])


def test_killed_workers_cost_no_picture(tmp_path):
    pictures, out = draw(tmp_path / "in", COUNT), tmp_path / "out"
    for batch in (1, 2, 1, 0):
        assert ended(shared, pictures, out, (), batch) == -signal.SIGKILL
    assert until_done(shared, pictures, out) == 0
    merge(out)
    whole(out, [])


def test_the_lines_of_a_takeover_keep_the_order_of_the_pictures(tmp_path):
    pictures, out = draw(tmp_path / "in", COUNT), tmp_path / "out"
    assert ended(shared, pictures, out, (), 2) == -signal.SIGKILL
    assert any(read_lines(path) for path in BlockFolder(out).parts.rglob(BEGUN))
    assert ended(shared, pictures, out) == 0
    merge(out)
    assert [line["image"] for line in answers(out)] == [f"{number:04d}.png" for number in range(COUNT)]


def test_a_journal_stays_small_and_is_nobody_elses(tmp_path):
    journal = Journal(tmp_path / BEGUN)
    for number in range(0, 20_000, 20):
        names = [f"{n:06d}.png" for n in range(number, number + 20)]
        journal.begin(names)
        for name in names[:-1]:
            journal.settle(name)
        if number % 40 == 0:
            journal.settle(names[-1])
    assert (tmp_path / BEGUN).stat().st_size < 40_000
    found = Journal(tmp_path / "other", read_lines(tmp_path / BEGUN))
    assert all(found.deaths(f"{n + 19:06d}.png") == 0 for n in range(20, 20_000, 40))
    journal.close()
    assert not (tmp_path / BEGUN).exists()
    for text in ('{"image": "a"}\n', "[]\n", '{"begun": [1]}\n', '{"apart": {}}\n'):
        (tmp_path / BEGUN).write_text(text)
        with pytest.raises(DataError, match=r"line 1 of .*begun\.jsonl"):
            go(draw(tmp_path / "in", 2), tmp_path, FakeVLM())
        assert (tmp_path / BEGUN).read_text() == text
