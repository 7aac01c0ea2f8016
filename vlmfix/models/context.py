"""How many tokens a model takes: its context, and what of it is left for an answer.

Shape letters (``docs/notation.md``): B rows, T prompt tokens.
"""

from __future__ import annotations

from torch import Tensor

from vlmfix.errors import ContextError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.upstream.positions import context


def room_for_answers(vlm: Checkpoint, lengths: Tensor, *, wanted: int = 1) -> Tensor | None:
    """Tells how many tokens of the model's context are left for each row's answer.

    Args:
        vlm: The model.
        lengths: (B,) tokens of the rows' prompts, without padding.
        wanted: Tokens that every row must have room for.

    Returns:
        (B,) int64, or None when the model has no limit.

    Raises:
        ContextError: A row has no such room.
    """
    most = context(vlm.family.decoder(vlm.model))
    if most is None:
        return None
    longest = int(lengths.max())
    if longest + wanted > most:
        row = f" of row {int(lengths.argmax())}" if len(lengths) > 1 else ""
        answer = "" if wanted == 1 else f" and its answer {wanted}"
        raise ContextError(
            f"the prompt{row} has {longest} tokens, pictures included{answer}, and the model's context is {most}",
            "shorten the question, or show fewer or smaller pictures",
        )
    return most - lengths
