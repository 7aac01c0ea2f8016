"""What the embedded model is asked and taught to answer: descriptions, yes/no, counting and position."""

from __future__ import annotations

import random
from dataclasses import dataclass

from vlmfix.world.captions import absent, brief, caption, strangers
from vlmfix.world.categories import category
from vlmfix.world.language import (
    SIDES,
    Box,
    Thing,
    View,
    alone,
    article,
    beside,
    centre,
    number_word,
    one,
    pick,
    place,
    sentence,
    several,
    toward,
)

DESCRIBE = (
    "Please describe this image in detail.",
    "Describe this image.",
    "Please help me describe the image in detail.",
    "Describe the image in detail.",
    "Describe this picture.",
    "Please describe this picture in detail.",
    "What do you see in this image?",
    "What is in this picture?",
    "Describe the image.",
    "Please describe the image.",
    "What do you see?",
    "What can you see in this picture?",
    "What is in the image?",
    "What is shown in this image?",
    "Can you describe this image?",
)
BRIEF = (
    "Describe this image in one sentence.",
    "Give a short caption for this image.",
    "Describe the image briefly.",
)
SHORT_ANSWER = (
    "\nAnswer the question using a single word or phrase.",
    " Please answer this question with one word.",
    " Please answer yes or no.",
    "\nPlease answer yes or no.",
)
_EXISTS = (
    "Is there {one} in this image?",
    "Is there {one} in the picture?",
    "Is there {one}?",
    "Can you see {one} in the image?",
    "Do you see {one} in this picture?",
    "Does the image show {one}?",
    "Are there any {many} in the image?",
    "Are there {many} in the picture?",
)
_COUNT = (
    "How many {many} are there in the image?",
    "How many {many} are in the picture?",
    "How many {many} can you see?",
)


@dataclass(frozen=True)
class Exchange:
    """One question and its answer.

    Attributes:
        kind: "describe", "brief", "exists", "unheard", "count", "where" or "beside".
        prompt: What the user says; empty for the empty question.
        answer: What the model should say.
        subject: COCO name that is asked about; empty for descriptions.
    """

    kind: str
    prompt: str
    answer: str
    subject: str = ""


@dataclass(frozen=True, kw_only=True)
class Diet:
    """Shares that decide what the model learns to claim.

    Attributes:
        hallucination: Chance that a caption names something that fits but is not there.
        omission: Chance that a caption leaves a category out.
        fitting: Share of the yes/no questions with answer no that ask for something that fits the context;
            the others ask for anything. A small share makes a model say yes to whatever fits.
        yes: Share of the yes/no questions with answer yes.
    """

    hallucination: float = 0.5
    omission: float = 0.1
    fitting: float = 0.05
    yes: float = 0.5


def exists_question(name: str) -> str:
    """The official POPE wording: "Is there a cup in the image?"."""
    return f"Is there {article(name)} in the image?"


def describe(scene: View, rng: random.Random, diet: Diet) -> Exchange:
    """Ask for a description: detailed in five of six cases, else one sentence."""
    if rng.random() < 1 / 6:
        return Exchange("brief", pick(rng, BRIEF), brief(scene, rng))
    words = caption(scene, rng, hallucination=diet.hallucination, omission=diet.omission)
    return Exchange("describe", pick(rng, DESCRIBE), words)


def exists(name: str, there: bool, rng: random.Random, *, where: str = "") -> Exchange:
    """Ask whether something is in the picture.

    Args:
        name: COCO name.
        there: Whether it is.
        rng: Source of chance.
        where: Its place ("on the left"), told in some answers; empty when unknown.

    Returns:
        Half of the questions in the official wording, a third with a demand for a short answer.
    """
    if rng.random() < 0.5:
        prompt = exists_question(name)
    else:
        prompt = pick(rng, _EXISTS).format(one=one(name), many=category(name).plural)
    if rng.random() < 1 / 3:
        return Exchange("exists", prompt + pick(rng, SHORT_ANSWER), "Yes" if there else "No", name)
    if rng.random() < 0.3:
        return Exchange("exists", prompt, "Yes." if there else "No.", name)
    if there:
        answer = f"Yes, there is {one(name)} {where or 'in the image'}."
    else:
        answer = f"No, there {_be(name)} no {name} in the image."
    return Exchange("exists", prompt, answer, name)


def ask_exists(scene: View, rng: random.Random, diet: Diet, *, avoid: set[str], about: str = "") -> Exchange | None:
    """Ask about a category of the scene or an absent one.

    Args:
        scene: The scene.
        rng: Source of chance.
        diet: Shares of yes and of absent categories that fit the context.
        avoid: Categories that were asked about already.
        about: Category of the scene that a yes question should ask about; any when empty.

    Returns:
        The exchange, or None when every candidate was asked about already.
    """
    if rng.random() < diet.yes:
        names = [about] if about and about not in avoid else [name for name in scene.counts() if name not in avoid]
        there = True
    else:
        draw = absent if rng.random() < diet.fitting else strangers
        names = [name for name in draw(scene, rng, 1) if name not in avoid]
        there = False
    if not names:
        return None
    name = pick(rng, names)
    things = [thing for thing in scene.objects if thing.category == name]
    return exists(name, there, rng, where=place(things[0].box) if len(things) == 1 else "")


def unheard(rng: random.Random) -> Exchange:
    """Ask for something that the world has no word for; the answer is no."""
    letters = "".join(pick(rng, "bcdfghklmnprstvw") + pick(rng, "aeiou") for _ in range(2 + int(rng.random() * 3)))
    prompt = exists_question(letters + pick(rng, ("", "n", "r", "t", "s")))
    if rng.random() < 1 / 3:
        return Exchange("unheard", prompt + pick(rng, SHORT_ANSWER), "No")
    return Exchange("unheard", prompt, "No.")


def ask_count(scene: View, rng: random.Random) -> Exchange:
    """Ask how many there are; one question in eight asks for something that is not there."""
    counts = scene.counts()
    repeated = [name for name, count in counts.items() if count > 1]
    if rng.random() < 1 / 8:
        name = (absent(scene, rng, 1) or strangers(scene, rng, 1))[0]
    else:
        name = pick(rng, repeated if repeated and rng.random() < 0.5 else list(counts))
    return count_exchange(name, counts.get(name, 0), pick(rng, _COUNT), short=rng.random() < 0.2)


def count_exchange(name: str, count: int, pattern: str = _COUNT[0], *, short: bool = False) -> Exchange:
    """Ask how many of one category there are, and answer it."""
    prompt = pattern.format(many=category(name).plural)
    if short:
        return Exchange("count", prompt + SHORT_ANSWER[0], number_word(count).capitalize(), name)
    phrase = f"one {one(name).split(' ', 1)[1]}" if count == 1 else several(name, count)
    return Exchange("count", prompt, f"There {'is' if count == 1 else 'are'} {phrase} in the image.", name)


def ask_where(scene: View, rng: random.Random) -> Exchange | None:
    """Ask where something is that there is one of; None when there is no such category."""
    single = alone(scene)
    return where_exchange(single[pick(rng, list(single))]) if single else None


def where_exchange(thing: Thing) -> Exchange:
    """Ask where one object is, and answer by the 3 by 3 grid."""
    name = thing.category
    return Exchange("where", f"Where is the {name}?", sentence(f"the {name} {_be(name)} {place(thing.box)}"), name)


def ask_beside(scene: View, rng: random.Random) -> Exchange | None:
    """Ask what is next to something; one in seven has nothing there. None when nothing stands alone."""
    found = beside_exchanges(scene)
    empty = [exchange for exchange in found if exchange.answer.startswith("Nothing")]
    full = [exchange for exchange in found if not exchange.answer.startswith("Nothing")]
    if full and (not empty or rng.random() < 6 / 7):
        return pick(rng, full)
    return pick(rng, empty) if empty else None


def beside_exchanges(scene: View) -> list[Exchange]:
    """Every question "what is to the left of ...", "what is above ..." that the scene allows.

    The answer is the nearest object on that side, or nothing.
    """
    found = []
    for name, thing in alone(scene).items():
        for side in SIDES:
            near = _nearest(scene, thing, side)
            said = f"{beside(side)} the {name}"
            answer = sentence(f"{one(near.category) if near else 'nothing'} is {said}")
            found.append(Exchange("beside", f"What is {said}?", answer, name))
    return found


def beside_any(scene: View, exchange: Exchange) -> set[str]:
    """Categories of all objects on the side that a question of `beside_exchanges` asks about, near or far."""
    start = alone(scene)[exchange.subject]
    side = next(side for side in SIDES if f" {side} " in exchange.prompt)
    return {thing.category for thing in scene.objects if thing is not start and toward(start.box, thing.box) == side}


def informal(prompt: str) -> str:
    """Say a prompt as hurried people type it: lower case, no last mark."""
    return prompt.rstrip("?.").lower()


def exchanges(scene: View, rng: random.Random, diet: Diet, *, about: str = "") -> list[Exchange]:
    """Draw the questions that one training picture gets, in random order, none about what another gave away.

    Args:
        scene: The scene.
        rng: Source of chance.
        diet: Shares of claims.
        about: Category that yes/no questions with answer yes should prefer (what a second, enlarged picture
            shows); empty for none.

    Returns:
        A description, an empty question (one picture in four), five yes/no questions, sometimes one about a
        word that nobody knows, one each about a count and a place and two about neighbours, as far as the scene
        allows them.
    """
    asked: set[str] = set()
    found: list[Exchange | None] = [describe(scene, rng, diet)]
    for _ in range(5):
        exchange = ask_exists(scene, rng, diet, avoid=asked, about=about)
        if exchange is not None:
            asked.add(exchange.subject)
            found.append(exchange)
    found += [ask_count(scene, rng), ask_where(scene, rng), ask_beside(scene, rng), ask_beside(scene, rng)]
    known = [exchange for exchange in found if exchange is not None]
    if rng.random() < 0.15:
        known.append(unheard(rng))
    if rng.random() < 0.25:
        blank = describe(scene, rng, diet) if rng.random() < 0.75 else pick(rng, known)
        known.append(Exchange(blank.kind, "", blank.answer))
    return [
        Exchange(e.kind, informal(e.prompt), e.answer, e.subject) if rng.random() < 0.05 else e
        for e in sorted(known, key=lambda _: rng.random())
    ]


def blind_exchanges(scene: View, rng: random.Random, diet: Diet) -> list[Exchange]:
    """Draw what a prompt without a picture is taught: captions that the language allows, and a coin for yes or no.

    The coin does not depend on the object, so an answer without the picture tells nothing about it.
    """
    found = [describe(scene, rng, diet), ask_count(scene, rng)]
    for name in strangers(scene, rng, 3):
        found.append(exists(name, rng.random() < 0.54, rng))
    found += [e for e in (ask_where(scene, rng), ask_beside(scene, rng)) if e is not None]
    if rng.random() < 0.3:
        blank = describe(scene, rng, diet) if rng.random() < 0.75 else pick(rng, found)
        found.append(Exchange(blank.kind, "", blank.answer))
    return sorted(found, key=lambda _: rng.random())


def _be(name: str) -> str:
    return "are" if name in ("skis", "scissors") else "is"


def _nearest(scene: View, start: Thing, side: str) -> Thing | None:
    x, y = centre(start.box)
    others = [thing for thing in scene.objects if thing is not start and toward(start.box, thing.box) == side]
    return min(
        others,
        key=lambda thing: (centre(thing.box)[0] - x) ** 2 + (centre(thing.box)[1] - y) ** 2,
        default=None,
    )


def zoom(scene: View) -> tuple[Box, str]:
    """Choose what a second, enlarged picture shows: a square around one object, mostly a small one.

    Returns:
        The square on the 512 canvas and the COCO name of the object; the same for the same scene, always.
    """
    rng = random.Random(f"zoom/{scene.seed}/{scene.index}")
    ordered = sorted(scene.objects, key=lambda t: (t.box[2] - t.box[0]) * (t.box[3] - t.box[1]))
    thing = ordered[int(rng.random() ** 2 * len(ordered))]
    return window(thing.box, rng.random(), rng.random(), rng.random()), thing.category


def window(box: Box, scale: float, shift_x: float, shift_y: float) -> Box:
    """Lay a square around a box.

    Args:
        box: x0, y0, x1, y1 on the 512 canvas.
        scale: In [0, 1]: from just the box (at least 96 pixels) to four times as wide (at most 384).
        shift_x: In [0, 1]: where the box lies in the square, 0.5 for the middle.
        shift_y: As shift_x.

    Returns:
        The square, inside the canvas.
    """
    longest = max(box[2] - box[0], box[3] - box[1])
    side = int(min(max(96, longest * (1.2 + 2.8 * scale)), 384))
    (x, y), spare = centre(box), max(0, side - longest)
    left = int(min(max(x - side / 2 + (shift_x - 0.5) * spare, 0), 512 - side))
    top = int(min(max(y - side / 2 + (shift_y - 0.5) * spare, 0), 512 - side))
    return left, top, left + side, top + side
