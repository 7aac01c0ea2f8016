"""Batches that are prepared while another is answered: the same inputs and answers, and no thread left behind."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from tests.jobs.fake import FakeVLM, colour
from tests.tiny import TINY, tiny_vlm
from vlmfix.answering import Answerer
from vlmfix.decoders import parse
from vlmfix.errors import UsageError
from vlmfix.generation import VLM
from vlmfix.settings import Settings
from vlmfix.supply import Question, Supply


def noise(seed, size=(48, 64)):
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (*size, 3), generator=generator, dtype=torch.uint8).numpy())


A, B, C = noise(1), noise(2, (90, 26)), noise(3, (40, 120))
ROWS, PROMPTS = [[A], [], [B, C], [A], [B]], ["What?", "Hello", "Which of the two?", "Who is there?", ""]


def vlm_of(name):
    vlm = tiny_vlm(name)
    return VLM(model=vlm.model, processor=vlm.processor, family=vlm.family)


def batches(count, size=2):
    """Batches of questions about pictures of colours of their own, numbered."""
    numbers = [range(start, start + size) for start in range(0, count * size, size)]
    return [[(n, Question(Image.new("RGB", (4, 4), colour(n)), "What?")) for n in own] for own in numbers]


def left_running():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("vlmfix")]


@pytest.mark.parametrize("name", TINY)
def test_rows_prepared_in_threads_are_those_of_one_thread(name):
    vlm = tiny_vlm(name)
    expected = vlm.encode(PROMPTS, ROWS)
    with ThreadPoolExecutor(3) as pool:
        prepared = vlm.beside().prepared(PROMPTS, ROWS, each=pool.map)
    batch = vlm.placed(prepared)
    assert prepared.length == batch.length
    assert list(batch) == list(expected)
    assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert (batch.prompts, batch.sizes) == (expected.prompts, expected.sizes)
    assert [list(map(id, row)) for row in batch.pictures] == [list(map(id, row)) for row in ROWS]


def test_a_second_tokenizer_is_no_part_of_the_first():
    vlm = tiny_vlm("llava")
    beside = vlm.beside()
    assert beside.processor.tokenizer is not vlm.processor.tokenizer
    assert beside.processor.image_processor is vlm.processor.image_processor
    assert beside.model is vlm.model


@pytest.mark.parametrize("decoder", ["greedy", "vcd", "vicrop", "sgrs", "sample"])
def test_answers_to_what_was_prepared_are_the_same(decoder):
    vlm = vlm_of("llava")
    shown, asked = [A, B, A], ["What?", "Who?", "Where?"]
    expected = vlm.generate(shown, asked, decoder=decoder, max_new_tokens=5)
    prepared = vlm.prepared(asked, shown)
    found = vlm.generate(shown, asked, decoder=decoder, max_new_tokens=5, prepared=prepared)
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]


def test_what_was_prepared_is_what_the_model_reads(monkeypatch):
    vlm = vlm_of("llava")
    prepared = vlm.prepared(["What?"], [A])
    monkeypatch.setattr(VLM, "prepared", lambda *_, **__: pytest.fail("prepared again"))
    assert len(vlm.generate([A], ["What?"], max_new_tokens=2, prepared=prepared)) == 1


@pytest.mark.parametrize(("pictures", "prompts"), [([B], ["What?"]), ([A], ["Who?"]), ([A, A], ["What?"] * 2)])
def test_what_was_prepared_of_others_is_refused(pictures, prompts):
    vlm = vlm_of("llava")
    with pytest.raises(UsageError, match="other pictures or questions were prepared"):
        vlm.generate(pictures, prompts, prepared=vlm.prepared(["What?"], [A]))


class Watched(FakeVLM):
    """Notes when it prepares and answers; a batch is answered only when the one after it is being prepared."""

    def __init__(self, last, **more):
        super().__init__(**more)
        self.last, self.events, self.begun = last, [], [threading.Event() for _ in range(last + 2)]

    def prepared(self, prompts, pictures, **how):
        number = pictures[0][0].getpixel((0, 0))[0] // 2
        self.events.append(("prepared", number, threading.current_thread().name.rpartition("_")[0]))
        self.begun[number].set()
        return super().prepared(prompts, pictures, **how)

    def generate(self, pictures, prompts, **options):
        number = pictures[0].getpixel((0, 0))[0] // 2
        assert options["prepared"] is not None
        assert number == self.last or self.begun[number + 1].wait(3), "nothing was prepared ahead"
        self.events.append(("answered", number, threading.current_thread().name))
        return super().generate(pictures, prompts, **options)


def test_the_next_batch_is_prepared_while_one_is_answered():
    vlm = Watched(last=3)
    ask = Answerer(vlm, parse("greedy"), Settings(), batch_size=2)
    settled = [pair for part in ask(batches(4), lambda: None) for pair in part]
    assert [(item, outcome.text) for item, outcome in settled] == [(n, f"What?: {colour(n)}") for n in range(8)]
    assert [event[1] for event in vlm.events if event[0] == "prepared"] == [0, 1, 2, 3]  # each once
    assert {event[2] for event in vlm.events if event[0] == "prepared"} == {"vlmfix-batch"}
    assert left_running() == []


def test_who_prepares_has_the_tokenizer_alone():
    vlm, other = FakeVLM(), FakeVLM()
    vlm.beside = lambda: other
    vlm.prepared = lambda *_, **__: pytest.fail("prepared with the tokenizer of who answers")
    with Supply(vlm) as supply:
        assert supply.take([Question(A, "What?")]) is not None


def test_a_refining_decoder_has_nothing_prepared_and_no_batch_ahead():
    vlm, taken = FakeVLM(), []

    def coming():
        for number, batch in enumerate(batches(3)):
            taken.append(number)
            yield batch

    vlm.prepared = lambda *_, **__: pytest.fail("prepared")
    ask = Answerer(vlm, parse("carve"), Settings(), batch_size=2)
    for number, part in enumerate(ask(coming(), lambda: None)):
        assert [item for item, _ in part] == [2 * number, 2 * number + 1]
        assert len(taken) == number + 1


def test_what_cannot_be_prepared_is_the_fault_of_its_question():
    class Odd(FakeVLM):
        def prepared(self, prompts, pictures, **how):
            if any(row and row[0].getpixel((0, 0)) == colour(3) for row in pictures):
                raise ValueError("cannot resize")
            return super().prepared(prompts, pictures, **how)

        def generate(self, pictures, prompts, **options):
            self.prepared(prompts, [[picture] for picture in pictures])
            return super().generate(pictures, prompts, **options)

    ask = Answerer(Odd(), parse("greedy"), Settings(), batch_size=2)
    settled = dict(pair for part in ask(batches(3), lambda: None) for pair in part)
    assert list(settled) == list(range(6))
    assert settled.pop(3) == "ValueError: cannot resize"
    assert {outcome.text for outcome in settled.values()} == {f"What?: {colour(n)}" for n in (0, 1, 2, 4, 5)}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UsageError("no", "no")])
def test_no_thread_outlives_an_error(error):
    vlm = FakeVLM(fails=lambda batch: error)
    with pytest.raises(type(error)):
        list(Answerer(vlm, parse("greedy"), Settings(), batch_size=2)(batches(4), lambda: None))
    assert left_running() == []


def test_pictures_that_wait_are_not_prepared_once_nobody_asks():
    hold, prepared = threading.Event(), []

    class Slow(FakeVLM):
        def prepared(self, prompts, pictures, *, system=None, each=map):
            def one(row):
                prepared.append(row)
                hold.wait(10)

            list(each(one, pictures))

    supply = Supply(Slow())
    with supply:
        supply.begin([Question(A, "What?")] * 1000)
        while not prepared:
            hold.wait(0.01)
        threading.Timer(0.05, hold.set).start()
    assert len(prepared) < 1000
    assert left_running() == []
