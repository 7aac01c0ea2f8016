"""CLIPScore and RefCLIPScore: how well a caption fits its picture, for people without annotations.

Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", EMNLP 2021, arXiv 2104.08718.
"""

from __future__ import annotations

import hashlib
import io
import random
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor

from vlmfix.errors import DataError, PassingError, UsageError
from vlmfix.evals.benchmarks.coco import read_index
from vlmfix.evals.inputs import read_source
from vlmfix.evals.task import Judged, Numbers, Sample, Task, Verdict, Workload, plain, ratio
from vlmfix.images import Found, begins_like_a_picture, find, read_ahead
from vlmfix.parsing import some

PREFIX = "A photo depicts "
"""Stands before every caption and every reference."""
WEIGHT = 2.5
"""w of the paper: stretches cosines, which hardly exceed 0.4, to about [0, 1]."""
PROMPT = "Please describe this image in one sentence."
"""Short on purpose: CLIP reads no more than 77 tokens."""
CODE = "trust_remote_code"
"""The option of transformers under which code of a model's folder is run; it is never given."""
LONGEST_REASON = 200
"""Characters of open_clip's own words in a message; it lists all models that it knows."""
Item = TypeVar("Item")


def clip_scores(pictures: Tensor, captions: Tensor) -> Tensor:
    """``2.5 * max(cos(picture, caption), 0)``.

    Args:
        pictures: (N, D) features.
        captions: (N, D) features.

    Returns:
        (N,) scores in [0, 2.5].
    """
    return WEIGHT * torch.cosine_similarity(pictures, captions).clamp(min=0)  # (N,)


def ref_clip_score(score: float, caption: Tensor, references: Tensor) -> float:
    """The harmonic mean of a caption's CLIPScore and of its largest cosine to a reference, at least 0.

    Args:
        score: CLIPScore of the caption.
        caption: (D,) features.
        references: (R, D) features of the picture's references, at least one.
    """
    nearest = float(torch.cosine_similarity(references, caption[None]).max().clamp(min=0))
    return 2 * score * nearest / (score + nearest) if score + nearest > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class ClipScore(Task):
    """CLIPScore, and RefCLIPScore where there are references.

    Judging runs a CLIP model and opens the pictures, each once for all arms. Captions longer than what the model
    reads (77 tokens with most) are cut and counted.

    Attributes:
        images: Folder of the pictures.
        model: A model that open_clip knows, ``hf-hub:OWNER/NAME``, or ``local-dir:FOLDER`` with a copy of such a
            repository. The paper's model is the default.
        pretrained: A tag that open_clip knows for the model, or a file with its weights; not read when ``model`` names
            a repository or a folder.
        batch: Pictures or captions at a time.
    """

    name: ClassVar[str] = "clipscore"
    better: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {"clip_score": "higher", "ref_clip_score": "higher"}
    shifts: ClassVar[tuple[str, ...]] = ("length",)
    max_new_tokens: ClassVar[int] = 64

    images: str = ""
    model: str = "ViT-B-32-quickgelu"
    pretrained: str = "openai"
    batch: int = 32

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UsageError(f"batch={self.batch} is not allowed", "take at least one picture at a time")

    @cached_property
    def _clip(self) -> Clip:
        return Clip.load(self.model, self.pretrained, batch=self.batch)

    def load(self) -> None:
        """Load the CLIP model now and not when the first caption is scored.

        Raises:
            DataError: It cannot be had.
        """
        _ = self._clip

    def judge(self, sample: Sample, answer: str) -> Verdict:
        """Score one caption."""
        return self.judge_all([sample], [answer])[0]

    def judge_all(self, samples: Sequence[Sample], answers: Sequence[str]) -> list[Verdict]:
        """Score captions in batches.

        Raises:
            DataError: The CLIP model cannot be had, or a picture cannot be opened.
        """
        if not samples:
            return []
        clip = self._clip
        pictures = clip.pictures(Path(self.images), [_picture(sample) for sample in samples])  # (N, D)
        captions = clip.texts(answers)  # (N, D)
        scores = clip_scores(pictures, captions).tolist()
        references = _references(samples)
        known = clip.remembered_texts([text for texts in references for text in texts])
        verdicts = []
        for number, cut in enumerate(clip.cut(answers)):
            found = [known[text] for text in references[number]]
            ref = ref_clip_score(scores[number], captions[number], torch.stack(found)) if found else 0.0
            counts = {
                "score": scores[number],
                "ref_score": ref,
                "captions": 1.0,
                "referenced": float(bool(found)),
                "words": float(len(answers[number].split())),
                "truncated": float(cut),
            }
            verdicts.append(Verdict(counts=counts, note=f"{scores[number]:.3f}{', cut' if cut else ''}"))
        return verdicts

    def figures(self, sums: Mapping[str, Numbers]) -> dict[str, Numbers]:
        """Both mean scores, the second over captions with references, and the mean length in words."""
        if not sums:
            return {}
        return {
            "clip_score": ratio(sums["score"], sums["captions"]),
            "ref_clip_score": ratio(sums["ref_score"], sums["referenced"]),
            "length": ratio(sums["words"], sums["captions"]),
        }

    def results(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """Keys clip_score, ref_clip_score (None without references), length, truncated and n."""
        sums = self.tally(judged).sums()
        figures = {name: plain(value) for name, value in self.figures(sums).items()}
        return {
            **{name: figures.get(name) for name in ("clip_score", "ref_clip_score", "length")},
            "truncated": int(sums.get("truncated", 0)),
            "n": len(judged),
        }

    def details(self, judged: Sequence[Judged], answers: Sequence[str]) -> dict[str, Any]:
        """Which CLIP model scored, and how many captions had references or were cut to the tokens that it reads."""
        return {
            "clip": {"weights": self._clip.digest, "tokens": self._clip.context} if judged else None,
            "referenced": sum(int(verdict.counts["referenced"]) for _, verdict in judged),
            "truncated": sum(int(verdict.counts["truncated"]) for _, verdict in judged),
        }


def _picture(sample: Sample) -> str:
    if sample.image is None:
        raise DataError(f"sample {sample.id} has no picture", "CLIPScore needs one for every caption")
    return sample.image


def _references(samples: Sequence[Sample]) -> list[list[str]]:
    return [list(sample.target.get("references", ())) for sample in samples]


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP model with its tokenizer, in float32; remembers what it has seen of pictures and references.

    On a GPU torch's own default lets convolutions round to TF32.

    Attributes:
        model: An open_clip model.
        transform: PIL picture to (3, h, w).
        tokenize: Texts to (N, length) token ids, padded on the right; cut to the length.
        context: Tokens that the model reads.
        device: Where it runs.
        batch: Pictures or texts at a time.
    """

    model: Any
    transform: Callable[[Image.Image], Tensor]
    tokenize: Callable[[Sequence[str], int], Tensor]
    context: int
    device: torch.device
    batch: int
    _seen: dict[Path, Tensor] = field(default_factory=dict)
    _read: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, model: str, pretrained: str, *, batch: int) -> Clip:
        """Loads a model onto the GPU when there is one.

        Args:
            model: See :class:`ClipScore`.
            pretrained: See :class:`ClipScore`.
            batch: Pictures or texts at a time.

        Raises:
            DataError: There is no such model, or its weights cannot be had.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        weights = None if model.startswith(("hf-hub:", "local-dir:")) else pretrained
        try:
            import open_clip  # takes seconds, and every evaluation imports this module

            with _nobody_asked():
                net, transform = open_clip.create_model_from_pretrained(model, pretrained=weights, device=device)
                tokenizer = _tokenizer(open_clip.get_tokenizer, model)
        except Exception as error:  # open_clip and what it reads weights with raise nearly anything
            reason = textwrap.shorten(str(error) or type(error).__name__, LONGEST_REASON)
            if CODE in str(error):
                reason = "it needs Python code of its own, which vlmfix does not run"
            raise DataError(
                f"no CLIP model {model}{f' with weights {weights}' if weights else ''}: {reason}",
                "without a network give a weights file (--clip-weights FILE), or a folder (--clip local-dir:FOLDER); "
                "with one, --clip ViT-B-32-quickgelu --clip-weights openai, or --clip hf-hub:OWNER/NAME",
            ) from error
        context = int(tokenizer.context_length)
        return cls(net.float().eval(), transform, lambda texts, n: tokenizer(list(texts), n), context, device, batch)

    @cached_property
    def digest(self) -> str:
        """Which weights these are: sha256 of every tensor with its name."""
        whole = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            whole.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return f"sha256:{whole.hexdigest()}"

    def pictures(self, folder: Path, names: Sequence[str]) -> Tensor:
        """Features of pictures, (N, D) float64 on the CPU; each picture is opened and encoded once.

        Raises:
            DataError: A picture cannot be opened.
        """
        new = [folder / name for name in dict.fromkeys(names) if folder / name not in self._seen]
        for paths, inputs in self._opened(new):
            self._seen.update(zip(paths, self._encoded(self.model.encode_image, inputs), strict=True))
        return torch.stack([self._seen[folder / name] for name in names])  # (N, D)

    def _opened(self, paths: Sequence[Path]) -> Iterator[tuple[list[Path], Tensor]]:
        with closing(read_ahead(Found(path.name, path) for path in paths)) as opened:
            for files in _batches(opened, self.batch):
                inputs = []
                for file, picture in files:
                    if isinstance(picture, PassingError):
                        raise PassingError(f"{file.path}: {picture.message}", picture.hint)
                    if isinstance(picture, DataError):
                        raise DataError(f"{file.path}: {picture.message}", "give the pictures that were asked about")
                    inputs.append(self.transform(picture.image))
                yield [file.path for file, _ in files], torch.stack(inputs)  # (n, 3, h, w)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features of texts with the prefix before them, (N, D) float64 on the CPU."""
        parts = [
            self._encoded(self.model.encode_text, self.tokenize([PREFIX + text for text in part], self.context))
            for part in _batches(texts, self.batch)
        ]
        return torch.cat(parts)  # (N, D)

    def remembered_texts(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """Features of texts by text, each (D,); a text is encoded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._read]
        if new:
            self._read.update(zip(new, self.texts(new), strict=True))
        return self._read

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Which texts, with the prefix, have more tokens than the model reads."""
        # With room for one more token, a text that fits has its end or padding where the model's last token stands.
        room = self.context + 1
        ends = torch.tensor(sorted(set(self.tokenize([""], room)[0].tolist())))
        last = self.tokenize([PREFIX + text for text in texts], room)[:, self.context - 1]  # (N,)
        cut: list[bool] = (~torch.isin(last, ends)).tolist()
        return cut

    def _encoded(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            return encode(inputs.to(self.device)).double().cpu()  # (n, D)


def _tokenizer(get: Callable[..., Any], model: str) -> Any:  # noqa: ANN401 (open_clip has no types)
    """A model's tokenizer, without code of its own, which its configuration could let in.

    Tokenizers of transformers take the option that says so, open_clip's own do not know it.
    """
    try:
        return get(model, **{CODE: False})
    except TypeError as error:
        if f"unexpected keyword argument '{CODE}'" not in str(error):
            raise
        return get(model)


@contextmanager
def _nobody_asked() -> Iterator[None]:
    """Lets nothing ask on standard input inside the block: transformers, below open_clip, asks about code there."""
    before = sys.stdin
    sys.stdin = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()):  # the question
            yield
    finally:
        sys.stdin = before


def _batches(items: Iterable[Item], size: int) -> Iterator[tuple[Item, ...]]:
    rest = iter(items)
    while batch := tuple(islice(rest, size)):
        yield batch


def read(
    images: Path,
    *,
    captions: Path | None = None,
    count: int | None = None,
    seed: int = 0,
    listed: Path | None = None,
    prompt: str = PROMPT,
    skip: Path | None = None,
) -> Workload:
    """Ask for a caption of pictures from any folder.

    Args:
        images: The folder; files in it that are no pictures are passed over and counted.
        captions: COCO captions with references; only pictures that it has captions of are then asked about. They are
            found by file name, whatever the folder within ``images``.
        count: Ask about this many; None for all. A smaller count gives a part of a larger one's.
        seed: Seed of the draw: names are sorted, shuffled by ``random.Random(seed)``, and the first taken.
        listed: Text file with the pictures to ask about, one name relative to ``images`` per line.
        prompt: Asked about every picture, literally.
        skip: A folder within ``images`` to leave out, such as that of the run.

    Raises:
        UsageError: Both a count and a list, or a count below 1.
        DataError: A file or the folder cannot be read, no picture is left, or fewer than ``count``.
    """
    if count is not None and (listed is not None or count < 1):
        raise UsageError(f"count={count} is not allowed", "give a number of pictures from 1, or a list, not both")
    about: dict[str, Any] = {"prompt": prompt, "captions": None, "list": None, "count": count, "seed": None}
    if listed is not None:
        source = read_source(listed)
        names = [line.strip() for line in source.lines() if line.strip()]
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise DataError(
                f"{listed} lists {len(twice)} pictures more than once: {some(twice)}", "list each picture once"
            )
        about["list"] = source.about()
    else:
        names, about["passed_over"] = _pictures(images, skip)
    references: Mapping[str, Sequence[str]] = {}
    if captions is not None:
        index = read_index(captions, "captions")
        references = {Path(index.files[number]).name: told for number, told in index.told.items()}
        names = [name for name in names if Path(name).name in references]
        about["captions"] = {"file": captions.name, "sha256": index.sha256}
    if len(names) < (count or 1):
        wanted = f", not {count}" if count else ""
        raise DataError(
            f"{len(names)} pictures in {images} can be asked about{wanted}", "check the folder, the list and captions"
        )
    if count is not None:
        drawn = sorted(names)
        random.Random(seed).shuffle(drawn)
        names, about["seed"] = sorted(drawn[:count]), seed
    samples = [
        Sample(id=name, image=name, prompt=prompt, target={"references": list(references.get(Path(name).name, ()))})
        for name in names
    ]
    return Workload(samples=samples, images=images, about=about)


def _pictures(folder: Path, skip: Path | None) -> tuple[list[str], int]:
    """Names of the files that begin like a picture, and how many do not."""
    files = list(find(folder, skip=skip))
    names = [file.name for file in files if not file.problem and begins_like_a_picture(file.path)]
    return names, len(files) - len(names)
