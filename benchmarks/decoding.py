"""What each decoder costs on a GPU: milliseconds per token and memory, at LLaVA-1.5-7B's shapes with random weights.

    python benchmarks/decoding.py --layers 8 --json decoding.json
    python benchmarks/decoding.py --layers 8 --rows 1 greedy spin:kept_share=0.95,suppression=0.08,layers=all

Weights do not change the arithmetic, so none are needed; where a method takes heads, sinks or layers from a table, some
are given. With fewer than 32 layers the numbers are those of a smaller model; the ratios between decoders are what to
read. Each is timed compiled (static cache) and not, after a run to warm up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from vlmfix.decoders import parse
from vlmfix.generation import VLM, wrap
from vlmfix.models.checkpoint import EMBEDDED

VAR = "var:sink_dims=1415/2533,sink_threshold=2,min_visual_mass=0"
SPIN = "spin:kept_share=0.95,suppression=0.08,layers=all"
DECODERS = (
    "greedy",
    "locore",
    VAR,
    "vcd",
    "inter",
    f"{VAR}+vcd",
    "vhr:alpha=2,layers=1/4:",
    "gift:alpha=5,saliency_layers=3,layers=4:6,words=all",
    "zerotuning:heads=" + "/".join(map(str, range(32))),
    "act:heads=all",
    SPIN,
    f"vcd+{SPIN}",
    "adhh:heads=L2H3/L4H9/L6H30",
    "ph3:heads=L2H3/L4H9/L6H30",
    "imbalance",
)
"""Every method whose forward pass is the model's own with an edit or a contrast."""
QUESTION = "Please describe this image in detail."


def build(layers: int) -> VLM:
    """LLaVA-1.5-7B's shapes with random bfloat16 weights on the GPU."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED["tiny"])
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=Path(EMBEDDED["tiny"], "chat_template.jinja").read_text(),
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=LlamaConfig(
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=32768,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(processor.image_token),
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return wrap(model.eval(), processor)


def run(vlm: VLM, spec: str, rows: int, tokens: int, **options: Any) -> float:
    """Seconds of one generate call."""
    pictures = [[Image.effect_noise((336, 336), 80).convert("RGB")] for _ in range(rows)]
    batch = vlm.encode([QUESTION] * rows, pictures)
    torch.cuda.synchronize()
    started = time.perf_counter()
    with parse(spec).applied(vlm, batch) as arguments:
        vlm.model.generate(
            **batch, **arguments, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options
        )
    torch.cuda.synchronize()
    return time.perf_counter() - started


def per_token(vlm: VLM, spec: str, rows: int, **options: Any) -> float:
    """Milliseconds per decoding step: the difference of a long and a short run, median of three."""
    run(vlm, spec, rows, 24, **options)
    run(vlm, spec, rows, 88, **options)
    samples = [run(vlm, spec, rows, 88, **options) - run(vlm, spec, rows, 24, **options) for _ in range(3)]
    return 1000 * statistics.median(samples) / 64


@torch.no_grad()
def prefill_memory(vlm: VLM, spec: str, length: int, implementation: str = "sdpa") -> float:
    """Peak MiB above the weights of one prefill of ``length`` tokens."""
    batch = vlm.encode([QUESTION], [[Image.new("RGB", (336, 336))]])
    filler = torch.full((1, length - batch.length), 5, device=vlm.device)
    longer = batch.with_inputs(
        input_ids=torch.cat([batch["input_ids"][:, :1], filler, batch["input_ids"][:, 1:]], dim=1),
        attention_mask=torch.ones(1, length, dtype=torch.long, device=vlm.device),
    )
    vlm.model.set_attn_implementation({"text_config": implementation})
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with parse(spec).applied(vlm, longer):
        vlm.model(**longer, logits_to_keep=1)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    vlm.model.set_attn_implementation({"text_config": "sdpa"})
    return peak


def main() -> None:
    """Prints the tables and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("decoders", nargs="*", default=DECODERS, metavar="DECODER", help="as --decoder takes it")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--minutes", type=float, default=30.0, help="starts no new measurement after this")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.minutes
    vlm = build(given.layers)
    name = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {given.layers} layers, bfloat16"
    print(name, flush=True)
    memory = {}
    for length in (4096, 8192):
        for spec, implementation in (
            ("greedy", "sdpa"),
            (VAR, "sdpa"),
            ("locore", "sdpa"),
            ("greedy", "eager"),
        ):
            label = spec.split(":")[0] + (" (eager attention)" if implementation == "eager" else "")
            memory[f"{label}, {length}"] = prefill_memory(vlm, spec, length, implementation)
            print(f"prefill of {length} tokens, {label}: {memory[f'{label}, {length}']:.0f} MiB", flush=True)
    speed: dict[str, float] = {}
    for rows in given.rows:
        for spec in given.decoders:
            for mode, options in (("compiled", {"cache_implementation": "static"}), ("eager", {})):
                if time.monotonic() > deadline:
                    break
                torch.compiler.reset()
                vlm.model.__dict__.pop("_compiled_call", None)
                label = "+".join(part.split(":")[0] for part in spec.split("+"))
                speed[f"{label}, {rows} rows, {mode}"] = per_token(vlm, spec, rows, **options)
                print(
                    f"{label}, {rows} rows, {mode}: {speed[f'{label}, {rows} rows, {mode}']:.2f} ms/token", flush=True
                )
    if given.json:
        given.json.write_text(json.dumps({"machine": name, "ms_per_token": speed, "prefill_mib": memory}, indent=1))


if __name__ == "__main__":
    main()
