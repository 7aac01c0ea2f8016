"""`vlmfix export`: a decoder folded into a checkpoint that needs no vlmfix."""

from __future__ import annotations

from pathlib import Path

import click

from vlmfix.commands import options


@click.command()
@click.argument("model", type=options.ModelName())
@click.option("--decoder", "spec", required=True, type=options.DecoderSpec(), help="What is folded in, such as ph3.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the new checkpoint.")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Precision of the new checkpoint.",
)
@options.debug
def export(*, model: str, spec: str, out: Path, dtype: str) -> None:
    """Fold a decoder into the weights of MODEL, and write a checkpoint that any program loads without vlmfix.

    That is possible where a decoder multiplies outputs of heads by constants, as ph3 does, or takes directions out of
    outputs of MLPs, as nullu does; others are refused with the reason. The new checkpoint's answers are compared with
    the decoder's, token by token, before it is written.
    """
    options.quieten()
    from vlmfix.decoders import parse
    from vlmfix.display import loading
    from vlmfix.folding import CARD
    from vlmfix.folding import export as folded

    decoder = parse(spec)  # what is wrong with it is said before the model is loaded
    done = folded(loading(model, device="cpu", dtype=dtype), decoder, out)
    parts = [f"L{layer}H{head} x {factor:g}" for layer, head, factor in done.heads]
    parts += [f"{count} directions out of L{layer}" for layer, count in done.removed.items()]
    options.say(f"{decoder.spec()} is folded into {out}: {', '.join(parts)}")
    options.say(f"{done.answers} answers are those of the decoder, token for token; {out / CARD} says what was folded")
