"""Batches of questions through a model: what goes wrong with one row is its own, and memory sets the batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmfix.card import free_memory
from vlmfix.decoders import Decoder
from vlmfix.errors import DataError, LayoutError, VlmfixError
from vlmfix.generation import VLM, Answer
from vlmfix.settings import Settings

logger = logging.getLogger(__name__)

ROW_TOKENS = 4096
"""Prompt and answer tokens that an automatic batch size makes room for in every row."""
LARGEST_BATCH = {"cuda": 32, "cpu": 8}

REPEATABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Attention kernels that give the same bits every time. cuDNN's is left out: on a busy H200 it rounded otherwise from
run to run, which changed words in one caption of eighty."""

OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


@dataclass(frozen=True, eq=False)
class Question:
    """One prompt about one picture, or about none.

    Attributes:
        picture: RGB; rows of a batch that hold the same object share its encoding. None for a prompt alone.
        prompt: What is asked.
    """

    picture: Image.Image | None
    prompt: str


class Answerer:
    """A model with a decoder and settings, which answers batches.

    Args:
        vlm: The model.
        decoder: How it decodes.
        settings: Its generation settings; the model's own fields are not read.
        batch_size: Rows at a time; None takes as many as the free memory allows.
    """

    def __init__(self, vlm: VLM, decoder: Decoder, settings: Settings, batch_size: int | None = None) -> None:
        self._vlm = vlm
        self._decoder = decoder
        self._settings = settings
        self.rows = batch_size or fitting_batch(vlm, decoder)
        """Rows that go through at a time; halved when memory runs out."""

    def __call__(self, batch: Sequence[Question]) -> list[Answer | str]:
        """Answers questions.

        Returns:
            For each question its answer, or the reason why there is none.

        Raises:
            VlmfixError: Settings that can work with no batch.
        """
        found: list[Answer | str] = []
        while len(found) < len(batch):
            part = batch[len(found) : len(found) + self.rows]
            found += self._part(part)
        return found

    def _part(self, part: Sequence[Question]) -> list[Answer | str]:
        """Where a batch fails, smaller ones, until the question at fault is alone."""
        answers = self._attempt(part)
        if not isinstance(answers, Exception):
            return ["the model's output was not a number" if a.finish == "nan" else a for a in answers]
        if len(part) == 1:
            return [_reason(answers)]
        if not is_memory(answers):
            return [outcome for question in part for outcome in self._part([question])]
        self.rows = len(part) // 2
        logger.warning("out of memory with %d rows: going on with %d", len(part), self.rows)
        return self(part)

    def _attempt(self, part: Sequence[Question]) -> list[Answer] | Exception:
        """The answers, or what went wrong with this batch; what would go wrong with every batch is raised."""
        settings = self._settings
        try:
            with sdpa_kernel(REPEATABLE):
                return self._vlm.generate(
                    [[] if question.picture is None else question.picture for question in part],
                    [question.prompt for question in part],
                    decoder=self._decoder,
                    max_new_tokens=settings.max_new_tokens,
                    num_beams=settings.num_beams,
                    temperature=settings.temperature,
                    seed=settings.seed,
                )
        except Exception as error:
            if not is_memory(error) and _concerns_every_batch(error):
                raise
            problem = error.with_traceback(None)  # its frames would keep the tensors alive
        if is_memory(problem) and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return problem


def fitting_batch(vlm: VLM, decoder: Decoder) -> int:
    """Rows whose keys and values, twice over for what else a row needs, fit the free memory."""
    config = vlm.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * width * vlm.model.dtype.itemsize * ROW_TOKENS
    fitting = free_memory(vlm.device) // (2 * cache * decoder.passes)
    return int(max(1, min(fitting, LARGEST_BATCH.get(vlm.device.type, 8))))


def is_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def _reason(error: Exception) -> str:
    if isinstance(error, VlmfixError):
        return str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{'out of memory: ' if is_memory(error) else ''}{type(error).__name__}: {first}"


def _concerns_every_batch(error: Exception) -> bool:
    """Settings that cannot work, and a GPU that is lost until the process ends."""
    if isinstance(error, VlmfixError):
        return not isinstance(error, DataError | LayoutError)
    return isinstance(error, torch.AcceleratorError)
