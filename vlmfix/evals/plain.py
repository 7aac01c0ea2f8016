"""Plain greedy answers by transformers alone: the yardstick for everything that edits decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin


@dataclass
class Plain:
    """Answers by greedy decoding.

    Attributes:
        model: A model of the embedded kind (LLaVA).
        processor: Its processor.
        batch_size: Rows at a time.
        tokens: Most new tokens in an answer.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    batch_size: int
    tokens: int = 128
    pixels: dict[int, tuple[Image.Image, Tensor]] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path, *, device: str, batch_size: int) -> Plain:
        """Load a model directory in its own number format."""
        model = AutoModelForImageTextToText.from_pretrained(directory).to(device).eval()
        return cls(model, AutoProcessor.from_pretrained(directory), batch_size)

    def __call__(self, pictures: Sequence[Sequence[Image.Image]], prompts: Sequence[str]) -> list[str]:
        """Answer one prompt for each row.

        Args:
            pictures: For each row its pictures, 512 pixels square; no, one or two.
            prompts: For each row what is asked.

        Returns:
            The answers, stripped.
        """
        found: list[str] = []
        for start in range(0, len(prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            batch = self.encode(pictures[rows], prompts[rows])
            with torch.inference_mode():
                ids = self.model.generate(**batch, max_new_tokens=self.tokens, do_sample=False)
            new = ids[:, batch["input_ids"].shape[1] :]
            found += [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]
        return found

    def encode(
        self, pictures: Sequence[Sequence[Image.Image]], prompts: Sequence[str], answers: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """Make model inputs; each picture goes through the processor once, however many prompts ask about it."""
        config = self.model.config
        texts = []
        for number, (row, prompt) in enumerate(zip(pictures, prompts, strict=True)):
            content = [{"type": "image"}] * len(row) + [{"type": "text", "text": prompt}]
            text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            image = self.processor.image_token
            text = text.replace(image, image * config.image_seq_length)
            texts.append(f"{text} {answers[number]}" if answers else text)
        batch = dict(self.processor.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt"))
        shown = [picture for row in pictures for picture in row]
        new = {id(picture): picture for picture in shown if id(picture) not in self.pixels}
        if new:
            values = self.processor.image_processor(list(new.values()), return_tensors="pt")["pixel_values"]
            # the picture is kept beside its pixels, so that its id stays its own
            kept = zip(new.values(), values.to(self.model.dtype), strict=True)
            self.pixels |= {id(picture): (picture, value) for picture, value in kept}
        if shown:
            batch["pixel_values"] = torch.stack([self.pixels[id(picture)][1] for picture in shown])
        batch.pop("token_type_ids", None)
        return {name: value.to(self.model.device) for name, value in batch.items()}
