"""`vlmfix explain`: what a decoder or a chain does, before anything runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from vlmfix.commands import options
from vlmfix.errors import UsageError
from vlmfix.settings import Settings


@click.command()
@click.argument("spec", type=options.DecoderSpec())
@click.option(
    "--model", type=options.ModelName(), help="Plan for it: tiny, tiny-qwen, small, a Hub id, or a directory."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options.generation_options("model", "decoder", "temperature", "seed", *options.CHOSEN)
def explain(*, spec: str, model: str | None, as_json: bool, settings: Settings) -> None:
    """Say what the decoder SPEC does: its parts, where they act, what they cost, and what does not go together.

    Without --model, as far as the decoders' declarations know. With it, also where the parts act in the model, prompt
    lengths, memory, and what the model or another part refuses: a made-up question about a made-up picture is planned,
    and nothing is decoded.
    """
    if model is None and settings != Settings():
        raise UsageError("options about a model and its answers, and no model", "add --model, or leave them out")
    from vlmfix.reports.explanation import declared, explanation_text, words_of

    words = words_of(spec)
    if model is None and any(one.given for one in words):
        options.quieten()
        from vlmfix.planned import parts_of

        parts_of(spec)  # values are known to the decoders alone, and a wrong one is not explained
    explanation = {"spec": spec, **declared([(one, _described(one.name)) for one in words]), "model": None}
    if model is not None:
        options.quieten()
        from vlmfix.display import loading
        from vlmfix.planned import parts_of, planned

        parts = parts_of(spec)  # what is wrong with it is said before the model is loaded
        chosen = replace(settings, model=model)
        vlm = loading(chosen.model, **chosen.loading())
        found = planned(vlm, parts, max_new_tokens=settings.max_new_tokens, num_beams=settings.num_beams)
        conflicts = found.pop("conflicts")
        explanation |= {"model": {"id": model, **found}, "conflicts": conflicts or explanation["conflicts"]}
    if as_json:
        options.say_json(explanation)
    else:
        click.echo(explanation_text(explanation), nl=False)


def _described(name: str) -> Any:  # noqa: ANN401 (a DecoderInfo, whose module is imported where it is needed)
    """The description of a decoder; one of another distribution, or in a file, is imported, and with it torch."""
    from vlmfix.decoders.index import own

    if name in own():
        return own()[name]
    options.quieten()
    from vlmfix.decoders import DECODERS, describe

    return describe(DECODERS[name])
