"""SGRS: the gate against its specification's cases, and the loop on models of every family."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, TextIteratorStreamer

from tests.contracts.support import STRONG, Forced, batch_of, close, crossed, extended, logits, plain, vlm_of
from tests.tiny import TINY
from vlmfix.decoders import Chain, parse
from vlmfix.decoders.logits.sgrs import SGRS, Draws, RejectionGate
from vlmfix.errors import DataError, IncompatibleDecodersError
from vlmfix.upstream.names import KNOWN

NEUTRAL = SGRS(draw="greedy", strictness=1e-6)
"""Scores everything and rejects nothing."""
STRONG_ONE = SGRS(draw="greedy", strictness=1.3, top_k=8, window=3, layers="1:")


# --- the loop


def tokens(vlm, batch, decoder, *, steps=5, **options):
    """(B, steps) what was generated; no row ends early."""
    options = {"do_sample": False, "max_new_tokens": steps, "min_new_tokens": steps} | options
    with decoder.applied(vlm, batch) as arguments:
        sequences = vlm.model.generate(
            **batch, **arguments, suppress_tokens=[vlm.family.image_token(vlm.model.config)], **options
        )
    return sequences[:, batch.length :]


@pytest.mark.parametrize("family", TINY)
def test_a_gate_that_rejects_nothing_is_greedy_search(family):
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    close(logits(vlm, batch, NEUTRAL), plain(vlm, batch))
    assert torch.equal(tokens(vlm, batch, SGRS(top_k=1)), tokens(vlm, batch, parse("greedy")))


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(
    "method", [STRONG_ONE, SGRS(top_k=8, strictness=1.3, draw_seed=3, layers="1:")], ids=["greedy", "sample"]
)
def test_a_padded_batch_equals_each_row_alone(family, method):
    vlm = vlm_of(family)
    together = tokens(vlm, batch_of(vlm), method)
    for row in (0, 1):
        assert torch.equal(together[row], tokens(vlm, batch_of(vlm, [row]), method)[0])


def slow_sgrs(vlm, batch, method, steps):
    """Algorithm 1 with greedy draws, one row, on the full T x T computation without a cache."""
    from tests.attention.test_saliency import Graph
    from tests.contracts.test_reference import installed

    prompt, image = batch.length, batch["input_ids"][0] == vlm.family.image_token(vlm.model.config)
    begin = int(vlm.layout(batch).tokens[0].nonzero()[-1]) + 1 if method.scope == "post_image" else prompt
    ends = vlm.model.generation_config.eos_token_id
    withheld = [vlm.family.image_token(vlm.model.config), *([ends] if isinstance(ends, int) else ends)]
    assert image.any()

    graph, history, said = Graph(), [], []
    with installed(vlm, graph):
        for _ in range(steps):
            inputs = extended(batch, torch.tensor([said], dtype=torch.long))
            with torch.enable_grad():
                scores = vlm.model(**inputs, use_cache=False).logits[0, -1].double()
            allowed = scores.detach().clone()
            allowed[withheld] = -math.inf
            candidates = allowed.topk(method.top_k).indices
            layers = [graph.attention[layer] for layer in (1, 2)]

            def score(token, scores=scores, layers=layers):
                with torch.enable_grad():
                    loss = -scores.log_softmax(0)[token]
                total = 0.0
                for a, g in zip(layers, torch.autograd.grad(loss, layers, retain_graph=True), strict=True):
                    row = (a.detach() * g)[0, :, -1].abs().sum(0)
                    row = row / row.norm().clamp(min=1e-9)
                    total += float(row[begin:].mean()) / len(layers)
                return total

            if begin >= prompt + len(said):
                token = candidates[0]
            else:
                recent = history[-method.window :]
                tau = method.strictness * sum(recent) / len(recent) if recent else 0.0
                seen = {}
                for token in candidates[: method.tries]:
                    seen[int(token)] = score(token)
                    if seen[int(token)] >= tau:
                        break
                else:
                    seen |= {int(token): score(token) for token in candidates[method.tries :]}
                    token = torch.tensor(max(seen, key=seen.get))
                history.append(seen[int(token)])
            said.append(int(token))
    return said


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(("scope", "row"), [("post_image", 1), ("generated", 0)])
def test_the_loop_says_what_the_slow_algorithm_says(family, scope, row):
    """In the scope that asks where pictures end, behind two of them."""
    vlm = vlm_of(family)
    method = SGRS(draw="greedy", strictness=1.3, top_k=8, window=3, layers="1:", scope=scope)
    batch = batch_of(vlm, [row])
    assert tokens(vlm, batch, method, steps=6)[0].tolist() == slow_sgrs(vlm, batch, method, 6)


def test_a_text_streamer_yields_the_answer():
    vlm = vlm_of("llava")
    batch = batch_of(vlm, [0])
    streamer = TextIteratorStreamer(vlm.processor.tokenizer, skip_prompt=True)
    said = tokens(vlm, batch, STRONG_ONE, token_streamer=streamer)
    assert "".join(streamer) == vlm.processor.tokenizer.decode(said[0])


def test_strictness_rejects():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    assert not torch.equal(tokens(vlm, batch, STRONG_ONE, steps=8), tokens(vlm, batch, NEUTRAL, steps=8))


def test_official_code_is_sampling_from_the_best_five():
    """No score differs from zero, so the first draw stands."""
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    method = SGRS(preset="official-code")
    said = tokens(vlm, batch, method, steps=6)
    raw = logits(vlm, batch, logits_processor=[Forced(said, batch.length)], steps=6)  # (steps, B, V)
    raw[..., [vlm.family.image_token(vlm.model.config), vlm.model.generation_config.eos_token_id]] = -math.inf
    layout = vlm.layout(batch)
    gate = method.plan(vlm, batch, layout).gate
    assert isinstance(gate, RejectionGate)
    draws = Draws(method, LogitsProcessorList(), gate.seeds, sampling=False)
    for step in range(6):
        candidates = draws(None, raw[step])[1]
        assert candidates.tokens[:, 0].tolist() == said[:, step].tolist()
        assert candidates.tokens.shape == (2, 5)
    assert not torch.equal(said, tokens(vlm, batch, SGRS(preset="official-code", draw_seed=1), steps=6))


def test_seeds_are_the_rows_own():
    vlm = vlm_of("llava_next")
    batch = batch_of(vlm)
    seeds = SGRS().plan(vlm, batch, vlm.layout(batch)).gate.seeds
    assert len(set(seeds)) == 2
    for row in (0, 1):
        alone = batch_of(vlm, [row])
        assert SGRS().plan(vlm, alone, vlm.layout(alone)).gate.seeds == [seeds[row]]
    assert SGRS(draw_seed=1).plan(vlm, batch, vlm.layout(batch)).gate.seeds != seeds


WITH_GRADIENTS = {
    name: spec for name, spec in STRONG.items() if name not in ("kvsmooth", "kvsmooth-before", "memvr", "pti")
}
"""Methods through whose edits there is a gradient (none goes through what is kept of a cache), and beside which the
last token of a prompt may pass alone."""


@pytest.mark.parametrize(
    ("family", "name"),
    crossed(WITH_GRADIENTS, families=["llava", "gemma3", "qwen3_vl", "internvl"], pair=["llava", "qwen3_vl"], turn=2),
)
def test_a_chain_gives_the_logits_of_its_other_parts(family, name):
    """Edits and branches act in the prompt's pass, in the step back and behind it, on either side of the gate."""
    vlm = vlm_of(family)
    batch = batch_of(vlm)
    other = parse(STRONG[name]) if isinstance(STRONG[name], str) else STRONG[name]
    both = [Chain(decoders=pair) for pair in ((other, STRONG_ONE), (STRONG_ONE, other))]
    said = [tokens(vlm, batch, chain, steps=4) for chain in both]
    assert torch.equal(*said)
    forced = logits(vlm, batch, STRONG[name], steps=4, logits_processor=[Forced(said[0], batch.length)])
    got = logits(vlm, batch, both[0], steps=4)
    close(got, forced)


def test_saliency_is_that_of_the_edited_attention():
    from tests.attention.test_saliency import asked

    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    with parse("locore:mode=post,strength=4").applied(vlm, batch), asked(vlm, batch, "0") as call:
        call.prompt()
        assert (call.owed.recorder.seen[0].sum(-1) > 1.01).any()


def test_beams_static_caches_and_several_sequences_are_refused():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    with pytest.raises(IncompatibleDecodersError, match="does not work with beam search"):
        vlm.generate([[batch.pictures[0][0]]], "what?", decoder=SGRS(), num_beams=2)
    with pytest.raises(IncompatibleDecodersError, match="dynamic cache"):
        vlm.generate([[batch.pictures[0][0]]], "what?", decoder=SGRS(), static_cache=True)
    with pytest.raises(IncompatibleDecodersError, match="num_return_sequences"):
        tokens(vlm, batch, SGRS(), do_sample=True, num_return_sequences=2)
    with pytest.raises(IncompatibleDecodersError, match="both decoders choose tokens"):
        Chain(decoders=(SGRS(), SGRS())).plan(vlm, batch, vlm.layout(batch))


def test_a_finished_row_stays_finished_and_does_not_disturb_the_other():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    pad, end = vlm.model.generation_config.pad_token_id, vlm.model.generation_config.eos_token_id

    class FirstRowEnds:
        def __call__(self, input_ids, scores):
            scores = scores.index_fill(1, torch.tensor([end]), float("-inf"))
            if input_ids.shape[1] - batch.length == 1:
                scores[0] = float("-inf")
                scores[0, end] = 0.0
            return scores

    with STRONG_ONE.applied(vlm, batch) as arguments:
        fresh = vlm.model.generate(
            **batch, **arguments, max_new_tokens=6, do_sample=False, logits_processor=[FirstRowEnds()]
        )[:, batch.length :]
    assert fresh[0, 1] == end
    assert (fresh[0, 2:] == pad).all()
    with STRONG_ONE.applied(vlm, batch_of(vlm, [1])) as arguments:
        alone = vlm.model.generate(
            **batch_of(vlm, [1]), **arguments, max_new_tokens=6, min_new_tokens=6, do_sample=False
        )[0, -6:]
    assert fresh[1].tolist() == alone.tolist()


def test_answers_do_not_depend_on_neighbours_and_seeds_matter():
    vlm = vlm_of("llava")
    pictures, prompts = [list(row) for row in batch_of(vlm).pictures], list(batch_of(vlm).prompts)
    for options in ({"temperature": 1.3, "seed": 7}, {}):
        method = SGRS(strictness=1.2)
        run = {"decoder": method, "max_new_tokens": 5, **options}
        together = vlm.generate(pictures, prompts, **run)
        alone = [vlm.generate([p], [q], **run)[0] for p, q in zip(pictures, prompts, strict=True)]
        assert [a.ids for a in together] == [a.ids for a in alone]
        assert [a.ids for a in vlm.generate(pictures, prompts, **run)] == [a.ids for a in together]
        other = {**run, "seed": 8} if options else {**run, "decoder": SGRS(strictness=1.2, draw_seed=8)}
        assert [a.ids for a in vlm.generate(pictures, prompts, **other)] != [a.ids for a in together]


def test_transformers_own_sampling_works():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    drawn = tokens(vlm, batch, SGRS(strictness=1.0), do_sample=True, top_k=1)
    assert torch.equal(drawn, tokens(vlm, batch, parse("greedy")))
    torch.manual_seed(0)
    one = tokens(vlm, batch, SGRS(strictness=1.0), do_sample=True)
    assert not torch.equal(one, tokens(vlm, batch, SGRS(strictness=1.0), do_sample=True))
    torch.manual_seed(0)
    assert torch.equal(one, tokens(vlm, batch, SGRS(strictness=1.0), do_sample=True))


def test_committed_tokens_are_streamed():
    vlm = vlm_of("llava")
    batch = batch_of(vlm, [0])
    pieces = []

    class Streamer:
        def put(self, value):
            pieces.append(value.tolist())

        def end(self):
            pieces.append("end")

    said = tokens(vlm, batch, STRONG_ONE, token_streamer=Streamer())
    assert pieces.pop(0) == batch["input_ids"].tolist()
    assert pieces == [[token] for token in said[0].tolist()] + ["end"]


def test_a_row_without_a_picture_has_the_whole_prompt_as_history():
    vlm = vlm_of("llava")
    batch = vlm.encode(["what is here?", "hello there"], [batch_of(vlm).pictures[0], ()])
    alone = vlm.encode(["hello there"], [()])
    assert torch.equal(tokens(vlm, batch, STRONG_ONE)[1], tokens(vlm, alone, STRONG_ONE)[0])


def test_self_may_be_left_out_of_history():
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    without = SGRS(draw="greedy", strictness=1.3, top_k=8, window=3, layers="1:", include_self=False)
    assert not torch.equal(tokens(vlm, batch, without, steps=10), tokens(vlm, batch, STRONG_ONE, steps=10))


class Unlucky(LogitsProcessor):
    """A user's processor with an attribute that a sampler has too."""

    def __init__(self, token):
        self.token, self.generators = token, ()

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([self.token]), float("-inf"))


@pytest.mark.parametrize("draw", ["greedy", "sample"])
def test_a_users_processor_is_no_sampler(draw):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    decoder = parse(f"sgrs:top_k=1,draw={draw}")
    first = int(tokens(vlm, batch, decoder, steps=1)[0, 0])
    found = tokens(vlm, batch, decoder, steps=4, logits_processor=[Unlucky(first)])
    assert first not in found


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_prompt_that_ends_with_a_picture_is_refused(family):
    """Its last token would pass alone, as the placeholder that it is and not as the picture."""
    vlm = vlm_of(family)
    batch = batch_of(vlm, [0])
    image = vlm.family.image_token(vlm.model.config)
    end = int((batch["input_ids"][0] == image).nonzero()[-1]) + 1
    cut = {name: value[:, :end] if value.shape[:2] == (1, batch.length) else value for name, value in batch.items()}
    with parse("sgrs").applied(vlm, cut) as arguments, pytest.raises(DataError, match="a prompt ends with a picture"):
        vlm.model.generate(**cut, **arguments, max_new_tokens=2)


@pytest.mark.parametrize(
    ("spec", "options"),
    [("sgrs", {}), ("sgrs", {"temperature": 1.3, "seed": 7}), ("sgrs+locore+vcd", {})],
    ids=["draws of its own", "sampling", "chain"],
)
def test_a_row_that_has_ended_takes_part_in_no_further_pass(spec, options, monkeypatch):
    vlm = vlm_of("llava")
    batch, rows = batch_of(vlm), []
    pictures, run = [list(row) for row in batch.pictures], {"decoder": spec, "max_new_tokens": 6, **options}
    alone = [vlm.generate([pictures[row]], batch.prompts[row], **run)[0].ids for row in (0, 1)]
    end = next(token for token in alone[0][:3] if token not in alone[1])
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", end)

    def count(module, args, kwargs):
        rows.append(len(kwargs["input_ids"]))

    with vlm.model.register_forward_pre_hook(count, with_kwargs=True):
        found = vlm.generate(pictures, batch.prompts, **run)
    first = alone[0].index(end) + 1
    assert [answer.ids for answer in found] == [alone[0][:first], alone[1]]
    copies = parse(spec).passes
    assert rows == [2 * copies] * (1 + first) + [copies] * (6 - first)  # the prompt's last token passes twice


class Silent:
    """A streamer that is put nothing."""


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"streamer": Silent()}, "gets no streamer"),
        (dict.fromkeys(KNOWN["cache"][-1:], DynamicCache()), f"gets no {KNOWN['cache'][-1]}"),
        ({"prompt_lookup_num_tokens": 2}, "does not know assisted_generation"),
        ({"num_beams": 2}, "does not know beam_search"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "does not know output_hidden_states"),
        ({"use_cache": False}, "an empty dynamic cache of its own, not NoneType"),
        ({"cache_implementation": "static"}, "an empty dynamic cache of its own, not StaticCache"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_what_a_users_call_would_not_get_is_refused_by_name(options, named):
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    with SGRS().applied(vlm, batch) as arguments, pytest.raises(IncompatibleDecodersError, match=named):
        vlm.model.generate(**batch, **arguments, max_new_tokens=2, **options)


def test_a_users_call_gets_scores_and_logits():
    """As transformers gives them: what processors made of the scores, and the scores themselves."""
    vlm = vlm_of("llava")
    batch = batch_of(vlm)
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    withheld = [40, 41]
    with STRONG_ONE.applied(vlm, batch) as arguments:
        found = vlm.model.generate(
            **batch, **arguments, max_new_tokens=3, do_sample=False, suppress_tokens=withheld, **asked
        )
    said = found.sequences[:, batch.length :]
    forced = logits(vlm, batch, logits_processor=[Forced(said, batch.length)])
    close(torch.stack(found.logits), forced[: said.shape[1]])
    scores = torch.stack(found.scores)
    assert scores[..., withheld].isinf().all()
    scores[..., withheld] = torch.stack(found.logits)[..., withheld]
    close(scores, torch.stack(found.logits))


def test_greedy_draws_refuse_a_generate_that_samples():
    vlm = vlm_of("llava")
    batch = batch_of(vlm, [0])
    for options in ({"temperature": 0.7}, {}):
        if options:
            with pytest.raises(IncompatibleDecodersError, match="draw=greedy"):
                vlm.generate([batch.pictures[0]], "what?", decoder=NEUTRAL, max_new_tokens=2, **options)
        else:
            with NEUTRAL.applied(vlm, batch) as arguments, pytest.raises(IncompatibleDecodersError, match="draw=gr"):
                vlm.model.generate(**batch, **arguments, do_sample=True, max_new_tokens=2)
