"""Directions for `vti`: from planted captions to true ones, and from whole pictures to masked ones.

Shape letters (``docs/notation.md``): L layers, D hidden size, V views of a picture; here also M layers and E hidden
size of the vision tower, P places of a view, N pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmfix.attention.tower import tower_layers
from vlmfix.heads.directions.component import first_component
from vlmfix.heads.directions.method import Differences, Measurement
from vlmfix.heads.directions.shown import Shown, answered, streams
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.upstream.features import encoded


@dataclass(frozen=True, kw_only=True)
class Shifts(Measurement):
    """Measures for each layer the shift from a planted caption to the true one, and from a picture to what masks leave.

    ``text_mean`` (L, D) is the mean over pictures of the difference, at the last token of question and caption, of the
    stream that leaves the layer: true caption minus planted one. ``vision_mean`` (M, P, E) is the mean of the
    difference in the stream of the vision tower, averaged over ``trials`` masked copies of the picture, minus that of
    the picture itself; P is 1, the mean over places, where the tower lays patches of all pictures one behind the other
    (Qwen-VL). ``text_component`` and ``vision_component`` have the first principal component, over all layers together.

    A mask sets patches to the mean colour of the picture's pixels (where pixels come as patches, to the mean patch).

    Args:
        trials: Masked copies of each picture.
        masked: Share of the patches that a mask hides, in (0, 1).
    """

    name: ClassVar[str] = "vti"

    trials: int = 50
    masked: float = 0.99

    def begin(self, vlm: Checkpoint, question: str, seed: int) -> Differences:
        """Begins a measurement."""
        tower_layers(vlm)
        return _Shifts(self, vlm, question, seed)


class _Shifts(Differences):
    def __init__(self, how: Shifts, vlm: Checkpoint, question: str, seed: int) -> None:
        self._how, self._vlm, self._question, self._seed = how, vlm, question, seed
        self._text: list[Tensor] = []
        self._vision: list[Tensor] = []

    def add(self, shown: Shown, number: int) -> None:
        """Measures both shifts."""
        vlm = self._vlm
        true, planted = (
            streams(vlm, answered(vlm, self._question, shown.picture, said))[:, -1]
            for said in (shown.caption, shown.planted)
        )
        self._text.append((true - planted).cpu())
        batch = vlm.encode([self._question], [[shown.picture]])
        dice = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        total: Tensor | int = 0
        for _ in range(self._how.trials):
            pixels = hidden(vlm, batch["pixel_values"], self._how.masked, dice)
            total = total + tower_streams(vlm, batch.with_inputs(pixel_values=pixels))
        difference = total / self._how.trials - tower_streams(vlm, batch)
        self._vision.append(difference.cpu().half())  # of many pictures, places and layers

    def tensors(self) -> dict[str, Tensor]:
        """Returns means and first components."""
        text, vision = torch.stack(self._text), torch.stack(self._vision)  # (N, L, D), (N, M, P, E)
        components = [first_component(vision[:, :, place].flatten(1)) for place in range(vision.shape[2])]
        return {
            "text_mean": text.mean(dim=0),
            "text_component": first_component(text.flatten(1)).view(text.shape[1:]),
            "vision_mean": vision.float().mean(dim=0).half(),
            "vision_component": torch.stack(
                [part.view(vision.shape[1], vision.shape[3]) for part in components], dim=1
            ).half(),
        }


@torch.no_grad()
def tower_streams(vlm: Checkpoint, inputs: Any) -> Tensor:  # noqa: ANN401 (a batch, which is a mapping)
    """Reads the stream that leaves each layer of the vision tower for a picture: (M, P, E) float32, mean over views."""
    seen: list[Tensor] = []

    def keep(stream: Tensor) -> None:
        places = stream.float()
        seen.append(places.mean(dim=0) if places.dim() == 3 else places.mean(dim=0, keepdim=True))

    with _watched(vlm, keep):
        encoded(vlm.model, inputs)
    return torch.stack(seen)


@contextmanager
def _watched(vlm: Checkpoint, keep: Any) -> Iterator[None]:  # noqa: ANN401
    def show(layer: nn.Module, args: object, output: Any) -> None:  # noqa: ANN401 (a tensor, or a tuple that has it)
        keep(output if isinstance(output, Tensor) else output[0])

    with ExitStack() as hooks:
        for layer in tower_layers(vlm):
            hooks.enter_context(layer.register_forward_hook(show))
        yield


def hidden(vlm: Checkpoint, pixels: Tensor, share: float, dice: torch.Generator) -> Tensor:
    """Hides patches of a picture's pixels.

    Args:
        vlm: The model, whose tower says how large a patch is.
        pixels: (..., channels, height, width), or (patches, n).
        share: Share of the patches to hide.
        dice: Draws them.
    """
    if pixels.dim() == 2:
        lost = torch.randperm(len(pixels), generator=dice)[: int(share * len(pixels))]
        return pixels.index_copy(0, lost.to(pixels.device), pixels.mean(dim=0).expand(len(lost), -1).contiguous())
    size = vlm.model.config.vision_config.patch_size
    size = size[0] if isinstance(size, list | tuple) else int(size)
    rows, columns = (length // size for length in pixels.shape[-2:])
    views = pixels.flatten(0, -4)  # (V, channels, height, width)
    kept = torch.ones(len(views), rows * columns, dtype=torch.bool)
    for view in kept:
        view[torch.randperm(rows * columns, generator=dice)[: int(share * rows * columns)]] = False
    grid = kept.view(-1, 1, rows, columns).repeat_interleave(size, 2).repeat_interleave(size, 3)
    whole = torch.ones(len(views), 1, *pixels.shape[-2:], dtype=torch.bool)
    whole[..., : rows * size, : columns * size] = grid
    hid = torch.where(whole.to(pixels.device), views, views.mean(dim=(-2, -1), keepdim=True))
    return hid.view(pixels.shape)
