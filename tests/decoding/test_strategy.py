"""Sampling and beam search as decoders: the same tokens as by options, alone and in chains, on every family."""

from __future__ import annotations

import pytest
import torch
from PIL import ImageOps

from tests.contracts.support import PICTURES, PROMPTS, batch_of, unlike, vlm_of
from vlmfix.decoders import Beam, Chain, Sample, Strategy, parse
from vlmfix.decoders.base import Refiner
from vlmfix.decoders.picture.refined import Refined
from vlmfix.decoding.choice import Drawn
from vlmfix.decoding.draws import drawing
from vlmfix.errors import IncompatibleDecodersError, UsageError
from vlmfix.generation import check_settings
from vlmfix.jobs.folder import Questions, run
from vlmfix.settings import Settings

ROWS = [list(row) for row in PICTURES]


def tokens(vlm, decoder, **options):
    return [answer.ids for answer in vlm.generate(ROWS, PROMPTS, decoder=decoder, max_new_tokens=5, **options)]


@pytest.mark.parametrize("family", unlike())
@pytest.mark.parametrize("other", ["", "vcd", "locore:strength=4"])
def test_a_strategy_gives_what_the_options_give(family, other):
    vlm = vlm_of(family)
    for spec, options in (
        ("beam:num_beams=3", {"num_beams": 3}),
        ("sample:temperature=1.3,top_p=0.9", {"temperature": 1.3, "top_p": 0.9}),
        ("sample:temperature=1.3,top_k=5", {"temperature": 1.3, "top_k": 5}),
    ):
        expected = tokens(vlm, other or "greedy", seed=4, **options)
        for chain in {f"{spec}+{other}", f"{other}+{spec}"} if other else {spec}:
            assert tokens(vlm, chain, seed=4) == expected
            assert tokens(vlm, chain, seed=4, **options) == expected  # said twice, and the same


def test_a_strategy_changes_the_answer_and_a_draw_has_a_seed():
    vlm = vlm_of("llava")
    plain, drawn = tokens(vlm, "greedy"), tokens(vlm, "sample:temperature=2")
    assert plain != drawn != tokens(vlm, "sample:temperature=2", seed=1)
    assert tokens(vlm, "beam:num_beams=6") != plain
    assert tokens(vlm, "beam:num_beams=1") == tokens(vlm, "sample:temperature=0") == plain


class Mirrored(Refiner):
    """Shows every picture from behind."""

    name = "mirrored"

    def refine(self, vlm, pictures, prompts, memo):
        return [Refined(tuple(ImageOps.mirror(picture) for picture in row)) for row in pictures]


def test_a_chain_with_a_refiner_has_the_strategy_too():
    vlm = vlm_of("llava")
    method = Chain(decoders=(Mirrored(), Beam(num_beams=3)))
    assert tokens(vlm, method) == tokens(vlm, Mirrored(), num_beams=3)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_users_own_generate_is_told_of_the_strategy(family):
    vlm = vlm_of(family)
    batch = batch_of(vlm)

    def own(spec):
        with parse(spec).applied(vlm, batch) as arguments:
            torch.manual_seed(3)
            return vlm.model.generate(**batch, **arguments, max_new_tokens=4)

    with parse("vcd").applied(vlm, batch, num_beams=3) as arguments:
        expected = vlm.model.generate(**batch, **arguments, max_new_tokens=4, num_beams=3, do_sample=False)
    assert torch.equal(own("vcd+beam:num_beams=3"), expected)
    torch.manual_seed(3)
    expected = vlm.model.generate(**batch, max_new_tokens=4, do_sample=True, temperature=1.5, top_p=0.8, top_k=6)
    assert torch.equal(own("sample:temperature=1.5,top_p=0.8,top_k=6"), expected)


def test_a_stream_of_beams_comes_in_one_piece():
    vlm = vlm_of("llava")
    call = {"decoder": "beam:num_beams=3", "max_new_tokens": 5}
    (answer,) = vlm.generate([ROWS[0]], PROMPTS[0], **call)
    assert list(vlm.stream(ROWS[0], PROMPTS[0], **call)) == [answer.text]
    drawn = {"decoder": "sample:temperature=2", "max_new_tokens": 5, "seed": 2}
    (answer,) = vlm.generate([ROWS[0]], PROMPTS[0], **drawn)
    assert "".join(vlm.stream(ROWS[0], PROMPTS[0], **drawn)).rstrip() == answer.text


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("beam:num_beams=4", {"num_beams": 3}, "num_beams=3 is asked for with a decoder that chooses by 4 beams"),
        ("beam", {"temperature": 0.7}, r"temperature=0\.7 is asked for with a decoder that chooses by 5 beams"),
        ("sample", {"num_beams": 2}, "num_beams=2 .* chooses by sampling at temperature 1"),
        ("vcd+sample:temperature=0.5", {"temperature": 0.7}, r"sampling at temperature 0\.5"),
        ("sample:top_p=0.5", {"temperature": 1.0, "top_p": 0.9}, r"top_p=0\.9 .* temperature 1, top_p 0\.5"),
    ],
)
def test_options_that_contradict_are_refused(spec, options, message):
    vlm = vlm_of("llava")
    with pytest.raises(UsageError, match=message):
        tokens(vlm, spec, **options)
    if "top_p" not in options:
        with pytest.raises(UsageError, match=message):
            check_settings(parse(spec), Settings(decoder=spec, **options))


@pytest.mark.parametrize("spec", ["sample+beam", "beam+vcd+sample", "beam+beam", "sample+sample"])
def test_two_strategies_are_refused(spec):
    with pytest.raises(IncompatibleDecodersError, match="both choose the tokens"):
        parse(spec)


def test_beams_with_a_method_that_refuses_them():
    with pytest.raises(IncompatibleDecodersError, match="sgrs does not work with beam search"):
        parse("beam+sgrs")
    assert parse("beam:num_beams=1+sgrs").strategy == Strategy()
    with pytest.raises(IncompatibleDecodersError, match=r"sgrs.* does not work with beam search"):
        check_settings(parse("sgrs"), Settings(num_beams=2))


def test_what_is_refused_is_refused_before_a_model_loads(tmp_path):
    PICTURES[0][0].save(tmp_path / "a.png")

    def load(*args, **kwargs):
        pytest.fail("a model was loaded")

    settings = Settings(decoder="beam:num_beams=2", num_beams=3)
    with pytest.raises(UsageError, match="num_beams=3"):
        run(tmp_path, tmp_path / "out", questions=Questions.text("what?"), settings=settings, loader=load)


def test_ranges():
    for make in (lambda: Sample(temperature=-1.0), lambda: Sample(top_p=0.0), lambda: Beam(num_beams=0)):
        with pytest.raises(UsageError):
            make()
    with pytest.raises(UsageError, match="greedy search has no nucleus"):
        Sample(temperature=0.0, top_p=0.5)
    with pytest.raises(UsageError, match="top_k=3 with temperature=0"):
        Sample(temperature=0.0, top_k=3)


def test_rows_of_a_search_are_counted():
    assert (Beam().passes, parse("beam:num_beams=3").passes, parse("vcd+beam:num_beams=3").passes) == (5, 3, 6)
    assert parse("sample+inter").passes == parse("inter").passes


def test_strategies_in_words():
    said = [
        str(parse(spec).strategy)
        for spec in ("beam", "sample", "sample:temperature=0.7,top_p=0.9,top_k=40", "beam:num_beams=1")
    ]
    assert said == [
        "5 beams",
        "sampling at temperature 1",
        "sampling at temperature 0.7, top_p 0.9, top_k 40",
        "the most probable token",
    ]
    assert parse("greedy").strategy is parse("vcd+locore").strategy is None


def test_draws_follow_the_formula():
    scores = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    temperature, top_p, top_k, draws = 1.3, 0.8, 6, 20_000
    order = scores[0].argsort(descending=True)[:top_k]
    share = (scores[0, order] / temperature).softmax(dim=0)  # over the k best alone
    kept = order[: int((share.cumsum(0) < top_p).sum()) + 1]
    assert 1 < len(kept) < top_k  # both cut
    expected = torch.zeros(12)
    expected[kept] = (scores[0, kept] / temperature).softmax(dim=0)
    kind = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    choice = Drawn(drawing(range(draws), torch.device("cpu"), **kind))
    found = choice(scores.expand(draws, -1)).bincount(minlength=12) / draws
    assert (found[expected == 0] == 0).all()
    assert (found - expected).abs().max() < 4 * (0.25 / draws) ** 0.5
