"""Every kind of decoder on the published checkpoints, with two photographs of odd shapes in one padded batch."""

from __future__ import annotations

import pytest

from tests.contracts.support import close, logits, picture, plain
from tests.real.published import PUBLISHED

SIZES = {
    "llava-1.5-7b-hf": ((333, 777), (1000, 37)),
    "gemma-3-4b-it": ((333, 777), (1000, 37)),
    "Qwen2-VL-2B-Instruct": ((150, 97), (61, 230)),
    "Qwen2.5-VL-7B-Instruct": ((150, 97), (61, 230)),
    "Qwen3-VL-4B-Instruct": ((150, 97), (61, 330)),
    "InternVL3-1B-hf": ((300, 290), (200, 220)),
}
"""(width, height) of the two photographs; the others, which cut any picture in tiles, get two thin ones."""
QUESTIONS = ("?", "What is in it?")

CLASS_TOKENS = ("llava-1.5-7b-hf", "llava-v1.6-mistral-7b-hf", "InternVL3-1B-hf")
"""Checkpoints whose vision tower has a class token."""
ACT = "act:heads=all,layers=all,sink_factor=1"
LOCORE, VHR, VCD = "locore:strength={}", "vhr:alpha={},layers=all", "vcd:contrast={},plausibility=0"
IMBALANCE = "imbalance:significance={significance},alpha={},beta=0,local_share=0.5,layers=all"

KINDS = {
    "text rows": (LOCORE.format(0), LOCORE.format(4)),
    "every row": (VHR.format(1), VHR.format(4)),
    "every row's weights": (f"{ACT},kept_fraction=1", f"{ACT},kept_fraction=0"),
    "row that predicts": ("spin:suppression=1", "spin:kept_share=0.5"),
    "chosen heads": ("ph3:share=0", "ph3:heads=L0H0/L1H1"),
    "saliency": tuple(f"gift:saliency_layers=0,layers=all,alpha={alpha}" for alpha in (0, 6)),
    "tower": (IMBALANCE.format(0, significance="{}"), IMBALANCE.format(1, significance="{}")),
    "noisy pictures": (VCD.format(0), VCD.format(1.5)),
    "without pictures": ("inter:variance=inf,plausibility=0", "inter:variance=0,plausibility=0"),
    "one layer's heads": tuple(f"only:contrast={by},complement={by},plausibility=0" for by in (0, 3)),
    "tokens in an MLP": tuple(f"memvr:ratio={ratio},threshold=0,layers=0" for ratio in (0, 0.9)),
    "stream": tuple(f"vista:strength={strength},augmentation=0" for strength in (0, 3)),
    "tokens' logits": tuple(f"revisit:strength={strength},plausibility=0" for strength in (0, 3)),
}
"""Specifications under which a method does nothing, and much."""
KINDS["chain"] = tuple(
    "+".join(KINDS[kind][place] for kind in ("text rows", "every row", "tower", "noisy pictures")) for place in (0, 1)
)

ANSWERS = {
    "rejection": (
        "sgrs:draw=greedy,strictness=0.000001",
        "sgrs:draw=greedy,strictness=1.3,top_k=8,window=3,layers=all",
    ),
    "kept pixels": ("carve:kept_share=1,probe_tokens=2", "carve:kept_share=0.3,probe_tokens=2,layers=all"),
    "window": (None, "vicrop:base=24,layers=1"),
    "beams": ("beam:num_beams=1", "beam:num_beams=3"),
    "draws": ("sample:temperature=0", "sample:temperature=1.5"),
}
"""The same of methods that choose otherwise, or change what is shown."""

EVERY_KIND = ("Qwen2.5-VL-7B-Instruct", "llava-1.5-7b-hf")
"""Checkpoints that meet every kind in every run; the others meet the chain, and the rest as ``product``."""
TWIN = "SmolVLM-256M-Instruct"
"""Has the model class of Idefics3-8B and the geometry of SmolVLM2, which meet the chain."""


def often(name, kind, everywhere):
    return name in EVERY_KIND or (kind in everywhere and name != TWIN)


def pairs(kinds, *, everywhere=()):
    return [
        pytest.param(name, kind, marks=() if often(name, kind, everywhere) else pytest.mark.product)
        for name in PUBLISHED
        for kind in kinds
    ]


def spec(name, kind, place):
    return (KINDS | ANSWERS)[kind][place].format("cls" if name in CLASS_TOKENS else "received")


def photographs(name):
    sizes = SIZES.get(name, ((1000, 37), (37, 1000)))
    return [[picture(number, (height, width))] for number, (width, height) in enumerate(sizes)]


@pytest.mark.parametrize(("name", "kind"), pairs(KINDS, everywhere=["chain"]))
def test_a_method_does_nothing_or_much_and_a_padded_row_is_as_alone(vlm, name, kind):
    check(vlm, photographs(name), spec(name, kind, 0), spec(name, kind, 1), both=name in EVERY_KIND)


def check(vlm, shown, neutral, strong, *, questions=QUESTIONS, length=1, both=False):
    """Two rows with some padding, of at least so many tokens; the padded one alone, or both."""
    batch = vlm.encode(questions, shown)
    padded = (batch["attention_mask"] == 0).any(dim=1)
    assert padded.sum() == 1
    assert batch.length >= length
    untouched = plain(vlm, batch, steps=2)
    close(logits(vlm, batch, neutral, steps=2), untouched)
    together = logits(vlm, batch, strong, steps=2)
    assert (together - untouched).abs().amax(dim=(0, 2)).min() > 1e-2
    assert untouched.std() > 0.3
    for row in (0, 1) if both else padded.nonzero()[0].tolist():
        alone = vlm.encode(questions[row : row + 1], shown[row : row + 1])
        close(together[:, row], logits(vlm, alone, strong, steps=2)[:, 0], 1e-3)


@pytest.mark.parametrize(("name", "kind"), pairs(ANSWERS))
def test_a_choice_or_a_look_is_as_alone(vlm, name, kind):
    shown = photographs(name)

    def said(decoder, rows=slice(None)):
        return vlm.generate(shown[rows], QUESTIONS[rows], decoder=decoder, max_new_tokens=3, seed=3)

    greedy = [answer.ids for answer in said("greedy")]
    if ANSWERS[kind][0] is not None:
        assert [answer.ids for answer in said(spec(name, kind, 0))] == greedy
    together = said(spec(name, kind, 1))
    if kind != "beams" or name in EVERY_KIND:  # the best of three beams may be the greedy one
        assert [answer.ids for answer in together] != greedy
    for row in (0, 1):
        (alone,) = said(spec(name, kind, 1), slice(row, row + 1))
        assert together[row].ids == alone.ids
        assert together[row].finish in ("length", "eos")
    if kind in ("kept pixels", "window"):
        looks = [answer.refined for answer in together]
        assert [len(look.pictures) for look in looks] == [2 if kind == "window" else 1] * 2


# Gemma's window of 1024 tokens: of two layers the first has it

BEYOND = {
    "every row": ("vhr:alpha=1,layers=1", "vhr:alpha=4,layers=1"),
    "tower": tuple(f"imbalance:significance=received,alpha={alpha},beta=0,layers=1" for alpha in (0, 1)),
    "noisy pictures": KINDS["noisy pictures"],
    "without pictures": KINDS["without pictures"],
}
"""Edits of layers without a window, and branches."""


LONG = "Is there anything in this picture that could be called " + "very " * 150 + "odd?"


@pytest.mark.parametrize("name", ["gemma-3-4b-it"])
@pytest.mark.parametrize(
    ("kind", "pictures"),
    [
        ("every row", 1),
        ("noisy pictures", 1),
        *(pytest.param(kind, 4, marks=pytest.mark.product) for kind in BEYOND),
    ],
)
def test_beyond_gemma_s_window_a_method_does_nothing_or_much_and_a_padded_row_is_as_alone(vlm, kind, pictures):
    """The longer row has one picture and a long question, or four pictures of 256 tokens each."""
    few, window = photographs("gemma-3-4b-it"), vlm.model.config.text_config.sliding_window
    asked = (LONG if pictures == 1 else "?", "What is in it?")
    check(vlm, [few[0] * pictures, few[1]], *BEYOND[kind], questions=asked, length=window + 1)
