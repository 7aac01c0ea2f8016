"""Makes the tokens usable that end rows and fill them up, where a checkpoint's files leave them out."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from vlmfix.errors import DataError
from vlmfix.models import loading


def completed_tokens(model: PreTrainedModel, processor: ProcessorMixin, picture: int) -> dict[str, Any]:
    """Makes the tokens that end and fill up rows usable, in a model and a tokenizer that were just loaded.

    A padding token that is missing, that the model has no embedding of, or that is the image token, is no matter of
    answers: it is masked in prompts, and stands behind an answer's end. Without an end token in the generation
    settings, the tokenizer's ends answers.

    Args:
        model: The model.
        processor: Its processor.
        picture: The token that stands for one image patch.

    Returns:
        What was put in: name -> value.

    Raises:
        DataError: A token is not one of the model's.
    """
    tokenizer, config = processor.tokenizer, model.generation_config
    size = len(model.get_input_embeddings().get_parameter("weight"))
    added: dict[str, Any] = {}
    if not _tokens(config, "eos_token_id", size) and tokenizer.eos_token_id is not None:
        config.eos_token_id = added["eos_token_id"] = tokenizer.eos_token_id
    ends = _tokens(config, "eos_token_id", size)
    if tokenizer.pad_token_id in (None, picture) or tokenizer.pad_token_id >= size:
        if tokenizer.eos_token is None or tokenizer.eos_token_id >= size:
            raise DataError("the tokenizer has no padding token", "name pad_token in tokenizer_config.json")
        tokenizer.pad_token = added["pad_token"] = tokenizer.eos_token
    if _tokens(config, "pad_token_id", size) in ([], [picture]):
        config.pad_token_id = added["pad_token_id"] = ends[0] if ends else tokenizer.pad_token_id
    return added


def _tokens(config: Any, name: str, size: int) -> list[int]:  # noqa: ANN401 (its settings have no types)
    """The tokens that a generation setting names, each one of the model's."""
    value = getattr(config, name)
    found = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    if odd := [token for token in found if type(token) is not int or not 0 <= token < size]:
        raise DataError(
            f"generation_config.json: {name} {odd[0]!r} is no token of the model, which has 0 to {size - 1}",
            loading.COMPLETE,
        )
    return found
