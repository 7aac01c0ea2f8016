"""Reads a model's folder through transformers, runs no code of it, and says in one sentence what is wrong with it."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from vlmfix.errors import DataError, VlmfixError
from vlmfix.models.quantization import quantization
from vlmfix.upstream import hub, panics

WHAT_LOADS = (
    "give 'tiny', 'tiny-qwen', 'small', a Hub id such as llava-hf/llava-1.5-7b-hf, or a directory with config.json"
)
COMPLETE = "take this file from the checkpoint as it was published, or save the model anew with save_pretrained"
PLAIN = {"trust_remote_code": False}
"""Code that lies in a model's folder is never run, and nobody is asked whether it may."""
SDPA = "sdpa"
"""The attention of models that nobody wants otherwise. A configuration may name another, also one that transformers
would fetch from the Hub and run."""
ADAPTER = "adapter_config.json"
PROCESSOR = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
)
"""Files that settings of processors come from."""
MEMORY = (MemoryError, torch.OutOfMemoryError)
LONGEST = 300
"""Characters of another package's words in a message."""
LAYERS, MOST_LAYERS = ("num_hidden_layers", "depth"), 1000
"""Entries that say how many layers to make, and the most that are made before the weights are looked at."""
MOST_PER_BYTE = 4
"""Parameters for a byte of weights, in the tightest quantization twice over."""
MOST_STEPS = 1_000_000
"""Lines of Python that a chat template may run for; those of today's families run for some hundred."""
LONGEST_TEXT = 100_000
"""Characters that a chat template may write around a question; more only where the question is long."""
SUSPECTS = 3
"""Odd entries of a configuration that a message names."""
MISSING = object()


def configuration(path: str, revision: str | None) -> dict[str, Any]:
    """What config.json says, a model type at least; what is plainly a path is never asked of the Hub.

    Raises:
        DataError: There is no such folder, the file cannot be read, or the folder holds an adapter.
    """
    local = Path(path).is_absolute() or path.startswith(".") or path.count("/") > 1
    if local and not os.path.isdir(path):
        raise DataError(f"there is no directory {path!r}", WHAT_LOADS)
    if os.path.exists(Path(path) / ADAPTER):
        raise DataError(
            f"{path!r} holds an adapter ({ADAPTER}), which would be loaded or left out by what else is installed",
            "merge it into its model (PEFT's merge_and_unload) and save that, or hand the model over with vlmfix.wrap",
        )
    with _told(path, "config.json: ", hint=WHAT_LOADS):
        config = hub.settings(path, revision)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise DataError(f"{path!r} has no config.json with a model_type", WHAT_LOADS)
    return config


def described(path: str, revision: str | None, config: Mapping[str, Any]) -> PreTrainedConfig:
    """The model that config.json describes, which is of about the size of the weights in the folder.

    What a configuration leaves out has defaults of seven billion parameters and more, which would fill the memory
    before anybody sees that the weights are others.

    Args:
        path: Hub id or directory.
        revision: Branch, tag or commit on the Hub.
        config: What config.json says.

    Raises:
        DataError: It describes none, or one that is far larger.
    """
    for name, value in _entries(config):
        if name.rpartition(".")[2] in LAYERS and isinstance(value, int) and value > MOST_LAYERS:
            raise DataError(f"cannot load model {path!r}: config.json: {name} is {value}", COMPLETE)
    with _told(path, lambda error: _suspicion(config, error)):
        parsed: PreTrainedConfig = AutoConfig.from_pretrained(path, revision=revision, **PLAIN)
        with torch.device("meta"):
            empty = AutoModelForImageTextToText.from_config(parsed, **PLAIN, attn_implementation=SDPA)
    count = sum(weight.numel() for weight in empty.parameters())
    held = sum(file.stat().st_size for file in Path(path).glob("*") if file.suffix in (".safetensors", ".bin"))
    if held and count > MOST_PER_BYTE * held:
        raise DataError(
            f"cannot load model {path!r}: the weights do not fit its config.json, which describes a model of {count} "
            f"parameters, while its files have {held} bytes; a part such as text_config is missing or empty",
            "put back the config.json that belongs to the weights",
        )
    return parsed


def _entries(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All entries of a configuration that are no parts, by dotted names."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def processor(path: str, revision: str | None) -> ProcessorMixin:
    """The processor of a checkpoint, with tokenizer, image processor and chat template.

    Raises:
        DataError: A file is missing, damaged, does not fit, or needs code of its own.
    """
    with _told(path, lambda error: _at_fault(path, revision)):
        found = AutoProcessor.from_pretrained(path, revision=revision, **PLAIN)
    if not isinstance(found, ProcessorMixin):  # AutoProcessor then gives the tokenizer, or the image processor, alone
        raise DataError(
            f"cannot load model {path!r}: its files make a {type(found).__name__} and no processor",
            "a checkpoint has processor_config.json or preprocessor_config.json, and the files of its tokenizer",
        )
    return found


def model(
    path: str,
    revision: str | None,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype | str,
    place: torch.device | str,
    quantize: str | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """The model, with every weight from its files.

    Args:
        path: Hub id or directory.
        revision: Branch, tag or commit on the Hub.
        config: What config.json describes.
        dtype: Precision of the weights, or ``auto``.
        place: Device of the weights, or how transformers is to spread them.
        quantize: ``int8`` or ``int4`` weights; None leaves them as they are.
        attention: How attention is computed, by transformers' name; None is ``sdpa``.

    Raises:
        DataError: A file is missing, damaged, does not fit the others, or needs code of its own.
        UsageError: The weights to be quantized are quantized in their files.
    """
    quantized = {} if quantize is None else {"quantization_config": quantization(quantize, config, dtype)}
    with _told(path, lambda error: _at_fault_beside_config(path, revision)):
        loading: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            revision=revision,
            config=config,
            dtype=dtype,
            device_map=place,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
            weights_only=True,  # where weights are pickled, nothing but tensors is unpickled
            **quantized,
            attn_implementation=attention or SDPA,
            **PLAIN,
        )
    loaded: PreTrainedModel = loading[0]
    for module in loaded.modules():  # a configuration may ask for tuples, which transformers' own generate cannot read
        if isinstance(own := getattr(module, "config", None), PreTrainedConfig):
            own.return_dict = True
    report: Mapping[str, Any] = loading[1]
    if mismatched := sorted(report["mismatched_keys"], key=str):
        name, stored, wanted = mismatched[0]
        more = f", and {len(mismatched) - 1} more do not fit" if len(mismatched) > 1 else ""
        raise DataError(
            f"cannot load model {path!r}: the weights do not fit its config.json{_section(name)}: {name} is "
            f"{_shape(stored)} in the weights and {_shape(wanted)} by the configuration{more}",
            "put back the config.json that belongs to the weights",
        )
    if missing := sorted(report["missing_keys"]):
        raise DataError(
            f"model {path!r} lacks {len(missing)} weights, {missing[0]} among them",
            "download it again; transformers would go on with random numbers instead",
        )
    if spare := sorted(name for name in report["unexpected_keys"] if _is_layer(name, loaded)):
        raise DataError(
            f"cannot load model {path!r}: the weights do not fit its config.json (text_config.num_hidden_layers): "
            f"{spare[0]} has no place in it, and {len(spare) - 1} more have none",
            "put back the config.json that belongs to the weights",
        )
    return loaded


@contextmanager
def _told(path: str, where: Any = "", hint: str = "") -> Iterator[None]:  # noqa: ANN401 (words, or what makes them)
    """Tells in one sentence what transformers and its readers raise inside the block, which is nearly anything.

    Args:
        path: What was to be loaded.
        where: The file that is at fault, in words that the reason follows; or a function that finds it by the error.
        hint: What to do about it.
    """
    try:
        with panics.as_errors():
            yield
    except VlmfixError:
        raise
    except MEMORY as error:
        raise too_large(path, error) from error
    except Exception as error:  # config.json alone can make transformers raise a dozen types
        if "trust_remote_code" in str(error):
            raise DataError(
                f"cannot load model {path!r}: it needs Python code of its own, which vlmfix does not run",
                "use a checkpoint whose classes are part of transformers, such as those in transformers format",
            ) from error
        place = where if isinstance(where, str) else where(error)
        raise DataError(f"cannot load model {path!r}: {place}{words(error)}", hint or COMPLETE) from error


def too_large(called: str, error: BaseException) -> DataError:
    """The error for a model, or a picture in it, that the memory has no room for."""
    return DataError(
        f"cannot load model {called!r}: {words(error)}", "take --dtype bfloat16, another --device, or a smaller model"
    )


@contextmanager
def few_steps() -> Iterator[None]:
    """Ends what runs inside the block when it takes far more steps than any chat template does.

    A template is a program that came with a checkpoint: its sandbox keeps it from files, not from endless loops.
    """
    steps = itertools.count()

    def step(frame: object, event: str, argument: object) -> Any:  # noqa: ANN401 (it returns itself)
        if next(steps) > MOST_STEPS:
            raise TimeoutError(f"it takes more than {MOST_STEPS} steps")
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        yield
    finally:
        sys.settrace(before)


def words(error: BaseException) -> str:
    """What an error says, on one line and with its type where the words alone mean little."""
    said = textwrap.shorten(str(error), LONGEST)
    if said and (isinstance(error, OSError | ValueError) or type(error).__name__.startswith("StrictDataclass")):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _at_fault(path: str, revision: str | None) -> str:
    """Which files of a processor cannot be used, in words that a reason follows."""
    damaged = [file.name for file in sorted(Path(path).glob("*.json")) if not _is_json(file)]
    if damaged:
        return f"{damaged[0]} is no JSON object: "
    try:
        AutoTokenizer.from_pretrained(path, revision=revision, **PLAIN)
    except Exception:  # the reason has been raised already
        return "tokenizer.json, tokenizer_config.json: "
    files = [name for name in PROCESSOR if os.path.exists(Path(path) / name)]
    return f"one of {', '.join(files)}: " if files else ""


def _at_fault_beside_config(path: str, revision: str | None) -> str:
    """Which file of a model cannot be used when config.json can, in words that a reason follows."""
    try:
        GenerationConfig.from_pretrained(path, revision=revision or "main")
    except OSError:  # there is none, which is no fault
        return "weights: "
    except Exception:  # the reason has been raised already
        return "generation_config.json: "
    return "weights: "


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError, RecursionError):
        return False


def _suspicion(config: Mapping[str, Any], error: BaseException) -> str:
    """Entries of config.json that cannot be meant, in words that a reason follows."""
    named = [entry for entry in _entries(config) if isinstance(error, KeyError) and error.args[:1] == (entry[1],)]
    odd = [f"{name} is {json.dumps(value, default=str)}" for name, value in named or suspects(config)]
    return f"config.json ({textwrap.shorten(', '.join(odd[:SUSPECTS]), LONGEST)}): " if odd else "config.json: "


def suspects(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of a configuration whose value is of another kind than its class's default, or no size.

    Special tokens are left out: many models have none where others have one.

    Args:
        config: What config.json, or a part of it, says.
        prefix: What stands before the names of the part's entries.
    """
    try:
        default: Any = AutoConfig.for_model(str(config.get("model_type")))
    except Exception:  # no such class: that is the reason itself
        return
    for name, value in config.items():
        usual = getattr(default, name, MISSING)
        if isinstance(value, Mapping) and "model_type" in value:
            yield from suspects(value, f"{prefix}{name}.")
        elif name in ("dtype", "torch_dtype"):
            if not isinstance(value, str) or not isinstance(getattr(torch, value, None), torch.dtype):
                yield f"{prefix}{name}", value
        elif usual is not MISSING and usual is not None and not name.endswith("_token_id") and _is_odd(value, usual):
            yield f"{prefix}{name}", value


def odd_settings(processor: ProcessorMixin) -> str:
    """Settings of an image processor that are of another kind than its class's, in brackets; empty without any."""
    settings: Any = processor.image_processor
    known = ((name, value, getattr(type(settings), name, None)) for name, value in vars(settings).items())
    odd = [f"{name} is {value!r}" for name, value, usual in known if usual is not None and _kind(value) != _kind(usual)]
    return f" ({textwrap.shorten(', '.join(odd[:SUSPECTS]), LONGEST)})" if odd else ""


def _kind(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(type(value))
    return "number" if isinstance(value, int | float) else "text" if isinstance(value, str) else "several"


def _is_odd(value: object, usual: object) -> bool:
    numbers = int | float
    if isinstance(value, numbers) and isinstance(usual, numbers):
        return isinstance(value, bool) != isinstance(usual, bool) or (value < 0 <= usual) or (value == 0 < usual)
    return _kind(value) != _kind(usual)


def _section(name: str) -> str:
    """The part of config.json that describes a weight, in brackets, where its name tells."""
    if "vision" in name or "visual" in name:
        return " (vision_config)"
    return " (text_config)" if "language_model" in name or "lm_head" in name else ""


def _shape(sizes: Any) -> str:  # noqa: ANN401 (a torch.Size or a list)
    return " x ".join(map(str, sizes)) or "one number"


def _is_layer(name: str, loaded: PreTrainedModel) -> bool:
    """Whether a weight that has no place would be one of the text decoder's layers."""
    count = loaded.config.get_text_config().num_hidden_layers
    found = re.search(r"\blayers\.(\d+)\.", name)
    return found is not None and "vis" not in name and int(found[1]) >= count
