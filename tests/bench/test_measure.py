"""Measurements: turns, medians and ratios on arms that only note their calls, the rest on the embedded model."""

from __future__ import annotations

import time

import pytest
import torch

from vlmfix.bench import arms, measure, reference, results, shapes
from vlmfix.bench.measure import LEAST, Arm, Measured, Said, Task, Timed, measured
from vlmfix.decoders import DECODERS, parse
from vlmfix.errors import IncompatibleDecodersError, UsageError
from vlmfix.reports.bench import bench_table
from vlmfix.terminal import rendered
from vlmfix.upstream import memory


@pytest.fixture(scope="module")
def tiny():
    return shapes.tiny(device="cpu")


@pytest.fixture(scope="module")
def task(tiny):
    return Task(*shapes.shown(tiny, 2), tokens=LEAST)


@pytest.fixture(autouse=True)
def _little_to_copy(monkeypatch):
    monkeypatch.setitem(measure.COPIED, "cpu", 1 << 16)


@pytest.fixture
def _no_memory(monkeypatch):
    monkeypatch.setattr(measure, "peak_of", lambda work: int(work()))


def noting(calls, name, *, way="vlmfix", plain=False, fails=None, short_of=0):
    """An arm that notes each call and answers at once."""

    def answer(vlm, pictures, tokens):
        calls.append((name, len(pictures), tokens))
        if fails is not None and len(pictures) >= fails:
            raise IncompatibleDecodersError(f"{name} cannot act", "take another")
        return [Said([0] * (tokens - short_of))] * len(pictures)

    return Arm(name, name, way, plain, answer)


@pytest.mark.usefixtures("_no_memory")
def test_every_arm_gets_its_turn_in_each_round(task):
    calls = []
    compared = [noting(calls, name) for name in "ab"]
    *_, last = measured(task, compared, [1, 2], rounds=3)
    turns = [(name, rows) for name, rows, tokens in calls if tokens == 1]
    assert turns == [("a", 1), ("b", 1), ("a", 2), ("b", 2)] * 3
    assert {tokens for _, _, tokens in calls} == {1, task.short, task.tokens}
    assert [one.cold is not None for one in last.timed] == [True, True, False, False]
    assert last.finished
    assert [len(one.long) for one in last.timed] == [3] * 4
    assert len(last.bandwidth) == 3


@pytest.mark.usefixtures("_no_memory")
def test_steps_are_recorded_anew_in_each_turn_before_it_is_timed(task, monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "RECORDING", ("cpu",))
    monkeypatch.setattr(measure, "forget", lambda model: calls.append(("forget", 0, 0)))
    *_, last = measured(task, [noting(calls, "a")], [1], rounds=2)
    long, short = task.tokens, task.short
    memory = [short]
    turn = [1, short, long]
    assert [tokens for _, _, tokens in calls] == [0, long, short, *memory, *turn, 0, long, short, *turn]
    assert [len(one.long) for one in last.timed] == [2]


@pytest.mark.usefixtures("_no_memory")
def test_what_keeps_an_arm_from_answering_is_told_and_the_others_go_on(task):
    calls = []
    compared = [noting(calls, "a"), noting(calls, "b", fails=2), noting(calls, "c", short_of=1)]
    *_, last = measured(task, compared, [1, 2], rounds=2)
    found = {(one.arm.name, one.rows): one.error for one in last.timed}
    short = [f"an answer ends after {tokens - 1} of {tokens} tokens" for tokens in (task.tokens, task.short)]
    assert found == {
        ("a", 1): None,
        ("b", 1): None,
        ("c", 1): short[0],
        ("a", 2): None,
        ("b", 2): "b cannot act",
        ("c", 2): short[1],
    }
    assert len([1 for name, rows, _ in calls if (name, rows) == ("b", 2)]) == 1  # it is not tried again


def test_no_measurement_begins_when_the_time_is_over(task):
    calls = []
    (last,) = measured(task, [noting(calls, "a", plain=True)], [1], rounds=2, until=time.monotonic())
    assert calls == []
    assert not last.finished
    line = results.results(results.about(task, "tiny", 2, ""), last)["lines"][0]
    assert (line["rounds"], line["reason"], line["step_ms"]) == (0, results.LATE, None)


@pytest.mark.usefixtures("_no_memory")
def test_what_a_refining_decoder_knows_is_forgotten_between_calls(task):
    memos = set()

    def answer(vlm, pictures, tokens):
        memos.add(id(vlm.memo))
        kept.append(vlm.memo)
        return [Said([0] * tokens)] * len(pictures)

    kept = []
    *_, last = measured(task, [Arm("a", "a", "vlmfix", False, answer)], [1], rounds=1)
    assert len(memos) == len(kept)
    assert last.timed[0].error is None


@pytest.mark.usefixtures("_no_memory")
def test_a_line_says_what_a_contrast_left_to_the_plain_rows(task):
    waiting = ("vcd:when=uncertain,margin=0.3", "icd:when=uncertain,margin=0")
    compared = arms.arms_of(task.vlm, ("vcd", *waiting))
    *_, last = measured(task, compared, [2], rounds=1)
    document = results.results(results.about(task, "tiny", 1, ""), last)
    rates = [line["skip_rate"] for line in document["lines"]]
    answers = [
        said
        for tokens in (task.tokens, task.short, 1, task.short, task.tokens)
        for said in task.vlm.generate(task.pictures, shapes.QUESTION, decoder=waiting[0], max_new_tokens=tokens)
    ]
    share = round(sum(said.skipped for said in answers) / sum(said.tokens for said in answers), 4)
    assert rates == [None, None, share, 1.0]
    text = " ".join(rendered(*bench_table(document)).split())
    assert (
        f"left to the clean row, which was sure of them: {waiting[0]} (2) {100 * share:.1f} %, icd (2) 100.0 %." in text
    )


def timed(arm, *, cold, first, short, long, memory):
    return Timed(arm, 2, cold=cold, first=first, short=short, long=long, memory=memory)


def test_figures_are_medians_and_ratios_are_those_of_medians(task):
    calls = []
    plain, other, stock = (
        noting(calls, name, way=way, plain=plain)
        for name, way, plain in (
            ("greedy", "vlmfix", True),
            ("vcd", "vlmfix", False),
            ("generate", "transformers", True),
        )
    )
    more = task.tokens - task.short
    found = Measured(
        [
            timed(
                plain, cold=9.0, first=[0.1, 0.2, 9], short=[1, 1, 1], long=[1 + more, 1 + 2 * more, 8.0], memory=100
            ),
            timed(
                other,
                cold=3.5,
                first=[0.3, 0.4, 0.5],
                short=[1, 2, 3],
                long=[1.0 + more * s for s in (3, 3, 3)],
                memory=150,
            ),
            timed(stock, cold=9.0, first=[2, 2, 2], short=[1, 1, 1], long=[1 + 4 * more] * 3, memory=90),
        ],
        [1e6, 3e6, 2e6],
        finished=True,
    )
    facts = results.about(task, "tiny", 3, "vlmfix bench")
    assert facts["model"]["weights"] == "its own"
    document = results.results(facts, found)
    first, second, third = document["lines"]
    steps = [1, 2, 7 / more]
    assert first["step_ms"] == pytest.approx(1000 * sorted(steps)[1])
    assert (first["first_ms"], first["step_ratio"], first["first_ratio"]) == (pytest.approx(200), 1, 1)
    assert first["tokens_per_second"] == pytest.approx(2 * task.tokens / sorted([1 + more, 1 + 2 * more, 8.0])[1])
    assert first["warm_up_s"] == pytest.approx(9.0 - sorted([1 + more, 1 + 2 * more, 8.0])[1])
    assert second["first_ratio"] == pytest.approx(0.4 / 0.2)
    assert second["step_ratio"] == pytest.approx(second["step_ms"] / first["step_ms"])
    assert (second["memory_above_plain"], third["memory_above_plain"]) == (50, 0)
    assert (third["step_ratio"], third["first_ratio"]) == (1, 1)  # transformers is held against itself
    assert second["memory"] == 150 + facts["model"]["weight_bytes"]
    assert document["bandwidth"]["median"] == 2e6
    assert document["weights_ms"] == pytest.approx(facts["model"]["step_bytes"] / 2e6 * 1000)
    assert first["weights_share"] == pytest.approx(document["weights_ms"] / first["step_ms"])
    assert first["samples"]["short_s"] == [1, 1, 1]


def test_a_step_reads_the_decoder_and_the_output_and_no_table_of_embeddings(tiny):
    text = tiny.model.config.get_text_config()
    width, inner, head, groups = text.hidden_size, text.intermediate_size, text.head_dim, text.num_key_value_heads
    layer = width * head * (2 * text.num_attention_heads + 2 * groups) + 3 * width * inner + 2 * width
    assert measure.step_bytes(tiny) == 4 * (8 * layer + width + text.vocab_size * width)


def test_every_method_is_measured_where_none_is_named(tiny):
    found = arms.arms_of(tiny, ())
    assert [arm.name for arm in found] == list(DECODERS)
    assert [arm.name for arm in found if arm.plain] == ["greedy"]
    for spec in arms.suited(tiny):
        assert parse(spec).check(tiny) is None, spec


def test_decoders_are_named_without_parameters_where_that_tells_them_apart(tiny):
    found = arms.arms_of(tiny, ("vcd:contrast=0.5", "vcd", "locore:window=3+inter", "greedy"))
    assert [arm.name for arm in found] == ["greedy", "vcd:contrast=0.5", "vcd", "locore+inter"]
    with pytest.raises(UsageError, match="--decoder vcd:contrast=1 is given twice"):
        arms.arms_of(tiny, ("vcd", "vcd:contrast=1"))


def test_the_ways_beside_ours_say_the_same(task):
    compared = arms.arms_of(task.vlm, ("vcd", "inter", "locore", "locore+vcd", "beam"), beside=True)
    beside = {arm.name: arm for arm in compared if arm.way == "transformers"}
    assert list(beside) == ["generate", "eager, weights kept", "vcd, pass by pass", "inter, pass by pass"]

    def answered(arm):
        return [list(said.ids) for said in arm.answer(task.vlm, task.pictures, 6)]

    said = {arm.name: answered(arm) for arm in compared[:3]}
    assert said["greedy"] != said["vcd"]
    for name, ours in zip(beside, ("greedy", "greedy", "vcd", "inter"), strict=True):
        assert answered(beside[name]) == said[ours], name
    assert task.vlm.model.config.text_config._attn_implementation == "sdpa"


def test_eager_attention_keeps_its_weights(task):
    length = task.vlm.encode([shapes.QUESTION], [[task.pictures[0]]]).length
    one = 4 * len(task.pictures) * task.vlm.heads * length**2
    stock, eager = (
        memory.peak_of(lambda way=way: way(task.vlm, task.pictures, 2))
        for way in (reference.stock, reference.with_weights)
    )
    assert eager - stock > 0.7 * task.vlm.layers * one  # one layer's after the other would be two at the most


@pytest.mark.parametrize("wanted", [150, 400])
def test_a_prompt_of_the_length_that_is_asked_for(wanted):
    vlm, (picture, other) = shapes.shown(shapes.checkpoint("tiny-qwen", "cpu"), 2, wanted)
    assert vlm.encode([shapes.QUESTION], [[picture]]).length == pytest.approx(wanted, rel=0.1)
    assert picture.tobytes() != other.tobytes()


def test_a_length_that_no_picture_gives_is_refused(tiny):
    with pytest.raises(UsageError, match=r"LLaVA-1\.5 makes of a picture cannot be chosen"):
        shapes.shown(tiny, 1, 500)


@pytest.mark.parametrize(
    ("make", "weights", "tokens"), [(shapes.llava, 7_063_427_072, 576), (shapes.qwen, 8_292_166_656, 391)]
)
def test_shapes_are_those_of_the_checkpoint(make, weights, tokens):
    vlm = make(device="meta")
    assert vlm.model.config.name_or_path == ""  # by which results know that weights are random
    assert sum(weight.numel() for weight in vlm.model.parameters()) == weights
    assert vlm.model.dtype == torch.bfloat16
    assert vlm.model.generation_config.eos_token_id is None
    _, (picture,) = shapes.shown(vlm, 1)
    inputs = vlm.family.process(vlm.processor, [vlm.render(shapes.QUESTION, 1)], [[picture]])
    assert int((inputs["input_ids"] == vlm.family.image_token(vlm.model.config)).sum()) == tokens
