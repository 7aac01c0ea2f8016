"""Probes: each tries one thing that vlmfix relies on and raises when it does not hold; ``contracts`` lists them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from vlmfix.errors import VlmfixError
from vlmfix.upstream import (
    attention,
    cache,
    defaults,
    features,
    geometry,
    loops,
    memory,
    names,
    norms,
    positions,
    readout,
    wrappers,
)
from vlmfix.upstream.bench import END, PAD, PICTURE, TEXT, Bench, library, noise
from vlmfix.upstream.versions import missing


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise missing(what)


def _close(found: Tensor, expected: Tensor, what: str) -> None:
    same = found.shape == expected.shape and torch.allclose(found, expected, atol=1e-4, rtol=1e-4)
    _require(same, what)


@contextmanager
def _seen(module: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of every call of a module inside the block."""
    calls: list[dict[str, Any]] = []

    def show(module: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        calls.append(dict(kwargs))

    with module.register_forward_pre_hook(show, with_kwargs=True):
        yield calls


def cache_argument(bench: Bench) -> None:
    """The model and its text decoder take a cache by a known name, and fill the one that they are given."""
    model, filled = bench.llava, library.DynamicCache()
    with torch.no_grad():
        output = model(**bench.prompt, **cache.handed_over(model, filled))
    _require(cache.length(filled) == 8, "a pass does not fill the cache that it is handed")
    _require(cache.returned(model, output) is filled, "a pass does not return the cache that it was handed")
    lengths: list[int] = []

    def show(decoder: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        handed = kwargs.get(names.name_of(type(decoder), "cache"))
        lengths.append(-1 if handed is None else cache.length(handed))

    with bench.decoder.register_forward_pre_hook(show, with_kwargs=True):
        bench.generate(model, bench.prompt, 2)
    _require(lengths == [0, 8], "generate does not hand its cache down to the text decoder under its name")


def attention_function(bench: Bench) -> None:
    """A registered attention function is called with queries, keys, values and what rows may see."""
    called: list[tuple[int, torch.Size, torch.Size]] = []

    modules = [layer.self_attn for layer in bench.decoder.layers]

    def probe(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        called.append((modules.index(module), query.shape, key.shape))
        return attention.sdpa(module, query, key, value, attention_mask, **options), None

    expected, before = bench.logits(bench.llava, **bench.prompt), bench.decoder.config._attn_implementation
    attention.register("vlmfix_probe", probe)
    try:
        with attention.switched([bench.decoder, *modules], "vlmfix_probe"):
            found = bench.logits(bench.llava, **bench.prompt)
    finally:
        attention.unregister("vlmfix_probe")
    shapes = (torch.Size([2, 4, 8, 4]), torch.Size([2, 2, 8, 4]))
    _require(called == [(0, *shapes), (1, *shapes)], "a registered attention function is not called once in each layer")
    _close(found, expected, "a registered attention function gives other logits")
    _require(bench.decoder.config._attn_implementation == before, "the attention function is not put back")


def masks(bench: Bench) -> None:
    """Masks hide padding, in the shapes that edits and branches read."""
    with _seen(bench.decoder.layers[0].self_attn) as calls:
        bench.logits(bench.llava, **bench.prompt)
        bench.logits(bench.llava, **{name: value[:1] for name, value in bench.prompt.items()})
    padded, whole = (call[names.KNOWN["mask"][0]] for call in calls)
    real = bench.prompt["attention_mask"].bool()
    causal = torch.ones(8, 8, dtype=torch.bool).tril() & real[:, None, None]
    matches = (
        isinstance(padded, Tensor) and padded.dtype == torch.bool and torch.equal(padded[:, :, 2:], causal[:, :, 2:])
    )
    _require(matches, "attention gets no bool mask, (B, 1, Q, K), of the tokens that a padded row may look at")
    _require(whole is None, "attention gets a mask where rows without padding need none")


def position_bias(bench: Bench) -> None:
    """SDPA adds a bias to the scores."""
    query, key, value = noise(1, 4, 1, 4), noise(1, 2, 5, 4), noise(1, 2, 5, 4)
    bias, mask = noise(1, 4, 1, 5), torch.tensor([True, False, True, True, True]).view(1, 1, 1, 5)
    module = bench.decoder.layers[0].self_attn
    found = attention.sdpa(module, query, key, value, mask, scaling=0.5, position_bias=bias)
    scores = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) * 0.5 + bias
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    expected = (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2)
    _close(found, expected, "SDPA does not add a position_bias to the scores")


def other_mathematics(bench: Bench) -> None:
    """Attention of another kind shows the signs by which it is refused."""
    size, plain = TEXT | {"head_dim": 4}, {"rope_type": "default", "rope_theta": 1e4}
    capped = _module("gemma2", "Gemma2Attention")(library.Gemma2Config(**size, attn_logit_softcapping=5.0), 0)
    sinks = _module("gpt_oss", "GptOssAttention")(library.GptOssConfig(**size, rope_parameters=plain), 0)
    for module, what in ((capped, "caps its scores"), (sinks, "has learned sinks")):
        try:
            attention.check_mathematics(module)
        except VlmfixError:
            continue
        raise missing(f"{type(module).__name__} no longer shows that it {what}")
    kinds = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    config = library.Gemma3TextConfig(**size, **kinds)
    windows = [attention.window(_module("gemma3", "Gemma3Attention")(config, layer)) for layer in range(2)]
    _require(windows == [5, None], "attention modules no longer show their sliding window")
    tower = [
        module for module in bench.llava.model.vision_tower.modules() if getattr(module, "is_causal", None) is False
    ]
    _require(len(tower) == 2, "the vision tower's attention modules no longer show that they are not causal")
    for layer in bench.decoder.layers:
        attention.check_mathematics(layer.self_attn)


def residual_stream(bench: Bench) -> None:
    """Layers are called with the residual stream."""
    streams: list[Tensor] = []

    def show(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append(names.hidden(args, kwargs))

    layers = list(bench.decoder.layers)
    with layers[0].register_forward_pre_hook(show, with_kwargs=True):
        with layers[1].register_forward_pre_hook(show, with_kwargs=True), _seen(bench.decoder) as calls:
            bench.logits(bench.llava, **bench.prompt)
    _require([stream.shape for stream in streams] == [(2, 8, 16)] * 2, "layers are not called with the residual stream")
    embeds = calls[0][names.TextNames.of(bench.decoder).embeds]
    _close(streams[0], embeds, "the residual stream does not begin as the embeddings")


def picture_features(bench: Bench) -> None:
    """Features stand in for pixels, joined, picked and repeated for beams."""
    for model, prompt in ((bench.llava, bench.prompt), (bench.qwen, bench.qwen_prompt)):
        name = type(model).__name__
        expected = bench.logits(model, **prompt)
        with torch.no_grad():
            found = features.encoded(model, prompt)
        rest = {key: value for key, value in prompt.items() if key != "pixel_values"}
        given = bench.logits(model, **rest, **features.handed_over(model, found))
        _close(given, expected, f"{name} answers otherwise when it is handed features in place of pixels")
        swapped = bench.logits(model, **rest, **features.handed_over(model, features.picked(found, [1, 0])))
        _require(not torch.allclose(swapped[1, -1], expected[1, -1]), f"{name} does not read the features it is handed")
        wide = features.for_beams(model, prompt["input_ids"], found, 2)
        _require(features.sizes(wide) == [4] * 4, f"features of {name} are not repeated for beams")


def prompt_positions(bench: Bench) -> None:
    """A prompt's positions are those that generate gives it, and nothing is left on the model."""
    for model, prompt in ((bench.llava, bench.prompt), (bench.qwen, bench.qwen_prompt)):
        found = positions.prompt_positions(model, prompt)
        with _seen(model) as calls:
            bench.generate(model, prompt, 1)
        handed = calls[0].get(names.name_of(type(model), "positions"))
        kind = type(model).__name__
        _require(
            isinstance(handed, Tensor) and torch.equal(handed.expand_as(found), found), f"positions of {kind} differ"
        )
    counted = (bench.prompt["attention_mask"].cumsum(1) - 1).clamp(min=0)
    _require(
        torch.equal(positions.prompt_positions(bench.llava, bench.prompt), counted),
        "positions do not count real tokens",
    )


def cache_layers(bench: Bench) -> None:
    """Layers of a cache hold plain keys and values, and give their last token back."""
    model, prompt, filled = bench.llava, bench.prompt, library.DynamicCache()
    handed, places = cache.handed_over(model, filled), positions.prompt_positions(model, prompt)
    with torch.no_grad():
        whole = model(**prompt, position_ids=places, **handed).logits[:, -1]
    _require(cache.is_plain(filled, 8) and cache.can_step_back(filled), "a dynamic cache has layers of another kind")
    _require(
        [keys.shape for pair in cache.keys_and_values(filled) for keys in pair] == [(2, 2, 8, 4)] * 4,
        "layers of a cache do not hold (B, G, K, D) keys and values",
    )
    cache.drop_last(filled)
    values = {"ids": prompt["input_ids"][:, -1:], "mask": prompt["attention_mask"], "positions": places[:, -1:]}
    newest = {names.name_of(type(model), name): value for name, value in values.items()}
    with torch.no_grad():
        again = model(**newest, **handed).logits[:, -1]
    _close(again, whole, "a token that was taken back from the cache gives other logits when it passes again")
    cache.drop_last(filled)
    shared = cache.shared_prompt(filled, 0, 7)
    first = {name: value[[0, 0]] for name, value in newest.items()}
    with torch.no_grad():
        found = model(**first, **cache.handed_over(model, shared)).logits[:, -1]
    _close(found, whole[[0, 0]], "a prompt that several rows share gives other logits")
    keys = cache.keys_and_values(filled)[0][0].clone()
    reordered = cache.Reordered(filled, lambda rows: rows.flip(0))
    filled.reorder_cache(torch.tensor([0, 1]))
    reordered.restore()
    _close(cache.keys_and_values(filled)[0][0], keys.flip(0), "a cache does not reorder its rows")
    fresh = library.DynamicCache()
    cache.fill(fresh, 0, keys, keys)
    _require(cache.length(fresh) == 7, "a layer cannot be filled from outside")


def sliding_cache(bench: Bench) -> None:
    """Sliding layers of a cache say how many tokens they keep."""
    kinds = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    config = library.Gemma3TextConfig(**TEXT, head_dim=4, **kinds)
    filled = library.DynamicCache(config=config)
    for layer in range(2):
        cache.fill(filled, layer, noise(1, 2, 3, 4), noise(1, 2, 3, 4))
    _require(
        cache.is_plain(filled, 4) and not cache.is_plain(filled, 5), "a window is not told from the prompt's length"
    )


def static_cache(bench: Bench) -> None:
    """A static cache says what it holds."""
    model, widths, found = bench.llava, [], []

    def show(decoder: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        handed = kwargs[names.name_of(type(decoder), "cache")]
        widths.append(cache.mask_width(handed))
        found.append((cache.is_static(handed), cache.capacities(handed)))

    with bench.decoder.register_forward_pre_hook(show, with_kwargs=True):
        tokens = bench.generate(model, bench.prompt, 3, cache_implementation="static")
    capacity = widths[0]
    _require(found[-1] == (True, (capacity, capacity)), "a static cache does not show its capacity")
    _require(torch.equal(tokens, bench.generate(model, bench.prompt, 3)), "a static cache gives other tokens")


def roomy_cache(bench: Bench) -> None:
    """Keys and values may be written into memory that is there, at a place that stands in memory."""
    model, arena = bench.llava, cache.Arena()
    filled = cache.roomy(model, arena, 3, 12, 4)
    _require(cache.is_roomy(filled), "a text decoder without windows has layers of another kind")
    places = positions.prompt_positions(model, bench.prompt)
    newest = {"input_ids": bench.prompt["input_ids"][:, -1:], "position_ids": places[:, -1:] + 1}
    mask = torch.nn.functional.pad(bench.prompt["attention_mask"], (0, 1), value=1)
    with torch.no_grad():
        wanted = bench.logits(model, **bench.prompt | {"position_ids": places}, **cache.handed_over(model, filled))
        plain = library.DynamicCache()
        expected = bench.logits(model, **bench.prompt | {"position_ids": places}, **cache.handed_over(model, plain))
        _close(wanted, expected, "a cache with room gives other logits")
        expected = bench.logits(model, **newest, attention_mask=mask, **cache.handed_over(model, plain))
        fixed = arena.fixed(2, 12, torch.tensor([cache.length(filled)]))
        visible = torch.nn.functional.pad(mask, (0, 12 - mask.shape[1])).bool()[:, None, None]
        found = bench.logits(model, **newest, attention_mask=visible, **cache.handed_over(model, fixed))
    _close(found[:, -1], expected[:, -1], "a step that writes at a column gives other logits")


def output_head(bench: Bench) -> None:
    """The output head, behind the decoder's last norm, makes the model's logits of what leaves the last layer."""
    model = bench.llava
    decoder, streams = model.model.language_model, list[Any]()

    def keep(layer: nn.Module, args: object, output: Any) -> None:  # noqa: ANN401 (a tensor, or a tuple that has it)
        streams.append(output if isinstance(output, Tensor) else output[0])

    with decoder.layers[-1].register_forward_hook(keep), torch.no_grad():
        logits = bench.logits(model, **bench.prompt)
        _close(readout.read_out(model, decoder, streams[0], normed=True), logits, "the output head gives other logits")


def output_projection(bench: Bench) -> None:
    """An attention module's output projection reads its heads one behind the other."""
    module = bench.decoder.layers[0].self_attn
    made: list[Tensor] = []
    read: list[Tensor] = []

    def probe(module: nn.Module, query: Tensor, *args: object, **options: object) -> tuple[Tensor, None]:
        made.append(query.transpose(1, 2))  # (B, Q, H, D)
        return made[-1], None

    attention.register("vlmfix_probe", probe)
    projection = attention.output_projection(module)
    try:
        with (
            attention.switched([bench.decoder, *(layer.self_attn for layer in bench.decoder.layers)], "vlmfix_probe"),
            projection.register_forward_pre_hook(lambda _, args: read.append(args[0])),
        ):
            bench.logits(bench.llava, **bench.prompt)
    finally:
        attention.unregister("vlmfix_probe")
    _close(read[0], made[0].flatten(2), "an output projection does not read heads one behind the other")


def decoder_norms(bench: Bench) -> None:
    """A text decoder's norms are RMS norms that one kernel can compute, and nothing else is taken for one."""
    model = bench.llava
    found = [module for module in model.modules() if norms.is_rms(module)]
    known = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    _require(bool(known), "a text decoder has no RMS norms")
    _require(found == known, f"{len(found)} of {len(known)} RMS norms compute what their name says")
    with torch.no_grad(), norms.fused(model):
        fused = bench.logits(model, **bench.prompt)
    _close(fused, bench.logits(model, **bench.prompt), "norms by one kernel give other logits")


def decoding_loop(bench: Bench) -> None:
    """A loop of another's gets what it needs from generate, and is told what a call asks for."""
    asked: list[list[str]] = []

    def loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:  # noqa: ANN401
        processors, stops, config = loops.handed(kwargs)
        fresh = loops.is_fresh(loops.cache_of(model, kwargs))
        _require(fresh, "generate hands no empty cache to a loop of another's")
        _require(loops.padding(config) == PAD, "generate does not say what fills rows up")
        asked.append(loops.unusual(config))
        scores = processors(input_ids, noise(2, TEXT["vocab_size"]))
        _require(bool(scores[:, END].isinf().all()), "generate hands its processors to no loop of another's")
        longer = torch.cat([input_ids, input_ids[:, :3]], dim=1)
        _require(bool(stops(longer, scores).all()), "generate hands its stopping criteria to no loop of another's")
        return input_ids

    calls: list[dict[str, Any]] = [{}, {"prompt_lookup_num_tokens": 2}]
    for options in calls:
        bench.generate(bench.llava, bench.prompt, 3, custom_generate=loop, **options)
    _require(asked == [[], ["assisted_generation"]], "a loop of another's is not told what a call asks for")


def generation_settings(bench: Bench) -> None:
    """Settings of a checkpoint are told from defaults, and do not reach generate."""
    model, own = bench.llava, bench.llava.generation_config
    expected = bench.generate(model, bench.prompt, 3)
    settings = {"suppress_tokens": expected[:, 8:].flatten().tolist(), "repetition_penalty": 1.5}
    model.generation_config = library.GenerationConfig(pad_token_id=PAD, eos_token_id=END, **settings)
    try:
        said = defaults.set_aside(model)
        _require(said == settings, "settings of a checkpoint are not told from those that do nothing")
        with defaults.undisturbed(model):
            found = bench.generate(model, bench.prompt, 3)
    finally:
        model.generation_config = own
    _require(torch.equal(found, expected), "settings of a checkpoint reach generate all the same")


def rotary(bench: Bench) -> None:
    """Rotary embeddings that grow with the pass are told from others."""
    _require(not positions.grows(bench.decoder), "a plain rotary embedding is taken for one that grows")
    module, rope = nn.Module(), {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    module.config = library.LlamaConfig(**TEXT, rope_parameters=rope)
    _require(positions.grows(module), "a rotary embedding that grows is not recognised")


def tiles(bench: Bench) -> None:
    """Tiles, canvases and windows are those that the models use."""
    canvases = [[336, 672], [672, 336], [672, 672]]
    _require(geometry.best_canvas((300, 700), canvases) == (336, 672), "the canvas of a wide picture is another")
    for family in ("llava_next", "llava_onevision"):
        count = geometry.tile_count(family, torch.tensor([300, 700]), canvases, 336)
        _require(count == 3, f"the number of tiles of {family} is another")
    _require(geometry.tile_grid((300, 700), (448, 448), 1, 12) == (2, 5), "the tiles of InternVL are others")
    order = geometry.window_order(torch.tensor([[1, 8, 4]]), merge=2, window=16, patch=4)
    _require(order.tolist() == [0, 1, 2, 3, 4, 5, 6, 7], "the windows of Qwen2.5-VL's vision tower are others")


def processor(bench: Bench) -> None:
    """Processors return what is read of them, and take an image processor of ours."""
    vocabulary = {"<pad>": 0, "<image>": PICTURE, "a": 4, "<unk>": 5}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = library.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    pictures = library.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = library.LlavaProcessor(
        image_processor=pictures,
        tokenizer=fast,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    given: Any = copy.copy(processor)
    own, replaced = given.replace_image_token, list[int]()

    def replace(image_inputs: Any, image_idx: int, **options: Any) -> str:  # noqa: ANN401
        replaced.append(image_idx)
        return str(own(image_inputs, image_idx=0, **options))

    given.replace_image_token = replace
    blank = Image.new("RGB", (8, 8))
    made = given(text=["<image> a", "<image> a"], images=[[blank], [blank]], padding=True, return_tensors="pt")
    absent = [name for name in names.PROCESSED if name not in made]
    _require(not absent, f"processors return no {' and '.join(absent)}")
    _require(replaced == [0, 1], "the processor does not ask for the text of each picture by its number")
    _require(made["input_ids"].tolist() == [[PICTURE] * 4 + [4]] * 2, "the processor expands pictures otherwise")


def memory_errors(bench: Bench) -> None:
    """Errors of memory are of the types by which a batch is halved."""
    _require(issubclass(torch.OutOfMemoryError, RuntimeError), "torch.OutOfMemoryError is no RuntimeError")
    _require(issubclass(torch.AcceleratorError, RuntimeError), "torch.AcceleratorError is no RuntimeError")


def memory_of_tensors(bench: Bench) -> None:
    """The profiler sees what tensors on the CPU take and give back."""

    def work() -> None:
        for _ in range(2):  # the second takes the place of the first
            torch.empty(1 << 20, dtype=torch.uint8)

    _require(memory.peak_of(work) == 1 << 20, "torch's profiler counts the memory of tensors otherwise")


def wrapped_models(bench: Bench) -> None:
    """Offloaded weights are found, changed weights show, compiled code can be set aside."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    kept = nn.Embedding(4, 2)
    weight = kept.weight.detach().clone()
    add_hook_to_module(kept, AlignDevicesHook(execution_device="cpu", offload=True))
    owner: Any = nn.Module()
    owner.get_input_embeddings = lambda: kept
    _require(
        kept.weight.is_meta and wrappers.device_of(owner).type == "cpu", "offloaded weights do not say their place"
    )
    with wrappers.present(kept, "weight") as found:
        _close(found, weight, "offloaded weights are not brought back")
    before = wrappers.weights_of(bench.decoder)
    with torch.no_grad():
        next(bench.decoder.parameters()).add_(0)
    _require(wrappers.weights_of(bench.decoder) != before, "weights do not show that they were written to")
    _require(hasattr(nn.Module(), "_compiled_call_impl"), "modules do not show whether they were compiled")
    _require(hasattr(torch.compiler, "set_stance"), "compiled code cannot be run as it is written")


def _module(family: str, name: str) -> Any:  # noqa: ANN401 (a module's class)
    return getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)
