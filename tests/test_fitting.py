"""How many rows an automatic batch has: what the free memory has room for, by the model and by what it is asked."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.jobs.fake import FakeVLM, draw
from vlmfix import fitting
from vlmfix.answering import Answerer
from vlmfix.decoders import parse
from vlmfix.errors import DataError
from vlmfix.fitting import fitting_batch, typical
from vlmfix.images import Found
from vlmfix.models.layout import Prepared
from vlmfix.settings import Settings
from vlmfix.supply import Question

GB = 10**9
PICTURE = Image.new("RGB", (8, 8))
ONE = (Question(PICTURE, "What?"),)


class Large(FakeVLM):
    """LLaVA-1.5-7B's sizes on a GPU, with prompts of a given length."""

    def __init__(self, tokens=600, groups=32, device="cuda:0", devices=()):
        super().__init__()
        text = SimpleNamespace(
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=groups,
            hidden_size=4096,
            intermediate_size=11008,
            vocab_size=32064,
        )
        self.model = SimpleNamespace(dtype=torch.bfloat16, config=SimpleNamespace(get_text_config=lambda: text))
        self.device, self.tokens = torch.device(device), tokens
        layers = [torch.nn.Identity() for _ in range(32)]
        for layer, place in zip(layers, devices, strict=False):
            layer._hf_hook = SimpleNamespace(execution_device=place)
        self.family = SimpleNamespace(layers=lambda model: layers)

    def prepared(self, prompts, pictures, **how):
        tokens = self.tokens(pictures) if callable(self.tokens) else self.tokens
        pixels = torch.empty(len(pictures), 3, 336, 336, dtype=torch.bfloat16, device="meta")
        ids = torch.empty(len(prompts), tokens, dtype=torch.long, device="meta")
        return Prepared(inputs={"input_ids": ids, "pixel_values": pixels}, sources={}, prompts=(), pictures=())


def rows(vlm, monkeypatch, free, *, decoder="greedy", new=64, questions=ONE, **settings):
    """The batch, with so many bytes free: on every device, or by device."""
    by_device = free if callable(free) else lambda device: free
    monkeypatch.setattr(fitting, "free_memory", by_device)
    return fitting_batch(vlm, parse(decoder), Settings(max_new_tokens=new, **settings), questions)


def test_a_card_of_80_gb_takes_64_captions_of_llava_at_a_time(monkeypatch):
    free = 80 * GB - 15 * GB  # the weights, and what CUDA itself takes
    assert 64 <= rows(Large(), monkeypatch, free) <= 128


def test_what_is_reckoned_is_no_less_than_keys_and_values(monkeypatch):
    row = 2 * 32 * 32 * 128 * 2 * 704  # of 664 tokens, in steps of 64
    for count in (4, 16, 48, 96):
        found = rows(Large(), monkeypatch, count * row / 0.8)
        assert 0.5 * count <= found < count  # beside them, what passes


def test_rows_that_a_recorded_step_rounds_up_to_are_reckoned(monkeypatch):
    row = 2 * 32 * 32 * 128 * 2 * 704
    passing = fitting._need(
        Large(), parse("greedy"), Settings(max_new_tokens=64), Large().prepared(["?"], [[]])
    ).passing
    free = (64 * row + 64 * passing) / 0.8
    assert rows(Large(), monkeypatch, free + 1) == 64
    assert rows(Large(), monkeypatch, free + 3 * row) == 64  # 65 rows have the room of 96
    assert rows(Large(), monkeypatch, (96 * row + 65 * passing) / 0.8 + 1) == 65


def test_a_row_takes_more_with_longer_prompts_answers_branches_and_beams(monkeypatch):
    def found(vlm=None, **how):
        return rows(vlm or Large(), monkeypatch, 65 * GB, **how)

    plain = found()
    assert found(Large(tokens=1200)) < 0.6 * plain
    assert found(new=700) < 0.6 * plain
    assert found(decoder="vcd") == plain // 2
    assert found(decoder="vcd:when=uncertain") < 0.8 * (plain // 2)
    assert found(num_beams=3) < 0.4 * plain
    assert found(decoder="beam:num_beams=3") < 0.4 * plain
    assert found(decoder="vicrop") < 0.6 * plain
    assert found(Large(groups=8), new=2000) > 2 * found(new=2000)


def test_the_longest_of_the_questions_counts(monkeypatch):
    vlm = Large(tokens=lambda pictures: pictures[0][0].width * 100)
    wide = Question(Image.new("RGB", (40, 8)), "What?")
    alone = rows(vlm, monkeypatch, 65 * GB, questions=[wide])
    assert rows(vlm, monkeypatch, 65 * GB, questions=[Question(PICTURE, "What?"), wide]) == alone
    assert rows(vlm, monkeypatch, 65 * GB) > alone


def test_no_batch_is_larger_than_its_kind_of_device_gains_by(monkeypatch):
    assert rows(Large(), monkeypatch, 10_000 * GB) == 128
    assert rows(Large(device="cpu"), monkeypatch, 10_000 * GB) == 8
    assert rows(Large(), monkeypatch, 0) == 1


def test_a_model_over_several_cards_is_as_large_as_the_fullest_lets_it(monkeypatch):
    spread = Large(devices=["cuda:0"] * 8 + ["cuda:1"] * 24)
    free = {"cuda:0": 10 * GB, "cuda:1": 20 * GB}
    alone = rows(Large(), monkeypatch, 80 / 3 * GB)  # the second card has three quarters of the layers
    assert rows(spread, monkeypatch, lambda device: free[str(device)]) == alone


def test_questions_that_cannot_be_prepared_leave_one_row(monkeypatch):
    vlm = Large()
    vlm.prepared = lambda *_, **__: (_ for _ in ()).throw(ValueError("odd"))
    assert rows(vlm, monkeypatch, 65 * GB) == 1

    def odd(pictures):
        if pictures[0][0].width == 3:
            raise DataError("odd")
        return 600

    questions = [Question(Image.new("RGB", (3, 3)), "What?"), Question(PICTURE, "What?")]
    assert rows(Large(tokens=odd), monkeypatch, 65 * GB, questions=questions) == rows(Large(), monkeypatch, 65 * GB)


def test_what_stands_for_the_questions_to_come(tmp_path):
    folder = draw(tmp_path, 40)
    paths = sorted(folder.iterdir())
    files = [Found(path.name, path) for path in paths]
    found = typical(files, ["What?", "What is in the picture?", "Who?"])
    assert [question.picture.getpixel((0, 0))[0] for question in found] == [0, 10, 20, 30]
    assert {question.prompt for question in found} == {"What is in the picture?"}
    for number in (0, 10, 20, 30):
        paths[number].write_bytes(b"broken")
    (alone,) = typical(files, ["What?"])
    assert (alone.picture, alone.prompt) == (None, "What?")
    assert typical([], ["What?"])[0].picture is None


def test_memory_of_recorded_steps_is_given_back_when_memory_runs_out(monkeypatch):
    """Before half as many rows are asked."""
    events = []

    def fails(batch):
        events.append(len(batch))
        return torch.OutOfMemoryError("CUDA out of memory") if len(batch) > 2 else None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("emptied"))
    monkeypatch.setattr("vlmfix.answering.forget", lambda model: events.append("given back"))
    ask = Answerer(FakeVLM(fails=fails), parse("greedy"), Settings(), batch_size=4)
    ((*settled,),) = ask([[(number, *ONE) for number in range(4)]], lambda: None)
    assert len(settled) == 4
    assert events == [4, "given back", "emptied", 2, 2]


@pytest.mark.gpu
def test_the_batch_that_is_reckoned_goes_through():
    from vlmfix import load

    vlm = load("tiny", device="cuda")
    picture = Image.new("RGB", (64, 64), "red")
    count = fitting_batch(vlm, parse("greedy"), Settings(max_new_tokens=8), [Question(picture, "What?")])
    assert count == 128
    assert len(vlm.generate([picture] * count, "What?", max_new_tokens=8)) == count
