"""GIFT: raises attention to the patches that gained attention while the question was read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vlmfix.attention.edit import LayerSet, Rows, Site, WeightEdit
from vlmfix.decoders.base import Decoder, Source
from vlmfix.decoding.plan import DecodingPlan
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.insight.gaze import GazeReading, deepest, most, per_row, read_apart, shift_peak
from vlmfix.insight.question import INSTALL, MODEL, RULES, asked, has_tagger, rule_in_words
from vlmfix.language.parameters import Value, parameter
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout


class Tuned(NamedTuple):
    """Holds the settings that the release uses for one model."""

    saliency: str
    enhancement: str
    alpha: float


TABLE: dict[tuple[str, str, int, int], Tuned] = {
    ("llava", "llama", 4096, 32): Tuned("11", "12:23", 5.0),
    ("llava", "llama", 5120, 40): Tuned("10", "14:21", 5.0),
    ("qwen2_vl", "qwen2_vl_text", 3584, 28): Tuned("14", "5:19", 4.0),
}
"""By the types of model and text model, hidden size and layers: LLaVA-1.5-7B and 13B, Qwen2-VL-7B."""
ALPHA = 4.0
"""Strength for models that are not in the table."""


def gains(saliency: Tensor, image: Tensor, *, alpha: float, clip: float) -> Tensor:
    """Computes the factor on each patch.

    Args:
        saliency: (B, T) map.
        image: (B, T) bool, image patches.
        alpha: Strength.
        clip: Deviations (unbiased) at which the map is clipped.

    Returns:
        (B, T), from 1 at the lowest patch to e^alpha at the highest; 1 elsewhere, and where all patches are equal.
    """
    number = image.sum(dim=1, keepdim=True)  # (B, 1)
    mean = (saliency * image).sum(dim=1, keepdim=True) / number.clamp(min=1)
    variance = ((saliency - mean).square() * image).sum(dim=1, keepdim=True) / (number - 1).clamp(min=1)
    reach = clip * variance.sqrt()
    clipped = torch.minimum(torch.maximum(saliency, mean - reach), mean + reach)
    low = clipped.masked_fill(~image, math.inf).amin(dim=1, keepdim=True)
    high = clipped.masked_fill(~image, -math.inf).amax(dim=1, keepdim=True)
    differs = image & (high > low)
    share = torch.where(differs, (clipped - low) / torch.where(high > low, high - low, 1.0), 0.0)
    return torch.where(differs, (alpha * share).exp(), 1.0)


def enhance(
    weights: Tensor,
    image: Tensor,
    question: Tensor,
    gain: Tensor,
    *,
    beta: float,
    image_heads: float,
    question_heads: float,
) -> Tensor:
    """Raises attention to the picture by the map, and to the question by as much.

    Args:
        weights: (B, H, R, K) attention, rows sum to 1.
        image: (B, K) bool, image patches.
        question: (B, K) bool, tokens of the question.
        gain: (B, K) factor on each key.
        beta: Further factor on the question.
        image_heads: Share of heads that look harder at the picture.
        question_heads: Share of heads that look harder at the question.

    Returns:
        (B, H, R, K), rows sum to 1; a sample without picture or question is unchanged.
    """
    shown, asking = image[:, None, None, :], question[:, None, None, :]  # (B, 1, 1, K)
    raised = weights * gain[:, None, None, :]
    seen = (weights * shown).sum(dim=-1)  # (B, H, R)
    looking = most(seen, image_heads)
    reading = most((weights * asking).sum(dim=-1), question_heads)
    before = (seen * looking).sum(dim=1)  # (B, R)
    after = ((raised * shown).sum(dim=-1) * looking).sum(dim=1)
    ratio = torch.where(before > 0, after / torch.where(before > 0, before, 1.0), 1.0)
    new = torch.where(looking[..., None] & shown, raised, weights)
    new = torch.where(reading[..., None] & asking, new * (beta * ratio)[:, None, :, None], new)
    new = new / new.sum(dim=-1, keepdim=True)
    acts = (image.any(dim=1) & question.any(dim=1))[:, None, None, None]
    return torch.where(acts, new, weights)


@dataclass(frozen=True, kw_only=True)
class GIFT(Decoder):
    """Gaze-shift guided fusion: raises attention to the patches that the question's words drew it to.

    While the prompt is read, with A[h, i, j] the attention of the saliency layer and i the tokens of content words:

        dA[h, i, j] = max(A[h, i, j] - A[h, i - 1, j], 0)                      for image patches j
        s[j] = mean over i and over the half of the heads with the largest sum of dA
        w[j] = exp(alpha * (s'[j] - min s') / (max s' - min s')),  s' = s clipped to mean +- 3 std

    A patch that always gets the same attention, such as a visual sink, gains nothing. Then, for the row that predicts,
    at every step and in each enhancement layer, after the softmax:

        image heads, question heads = the halves that look most at the picture, at the question
        A[h, j] *= w[j]       image heads, image patches
        A[h, q] *= beta * r   question heads, tokens of the question; r = sum of A on the picture after / before, over
                              the image heads
        A[h]    /= sum of A[h]

    Args:
        preset: ``paper`` (every occurrence of a content word) or ``official-code`` (of a word that occurs twice, the
            last).
        alpha: Strength in [0, 20]; None takes the model's (LLaVA-1.5 5, all others 4). At 0, with beta 1, the plain
            model.
        beta: Further factor on the question in [0, 10]; the paper's is 1.
        saliency_layers: Layers whose map is taken, averaged; None takes the release's for its three models, and for
            others the layer with the largest shift, by a probe (not in the paper; it says how that layer is found).
        layers: Enhancement layers; None takes the release's, and for other models those from behind the saliency layer
            to 0.7 of the depth (not in the paper).
        saliency_heads: Share of the heads whose shifts are averaged, in [0, 1].
        image_heads: Share of the heads whose attention to the picture is raised, in [0, 1].
        question_heads: Share of the heads whose attention to the question is raised, in [0, 1].
        clip: The map is clipped at so many deviations from its mean.
        words: How content words are told: ``spacy`` (nouns, verbs, adjectives, adverbs, numbers by the tagger of
            en_core_web_sm, as the release does), ``stop-words`` (all but English function words), ``all``, or ``auto``:
            ``spacy`` when it is installed (``vlmfix[spacy]`` and the model), otherwise ``stop-words``. Run cards say
            which. Without any content word, and in questions without Latin letters, all tokens count.

    *Source*: "Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement for VLM Hallucination Mitigation",
    ICML 2026, arXiv 2510.22067; code amazon-science/GIFT.

    *Differs*: the release serves one row and one picture; here each row has a map of its own over all its pictures. A
    map without differences, for which the release divides by zero, raises nothing. The question is found by the chat
    template instead of fixed offsets; its first token is left out when the picture stands directly before it. Equal
    heads are taken by their number. A row without a picture or without a question is decoded plainly.

    *Cost*: one pass per token; decoding materialises one row per head in the enhancement layers, and prefill the text
    rows of the saliency layer. Where an enhancement layer does not come after the saliency layers, as in the release's
    Qwen2-VL, the map needs a pass over the prompt of its own, without the other methods of a chain. Beams and compiled
    decoding work. The probe of an untabulated model is 8 short prompts, once.

    Example:
        >>> GIFT(preset="official-code").repeated
        'last'
    """

    name: ClassVar[str] = "gift"
    source: ClassVar[Source] = Source(
        title="Gaze-Shift-guided Cross-modal Fusion Enhancement",
        year=2026,
        arxiv="2510.22067",
        code="https://github.com/amazon-science/GIFT",
    )
    acts_on: ClassVar[str] = "attention weights"
    presets: ClassVar[Mapping[str, Mapping[str, Value]]] = {
        "paper": {"repeated": "all"},
        "official-code": {"repeated": "last"},
    }

    preset: str = parameter("paper", str, choices=("paper", "official-code"), help="named set of parameters")
    alpha: float | None = parameter(
        None, float, low=0, high=20, optional=True, search=(0.5, 8.0), help="strength; none: the model's, 4 or 5"
    )
    beta: float = parameter(1.0, float, low=0, high=10, search=(0.5, 2.0), help="further factor on the question")
    saliency_layers: LayerSet | None = parameter(
        None, LayerSet, optional=True, help="layers whose map is taken; none: table or probe"
    )
    layers: LayerSet | None = parameter(
        None, LayerSet, optional=True, help="enhancement layers; none: table, or behind the saliency layer to 0.7"
    )
    saliency_heads: float = parameter(0.5, float, low=0, high=1, search=(0.1, 1.0), help="share of heads in the map")
    image_heads: float = parameter(
        0.5, float, low=0, high=1, search=(0.1, 1.0), help="share of heads that look harder at the picture"
    )
    question_heads: float = parameter(
        0.5, float, low=0, high=1, search=(0.0, 1.0), help="share of heads that look harder at the question"
    )
    clip: float = parameter(3.0, float, low=0, high=1e6, help="deviations at which the map is clipped")
    words: str = parameter("auto", str, choices=("auto", *RULES), help="how content words are told")
    repeated: str = parameter(None, str, choices=("all", "last"), help="which occurrences of a word count")

    def plan(self, vlm: Checkpoint, batch: Batch, layout: ImageLayout) -> DecodingPlan:
        """Plans a reading of the question and an edit of the rows that predict, or nothing when no row needs them."""
        reason = self.check(vlm)
        if reason is not None:
            raise IncompatibleDecodersError(f"gift cannot act: {reason}", "give saliency_layers and layers")
        alpha = self._alpha(vlm)
        if alpha == 0 and self.beta == 1:
            return DecodingPlan()
        found = asked(vlm, batch, self.word_rule, last_only=self.repeated == "last")
        if not bool((found.question.any(dim=1) & layout.tokens.any(dim=1)).any()):
            return DecodingPlan()
        source, target = self._layers(vlm)
        reading = GazeReading(layers=source, content=found.content, share=self.saliency_heads)
        count = vlm.layers
        together = min(target.resolve(count)) > max(source.resolve(count))
        if not together:
            read_apart(vlm, batch, layout, reading)
        enhancement = Enhancement(
            layers=target,
            reading=reading,
            known=None if together else reading.saliency(),
            question=found.question,
            alpha=alpha,
            beta=self.beta,
            clip=self.clip,
            image_heads=self.image_heads,
            question_heads=self.question_heads,
        )
        return DecodingPlan(edits=(reading, enhancement) if together else (enhancement,))

    def check(self, vlm: Checkpoint) -> str | None:
        """Checks that the tagger asked for is installed, and that the model has the layers."""
        if self.words == "spacy" and not has_tagger():
            return f"words=spacy needs spaCy and its model {MODEL}, which are not installed: {INSTALL}"
        count = vlm.layers
        if count < 2 and (self.saliency_layers is None or self.layers is None):
            return "the model has one layer, and a map must be taken before it is used"
        for name, layers in zip(("saliency_layers", "layers"), self._layers(vlm), strict=True):
            if not layers.resolve(count):
                return f"{name} {layers} are none of the model's {count}"
        return None

    @property
    def word_rule(self) -> str:
        """Returns how content words are told on this machine: ``spacy``, ``stop-words`` or ``all``."""
        if self.words == "auto":
            return "spacy" if has_tagger() else "stop-words"
        return self.words

    def facts(self, vlm: Checkpoint) -> dict[str, str]:
        """Returns how content words are told, with the versions that this depends on."""
        return {"content_words": rule_in_words(self.word_rule)}

    def _layers(self, vlm: Checkpoint) -> tuple[LayerSet, LayerSet]:
        """Returns saliency layers and enhancement layers."""
        count, tuned = vlm.layers, TABLE.get(_kind(vlm))
        source = self.saliency_layers or LayerSet(tuned.saliency if tuned else str(shift_peak(vlm)))
        if self.layers is not None or not source.resolve(count):
            return source, self.layers or LayerSet()
        behind = max(source.resolve(count)) + 1
        return source, LayerSet(tuned.enhancement if tuned else f"{behind}:{max(deepest(count), behind) + 1}")

    def _alpha(self, vlm: Checkpoint) -> float:
        tuned = TABLE.get(_kind(vlm))
        return self.alpha if self.alpha is not None else tuned.alpha if tuned else ALPHA


def _kind(vlm: Checkpoint) -> tuple[str, str, int, int]:
    text = vlm.model.config.get_text_config()
    return vlm.model.config.model_type, text.model_type, text.hidden_size, text.num_hidden_layers


@dataclass(frozen=True, eq=False, kw_only=True)
class Enhancement(WeightEdit):
    """Raises attention of the rows that predict, by a map that it learns from the prompt.

    It learns ``gain`` (B, T) float32, 1 but on image patches, and ``question`` (B, T) bool.

    Attributes:
        reading: Reading that makes the map when the same pass does.
        known: (samples, T) map of an earlier pass, or None.
        question: (samples, T) bool, tokens of the question.
        alpha: Strength.
        beta: Further factor on the question.
        clip: Deviations at which the map is clipped.
        image_heads: Share of heads that look harder at the picture.
        question_heads: Share of heads that look harder at the question.
    """

    reading: GazeReading
    known: Tensor | None
    question: Tensor
    alpha: float
    beta: float
    clip: float
    image_heads: float
    question_heads: float
    rows: ClassVar[Rows] = "last"
    of_prompt: ClassVar[frozenset[str]] = frozenset({"reading", "known", "question", "alpha", "clip"})

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Returns the weights, (B, H, R, K), raised in the heads that look at the picture and at the question."""
        if site.prefill:
            self._learn(site)
        return enhance(
            weights,
            site.image_keys,
            site.learned("question"),  # (B, K)
            site.learned("gain"),  # (B, K)
            beta=self.beta,
            image_heads=self.image_heads,
            question_heads=self.question_heads,
        )

    def _learn(self, site: Site) -> None:
        image = site.image_keys[:, : site.prompt]  # (B, T)
        saliency = self.reading.saliency() if self.known is None else per_row(site, self.known)
        gain = gains(saliency[:, : site.prompt], image, alpha=self.alpha, clip=self.clip)
        site.learn_of_keys("gain", gain)
        site.learn_of_keys("question", per_row(site, self.question))
