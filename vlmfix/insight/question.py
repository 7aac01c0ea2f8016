"""Finds the question among a prompt's tokens, and its content words, by the chat template and a tagger.

Shape letters (``docs/notation.md``): B rows, T prompt tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from itertools import takewhile
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmfix.decoding.spelling import Spelling, spelled
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.insight.wording import FUNCTION_WORDS
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch

MODEL = "en_core_web_sm"
"""spaCy's English model that tags words."""
INSTALL = f"pip install 'vlmfix[spacy]' && python -m spacy download {MODEL}"
"""Command that installs spaCy and the model."""
TAGS = frozenset(("NOUN", "PROPN", "VERB", "ADJ", "ADV", "NUM"))
"""Parts of speech of content words."""
RULES = ("spacy", "stop-words", "all")
"""Rules for content words: by spaCy's tagger, by a list of English function words, or every word counts."""


@dataclass(frozen=True)
class Word:
    """Holds a content word.

    Attributes:
        start: Place of its first character in the text.
        end: Place behind its last character.
        key: Equal for two occurrences of the same word.
    """

    start: int
    end: int
    key: str


@dataclass(frozen=True, eq=False)
class Asked:
    """Marks the questions of a batch.

    Attributes:
        question: (B, T) bool, tokens of the question; none in a row without a picture.
        content: (B, T) bool, tokens of its content words; all of its tokens when no word is one.
    """

    question: Tensor
    content: Tensor


def has_tagger() -> bool:
    """Returns whether spaCy and its English model are installed."""
    return find_spec("spacy") is not None and find_spec(MODEL) is not None


def rule_in_words(rule: str) -> str:
    """Describes a rule with the versions that its result depends on."""
    if rule == "spacy":
        return f"spacy {version('spacy')}, {MODEL} {version(MODEL)}"
    return {"stop-words": "list of English function words", "all": "every word"}[rule]


def content_words(text: str, rule: str) -> list[Word]:
    """Finds the content words of a question.

    Args:
        text: A question. One without Latin letters is not English, and all of its words count.
        rule: One of ``RULES``.
    """
    english = re.search("[a-zA-Z]", text) is not None
    if rule == "spacy" and english:
        tagged = [word for word in _tagger()(text) if word.pos_ in TAGS]
        return [Word(word.idx, word.idx + len(word.text), f"{word.text} ({word.pos_})") for word in tagged]
    words = [Word(*match.span(), match[0]) for match in re.finditer(r"\w+", text)]
    return [word for word in words if rule == "all" or not english or word.key.lower() not in FUNCTION_WORDS]


def speaking(vlm: Checkpoint, ids: Sequence[int]) -> list[bool]:
    """Tells which tokens of an answer write a part of a content word, by the list of English function words.

    Args:
        vlm: The model whose tokens they are.
        ids: The answer's tokens.

    Returns:
        One for each token; all True where no token does.
    """
    spelling = spelled(Spelling(vlm.processor.tokenizer, ()), ids)
    words = content_words(spelling.text, "stop-words")
    ends = [*spelling.starts[1:], len(spelling.text)]
    spans = zip(spelling.starts, ends, strict=True)
    found = [any(start < word.end and end > word.start for word in words) for start, end in spans]
    return found if any(found) else [True] * len(found)


def asked(vlm: Checkpoint, batch: Batch, rule: str, *, last_only: bool) -> Asked:
    """Finds the questions, between the last image token and the assistant's turn.

    Args:
        vlm: The model.
        batch: B rows.
        rule: One of ``RULES``.
        last_only: Whether only the last occurrence of a repeated word counts.

    Raises:
        IncompatibleDecodersError: Inputs from elsewhere do not follow the model's chat template.
    """
    question = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    content = question.clone()
    template = _template(vlm)
    for row in range(batch.rows):
        columns = _question_columns(vlm, batch, row, template)
        chosen = _content_columns(vlm, batch["input_ids"][row, columns].tolist(), rule, last_only=last_only)
        question[row, columns] = True
        content[row, [columns[place] for place in chosen]] = True
    return Asked(question, content)


def _template(vlm: Checkpoint) -> tuple[list[int], list[int]]:
    """Finds the template's tokens between picture and question, and behind the question, as two prompts share them."""
    blank = Image.new("RGB", (64, 64))
    batch = vlm.encode(["Yes", "7"], [[blank], [blank]])
    one, two = (_tail(vlm, batch, row)[1] for row in range(2))
    return one[: _common(one, two)], one[len(one) - _common(one[::-1], two[::-1]) :]


def _tail(vlm: Checkpoint, batch: Batch, row: int) -> tuple[list[int], list[int]]:
    """Returns columns and ids of the tokens behind the last image token; none in a row without one."""
    ids = batch["input_ids"][row].tolist()
    image = vlm.family.image_token(vlm.model.config)
    if image not in ids:
        return [], []
    columns = list(range(len(ids) - ids[::-1].index(image), len(ids)))
    return columns, [ids[column] for column in columns]


def _question_columns(
    vlm: Checkpoint, batch: Batch, row: int, template: tuple[Sequence[int], Sequence[int]]
) -> list[int]:
    before, after = template
    columns, ids = _tail(vlm, batch, row)
    first, last = _common(ids, before), _common(ids[::-1], after[::-1])
    if columns and batch.prompts is None and (first, last) != (len(before), len(after)):
        raise IncompatibleDecodersError(
            f"row {row} does not follow the model's chat template, so its question cannot be told from the rest",
            "make the inputs with vlm.encode(prompts, pictures) or the processor's chat template",
        )
    return columns[first : len(columns) - last]


def _content_columns(vlm: Checkpoint, ids: Sequence[int], rule: str, *, last_only: bool) -> list[int]:
    """Finds the places in the question of tokens that write content words, or parts of them."""
    tokenizer: Any = vlm.processor.tokenizer
    pieces = [tokenizer.decode(ids[: count + 1], clean_up_tokenization_spaces=False) for count in range(len(ids))]
    words = content_words(pieces[-1], rule) if pieces else []
    if last_only:
        words = list({word.key: word for word in words}.values())
    ends = [len(piece) for piece in pieces]
    spans = list(zip([0, *ends], ends, strict=False))
    chosen = [
        place
        for place, (start, end) in enumerate(spans)
        if any(start < word.end and end > word.start for word in words)
    ]
    return chosen or list(range(len(ids)))


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """Counts the first tokens that two sequences have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))


@cache
def _tagger() -> Any:  # noqa: ANN401 (spaCy ships no types that hold without it)
    import spacy

    return spacy.load(MODEL, disable=["parser", "ner"])
