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
    UsageError,
    VlmfixError,
)
from vlmfix.models import assembly, loading
from vlmfix.models.families import family_of
from vlmfix.models.family import Family
from vlmfix.models.layout import Batch, Earlier, ImageLayout, Prepared, Turn
from vlmfix.models.quantization import check_quantize
from vlmfix.models.repeats import Each, process_once
from vlmfix.parsing import is_text
from vlmfix.settings import ATTENTIONS, EMBEDDED, check_model_name
from vlmfix.upstream import defaults, features, hub, panics
from vlmfix.upstream.contracts import check_model
from vlmfix.upstream.names import PROCESSED
from vlmfix.upstream.versions import missing
from vlmfix.upstream.wrappers import device_of

HEADS = "heads.safetensors"
"""File in a model's folder that profiles of its heads are looked for in; it holds no weights."""

GROWN = 4
"""How many times its own pixels make a picture one that grows: a photograph padded to a square is none."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        _check_device_map(device_map, device)
        kind = dtype_named(dtype, place)
        check_quantize(quantize, place)
        if attention not in (None, *ATTENTIONS):
            raise UsageError(f"unknown attention {attention!r}", f"use {' or '.join(ATTENTIONS)}, or leave it out")
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
        if self._template() is None:
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

    def _template(self) -> str | None:
        """The chat template: the processor's, or else the tokenizer's; the one called ``default`` of several.

        Raises:
            UnsupportedModelError: There are several, and none is called so.
        """
        for holder in (self.processor, self.processor.tokenizer):
            found = getattr(holder, "chat_template", None)
            if isinstance(found, str):
                return found
            if isinstance(found, Mapping) and found:
                if "default" not in found:
                    raise UnsupportedModelError(
                        f"{self._called} has the chat templates {', '.join(sorted(found))} and none is called default",
                        "save the one to use as chat_template.jinja in its folder",
                    )
                return str(found["default"])
        return None

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
        template = self._template()
        if template is None:
            raise UnsupportedModelError(
                f"{self._called} has no chat template, neither with its processor nor with its tokenizer",
                "put chat_template.jinja of the checkpoint that it was made from into its folder",
            )
        if system is not None:
            earlier = [Turn("system", system), *(turn for turn in earlier if turn.role != "system")]
        mark = str(self.processor.tokenizer.convert_ids_to_tokens(self.family.image_token(self.model.config)))
        if any(mark in said for said in (prompt or "", *(turn.text for turn in earlier))):
            raise DataError(f"{mark} in a question stands for a picture there", "leave it out: pictures come before it")
        messages = [_message(turn.role, turn.text, turn.pictures) for turn in earlier]
        messages.append(_message("user", prompt, pictures - sum(turn.pictures for turn in earlier)))
        try:
            text = self.processor.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # whatever a template does, and it is a program
            raise UnsupportedModelError(
                f"the chat template of {self._called} fails: {loading.words(error)}",
                "put chat_template.jinja of the checkpoint that it was made from into its folder",
            ) from error
        for turn in earlier:
            if turn.text.strip() not in text:
                raise UnsupportedModelError(
                    f"the chat template of {self._called} leaves out what the {turn.role} said before the question",
                    "leave it out, or write it into the question",
                )
        asked = len(prompt or "") + sum(len(turn.text) for turn in earlier)
        if len(text) > loading.LONGEST_TEXT + loading.LONGEST_TEXT * asked // 1000:
            raise UnsupportedModelError(
                f"the chat template of {self._called} makes {len(text)} characters of a question of {asked}",
                "put chat_template.jinja of the checkpoint that it was made from into its folder",
            )
        return str(text)

    def layout(self, batch: Batch) -> ImageLayout:
        """Which prompt token shows which part of which picture.

        Raises:
            LayoutError: The number of image tokens and of places in the pictures differ.
        """
        ids = batch["input_ids"]
        marked = self._marked(batch)
        places = self.family.patches(self.model, self.processor, batch) if bool(marked.any()) else [[]] * batch.rows
        boxes = torch.full((*ids.shape, 4), float("nan"))
        image = torch.full(ids.shape, -1, dtype=torch.long)
        for row, pictures in enumerate(places):
            where = marked[row].nonzero().squeeze(1).cpu()
            count = sum(len(picture) for picture in pictures)
            if len(where) != count:
                raise LayoutError(
                    f"row {row} has {len(where)} image tokens but its pictures fill {count}",
                    "the inputs were cut, or made with another processor",
                )
            if pictures:
                boxes[row, where] = torch.cat(pictures)
                image[row, where] = torch.arange(len(pictures)).repeat_interleave(
                    torch.tensor([len(picture) for picture in pictures])
                )
        boxes, image = boxes.to(ids.device), image.to(ids.device)
        separator = boxes.isnan().any(dim=2)
        tokens = marked & ~separator
        return ImageLayout(
            tokens=tokens,
            text=batch.attention_mask.bool() & ~marked,
            image=torch.where(tokens, image, -1),
            boxes=torch.where(boxes.isinf(), float("nan"), boxes),
        )

    def _rounded(self, value: Tensor) -> Tensor:
        return value.to(self.model.dtype) if value.is_floating_point() else value


def said_before(earlier: Any, rows: Sequence[Sequence[Image.Image]]) -> Earlier | None:  # noqa: ANN401
    """Checks what was said before the questions of a batch.

    Args:
        earlier: For each row, its turns; None for nothing in any.
        rows: The pictures of each row.

    Raises:
        DataError: It is something else; there are not as many rows; a system message does not stand first; turns have
            more pictures than their row; or the turns do not alternate between user and assistant.
    """
    if earlier is None:
        return None
    hint = "give for each question a list of vlmfix.Turn(role, text), oldest first"
    if not isinstance(earlier, Sequence) or len(earlier) != len(rows):
        raise DataError(f"earlier is not a list with one list for each of {len(rows)} questions", hint)
    for number, (turns, pictures) in enumerate(zip(earlier, rows, strict=True)):
        place = f"earlier[{number}]"
        if not isinstance(turns, Sequence) or not all(isinstance(turn, Turn) for turn in turns):
            raise DataError(f"{place} is not a list of turns", hint)
        if not all(is_text(turn.text) for turn in turns):
            raise DataError(f"{place} has a turn that is no text", hint)
        said = [turn.role for turn in turns if turn.role != "system"]
        if "system" in [turn.role for turn in turns[1:]] or said != ["user", "assistant"] * (len(said) // 2):
            roles = ", ".join(turn.role for turn in turns)
            raise DataError(
                f"{place} has the roles {roles}",
                "after at most one system message, user and assistant take turns, and the question comes last",
            )
        if any(turn.pictures < 0 or (turn.pictures and turn.role != "user") for turn in turns):
            raise DataError(f"{place} has pictures in a turn that is not the user's", "only the user shows pictures")
        if sum(turn.pictures for turn in turns) > len(pictures):
            shown = sum(turn.pictures for turn in turns)
            raise DataError(f"{place} has {shown} pictures and its row {len(pictures)}", "give the row all pictures")
    return tuple(tuple(turns) for turns in earlier)


def _message(role: str, text: str | None, pictures: int) -> dict[str, Any]:
    """One message as chat templates read it."""
    content: list[dict[str, Any]] = [{"type": "image"}] * pictures
    return {"role": role, "content": content if text is None else [*content, {"type": "text", "text": text}]}


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


def device_named(name: str) -> torch.device:
    """A device by its name; ``auto`` is the GPU when there is one.

    Raises:
        UsageError: torch knows or sees no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}", "use auto, cpu, cuda or cuda:N") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} asked for, but torch sees no GPU", "use --device cpu")
    return place


def _check_device_map(name: str | None, device: str) -> None:
    if name not in (None, "auto"):
        raise UsageError(f"unknown device_map {name!r}", "use auto, or leave it out")
    if name is not None and device != "auto":
        raise UsageError(f"device_map={name} and device={device} are both given", "give one of them")


def dtype_named(name: str, device: torch.device) -> torch.dtype | str:
    """A precision by its name; ``auto`` is float32 on the CPU, and stays ``auto``, the checkpoint's own, elsewhere.

    Raises:
        UsageError: There is no such precision.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}", f"use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def completed_tokens(model: PreTrainedModel, processor: ProcessorMixin, picture: int) -> dict[str, Any]:
    """Makes the tokens that end and fill up rows usable, in a model and a tokenizer that were just loaded.

    A padding token that is missing, that the model has no embedding of, or that is the image token, is no matter of
    answers: it is masked in prompts, and stands behind an answer's end. Without an end token in the generation
    settings, the tokenizer's ends answers.

    Args:
        model: The model.
        processor: Its processor.
        picture: The token that stands for one image patch.

    Returns:
        What was put in: name -> value.

    Raises:
        DataError: A token is not one of the model's.
    """
    tokenizer, config = processor.tokenizer, model.generation_config
    size = len(model.get_input_embeddings().get_parameter("weight"))
    added: dict[str, Any] = {}
    if not _tokens(config, "eos_token_id", size) and tokenizer.eos_token_id is not None:
        config.eos_token_id = added["eos_token_id"] = tokenizer.eos_token_id
    ends = _tokens(config, "eos_token_id", size)
    if tokenizer.pad_token_id in (None, picture) or tokenizer.pad_token_id >= size:
        if tokenizer.eos_token is None or tokenizer.eos_token_id >= size:
            raise DataError("the tokenizer has no padding token", "name pad_token in tokenizer_config.json")
        tokenizer.pad_token = added["pad_token"] = tokenizer.eos_token
    if _tokens(config, "pad_token_id", size) in ([], [picture]):
        config.pad_token_id = added["pad_token_id"] = ends[0] if ends else tokenizer.pad_token_id
    return added


def _tokens(config: Any, name: str, size: int) -> list[int]:  # noqa: ANN401 (its settings have no types)
    """The tokens that a generation setting names, each one of the model's."""
    value = getattr(config, name)
    found = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    if odd := [token for token in found if type(token) is not int or not 0 <= token < size]:
        raise DataError(
            f"generation_config.json: {name} {odd[0]!r} is no token of the model, which has 0 to {size - 1}",
            loading.COMPLETE,
        )
    return found
