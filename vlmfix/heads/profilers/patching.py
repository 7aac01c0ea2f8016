"""Path patching: which heads speak from what the model remembers, and which from the picture.

Shape letters (``docs/notation.md``): B rows, L layers, H query heads, D head dimension; here also N copies of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfix.attention.edit import OutputEdit, Rows, Site
from vlmfix.attention.probe import LastOutputs, leaving
from vlmfix.attention.session import edited
from vlmfix.heads.moments import Moments, rank_correlation
from vlmfix.heads.profiler import Profiler, State
from vlmfix.heads.profilers.vhd import without_image_tokens
from vlmfix.insight.contributions import added
from vlmfix.insight.last_step import LastStep
from vlmfix.insight.work import Ran, Work
from vlmfix.models.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Patching(Profiler):
    """How far a head speaks for the answer from memory against the answer from the picture.

    Two runs: X, the prompt with its picture, and X', the same prompt without its image tokens. c is the most probable
    answer token of X, m that of X'. For each head, X's last position is computed again, with the outputs of all other
    heads held at those of X, this head's at that of X', and everything else recomputed, which leaves the head the ways
    through the MLPs and straight to the logits:

        e_m = (p(m) - p_patched(m)) / p(m)        e_c likewise        score = e_m - e_c

    Positive: a memory head, whose doing with the picture speaks for what the model would say without it. Negative: a
    context head. Where m is c there is no conflict and nothing to measure: such pictures are left out, so the question
    must be one that the model answers otherwise when it sees nothing, such as whether there is a chair. An effect on an
    improbable token can be a large ratio below 0, so pictures of which the model is sure weigh more.

    The picture is taken away and not exchanged for another: what the model then says is its memory, where another
    picture would be another context.

    ``details`` has the means of the two effects as ``memory`` (e_m) and ``context`` (e_c), (L, H), the number of
    pictures without conflict as ``no_conflict``, and beside the score its direct-to-logits estimate as ``direct``
    (L, H), for which MLPs are held too, with Spearman's correlation of the two over all heads as ``rank_correlation``;
    NaN when either gives all heads the same.

    Source: memory heads and context heads are those of PH3 ("Cutting Off the Head Ends the Conflict", Findings of ACL
    2024, arXiv 2402.18154). *Differs*: the paper's own formula was not to be found; this is path patching as it is
    usually done, with the picture for the context. *Cost*: one short pass beside the shared one, L * H one-token steps,
    ``copies`` at a time as rows of one pass that share the prompt's keys and values, and L * H rows through the last
    norm and the output embedding.

    Args:
        copies: Patched copies per pass, at least 1; fewer when they would need too much memory.
    """

    name: ClassVar[str] = "patching"
    title: ClassVar[str] = "support of memory against the picture"

    copies: int = 32

    def __post_init__(self) -> None:
        self._require(self.copies >= 1, "copies", "at least 1")

    def begin(self, vlm: Checkpoint) -> State:
        """A fresh state."""
        return _State(self.copies)


class _State(State):
    keeps_cache: ClassVar[bool] = True
    advice: ClassVar[str] = "ask something that the model answers otherwise when it does not see the picture"

    def __init__(self, copies: int) -> None:
        self._copies = copies
        self._shown: dict[int, Tensor] = {}
        self._last = torch.empty(0)
        self._found: dict[str, Moments] = {}
        self._agreed = 0

    @contextmanager
    def watching(self, work: Work) -> Iterator[None]:
        with _outputs(work, self._shown), leaving(work.vlm, self._keep):
            yield

    def _keep(self, layer: int, hidden: Tensor) -> None:
        self._last = hidden[:, -1]  # (B, hidden size), in the end that of the last layer

    @torch.no_grad()
    def scores(self, work: Work, ran: Ran | None) -> Tensor:
        if ran is None:
            raise RuntimeError("the shared pass did not run")
        batch = without_image_tokens(work.vlm, work.batch)
        blind: dict[int, Tensor] = {}
        model: Any = work.vlm.model
        with _outputs(Work(work.vlm, batch, work.vlm.layout(batch), work.first, work.seed), blind):
            memory = model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(dim=-1)  # (B,)
        shown, other = (torch.stack([part[layer] for layer in sorted(part)], dim=1) for part in (self._shown, blind))
        rows = [
            self._row(LastStep.of(work, ran, row), shown[row], other[row], int(memory[row]), self._last[row])
            for row in range(work.batch.rows)
        ]
        return torch.stack(rows)  # (B, L, H)

    def _row(self, step: LastStep, shown: Tensor, other: Tensor, memory: int, last: Tensor) -> Tensor:
        """(L, H) of one row, for (L, H, D) head outputs; NaN without a conflict."""
        if memory == step.token:
            self._agreed += 1
            return torch.full(shown.shape[:2], torch.nan, dtype=torch.float64)
        exact = effects(step, shown, other, (memory, step.token), self._copies)  # (2, L, H)
        direct = direct_effects(step.vlm, shown, other, (memory, step.token), last)
        none = Moments.empty(*shown.shape[:2])
        for name, value in (("memory", exact[0]), ("context", exact[1]), ("direct", direct[0] - direct[1])):
            self._found[name] = self._found.get(name, none).added(value[None])
        return exact[0] - exact[1]

    def details(self) -> dict[str, Tensor]:
        if not self._found:
            return {}
        means = {name: part.mean for name, part in self._found.items()}
        agreement = rank_correlation(means["memory"] - means["context"], means["direct"])
        return {
            **{name: mean.float() for name, mean in means.items()},
            "rank_correlation": torch.tensor([torch.nan if agreement is None else agreement]),
            "no_conflict": torch.tensor([float(self._agreed)]),
        }


@contextmanager
def _outputs(work: Work, found: dict[int, Tensor]) -> Iterator[None]:
    def read(site: Site, output: Tensor) -> None:
        found[site.layer] = output  # (B, H, D)

    with edited(work.vlm, work.layout, [LastOutputs(reader=read)]):
        yield


@dataclass(frozen=True, eq=False, kw_only=True)
class Held(OutputEdit):
    """Head outputs of the last row as they were in one run, but for some heads, which have those of another.

    Attributes:
        outputs: (L, H, D) of the one run.
        others: (L, H, D) of the other.
        swapped: (L, N, H) bool, which heads of which copy have those of the other.
    """

    outputs: Tensor
    others: Tensor
    swapped: Tensor
    rows: ClassVar[Rows] = "last"

    def output(self, site: Site, output: Tensor) -> Tensor:
        """(N, 1, H, D), whatever attention gave."""
        layer = site.layer
        chosen = torch.where(self.swapped[layer][..., None], self.others[layer], self.outputs[layer])  # (N, H, D)
        return chosen[:, None].expand_as(output)


@torch.no_grad()
def effects(step: LastStep, outputs: Tensor, others: Tensor, tokens: tuple[int, int], copies: int) -> Tensor:
    """What each head does for two tokens, by patching it alone and recomputing what is not a head.

    Args:
        step: The step over the last token.
        outputs: (L, H, D) head outputs in this step.
        others: (L, H, D) those of the other run.
        tokens: The tokens.
        copies: Most patched copies per pass.

    Returns:
        (2, L, H) float64 on the CPU: (p - p_patched) / p of each token, at most 1.
    """
    layers, heads, _ = outputs.shape
    copies, found = step.copies(copies), []
    for start in range(0, layers * heads, copies):
        patched = torch.arange(start, min(start + copies, layers * heads))  # (N,)
        swapped = torch.zeros(layers, 1 + len(patched), heads, dtype=torch.bool)  # the first copy is left alone
        swapped[patched // heads, 1 + torch.arange(len(patched)), patched % heads] = True
        edit = Held(outputs=outputs, others=others, swapped=swapped.to(step.device))
        found.append(_effects(step.logits([edit], copies=1 + len(patched)), tokens))
    return torch.cat(found, dim=1).view(2, layers, heads)


@torch.no_grad()
def direct_effects(vlm: Checkpoint, outputs: Tensor, others: Tensor, tokens: tuple[int, int], last: Tensor) -> Tensor:
    """The same when MLPs are held too, so that a head reaches the logits through the last norm alone.

    Args:
        vlm: The model.
        outputs: (L, H, D) head outputs at the last position.
        others: (L, H, D) those of the other run.
        tokens: The tokens.
        last: (hidden size,) residual stream that leaves the last layer there.

    Returns:
        (2, L, H) float64 on the CPU.
    """
    model: Any = vlm.model
    norm, embedding = vlm.family.decoder(model).get_submodule("norm"), model.get_output_embeddings()
    heads = outputs.shape[1]
    swapped = torch.cat([torch.zeros(1, heads), torch.eye(heads)]).bool().to(last.device)[..., None]  # (1 + H, H, 1)
    found = []
    for layer, own, other in zip(vlm.family.layers(model), outputs, others, strict=True):
        written = added(layer, torch.where(swapped, other, own).flatten(1)).float()  # (1 + H, hidden size)
        states = norm(last.float() + (written - written[0]))
        found.append(_effects(embedding(states.to(last.dtype)).float(), tokens))
    return torch.stack(found, dim=1)  # (2, L, H)


def _effects(logits: Tensor, tokens: tuple[int, int]) -> Tensor:
    """(2, N) float64 relative losses against the first row, for (1 + N, V) float32 logits."""
    log = logits.double().log_softmax(dim=-1)[:, list(tokens)].T.cpu()  # (2, 1 + N)
    return -torch.expm1(log[:, 1:] - log[:, :1])
