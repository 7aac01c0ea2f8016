"""What each decoder costs on a GPU: milliseconds per token and memory, at LLaVA-1.5-7B's shapes with random weights.

    python benchmarks/decoding.py --json decoding.json
    python benchmarks/decoding.py --rows 1 greedy spin:kept_share=0.95,suppression=0.08,layers=all

Weights do not change the arithmetic, so none are needed; where a method takes heads, sinks or layers from a table, some
are given. Each is timed in two ways, after a run to warm up: by ``vlm.generate``, as the commands decode, and by
transformers' own ``generate`` inside ``decoder.applied``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

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
    model.generation_config.eos_token_id = None  # random weights would say it now and then
    return wrap(model.eval(), processor)


def run(vlm: VLM, spec: str, rows: int, tokens: int, *, ours: bool) -> float:
    """Seconds of one call, by our loop or by transformers'."""
    pictures = [Image.effect_noise((336, 336), 80).convert("RGB") for _ in range(rows)]
    torch.cuda.synchronize()
    started = time.perf_counter()
    if ours:
        vlm.generate(pictures, QUESTION, decoder=spec, max_new_tokens=tokens)
    else:
        batch = vlm.encode([QUESTION] * rows, [[picture] for picture in pictures])
        with parse(spec).applied(vlm, batch) as arguments:
            vlm.model.generate(**batch, **arguments, max_new_tokens=tokens, do_sample=False)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def per_token(vlm: VLM, spec: str, rows: int, *, ours: bool) -> float:
    """Milliseconds per decoding step: the difference of a long and a short run, median of three."""
    run(vlm, spec, rows, 24, ours=ours)
    samples = [run(vlm, spec, rows, 88, ours=ours) - run(vlm, spec, rows, 24, ours=ours) for _ in range(3)]
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
            for mode, ours in (("vlm.generate", True), ("applied", False)):
                if time.monotonic() > deadline:
                    break
                label = "+".join(part.split(":")[0] for part in spec.split("+"))
                speed[f"{label}, {rows} rows, {mode}"] = per_token(vlm, spec, rows, ours=ours)
                print(
                    f"{label}, {rows} rows, {mode}: {speed[f'{label}, {rows} rows, {mode}']:.2f} ms/token", flush=True
                )
    if given.json:
        given.json.write_text(json.dumps({"machine": name, "ms_per_token": speed, "prefill_mib": memory}, indent=1))


if __name__ == "__main__":
    main()
