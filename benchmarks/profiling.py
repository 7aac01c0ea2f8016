"""What each profiler needs in memory on a prompt of 4,000 tokens, beside what whole attention matrices would take.

    python benchmarks/profiling.py --layers 8             # Qwen2.5-VL-7B's shapes, random weights, on a GPU
    python benchmarks/profiling.py --device cpu           # the embedded model

The prompt is long because its picture is large. Peaks are above what the loaded model holds: on a GPU the allocator's,
on the CPU the growth of a fresh process' resident memory after a small picture. ``plain`` is the model's own pass.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from vlmfix.errors import UnsupportedModelError
from vlmfix.generation import VLM, load, wrap
from vlmfix.heads.measure import profile
from vlmfix.heads.profilers import PROFILERS
from vlmfix.settings import EMBEDDED

QUESTION = "Please describe this image in detail."
VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
TEXT = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}


def build(layers: int) -> VLM:
    """Qwen2.5-VL-7B's shapes with random bfloat16 weights on the GPU."""
    small = EMBEDDED["tiny-qwen"]
    processor = AutoProcessor.from_pretrained(small)
    processor.image_processor.patch_size = 14
    config = Qwen2_5_VLConfig.from_pretrained(small)
    ids = {name: getattr(config, name) for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id")}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = TEXT | {"num_hidden_layers": layers, "vocab_size": 152064, "rope_parameters": rope}
    config = Qwen2_5_VLConfig(vision_config=VISION, text_config=text, **ids)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    return wrap(model.eval(), processor)


def shown(vlm: VLM, tokens: int) -> Image.Image:
    """A picture of noise that becomes about so many tokens."""
    kind = vlm.processor.image_processor
    cell = kind.patch_size * kind.merge_size
    side = cell * round(tokens**0.5)
    kind.size = {"shortest_edge": cell**2, "longest_edge": side**2}
    noise = torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def work_of(vlm: VLM, name: str) -> Callable[[Image.Image], object]:
    """One profiler's work on one picture; of ``plain``, the model's."""
    if name == "plain":
        return lambda picture: vlm.generate([picture], QUESTION, max_new_tokens=1)
    return lambda picture: profile(vlm, [picture], [name], question=QUESTION, batch_size=1)


def on_gpu(vlm: VLM, name: str, tokens: int) -> tuple[float, float]:
    """Peak MiB above the model, and seconds, after a small picture."""
    work = work_of(vlm, name)
    work(shown(vlm, 100))
    picture = shown(vlm, tokens)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, started = torch.cuda.memory_allocated(), time.perf_counter()
    work(picture)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20, time.perf_counter() - started


def on_cpu(name: str, tokens: int) -> tuple[float, float]:
    """The same in a process of its own."""
    _quieten()
    vlm = load("tiny-qwen", device="cpu")
    work = work_of(vlm, name)
    work(shown(vlm, 100))
    picture = shown(vlm, tokens)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    work(picture)
    seconds = time.perf_counter() - started
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10, seconds


def measured(vlm: VLM, name: str, tokens: int, *, gpu: bool) -> str:
    """A line of the table."""
    try:
        if gpu:
            memory, seconds = on_gpu(vlm, name, tokens)
        else:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                memory, seconds = pool.submit(on_cpu, name, tokens).result()
    except UnsupportedModelError as error:
        return f"{name:14} {error.message}"
    return f"{name:14} {memory:8.0f} MiB {seconds:8.1f} s"


def report(vlm: VLM, tokens: int, names: Sequence[str], *, gpu: bool) -> None:
    """Prints the table."""
    length = vlm.encode([QUESTION], [[shown(vlm, tokens)]]).length
    text = vlm.model.config.get_text_config()
    layers, heads, width = text.num_hidden_layers, text.num_attention_heads, 2 if gpu else 4
    whole = heads * length**2 * width / 2**20
    machine = torch.cuda.get_device_name() if gpu else "CPU"
    print(f"{machine}, torch {torch.__version__}, {layers} layers of {heads} heads, a prompt of {length} tokens")
    print(f"attention as matrices: {whole:.0f} MiB a layer, {layers * whole:.0f} MiB in all", flush=True)
    for name in names:
        print(measured(vlm, name, tokens, gpu=gpu), flush=True)


def _quieten() -> None:
    """The embedded tokenizer calls a long prompt too long; its model takes it."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def main() -> None:
    """Measures all profilers, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profilers", nargs="*", default=["plain", *PROFILERS], metavar="PROFILER")
    parser.add_argument("--layers", type=int, default=28, help="decoder layers, on a GPU")
    parser.add_argument("--tokens", type=int, default=4000, help="of the picture")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = parser.parse_args()
    _quieten()
    gpu = given.device == "cuda"
    report(build(given.layers) if gpu else load("tiny-qwen", device="cpu"), given.tokens, given.profilers, gpu=gpu)


if __name__ == "__main__":
    main()
