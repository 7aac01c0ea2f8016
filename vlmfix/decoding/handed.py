"""A user's own call of ``generate``, decoded by our loop: what transformers hands to it under ``custom_generate``.

Processors, stopping criteria and configuration are those of the call, and see every row until the last has ended, as in
transformers. Shape letters (``docs/notation.md``): B samples, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from vlmfix.decoding.plan import DecodingPlan, Gate
from vlmfix.decoding.running import running
from vlmfix.decoding.watch import idle
from vlmfix.errors import IncompatibleDecodersError
from vlmfix.models.checkpoint import Checkpoint
from vlmfix.models.layout import Batch, ImageLayout
from vlmfix.upstream import loops


@dataclass(frozen=True, eq=False, kw_only=True)
class HandedLoop:
    """What ``decoder.applied`` gives to ``generate`` for a plan with a gate.

    Attributes:
        vlm: The model.
        batch: B samples.
        layout: Where their image tokens are.
        plan: What the decoder does.
        gate: The plan's gate.
        name: How the decoder is written, for messages.
    """

    vlm: Checkpoint
    batch: Batch
    layout: ImageLayout
    plan: DecodingPlan
    gate: Gate
    name: str

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        token_streamer: loops.BaseStreamer | None = None,
        **kwargs: Any,
    ) -> Tensor | loops.GenerateDecoderOnlyOutput:
        """Generates.

        Args:
            model: The model.
            input_ids: (B, T) prompts, the planned ones.
            token_streamer: Gets the prompt and then every token. Transformers hands ``streamer`` to no loop of
                another's, so ``generate`` takes it under this name.
            **kwargs: Processors, stopping criteria, configuration, and what the model takes.

        Returns:
            (B, T + generated) tokens, or an output of ``generate`` when its configuration asks for one.

        Raises:
            IncompatibleDecodersError: The call asks for something that this loop does not do, or is another model's.
        """
        if model is not self.vlm.model:
            raise idle(self.name, "generate ran another model")
        processors, stops, config = loops.handed(kwargs)
        self._check(input_ids, config, loops.cache_of(model, kwargs))
        ended = torch.zeros(self.batch.rows, dtype=torch.bool, device=input_ids.device)
        kept: dict[str, list[Tensor]] = {"scores": [], "logits": []}
        limit = config.max_length - input_ids.shape[1]
        if token_streamer is not None:
            token_streamer.put(input_ids.cpu())
        with running(self.vlm, self.batch, self.layout, self.plan, limit=limit, name=self.name) as call:
            choice = self.gate(call.newest, processors, sampling=bool(config.do_sample))
            logits = call.prompt()
            while True:
                scores, tokens = choice.chosen(input_ids, logits, ~ended)
                tokens = torch.where(ended, loops.padding(config), tokens)
                input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
                ended = ended | stops(input_ids, scores)
                kept["scores"].append(scores)
                kept["logits"].append(logits)
                if token_streamer is not None:
                    token_streamer.put(tokens.cpu())
                if bool(ended.all()):
                    break
                logits = call.token(tokens)
        if token_streamer is not None:
            token_streamer.end()
        if not config.return_dict_in_generate:
            return input_ids
        output: dict[str, Any] = {name: tuple(kept[name]) for name in kept if getattr(config, f"output_{name}")}
        output["sequences"] = input_ids
        return loops.GenerateDecoderOnlyOutput(**output)

    def _check(self, input_ids: Tensor, config: Any, cache: Cache | None) -> None:  # noqa: ANN401 (settings have no types)
        """Refuses what a call asks for and would not get."""
        asked = loops.unusual(config)
        if asked:
            raise IncompatibleDecodersError(
                f"{self.name} decodes in a loop of its own, which does not know {', '.join(asked)}", "leave it out"
            )
        if input_ids.shape[0] != self.batch.rows:
            raise IncompatibleDecodersError(
                f"{self.name} was planned for {self.batch.rows} rows, generate runs {input_ids.shape[0]}",
                "use num_return_sequences=1 and repeat rows in the batch instead",
            )
        if not loops.is_fresh(cache):
            raise IncompatibleDecodersError(
                f"{self.name} needs an empty dynamic cache of its own, not {type(cache).__name__}",
                "leave use_cache on, static_cache and cache_implementation at their defaults, and hand no cache over",
            )
