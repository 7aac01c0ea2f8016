"""A loaded model with its processor and its family: load, encode, layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from vlmfix.asked import Shown, pictures_of, questions_of, whole
from vlmfix.errors import (
    DataError,
    LayoutError,
    SystematicError,
    UnsupportedModelError,
    UpstreamError,
    VlmfixError,
)
from vlmfix.models import assembly, loading
from vlmfix.models.chat import rendered, said_before, template_of
from vlmfix.models.families import family_of
from vlmfix.models.family import Family
from vlmfix.models.layout import Batch, ImageLayout, Prepared, Turn, laid_out
from vlmfix.models.places import check_device_map, device_named, dtype_named
from vlmfix.models.quantization import check_quantize
from vlmfix.models.repeats import Each, process_once
from vlmfix.models.special import completed_tokens
from vlmfix.settings import EMBEDDED, check_attention, check_model_name
from vlmfix.upstream import defaults, features, hub, panics
from vlmfix.upstream.contracts import check_model
from vlmfix.upstream.names import PROCESSED
from vlmfix.upstream.versions import missing
from vlmfix.upstream.wrappers import device_of

HEADS = "heads.safetensors"
"""File in a model's folder that profiles of its heads are looked for in; it holds no weights."""
DIRECTIONS = "directions.safetensors"
"""The same for directions in its streams and its KV cache."""

GROWN = 4
"""How many times its own pixels make a picture one that grows: a photograph padded to a square is none."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A vision-language model as transformers loaded it, with what vlmfix must know about it.

    Attributes:
        model: The stock transformers model. While it answers it is in eval mode, whatever it is in between.
        processor: Its processor, with what ``completed`` says and the limit on pixels that was asked for.
        family: Where its attention and its image tokens are.
        name: What it was loaded by.
        revision: Commit of the Hub snapshot, or None for a local directory.
        completed: What the checkpoint's files leave out and its other files have: name -> value.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    family: Family
    name: str = ""
    revision: str | None = None
    completed: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        max_pixels: int | None = None,
        min_pixels: int | None = None,
        device_map: str | None = None,
        quantize: str | None = None,
        attention: str | None = None,
    ) -> Self:
        """Loads a checkpoint through stock transformers classes.

        Args:
            model: ``tiny``, ``tiny-qwen`` or ``small`` (they come with the package), a Hub id, or a local directory.
            revision: Branch, tag or commit on the Hub.
            device: ``auto`` (the GPU when there is one), or a torch device such as ``cpu`` or ``cuda:1``.
            dtype: ``auto`` (the checkpoint's own on a GPU, float32 on the CPU), ``float32``, ``bfloat16`` or
                ``float16``.
            max_pixels: The most pixels that the processor makes of a picture, for Qwen-VL; None leaves its own limit.
            min_pixels: The fewest pixels, likewise: smaller pictures are enlarged.
            device_map: ``auto`` spreads the layers over all GPUs, and over the memory beside them where that is too
                little; None keeps the model on ``device``.
            quantize: ``int8`` or ``int4`` quantizes the weights while they are loaded, by bitsandbytes on a GPU; None
                leaves them as they are.
            attention: ``sdpa``, which None stands for, or ``eager``, transformers' own arithmetic in steps; where a
                decoder edits attention, vlmfix computes it in either case.

        Raises:
            UnsupportedModelError: The model's family is not one that vlmfix knows.
            DataError: There is no such checkpoint, a file of it cannot be read, or its files do not fit each other.
            SystematicError: It cannot take a picture in.
            UpstreamError: The installed transformers hands masks over in an unknown way.
            UsageError: Unknown device, dtype, device map, quantization or attention, or such as do not go together or
                need what is not there; or a limit on pixels that the processor does not know or cannot keep.
        """
        check_model_name(str(model))
        path = assembly.whole(EMBEDDED.get(str(model), model))
        place = device_named(device)
        check_device_map(device_map, device)
        kind = dtype_named(dtype, place)
        check_quantize(quantize, place)
        check_attention(attention)
        config = loading.configuration(path, revision)
        family = family_of(str(config["model_type"]))
        described = loading.described(path, revision, config)
        processor = limited(family, loading.processor(path, revision), most=max_pixels, least=min_pixels)
        spread: torch.device | str = place if device_map is None else device_map
        how = {"quantize": quantize, "attention": attention}
        loaded = loading.model(path, revision, described, dtype=kind, place=spread, **how).eval()
        check_model(loaded, family.decoder(loaded))
        processor, completed = family.completed(loaded, processor)
        completed |= completed_tokens(loaded, processor, family.image_token(loaded.config))
        vlm = cls(
            model=loaded,
            processor=processor,
            family=family,
            name=str(model),
            revision=hub.commit(path, revision),
            completed=completed,
        )
        vlm.try_out()
        return vlm

    @property
    def device(self) -> torch.device:
        """Where the inputs go: to the embeddings, or where accelerate brings those when it keeps them elsewhere.

        Raises:
            UnsupportedModelError: The weights were never loaded.
        """
        return device_of(self.model)

    @property
    def layers(self) -> int:
        """L, layers of the text decoder."""
        return len(self.family.layers(self.model))

    @property
    def heads(self) -> int:
        """H, query heads of the text decoder."""
        return int(self.model.config.get_text_config().num_attention_heads)

    @property
    def folder(self) -> Path | None:
        """The local folder that the model was loaded from: a directory, or the Hub's snapshot in the local cache.

        None for a model that was made in this process, or whose folder is gone.
        """
        return hub.folder(str(self.model.config.name_or_path), self.revision)

    @property
    def reading(self) -> dict[str, Any]:
        """How vlmfix reads the checkpoint's settings, in JSON values.

        ``ends`` are the tokens that end an answer, ``set_aside`` the generation settings of the checkpoint that would
        change an answer and do not act, ``completed`` what its files leave out and its other files have.
        """
        aside = defaults.set_aside(self.model)
        return {"ends": defaults.ends(self.model), "set_aside": aside, "completed": dict(self.completed)}

    def try_out(self) -> None:
        """Makes sure that the processor's files fit the model: a picture becomes as many tokens as the prompt has.

        A checkpoint without a chat template is not tried: it may still decode inputs that are made elsewhere.

        Raises:
            DataError: They do not fit.
            SystematicError: Taking a picture in fails with an error of another library.
            UnsupportedModelError: The chat template cannot be used.
        """
        if template_of(self.processor, self._called) is None:
            return
        picture = Image.new("RGB", (84, 56), (128, 128, 128))
        hint = "processor_config.json, preprocessor_config.json and config.json must belong to the same checkpoint"
        with loading.few_steps():
            silent = self.render("?", 1) == self.render("?", 0)
        if silent:
            raise UnsupportedModelError(
                f"the chat template of {self._called} writes nothing where a picture stands",
                "put chat_template.jinja of the checkpoint that it was made from into its folder",
            )
        try:
            with torch.no_grad():
                batch = self.encode(["?"], [[picture]])
                shown = int(self.layout(batch).tokens.sum()) and int(self._marked(batch).sum())
                made = sum(features.sizes(features.encoded(self.model, batch)))
        except LayoutError as error:
            raise DataError(f"the processor of {self._called} does not fit its model: {error.message}", hint) from error
        except UpstreamError:  # something has another name in this transformers: the decoders that need it say so
            return
        except VlmfixError:
            raise
        except loading.MEMORY as error:
            raise loading.too_large(self._called, error) from error
        except Exception as error:  # processors and towers raise nearly anything at files that do not fit
            said = loading.words(error)
            odd = loading.odd_settings(self.processor)
            raise SystematicError(f"{self._called} cannot take a picture in{odd}: {said}", hint) from error
        if shown != made:
            raise DataError(
                f"the processor of {self._called} does not fit its model: it writes {shown} image tokens for a picture "
                f"that becomes {made}",
                hint,
            )

    @property
    def _called(self) -> str:
        return self.name or type(self.model).__name__

    def _marked(self, batch: Batch) -> Tensor:
        """(B, T) bool: the tokens that stand for parts of pictures, newlines among them."""
        return batch["input_ids"] == self.family.image_token(self.model.config)

    def encode(
        self,
        prompts: str | Sequence[str | None],
        pictures: Sequence[Shown | Sequence[Shown]],
        *,
        system: str | None = None,
        earlier: Sequence[Sequence[Turn]] | None = None,
    ) -> Batch:
        """Renders the chat template and runs the processor, left-padded; see ``prepared``.

        Raises:
            DataError: See ``prepared``.
            UnsupportedModelError: The processor has no chat template.
            UpstreamError: The processor returns its tensors under other names.
        """
        return self.placed(self.prepared(prompts, pictures, system=system, earlier=earlier))

    def prepared(
        self,
        prompts: str | Sequence[str | None],
        pictures: Sequence[Shown | Sequence[Shown]],
        *,
        system: str | None = None,
        earlier: Sequence[Sequence[Turn]] | None = None,
        each: Each = map,
    ) -> Prepared:
        """Does the part of ``encode`` that needs no device, which may be done ahead of the model.

        The image processor sees pictures that several rows share, the same objects in the same order, once.

        Args:
            prompts: One question for all, or B questions; may be empty, or None for a user turn without any text.
            pictures: B pictures, or B lists of them, which may be empty; as for ``VLM.generate``.
            system: System message; None keeps the template's own.
            earlier: For each row, what was said before its question, oldest first; a system message of the row's own
                may stand first, which ``system`` replaces. The row's pictures are those of these turns and then the
                question's. None for nothing.
            each: Calls a function with every row's pictures, as ``map`` does and a pool of threads does at once. It is
                used where the family's image processor makes the same of a row whatever stands beside it.

        Raises:
            DataError: ``prompts`` and ``pictures`` differ in length, there is no row, something else than questions,
                turns and pictures is among them, or the processor would make too large a picture of one.
            UnsupportedModelError: The processor has no chat template, or it has no place for a system message or for
                such turns.
            UpstreamError: The processor returns its tensors under other names.
        """
        rows = pictures_of(pictures)
        asked = questions_of(prompts, len(rows), silent=True)
        self._check_enlarged(rows)
        before = said_before(earlier, rows)
        texts = [
            self.render(prompt, len(row), system=system, earlier=turns)
            for prompt, row, turns in zip(asked, rows, before or [()] * len(rows), strict=True)
        ]
        with panics.as_errors():
            processed, sources = process_once(self.family, self.model, self.processor, texts, rows, each)
        if absent := [name for name in PROCESSED if name not in processed and (name != "pixel_values" or any(rows))]:
            raise missing(f"{type(self.processor).__name__} returns no {' and '.join(absent)}")
        return Prepared(
            inputs={name: self._rounded(value) for name, value in processed.items() if isinstance(value, Tensor)},
            sources=sources,
            prompts=tuple(asked),
            pictures=tuple(tuple(row) for row in rows),
            system=system,
            earlier=before,
        )

    def placed(self, prepared: Prepared) -> Batch:
        """Brings prepared rows to the device and hands repeated pictures out there."""
        inputs = {name: value.to(self.device) for name, value in prepared.inputs.items()}
        repeated = {name: inputs[name][source.to(self.device)] for name, source in prepared.sources.items()}
        return Batch(
            inputs={**inputs, **repeated},
            prompts=prepared.prompts,
            pictures=prepared.pictures,
            sizes=tuple(tuple((picture.height, picture.width) for picture in row) for row in prepared.pictures),
            system=prepared.system,
            earlier=prepared.earlier,
        )

    def beside(self) -> Self:
        """The same model for a thread that prepares while another answers: with a tokenizer of its own.

        A tokenizer that two threads use at once refuses one of them.
        """
        processor = copy(self.processor)
        processor.tokenizer = deepcopy(self.processor.tokenizer)
        return replace(self, processor=processor)

    def enlarged(self, picture: Image.Image, together: int = 1) -> int:
        """Pixels of the largest picture that the processor makes of one; see ``Family.enlarged``."""
        return self.family.enlarged(self.processor, (picture.height, picture.width), together)

    def _check_enlarged(self, rows: Sequence[Sequence[Image.Image]]) -> None:
        """Refuses pictures that the processor makes more of than may be read from a file, alone or all of them."""
        limit, grown = Image.MAX_IMAGE_PIXELS, {}
        for picture, together in ((picture, len(row)) for row in rows for picture in row):
            made = self.enlarged(picture, together)
            if limit is not None and made > limit:
                raise DataError(
                    f"too large: the processor makes {made} pixels of {picture.width} x {picture.height}, at most "
                    f"{limit} are allowed",
                    "make the picture smaller, or cut a part out of it",
                )
            if made > GROWN * picture.width * picture.height:
                grown[id(picture)] = made
        if limit is not None and sum(grown.values()) > limit:
            raise DataError(
                f"too large: the processor makes {sum(grown.values())} pixels of {len(grown)} small pictures together, "
                f"at most {limit} are allowed",
                "show fewer at once",
            )

    def render(
        self, prompt: str | None, pictures: int, *, system: str | None = None, earlier: Sequence[Turn] = ()
    ) -> str:
        """The chat template's text for one question about ``pictures`` pictures, ready for the answer.

        Those of the pictures that belong to earlier turns stand there; of a turn, pictures come before the text.

        Raises:
            DataError: A text holds the token that stands for a picture.
            UnsupportedModelError: There is no chat template, it fails, or it leaves a turn out.
        """
        image = self.family.image_token(self.model.config)
        return rendered(self.processor, self._called, image, prompt, pictures, system=system, earlier=earlier)

    def layout(self, batch: Batch) -> ImageLayout:
        """Which prompt token shows which part of which picture.

        Raises:
            LayoutError: The number of image tokens and of places in the pictures differ.
        """
        marked = self._marked(batch)
        places = self.family.patches(self.model, self.processor, batch) if bool(marked.any()) else [[]] * batch.rows
        return laid_out(batch["input_ids"], batch.attention_mask.bool(), marked, places)

    def _rounded(self, value: Tensor) -> Tensor:
        return value.to(self.model.dtype) if value.is_floating_point() else value


def limited(family: Family, processor: ProcessorMixin, *, most: int | None, least: int | None) -> ProcessorMixin:
    """The processor, or a copy of it with limits on the pixels of a picture; None leaves its own.

    Raises:
        UsageError: A limit is no whole number above 0, or the processor does not know such limits or cannot keep them.
    """
    if most is None and least is None:
        return processor
    given = (("max_pixels", most), ("min_pixels", least))
    most, least = (None if limit is None else whole(name, limit, 1) for name, limit in given)
    return family.limited(processor, most=most, least=least)
