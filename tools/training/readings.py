"""What a stage of the third embedded model's training has come to: captions, yes and no, and attention sinks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tools.training.architecture import normalised
from tools.training.painting import Painters
from tools.training.questions import DESCRIBE
from tools.training.seeing import seen
from tools.training.smolvlm import CELLS, END, GRID, JOINED, SIDE, TOKENS, SmolVLM
from vlmfix.world.mentions import mentions
from vlmfix.world.pope import lines
from vlmfix.world.scenes import scene

SEED = 77
"""Of the scenes that a run is read on; no training scene has it."""
MASSIVE = 20.0
"""Largest |x_d| / rms(x) from which a token counts as a sink here; the bound is 24, and all words have about 12."""
CAPITAL = "What is the capital of France?"


class Readings:
    """Measures a stock model on scenes that it never saw.

    Args:
        count: How many scenes.
        tokenizer: Of the model.
        looked: Scenes of which attention is read.
        processes: How many draw; 0 draws here, at the first call.
    """

    def __init__(self, count: int, tokenizer: PreTrainedTokenizerFast, looked: int = 48, *, processes: int = 0) -> None:
        self.scenes = [scene(SEED, number) for number in range(count)]
        self.painters = Painters(seed=SEED, count=count, side=SIDE, device="cpu", processes=processes)
        self.tokenizer = tokenizer
        self.looked = min(looked, count)
        self.architecture = SmolVLM()

    @property
    def pictures(self) -> Tensor:
        """The scenes, (N, 3, side, side) uint8."""
        return self.painters.pictures(len(self.scenes))[:, 0]

    def close(self) -> None:
        """End the processes."""
        self.painters.close()

    def __call__(self, model: PreTrainedModel, longest: int = 80) -> dict[str, Any]:
        """Read captions, POPE and sinks of a model with eager attention.

        Args:
            model: The model, in float32 on its device.
            longest: Tokens of an answer at most.
        """
        with torch.no_grad():
            texts = self._answers(model, list(range(len(self.scenes))), [DESCRIBE[0]] * len(self.scenes), longest)
            found: dict[str, Any] = {"captions": self._captions(texts), "sinks": self._sinks(model)}
            found["pope"] = {split: self._pope(model, split) for split in ("random", "adversarial")}
            grey = torch.full_like(self.pictures[:1], 122)
            found["grey"] = self._answers(model, [0], [DESCRIBE[0]], longest, grey)[0]
            found["capital"] = self._answers(model, [], [CAPITAL], 20)[0]
            found["examples"] = [
                {"truth": list(view.counts()), "text": text} for view, text in zip(self.scenes[:8], texts, strict=False)
            ]
        return found

    def _answers(
        self,
        model: PreTrainedModel,
        rows: Sequence[int],
        prompts: Sequence[str],
        longest: int,
        pictures: Tensor | None = None,
    ) -> list[str]:
        """Greedy answers; without rows the prompts have no picture."""
        found: list[str] = []
        stock: Any = model
        shown = self.pictures if pictures is None else pictures
        for low in range(0, len(prompts), 200):
            ids, mask = self._asked(prompts[low : low + 200], pictures=1 if rows else 0)
            given: dict[str, Any] = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
            if rows:
                some = shown[torch.tensor(rows[low : low + 200])].to(model.device)
                given["pixel_values"] = normalised(some)[:, None]  # (B, 1, 3, side, side)
            out = stock.generate(**given, max_new_tokens=longest, do_sample=False)
            found += self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        return found

    def _asked(self, prompts: Sequence[str], pictures: int) -> tuple[Tensor, Tensor]:
        """Ids and mask, (B, T) each, filled up on the left."""
        encode = self.tokenizer.backend_tokenizer
        begin = self.architecture.beginning(
            lambda text: encode.encode(text, add_special_tokens=False).ids, (GRID,) * pictures
        )
        asked = [self.architecture.question(prompt, blind=not pictures) for prompt in prompts]
        ids = [begin + entry.ids for entry in encode.encode_batch(asked, add_special_tokens=False)]
        longest, pad = max(map(len, ids)), self.tokenizer.convert_tokens_to_ids(END)
        spare = [longest - len(row) for row in ids]
        return (
            torch.tensor([[pad] * more + row for more, row in zip(spare, ids, strict=True)]),
            torch.tensor([[0] * more + [1] * len(row) for more, row in zip(spare, ids, strict=True)]),
        )

    def _captions(self, texts: Sequence[str]) -> dict[str, float]:
        said = [mentions(text) for text in texts]
        truth = [set(view.counts()) for view in self.scenes]
        wrong = [sum(name not in there for name in names) for names, there in zip(said, truth, strict=True)]
        right = sum(len(set(names) & there) for names, there in zip(said, truth, strict=True))
        return {
            "chair_i": sum(wrong) / max(1, sum(map(len, said))),
            "chair_s": sum(map(bool, wrong)) / len(texts),
            "recall": right / sum(map(len, truth)),
            "mentions": sum(map(len, said)) / len(texts),
            "words": sum(len(text.split()) for text in texts) / len(texts),
            "distinct": len(set(texts)) / len(texts),
        }

    def _pope(self, model: PreTrainedModel, split: str) -> dict[str, float]:
        there = [(str(row), list(view.counts())) for row, view in enumerate(self.scenes) if len(view.counts()) >= 3]
        asked = [json.loads(line) for line in lines(there, split=split, seed=1)]
        said = self._answers(model, [int(entry["image"]) for entry in asked], [entry["text"] for entry in asked], 1)
        yes = [text.strip().startswith("Yes") for text in said]
        truth = [entry["label"] == "yes" for entry in asked]
        hit = sum(a and b for a, b in zip(yes, truth, strict=True))
        return {
            "f1": 2 * hit / max(1, sum(yes) + sum(truth)),
            "accuracy": sum(a == b for a, b in zip(yes, truth, strict=True)) / len(truth),
            "yes": sum(yes) / len(truth),
            "neither": sum(not text.strip().startswith(("Yes", "No")) for text in said) / len(truth),
        }

    def _sinks(self, model: PreTrainedModel) -> dict[str, Any]:
        """Massive activations and attention by layer, with the caption prompt; shares are of image tokens."""
        ids, mask = self._asked([DESCRIBE[0]] * self.looked, pictures=1)
        shown = normalised(self.pictures[: self.looked].to(model.device))[:, None]  # (B, 1, 3, side, side)
        whole: Any = model.model
        out = whole(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            pixel_values=shown,
            output_hidden_states=True,
            output_attentions=True,
        )
        states = torch.stack(list(out.hidden_states[:-1])).float()  # (L, B, T, width), entering each layer
        middle = range(len(states) // 4, max(1 + len(states) // 4, 3 * len(states) // 4))
        ratio = states.abs() * states.square().mean(-1, keepdim=True).add(1e-6).rsqrt()  # (L, B, T, width)
        place = int(ratio[list(middle), :, 0].median(0).values.median(0).values.argmax())
        phi, norm = ratio[..., place], states.norm(dim=-1)  # (L, B, T)
        attention = torch.stack([found.mean(1)[:, TOKENS:].mean(1) for found in out.attentions]).float()  # (L, B, T)
        image, rest = slice(0, TOKENS), slice(1, TOKENS)
        empty = self._empty().to(model.device)  # (B, tokens)
        table = []
        for layer in range(len(states)):
            first = float(norm[layer, :, 0].median())
            over = phi[layer, :, image] > MASSIVE  # (B, tokens)
            true = norm[layer, :, image] > first / 2
            given = attention[layer, :, image]  # (B, tokens)
            table.append(
                {
                    "layer": layer,
                    "first": float(phi[layer, :, 0].median()),
                    "image median": float(phi[layer, :, rest].median()),
                    "image largest": float(phi[layer, :, rest].max()),
                    "text largest": float(phi[layer, :, TOKENS:].max()),
                    "over": float(over.float().mean()),
                    "over without first": float(over[:, 1:].float().mean()),
                    "norm first": first,
                    "norm image": float(norm[layer, :, rest].median()),
                    "norm image largest": float(norm[layer, :, rest].max()),
                    "norm near first": float(true[:, 1:].float().mean()),
                    "attention first": float(attention[layer, :, 0].mean()),
                    "attention image": float(given.sum(1).mean()),
                    "attention of image to over": float(((given * over).sum(1) / given.sum(1)).mean()),
                    "attention of image to over without first": float(
                        ((given * over)[:, 1:].sum(1) / given.sum(1)).mean()
                    ),
                    "empty among over": float((over & empty)[:, 1:].sum() / over[:, 1:].sum().clamp(min=1)),
                }
            )
        chosen = phi[list(middle), :, image].mean(0) > MASSIVE  # (B, tokens)
        counts = chosen.sum(0)
        embeddings: Any = model.get_input_embeddings()
        words = embeddings.weight[:-1].square().mean().sqrt()
        keys = [name for name in table[0] if name != "layer"]
        return {
            "dimension": place,
            "loudness": float(states[0, :, image].square().mean().sqrt() / words),
            "loudness by token": [float(value) for value in self._quantiles(states[0, :, image] / words)],
            "empty tokens": float(empty.float().mean()),
            "middle": {key: sum(table[layer][key] for layer in middle) / len(middle) for key in keys},
            "pictures with a sink beside the first token": float(chosen[:, 1:].any(1).float().mean()),
            "empty among sinks": float((chosen & empty)[:, 1:].sum() / chosen[:, 1:].sum().clamp(min=1)),
            "places": [[int(number), int(counts[number])] for number in counts.topk(6).indices],
            "layers": table,
        }

    def _quantiles(self, states: Tensor) -> Tensor:
        """Least, quarter, median, three quarters and largest loudness of a token; (B, tokens, width) in."""
        loud = states.square().mean(-1).sqrt().flatten()
        return torch.quantile(loud, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], device=loud.device))

    def _empty(self) -> Tensor:
        """(B, tokens) bool: no object stands in the cells of a token."""
        found = [torch.from_numpy(seen(view, CELLS)[0]) for view in self.scenes[: self.looked]]
        return free(torch.stack(found))


def free(cells: Tensor) -> Tensor:
    """Tell which tokens show no object.

    Args:
        cells: (B, rows, columns) uint8 from `tools.training.seeing.seen`.

    Returns:
        (B, tokens) bool.
    """
    rows, columns = GRID
    blocks = cells.view(-1, rows, JOINED, columns, JOINED)
    return (blocks == 0).all(4).all(2).flatten(1)
