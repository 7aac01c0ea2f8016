"""Writes questions and what was said before them as a model's chat template wants it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

from vlmfix.errors import DataError, UnsupportedModelError
from vlmfix.models import loading
from vlmfix.models.layout import Earlier, Turn
from vlmfix.parsing import is_text


def template_of(processor: ProcessorMixin, called: str) -> str | None:
    """Finds the chat template: the processor's, or else the tokenizer's; the one called ``default`` of several.

    Args:
        processor: The processor.
        called: What messages call the model.

    Raises:
        UnsupportedModelError: There are several, and none is called so.
    """
    for holder in (processor, processor.tokenizer):
        found = getattr(holder, "chat_template", None)
        if isinstance(found, str):
            return found
        if isinstance(found, Mapping) and found:
            if "default" not in found:
                raise UnsupportedModelError(
                    f"{called} has the chat templates {', '.join(sorted(found))} and none is called default",
                    "save the one to use as chat_template.jinja in its folder",
                )
            return str(found["default"])
    return None


def rendered(
    processor: ProcessorMixin,
    called: str,
    image: int,
    prompt: str | None,
    pictures: int,
    *,
    system: str | None = None,
    earlier: Sequence[Turn] = (),
) -> str:
    """Writes one question about pictures by the chat template; see ``Checkpoint.render``.

    Args:
        processor: The processor, which has the template.
        called: What messages call the model.
        image: The token that stands for a picture.
        prompt: The question; None for a user turn without any text.
        pictures: How many pictures there are, those of earlier turns included.
        system: System message; None keeps the template's own.
        earlier: What was said before, oldest first.

    Raises:
        DataError: A text holds the token that stands for a picture.
        UnsupportedModelError: There is no chat template, it fails, or it leaves a turn out.
    """
    template = template_of(processor, called)
    if template is None:
        raise UnsupportedModelError(
            f"{called} has no chat template, neither with its processor nor with its tokenizer",
            "put chat_template.jinja of the checkpoint that it was made from into its folder",
        )
    if system is not None:
        earlier = [Turn("system", system), *(turn for turn in earlier if turn.role != "system")]
    mark = str(processor.tokenizer.convert_ids_to_tokens(image))
    if any(mark in said for said in (prompt or "", *(turn.text for turn in earlier))):
        raise DataError(f"{mark} in a question stands for a picture there", "leave it out: pictures come before it")
    messages = [_message(turn.role, turn.text, turn.pictures) for turn in earlier]
    messages.append(_message("user", prompt, pictures - sum(turn.pictures for turn in earlier)))
    try:
        text = processor.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # whatever a template does, and it is a program
        raise UnsupportedModelError(
            f"the chat template of {called} fails: {loading.words(error)}",
            "put chat_template.jinja of the checkpoint that it was made from into its folder",
        ) from error
    for turn in earlier:
        if turn.text.strip() not in text:
            raise UnsupportedModelError(
                f"the chat template of {called} leaves out what the {turn.role} said before the question",
                "leave it out, or write it into the question",
            )
    asked = len(prompt or "") + sum(len(turn.text) for turn in earlier)
    if len(text) > loading.LONGEST_TEXT + loading.LONGEST_TEXT * asked // 1000:
        raise UnsupportedModelError(
            f"the chat template of {called} makes {len(text)} characters of a question of {asked}",
            "put chat_template.jinja of the checkpoint that it was made from into its folder",
        )
    return str(text)


def said_before(earlier: Any, rows: Sequence[Sequence[Image.Image]]) -> Earlier | None:  # noqa: ANN401
    """Checks what was said before the questions of a batch.

    Args:
        earlier: For each row, its turns; None for nothing in any.
        rows: The pictures of each row.

    Raises:
        DataError: It is something else; there are not as many rows; a system message does not stand first; turns have
            more pictures than their row; or the turns do not alternate between user and assistant.
    """
    if earlier is None:
        return None
    hint = "give for each question a list of vlmfix.Turn(role, text), oldest first"
    if not isinstance(earlier, Sequence) or len(earlier) != len(rows):
        raise DataError(f"earlier is not a list with one list for each of {len(rows)} questions", hint)
    for number, (turns, pictures) in enumerate(zip(earlier, rows, strict=True)):
        place = f"earlier[{number}]"
        if not isinstance(turns, Sequence) or not all(isinstance(turn, Turn) for turn in turns):
            raise DataError(f"{place} is not a list of turns", hint)
        if not all(is_text(turn.text) for turn in turns):
            raise DataError(f"{place} has a turn that is no text", hint)
        said = [turn.role for turn in turns if turn.role != "system"]
        if "system" in [turn.role for turn in turns[1:]] or said != ["user", "assistant"] * (len(said) // 2):
            roles = ", ".join(turn.role for turn in turns)
            raise DataError(
                f"{place} has the roles {roles}",
                "after at most one system message, user and assistant take turns, and the question comes last",
            )
        if any(turn.pictures < 0 or (turn.pictures and turn.role != "user") for turn in turns):
            raise DataError(f"{place} has pictures in a turn that is not the user's", "only the user shows pictures")
        if sum(turn.pictures for turn in turns) > len(pictures):
            shown = sum(turn.pictures for turn in turns)
            raise DataError(f"{place} has {shown} pictures and its row {len(pictures)}", "give the row all pictures")
    return tuple(tuple(turns) for turns in earlier)


def _message(role: str, text: str | None, pictures: int) -> dict[str, Any]:
    """Writes one message as chat templates read it."""
    content: list[dict[str, Any]] = [{"type": "image"}] * pictures
    return {"role": role, "content": content if text is None else [*content, {"type": "text", "text": text}]}
