"""The training itself: language alone, then pictures; drawing and learning on one device."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, LlavaProcessor

from vlmfix.world.batches import SIZES, TRAINING_SEED, Batches, Kind, TextBatch
from vlmfix.world.checkpoint import (
    SMALL,
    Network,
    build_model,
    build_processor,
    build_tokenizer,
    save,
    vocabulary_texts,
)
from vlmfix.world.muon import Muon
from vlmfix.world.painting import Painters
from vlmfix.world.questions import Diet

# of twelve batches with pictures, two have two pictures each and two have none: the language must not be lost
CYCLE: tuple[Kind, ...] = ("one", "one", "two", "one", "one", "text") * 2
WARMUP = 150


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a training run is made of.

    Attributes:
        seed: Seed of weights, scenes and texts.
        language_steps: Batches of language alone, 0 or more.
        steps: Batches of the second phase, 1 or more.
        minutes: Wall-clock limit of both phases; the learning rate falls to its end by then. Infinite: none.
        pool: How many scenes are drawn.
        rate: Highest learning rate.
        diet: What the answers claim.
        start: Model directory whose weights and words to go on from; None for a new model.
        workers: Processes that write texts; as many draw. 0 does both in this one.
        device: "cuda" or "cpu".
        small: Learn a toy network from few rows, to try the run.
    """

    seed: int = 0
    language_steps: int = 300
    steps: int = 11_000
    minutes: float = math.inf
    pool: int = 60_000
    rate: float = 4e-3
    diet: Diet
    start: Path | None = None
    workers: int = 8
    device: str = "cuda"
    small: bool = False


def train(out: Path, recipe: Recipe, log: Callable[[str], None]) -> None:
    """Train the embedded model and write its directory.

    Args:
        out: Where to write it.
        recipe: What to do.
        log: Takes one line at a time.
    """
    begin = time.perf_counter()
    torch.manual_seed(recipe.seed)
    model, processor = _start(recipe)
    tokenizer = processor.tokenizer
    # processes are forked before CUDA and threads are there
    stream = _stream(tokenizer.backend_tokenizer, recipe)
    painters = Painters(
        seed=TRAINING_SEED + recipe.seed, count=recipe.pool, device=recipe.device, processes=recipe.workers
    )
    device = torch.device(recipe.device)
    cast(nn.Module, model).to(device)
    count = sum(value.numel() for value in model.parameters())
    log(f"torch {torch.__version__}, transformers {transformers.__version__}, device {_name(device)}")
    log(f"parameters {count:,}, vocabulary {len(tokenizer)}, {recipe}")
    if device.type == "cuda":
        _compile(model)
    clock = Clock(begin, recipe)
    _learn(model, stream, recipe.language_steps, painters, recipe, clock, log, "language")
    _learn(model, stream, recipe.steps, painters, recipe, clock, log, "pictures")
    painters.close()
    save(out, model, processor)
    log(f"{clock.seconds():6.1f} s  saved {out}")


def _start(recipe: Recipe) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    if recipe.start is not None:
        model = LlavaForConditionalGeneration.from_pretrained(recipe.start, dtype=torch.float32)
        return model, LlavaProcessor.from_pretrained(recipe.start)
    tokenizer = build_tokenizer(vocabulary_texts(200 if recipe.small else 3000))
    return build_model(tokenizer, SMALL if recipe.small else Network()), build_processor(tokenizer)


def _stream(tokenizer: Tokenizer, recipe: Recipe) -> Iterator[TextBatch]:
    """Batches in order, made ahead by other processes."""
    schedule: list[Kind] = ["text"] * recipe.language_steps
    schedule += [CYCLE[number % len(CYCLE)] for number in range(recipe.steps)]
    batches = Batches(
        tokenizer=tokenizer,
        schedule=schedule,
        seed=recipe.seed,
        pool=recipe.pool,
        filled=recipe.language_steps + int(0.4 * recipe.steps),
        diet=recipe.diet,
        shrink=32 if recipe.small else 1,
    )
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            num_workers=recipe.workers,
            pin_memory=recipe.device == "cuda",
            prefetch_factor=8 if recipe.workers else None,
        )
    )


class Clock:
    """Seconds since the start, and how far the run has come."""

    def __init__(self, begin: float, recipe: Recipe) -> None:
        self.begin = begin
        self.limit = 60 * recipe.minutes

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.begin

    def progress(self, step: int, steps: int, since: float) -> float:
        """Share of a phase that is done, by steps or by time, whichever is further; in [0, 1]."""
        return min(1.0, max(step / max(1, steps), (self.seconds() - since) / max(1e-9, self.limit - since)))


def _learn(
    model: LlavaForConditionalGeneration,
    stream: Iterator[TextBatch],
    steps: int,
    painters: Painters,
    recipe: Recipe,
    clock: Clock,
    log: Callable[[str], None],
    phase: str,
) -> None:
    device = next(model.parameters()).device
    optimizers = _optimizers(model, recipe)
    mean, std = _pixel_scale(device)
    since = clock.seconds()
    losses: dict[str, list[Tensor]] = {}
    for step in range(steps):
        done = clock.progress(step, steps, since)
        if done >= 1:
            log(f"{clock.seconds():6.1f} s  {phase} ends at step {step}: out of time")
            break
        rate = recipe.rate * min(1.0, (step + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        batch = next(stream).to(device)
        pixels = None
        if batch.kind != "text":
            shown = painters.pictures(batch.reach)[batch.scenes, : SIZES[batch.kind].pictures]  # (B, n, 3, 128, 128)
            shown = torch.where(batch.mirrored[:, None, None, None, None], shown.flip(-1), shown)
            pixels = (shown.flatten(0, 1).float() / 255 - mean) / std  # (B * n, 3, 128, 128)
        loss = _loss(model, batch, pixels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.setdefault(batch.kind, []).append(loss.detach())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            shares = ", ".join(f"{kind} {torch.stack(found).mean():.4f}" for kind, found in sorted(losses.items()))
            log(f"{clock.seconds():6.1f} s  {phase} {step + 1:5d}/{steps}  rate {rate:.2e}  loss {shares}")
            losses = {}


def _loss(model: LlavaForConditionalGeneration, batch: TextBatch, pixels: Tensor | None) -> Tensor:
    """Weighted mean of the answers' cross-entropy, in nats; a scalar."""
    half = torch.autocast("cuda", torch.bfloat16) if batch.ids.is_cuda else contextlib.nullcontext()
    with half:
        hidden = model.model(
            input_ids=batch.ids,
            pixel_values=pixels,
            attention_mask=batch.mask(),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state  # (B, T, width)
        logits = model.lm_head(hidden[:, :-1])  # (B, T - 1, V)
    each = cross_entropy(logits.flatten(0, 1).float(), batch.ids[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    return (each * weights).sum() / weights.sum()


def _optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, norms and biases."""
    named = list(model.named_parameters())
    hidden = {name for name, value in named if value.dim() == 2 and "embed" not in name}
    rest = [value for name, value in named if name not in hidden]
    return [
        Muon([value for name, value in named if name in hidden], lr=recipe.rate),
        torch.optim.AdamW(rest, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=recipe.device == "cuda"),
    ]


def _compile(model: LlavaForConditionalGeneration) -> None:
    # layer by layer: all layers share one compiled graph, so compiling takes seconds instead of minutes
    torch._dynamo.config.recompile_limit = 32
    for layer in (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers):
        layer.compile(dynamic=False)


def _pixel_scale(device: torch.device) -> tuple[Tensor, Tensor]:
    scale = CLIPImageProcessor()
    mean, std = (torch.tensor(value, device=device)[:, None, None] for value in (scale.image_mean, scale.image_std))
    return mean, std  # (3, 1, 1) each


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
