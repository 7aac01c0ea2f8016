"""The training itself: language alone, then pictures; drawing and learning on one device."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from tools.training.architecture import Architecture, Kind, TextBatch
from tools.training.batches import TRAINING_SEED, Batches
from tools.training.checkpoint import ARCHITECTURES, build_tokenizer, save, vocabulary_texts
from tools.training.muon import Muon
from tools.training.painting import Painters
from tools.training.questions import Diet
from vlmfix.errors import UsageError

# of twelve batches with pictures, two have two pictures each and two have none: the language must not be lost
CYCLE: tuple[Kind, ...] = ("one", "one", "two", "one", "one", "text") * 2
WARMUP = 150


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that a training run is made of.

    Attributes:
        architecture: Name of the model's architecture, one of `ARCHITECTURES`.
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

    architecture: str = "llava"
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

    Raises:
        UsageError: The model to go on from has another architecture.
    """
    clock = Clock(60 * recipe.minutes)
    torch.manual_seed(recipe.seed)
    architecture = ARCHITECTURES[recipe.architecture]
    model, processor = _start(recipe, architecture)
    # processes are forked before CUDA and threads are there
    stream = _stream(processor.tokenizer.backend_tokenizer, recipe, architecture)
    painters = Painters(
        seed=TRAINING_SEED + recipe.seed,
        count=recipe.pool,
        side=architecture.side,
        device=recipe.device,
        processes=recipe.workers,
    )
    cast(nn.Module, model).to(recipe.device)
    count = sum(value.numel() for value in model.parameters())
    name = torch.cuda.get_device_name() if recipe.device == "cuda" else recipe.device
    log(f"torch {torch.__version__}, transformers {transformers.__version__}, device {name}")
    log(f"parameters {count:,}, vocabulary {len(processor.tokenizer)}, {recipe}")
    trainer = Trainer(model, stream, painters, recipe, clock, log)
    trainer.learn("language", recipe.language_steps)
    trainer.learn("pictures", recipe.steps)
    painters.close()
    save(out, model, processor)
    log(f"{clock.seconds():6.1f} s  saved {out}")


def _start(recipe: Recipe, architecture: Architecture) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor, new or read."""
    if recipe.start is None:
        tokenizer = build_tokenizer(architecture, vocabulary_texts(architecture, 200 if recipe.small else 3000))
        return architecture.build_model(tokenizer, small=recipe.small), architecture.build_processor(tokenizer)
    found = PreTrainedConfig.get_config_dict(recipe.start)[0].get("model_type")
    if found != recipe.architecture:
        raise UsageError(
            f"the model in {recipe.start} is a {found}, not a {recipe.architecture}", "give its --architecture"
        )
    model: PreTrainedModel = architecture.model.from_pretrained(recipe.start, dtype=torch.float32)
    return model, architecture.processor.from_pretrained(recipe.start)


def _stream(tokenizer: Tokenizer, recipe: Recipe, architecture: Architecture) -> Iterator[TextBatch]:
    """Batches in order, made ahead by other processes."""
    schedule: list[Kind] = ["text"] * recipe.language_steps
    schedule += [CYCLE[number % len(CYCLE)] for number in range(recipe.steps)]
    batches = Batches(
        architecture=architecture,
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
    """Seconds since it was made, and how far a phase has come.

    Args:
        limit: Seconds by which everything must be over.
    """

    def __init__(self, limit: float) -> None:
        self.begin = time.perf_counter()
        self.limit = limit

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.begin

    def progress(self, step: int, steps: int, since: float) -> float:
        """Share of a phase that is done, by steps or by time, whichever is further; in [0, 1]."""
        return min(1.0, max(step / steps, (self.seconds() - since) / max(1e-9, self.limit - since)))


class Trainer:
    """One model and what it learns from.

    Args:
        model: On its device; trained in place.
        stream: Batches of all phases, in order.
        painters: The pictures.
        recipe: Rates.
        clock: Started with the run.
        log: Takes one line at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stream: Iterator[TextBatch],
        painters: Painters,
        recipe: Recipe,
        clock: Clock,
        log: Callable[[str], None],
    ) -> None:
        self.model: Any = model
        self.stream = stream
        self.painters = painters
        self.recipe = recipe
        self.clock = clock
        self.log = log
        self.device = torch.device(recipe.device)
        if recipe.device == "cuda":
            torch._dynamo.config.recompile_limit = 32
        self.forward = ARCHITECTURES[recipe.architecture].forward(model, compiled=recipe.device == "cuda")

    def learn(self, phase: str, steps: int) -> None:
        """Take the steps of one phase, with new optimisers; fewer when time runs out."""
        optimizers = _optimizers(self.model, self.recipe)
        since = self.clock.seconds()
        losses: dict[Kind, list[Tensor]] = {}
        for step in range(steps):
            done = self.clock.progress(step, steps, since)
            if done >= 1:
                self.log(f"{self.clock.seconds():6.1f} s  {phase} ends at step {step}: out of time")
                return
            falling = 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2
            rate = self.recipe.rate * min(1.0, (step + 1) / WARMUP) * falling
            batch = next(self.stream).to(self.device)
            losses.setdefault(batch.kind, []).append(self._step(batch, optimizers, rate))
            if (step + 1) % 100 == 0 or step + 1 == steps:
                means = ", ".join(f"{kind} {torch.stack(found).mean():.4f}" for kind, found in sorted(losses.items()))
                count = f"{step + 1:5d}/{steps}"
                self.log(f"{self.clock.seconds():6.1f} s  {phase} {count}  rate {rate:.2e}  loss {means}")
                losses = {}

    def _step(self, batch: TextBatch, optimizers: Sequence[torch.optim.Optimizer], rate: float) -> Tensor:
        loss = self._loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _shown(self, batch: TextBatch) -> Tensor | None:
        count = len(batch.grids)
        if count == 0:
            return None
        shown = self.painters.pictures(batch.reach)[batch.scenes, :count]  # (B, count, 3, side, side)
        return torch.where(batch.mirrored[:, None, None, None, None], shown.flip(-1), shown)

    def _loss(self, batch: TextBatch) -> Tensor:
        """Weighted mean of the answers' cross-entropy, in nats; a scalar."""
        half = torch.autocast("cuda", torch.bfloat16) if batch.ids.is_cuda else contextlib.nullcontext()
        with half:
            hidden = self.forward(batch, self._shown(batch))  # (B, T, width)
            logits = self.model.lm_head(hidden[:, :-1])  # (B, T - 1, V)
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
