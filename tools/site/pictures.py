"""Makes the picture of each method: made-up numbers before, and what the method's formula makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from tools.site import scene
from tools.site.drawing import Group, arrows, attention, heads, ladder, steps, words
from tools.site.shares import Share, cut, logs, mixed, moved, normal, raised, softmax

NAMES = ("stick", "ball", "tree", "cup")
THERE = (True, False, True, False)
CLEAN = (0.38, 0.42, 0.15, 0.05)
"""What the model says next of a picture of a dog with a stick before a tree."""
HABIT = (0.10, 0.70, 0.14, 0.06)
"""What it says from habit."""

GROUPS = (Group("start", 3), Group("picture", 8), Group("question", 4), Group("answer", 3))
FIRST, SYSTEM, IMAGE, QUESTION, ANSWER = [0], [1, 2], [*range(3, 11)], [*range(11, 15)], [*range(15, 18)]
SKY, DOG, STICK = 3, [6, 7], 9
"""Patches of the picture: one of sky, on which attention lies idle, and those that show things."""
SEEN = (
    *(0.30, 0.03, 0.02),
    *(0.14, 0.02, 0.02, 0.05, 0.06, 0.02, 0.03, 0.02),
    *(0.04, 0.05, 0.02, 0.04),
    *(0.04, 0.06, 0.04),
)
"""Attention of the row that predicts to each token."""


def said(title: str, shares: Sequence[Share]) -> str:
    """Draws what a model says next."""
    return words(title, shares, NAMES, THERE)


def row(
    after: Sequence[float], before: Sequence[float] = SEEN, title: str = "attention of the row that predicts"
) -> str:
    """Draws a row of attention before and after."""
    return attention(normal(before), after, GROUPS, title)


def contrast(other: str, shares: Sequence[float] = HABIT, weight: float = 1.0, share: float = 0.1) -> list[str]:
    """Draws a contrast of two rows: clean, other, and ``(1 + weight) * clean - weight * other``."""
    scores = cut(mixed((1 + weight, CLEAN), (-weight, shares)), CLEAN, share)
    return [said("with the picture", CLEAN), said(other, shares), said("scores", scores)]


def chosen(heads_: int, layers: int, wanted: Callable[[int, int], float]) -> list[list[float]]:
    """Makes a factor for every head of every layer."""
    return [[wanted(layer, head) for head in range(heads_)] for layer in range(layers)]


def _greedy() -> list[str]:
    return [said("the next token", CLEAN)]


def _sample() -> list[str]:
    return [
        said("temperature 1", CLEAN),
        said("temperature 0.5", softmax([2 * one for one in logs(CLEAN)])),
        said("temperature 2", softmax([one / 2 for one in logs(CLEAN)])),
    ]


def _beam() -> list[str]:
    ball = ("greedy decoding", [("a dog with a", 1.0), ("ball", 0.42), ("in the air", 0.3)], False)
    stick = ("beam search", [("a dog with a", 1.0), ("stick", 0.38), ("in its mouth", 0.8)], True)
    return [steps("two answers, and how probable they are", [ball, stick])]


def _opera() -> list[str]:
    lost = (0.2, 0.9, 0.3, 0.2)
    scores = [one - 2 * less for one, less in zip(logs(CLEAN), lost, strict=True)]
    return [
        said("with the picture", CLEAN),
        said("attention to one earlier word", lost),
        said("scores", softmax(scores)),
    ]


def _revisit() -> list[str]:
    token = (0.52, 0.24, 0.14, 0.10)
    return [
        said("what the model says", CLEAN),
        said("what an image token says", token),
        said("their product", softmax(mixed((1, CLEAN), (1, token)))),
    ]


def _var() -> list[str]:
    sinks = [*FIRST, SKY]
    return [row(moved(normal(SEEN), sinks, 0.4, [j for j in IMAGE if j not in sinks]))]


def _locore() -> list[str]:
    window = range(len(SEEN) - 6, len(SEEN) - 1)
    return [row(normal([weight * (2 if j in window else 1) for j, weight in enumerate(SEEN)]))]


def _gift() -> list[str]:
    drawn = {DOG[0]: 0.7, DOG[1]: 1.0, STICK: 0.6}
    seen = normal(SEEN)
    factors = {j: math.exp(2 * drawn.get(j, 0.0)) for j in IMAGE}
    ratio = sum(seen[j] * factors[j] for j in IMAGE) / sum(seen[j] for j in IMAGE)
    factors |= dict.fromkeys(QUESTION, ratio)
    return [row(normal([weight * factors.get(j, 1.0) for j, weight in enumerate(seen)]))]


def _zerotuning() -> list[str]:
    return [row(normal([weight * (0.3 if j in FIRST else 1) for j, weight in enumerate(normal(SEEN))]))]


def _act() -> list[str]:
    return [row(moved(normal(SEEN), [SKY], 0.4, [j for j in range(len(SEEN)) if j != SKY]), title="a calibrated head")]


def _adhh() -> list[str]:
    text = [*QUESTION, *ANSWER]
    before = normal([weight * (4 if j in text else 1) for j, weight in enumerate(SEEN)])
    return [row([0.0 if j in text else w for j, w in enumerate(before)], before, "a hallucination head")]


def _imbalance() -> list[str]:
    return [row(raised(SEEN, {**dict.fromkeys([*DOG, STICK], 0.7), SKY + 1: 0.4}))]


def _pai() -> list[str]:
    scores = cut(mixed((1.1, CLEAN), (-0.1, HABIT)), CLEAN, 0.1)
    return [
        row(raised(SEEN, dict.fromkeys(IMAGE, 0.2))),
        said("with the picture", CLEAN),
        said("without it", HABIT),
        said("scores", scores),
    ]


def _vaf() -> list[str]:
    return [row(raised(SEEN, {**dict.fromkeys(IMAGE, 0.5), **dict.fromkeys([*FIRST, *SYSTEM], -0.3)}))]


def _inter() -> list[str]:
    question, picture, neither = (0.14, 0.60, 0.14, 0.12), (0.25, 0.30, 0.35, 0.10), (0.10, 0.40, 0.20, 0.30)
    scores = cut(mixed((2, CLEAN), (-1, question), (-1, picture), (1, neither)), CLEAN, 0.1)
    return [
        said("picture and question", CLEAN),
        said("question alone", question),
        said("picture alone", picture),
        said("neither", neither),
        said("scores", scores),
    ]


def _sgrs() -> list[str]:
    tries = [("stick", 0.64, True), ("ball", 0.21, False), ("tree", 0.5, True), ("cup", 0.12, False)]
    rejected = [score if score >= 0.3 else None for _, score, _ in tries]
    return [
        said("drawn by these", CLEAN),
        said("what each owes the text", [score for _, score, _ in tries]),
        words("above the threshold", rejected, NAMES, THERE, gone="rejected"),
    ]


def _apc() -> list[str]:
    return [said("with the picture", CLEAN), said("above a fifth of the best", cut(logs(CLEAN), CLEAN, 0.2))]


def _m3id() -> list[str]:
    def scores(step: int) -> list[Share]:
        weight = math.expm1(0.02 * step)
        return cut(mixed((1 + weight, CLEAN), (-weight, HABIT)), CLEAN, 0.1)

    return [
        said("with the picture", CLEAN),
        said("without it", HABIT),
        said("scores, first token", scores(1)),
        said("scores, 50th token", scores(50)),
    ]


def _flb() -> list[str]:
    first = (0.30, 0.05, 0.25, 0.05)
    weight = 0.3 * (1 - math.exp(-0.05 * 50))
    scores = cut(mixed((1, CLEAN), (weight, first)), CLEAN, 0.1)
    return [said("first token", first), said("50th token", CLEAN), said("scores, 50th token", scores)]


def _mod() -> list[str]:
    alike, apart = (0.40, 0.36, 0.18, 0.06), HABIT
    agreed = cut(mixed((1, CLEAN), (4, alike)), CLEAN, 0.5)
    return [
        said("with the picture", CLEAN),
        said("regarded alone: agree", alike),
        said("scores", agreed),
        said("with the picture", CLEAN),
        said("regarded alone: differ", apart),
        said("scores", cut(mixed((2, CLEAN), (-1, apart)), CLEAN, 0.5)),
    ]


def _only() -> list[str]:
    ratios = (0.9, 0.5, 1.2, 0.4, 0.8, 1.1, 0.6, 1.0)
    alike = (0.36, 0.44, 0.15, 0.05)
    mean = sum(ratios) / len(ratios)
    return [
        heads("heads that stay", [[float(ratio >= mean) for ratio in ratios]]),
        said("the model", CLEAN),
        said("those heads: differ", HABIT),
        said("scores", cut(mixed((2, CLEAN), (-1, HABIT)), CLEAN, 0.1)),
        said("those heads: agree", alike),
        said("scores", cut(mixed((1, CLEAN), (3, alike)), CLEAN, 0.1)),
    ]


def _memvr() -> list[str]:
    layers, unsure = range(5, 11), (0.55, 0.62, 0.81, 0.78, 0.6, 0.5)
    x, output, tokens = (0.5, 0.9), (0.9, 0.5), ((0.5, 1.0), (-0.1, 0.8))
    likeness = [sum(a * b for a, b in zip(x, token, strict=True)) for token in tokens]
    picture = [sum(like * token[axis] for like, token in zip(likeness, tokens, strict=True)) for axis in range(2)]
    scale = sum(abs(part) for part in output) / sum(abs(part) for part in picture)
    same = (scale * picture[0], scale * picture[1])
    mixture = (0.69 * output[0] + 0.31 * same[0], 0.69 * output[1] + 0.31 * same[1])
    start = (0.4, 0.0)
    named = [
        (name, start, (start[0] + vector[0], start[1] + vector[1]), kind)
        for name, vector, kind in (
            ("the MLP's output", output, "dark"),
            ("the picture's tokens", same, "grey"),
            ("mixed, ratio 0.31", mixture, "strong"),
        )
    ]
    above = tuple(entropy > 0.75 for entropy in unsure)
    first = [place == above.index(True) for place in range(len(unsure))]
    return [
        words("unsure behind layer", unsure, tuple(str(layer) for layer in layers), first),
        arrows("in layer 8, the next", named),
    ]


def _dola() -> list[str]:
    early = HABIT
    return [
        ladder("layers", 10, 2, (0, 2, 4)),
        said("an early layer", early),
        said("the last layer", CLEAN),
        said("scores", cut(mixed((1, CLEAN), (-1, early)), CLEAN, 0.1)),
    ]


def _deco() -> list[str]:
    early = (0.66, 0.16, 0.14, 0.04)
    return [
        ladder("layers", 10, 7, (6, 7, 8)),
        said("an early layer", early),
        said("the last layer", CLEAN),
        said("scores", cut(mixed((1, CLEAN), (0.6 * max(early), early)), CLEAN, 0.3)),
    ]


def _acg() -> list[str]:
    without, with_ = (1.5, 0.3), (1.2, 0.7)
    effect = (with_[0] - without[0], with_[1] - without[1])
    along = (effect[0] * without[0] + effect[1] * without[1]) / (without[0] ** 2 + without[1] ** 2)
    part = (effect[0] - along * without[0], effect[1] - along * without[1])
    new = (with_[0] + 2.4 * part[0], with_[1] + 2.4 * part[1])
    named = [
        ("without the picture", (0.0, 0.0), without, "grey"),
        ("with the picture", (0.0, 0.0), with_, "dark"),
        ("", with_, new, "dashed"),
        ("guided", (0.0, 0.0), new, "strong"),
    ]
    return [arrows("output of a head", named)]


def _kvsmooth() -> list[str]:
    before, new = (1.5, 0.4), (0.5, 1.4)
    drawings = []
    for title, share in (("a token whose attention is sure", 0.25), ("a token whose attention is vague", 0.75)):
        kept = (new[0] + share * (before[0] - new[0]), new[1] + share * (before[1] - new[1]))
        named = [
            ("kept of the token before", (0.0, 0.0), before, "grey"),
            ("its key", (0.0, 0.0), new, "dark"),
            ("", new, kept, "dashed"),
            ("what is kept of it", (0.0, 0.0), kept, "strong"),
        ]
        drawings.append(arrows(title, named))
    return drawings


def _vista() -> list[str]:
    direction, drawings = (0.8, 0.15), []
    for title, stream in (("what is added lies across", (0.3, 1.4)), ("what is added points away", (-0.8, 1.1))):
        length, unit = math.hypot(*stream), math.hypot(*direction)
        away = max(0.0, -(stream[0] * direction[0] + stream[1] * direction[1]) / length / unit)
        new = [x / length + 0.4 * (1 + away) * d / unit for x, d in zip(stream, direction, strict=True)]
        turned = (new[0] * length / math.hypot(*new), new[1] * length / math.hypot(*new))
        start = (0.8, 0.0)
        vectors = (("the picture's direction", direction), ("added", stream), ("turned", turned))
        named = [
            (name, start, (start[0] + vector[0], start[1] + vector[1]), kind)
            for (name, vector), kind in zip(vectors, ("grey", "dark", "strong"), strict=True)
        ]
        drawings.append(arrows(title, named))
    late = (0.46, 0.30, 0.19, 0.05)
    mean = [0.7 * math.log(last) + 0.3 * math.log(early) for last, early in zip(CLEAN, late, strict=True)]
    return [*drawings, said("the last layer", CLEAN), said("late layers", late), said("scores", softmax(mean))]


def _vti() -> list[str]:
    drawings = []
    for title, direction, stream in (
        ("a patch, in the vision tower", (0.1, 1.3), (1.3, 0.4)),
        ("a token, in the text decoder", (0.8, 0.15), (0.3, 1.4)),
    ):
        length, unit = math.hypot(*stream), math.hypot(*direction)
        new = [x / length + 0.4 * d / unit for x, d in zip(stream, direction, strict=True)]
        turned = (new[0] * length / math.hypot(*new), new[1] * length / math.hypot(*new))
        vectors = (("the measured direction", direction), ("added", stream), ("turned", turned))
        kinds = ("grey", "dark", "strong")
        named = [(name, (0.0, 0.0), vector, kind) for (name, vector), kind in zip(vectors, kinds, strict=True)]
        drawings.append(arrows(title, named))
    return drawings


def _nullu() -> list[str]:
    direction, drawings, start = (0.96, 0.28), [], (0.6, 0.0)
    for title, stream in (("mostly along the direction", (1.5, 0.9)), ("mostly across it", (0.5, 1.3))):
        along = stream[0] * direction[0] + stream[1] * direction[1]
        left = (stream[0] - along * direction[0], stream[1] - along * direction[1])
        ends = [(start[0] + x, start[1] + y) for x, y in (direction, stream, left)]
        named = [
            ("the measured direction", start, ends[0], "grey"),
            ("added", start, ends[1], "dark"),
            ("", ends[1], ends[2], "dashed"),
            ("what is left", start, ends[2], "strong"),
        ]
        drawings.append(arrows(title, named))
    return drawings


def _pti() -> list[str]:
    drawings = []
    for title, direction, column in (
        ("a patch: towards objects", (0.8, 0.15), (0.3, 1.4)),
        ("the prompt's end: towards their list", (0.3, 0.8), (0.9, -0.7)),
    ):
        length, unit = math.hypot(*column), math.hypot(*direction)
        away = max(0.0, -(column[0] * direction[0] + column[1] * direction[1]) / length / unit)
        new = [c / length + 0.6 * (1 + away) * d / unit for c, d in zip(column, direction, strict=True)]
        turned = (new[0] * length / math.hypot(*new), new[1] * length / math.hypot(*new))
        start = (0.0, 0.8 if column[1] < 0 else 0.0)
        vectors = (("the measured direction", direction), ("its value", column), ("what is kept", turned))
        named = [
            (name, start, (start[0] + vector[0], start[1] + vector[1]), kind)
            for (name, vector), kind in zip(vectors, ("grey", "dark", "strong"), strict=True)
        ]
        drawings.append(arrows(title, named))
    return drawings


def _spin() -> list[str]:
    quiet = {(layer, head) for layer in range(6) for head in ((3 * layer + 1) % 8, (5 * layer + 6) % 8)}
    return [
        heads("before", chosen(8, 6, lambda layer, head: 1.0)),
        heads("after, for one token", chosen(8, 6, lambda layer, head: 0.08 if (layer, head) in quiet else 1.0)),
    ]


def _vhr() -> list[str]:
    strong = {(layer, (layer + step) % 8) for layer in (1, 3, 4, 5) for step in (0, 2, 3, 6)}
    return [
        heads("before", chosen(8, 6, lambda layer, head: 1.0)),
        heads("after", chosen(8, 6, lambda layer, head: 2.0 if (layer, head) in strong else 1.0)),
    ]


def _ph3() -> list[str]:
    removed = {(3, 2), (4, 6)}
    return [
        heads("before", chosen(8, 6, lambda layer, head: 1.0)),
        heads("after", chosen(8, 6, lambda layer, head: 0.0 if (layer, head) in removed else 1.0)),
    ]


def _amplify() -> list[str]:
    carried = {(2, 1), (2, 6), (3, 3), (3, 4)}
    return [
        heads("before", chosen(8, 6, lambda layer, head: 1.0)),
        heads("after", chosen(8, 6, lambda layer, head: 2.0 if (layer, head) in carried else 1.0)),
    ]


def _looks() -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    general = [[0.5, 0.2, 0.2, 0.1, 0.2, 0.7], [0.6, 0.5, 0.1, 0.15, 0.1, 0.1], [0.3, 0.2, 0.1, 0.1, 0.1, 0.1]]
    question = [[0.5, 0.2, 0.2, 0.2, 0.2, 0.6], [0.6, 0.5, 0.2, 0.75, 0.4, 0.1], [0.3, 0.2, 0.1, 0.2, 0.1, 0.1]]
    ratio = [[q / g for q, g in zip(*rows, strict=True)] for rows in zip(question, general, strict=True)]
    high = max(max(values) for values in ratio)
    return general, question, [[value / high for value in values] for values in ratio]


def _carve() -> list[str]:
    general, question, ratio = _looks()
    return [
        scene.looked("looked at, in general", general),
        scene.looked("looked at, for the sign", question),
        scene.looked("the ratio", ratio),
        scene.window("what the model is shown"),
    ]


def _vicrop() -> list[str]:
    return [
        scene.looked("the ratio of both looks", _looks()[2]),
        scene.framed("shown: the whole"),
        scene.window("shown as well: a window"),
    ]


PICTURES: Mapping[str, Callable[[], list[str]]] = {
    "greedy": _greedy,
    "sample": _sample,
    "beam": _beam,
    "var": _var,
    "locore": _locore,
    "vcd": lambda: contrast("with noise in its place"),
    "inter": _inter,
    "sgrs": _sgrs,
    "carve": _carve,
    "vicrop": _vicrop,
    "vhr": _vhr,
    "gift": _gift,
    "zerotuning": _zerotuning,
    "act": _act,
    "spin": _spin,
    "adhh": _adhh,
    "ph3": _ph3,
    "imbalance": _imbalance,
    "apc": _apc,
    "icd": lambda: contrast("told to be confused"),
    "m3id": _m3id,
    "flb": _flb,
    "dola": _dola,
    "deco": _deco,
    "sid": lambda: contrast("least seen patches alone"),
    "avisc": lambda: contrast("blind patches alone"),
    "mod": _mod,
    "pai": _pai,
    "vaf": _vaf,
    "acg": _acg,
    "kvsmooth": _kvsmooth,
    "vista": _vista,
    "vti": _vti,
    "nullu": _nullu,
    "pti": _pti,
    "opera": _opera,
    "revisit": _revisit,
    "amplify": _amplify,
    "only": _only,
    "memvr": _memvr,
}
"""Name of a method -> its drawings, in the order of reading."""
