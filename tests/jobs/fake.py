"""A model that answers at once, and fails where a test wants it to."""

import time
from types import SimpleNamespace

import torch
from PIL import Image

from vlmfix.generation import Answer
from vlmfix.models.layout import Prepared


class FakeVLM:
    revision = "abc"
    device = torch.device("cpu")

    def __init__(self, *, fails=None, seconds=0.0, broken=()):
        text = SimpleNamespace(
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            hidden_size=32,
            head_dim=8,
            intermediate_size=64,
            vocab_size=100,
        )
        config = SimpleNamespace(get_text_config=lambda: text)
        self.model = SimpleNamespace(dtype=torch.float32, config=config)
        self.family = SimpleNamespace(layers=lambda model: [torch.nn.Identity()] * 2)
        self.reading = {"ends": [2], "set_aside": {}, "completed": {}}
        self.batches = []
        self.options = {}
        self.fails = fails or (lambda batch: None)
        self.seconds = seconds
        self.broken = broken  # colours whose answers are not numbers

    def generate(self, pictures, prompts, **options):
        batch = [(picture.getpixel((0, 0)), prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
        self.batches.append(batch)
        self.options = options
        time.sleep(self.seconds * len(batch))
        problem = self.fails(batch)
        if problem is not None:
            raise problem
        return [
            Answer(f"{prompt}: {colour}", 3, "nan" if colour in self.broken else "eos", 0.5, (5, 6, 2))
            for colour, prompt in batch
        ]

    def beside(self):
        return self

    def prepared(self, prompts, pictures, *, system=None, each=map):
        return Prepared(inputs={"input_ids": torch.ones(len(prompts), 16)}, sources={}, prompts=(), pictures=())

    def load(
        self,
        model,
        *,
        revision=None,
        device="auto",
        dtype="auto",
        max_pixels=None,
        min_pixels=None,
        device_map=None,
        quantize=None,
        attention=None,
    ):
        return self

    def enlarged(self, picture, together=1):
        return 0


def colour(number):
    return (number % 256, number // 256, 0)


def draw(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (8, 8), colour(number)).save(folder / f"{number:04d}.png")
    return folder
