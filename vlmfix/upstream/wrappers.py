"""What other packages put around a model or onto it: wrappers, code that they compiled, hooks that move weights."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmfix.errors import UnsupportedModelError

INSIDE = frozenset(
    "LORA ADALORA LOHA LOKR OFT BOFT IA3 VERA FOURIERFT HRA VBLORA LN_TUNING RANDLORA C3A SHIRA MISS".split()
)
"""Kinds of PEFT adapters that sit in the model's own modules, so that the model inside has them too."""
HOOK = "_hf_hook"
"""Attribute of a module in which accelerate keeps what moves its weights and inputs."""


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model whose ``generate`` a wrapper runs; a transformers model is returned as it is.

    The wrappers of ``torch.compile``, ``DataParallel``, ``DistributedDataParallel`` and PEFT hold the model that
    generates, adapters included, and hand ``generate`` on to it.

    Raises:
        UnsupportedModelError: The wrapper is not one of these, or changes more than the model inside; there is no model
            of transformers that generates; or a part of it is in a wrapper.
    """
    kind = type(model).__name__
    if isinstance(model, PreTrainedModel):
        if not model.can_generate():
            raise UnsupportedModelError(f"{kind} does not generate", "load it with AutoModelForImageTextToText")
        if parts := [name for name, module in model.named_modules() if hasattr(module, "_orig_mod")]:
            raise UnsupportedModelError(
                f"{parts[0]} of the {kind} is inside torch.compile(...), which stands in the module's place",
                "put the module itself back, or compile it by module.compile(), which leaves it there",
            )
        return model
    if (compiled := getattr(model, "_orig_mod", None)) is not None:
        return unwrapped(compiled)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    if (adapters := getattr(model, "peft_config", None)) is not None:
        return unwrapped(_adapted(model, adapters))
    raise UnsupportedModelError(
        f"{kind} is no model of transformers",
        "hand over the model inside, whose generate(...) says the same: model.module, pipeline.model, for instance",
    )


def _adapted(model: Any, adapters: Any) -> nn.Module:  # noqa: ANN401 (PEFT has no types)
    """The model inside a ``PeftModel``; its modules hold the adapters, which may be switched on and off as before."""
    for name, config in adapters.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind not in INSIDE or getattr(config, "alora_invocation_tokens", None):
            raise UnsupportedModelError(
                f"the PEFT adapter {name!r} ({kind}) acts around the model and not in it",
                "merge it into the model (model.merge_and_unload()) where it can be, or use the plain model",
            )
    base: nn.Module = model.get_base_model()
    return base


def weights_of(model: nn.Module) -> Hashable:
    """Something that differs when a model's weights were written to, or other adapters of PEFT act in it."""
    written = sum(0 if weight.is_inference() else weight._version for weight in model.parameters())
    adapters = tuple(
        (name, str(module.active_adapters), module.disable_adapters, bool(getattr(module, "merged", False)))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "disable_adapters", None), bool)  # models have a method of that name
    )
    return written, adapters


def state_of(model: nn.Module, decoder: nn.Module) -> Hashable:
    """Something that differs when a model's text decoder would compute otherwise: weights, adapters, hooks, forwards.

    Args:
        model: The model.
        decoder: Its text decoder; hooks elsewhere, which transformers adds to vision towers, do not count.
    """
    places = hash(tuple(weight.data_ptr() for weight in (*model.parameters(), *model.buffers())))
    added = tuple(
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in module.__dict__)
        for name, module in (("model", model), *decoder.named_modules())
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    )
    return weights_of(model), places, added, model.training


def compiled(model: nn.Module) -> bool:
    """Whether somebody compiled the model, a part of it or a ``forward``; such code need not see what changes later."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None
        or "_orig_mod" in module._modules
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs: where its embeddings are, or are brought to when they are needed.

    Raises:
        UnsupportedModelError: The weights were never loaded.
    """
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    device = _brought_to(embeddings) or _brought_to(model) or next(embeddings.parameters()).device
    if device.type == "meta":
        raise UnsupportedModelError(
            "the model's weights are on the meta device, and nothing brings them from elsewhere",
            "load the model with from_pretrained, and offload it with accelerate if it is too large",
        )
    return device


def _brought_to(module: nn.Module) -> torch.device | None:
    hook = getattr(module, HOOK, None)
    for one in (hook, *getattr(hook, "hooks", ())):
        if (device := getattr(one, "execution_device", None)) is not None:
            return torch.device(device)
    return None


@contextmanager
def present(module: nn.Module, name: str) -> Iterator[Tensor]:
    """A module's own weight by name, in memory inside the block also where accelerate keeps it elsewhere."""
    weight: Tensor = getattr(module, name)
    if not weight.is_meta:
        yield weight
        return
    from accelerate.utils import align_module_device  # here alone: it is large, and weights are rarely elsewhere

    with align_module_device(module):
        yield getattr(module, name)


def layer_devices(layers: Iterable[nn.Module], device: torch.device) -> list[torch.device]:
    """Where each layer works: where accelerate brings its inputs, else where the whole model takes them."""
    return [_brought_to(layer) or device for layer in layers]
