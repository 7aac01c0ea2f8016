"""`vlmfix serve`: a server that speaks the chat-completions protocol."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from vlmfix.commands import options
from vlmfix.errors import UsageError
from vlmfix.extras import need
from vlmfix.files import resolved
from vlmfix.settings import Settings


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes any that is free."
)
@click.option(
    "--api-key", envvar="VLMFIX_API_KEY", show_envvar=True, help="What requests must show.  [default: nothing]"
)
@click.option(
    "--allow",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder whose pictures requests may name as file:// URLs.  [default: none]",
)
@options.batch_size("Answers at a time.")
@click.option(
    "--max-tokens",
    default=1024,
    show_default=True,
    type=click.IntRange(min=1),
    help="Longest answer, in tokens; also where a request names no length.",
)
@click.option(
    "--max-pictures", default=16, show_default=True, type=click.IntRange(min=0), help="Most pictures of a request."
)
@click.option(
    "--max-body", default=32, show_default=True, type=click.IntRange(1, 1024), help="Largest request, in MiB."
)
@click.option(
    "--max-waiting",
    default=256,
    show_default=True,
    type=click.IntRange(min=1),
    help="Most requests that wait; one more is refused.",
)
@click.option(
    "--timeout",
    default=300.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True, max=86400),
    help="Longest time of a request, in seconds.",
)
@click.option(
    "--grace",
    default=30.0,
    show_default=True,
    type=click.FloatRange(min=0, max=3600),
    help="Seconds for running requests when the server is told to end.",
)
@options.generation_options("max_new_tokens", "num_beams", "temperature", "seed", *options.CHOSEN)
def serve(
    host: str,
    port: int,
    api_key: str | None,
    allow: Path | None,
    batch_size: int | None,
    max_tokens: int,
    max_pictures: int,
    max_body: int,
    max_waiting: int,
    timeout: float,
    grace: float,
    settings: Settings,
) -> None:
    """Answer requests in the chat-completions protocol of OpenAI, until Ctrl-C.

    A request names its decoder in the model's name, such as tiny@vcd; --decoder is that of requests that name none.
    """
    need("serve")
    if allow is not None and not os.path.isdir(allow):
        raise UsageError(f"--allow {allow} is no folder", "name a folder with pictures")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise UsageError("the API key holds what no header can", "take ASCII letters, digits and signs")
    options.quieten()
    from dataclasses import replace

    from vlmfix.decoders import parse
    from vlmfix.display import loading
    from vlmfix.generation import VLM
    from vlmfix.serve.limits import Limits
    from vlmfix.serve.protocol import Served
    from vlmfix.serve.server import LOOPBACK, Server, listening

    limits = Limits(
        body=max_body << 20,
        pictures=max_pictures,
        tokens=max_tokens,
        waiting=max_waiting,
        seconds=timeout,
        rows=batch_size,
        grace=grace,
        allowed=allow,
    )
    decoder = parse(settings.decoder)
    name = resolved(Path(settings.model)).name if os.path.isdir(settings.model) else settings.model

    def load() -> VLM:
        vlm = loading(settings.model, **settings.loading())
        if reason := decoder.check(vlm):
            raise UsageError(f"{decoder.spec()} cannot act on {name}: {reason}", "see vlmfix doctor")
        options.say(f"vlmfix: {name} is ready", err=True)
        return vlm

    server = Server(
        load,
        Served(name, decoder),
        replace(settings, max_new_tokens=max_tokens),
        limits,
        key=api_key,
        open_socket=listening(host, port),
    )
    options.say(f"vlmfix: {server.address} until Ctrl-C", err=True)
    if api_key is None and server.address.split("/")[2].rpartition(":")[0] not in LOOPBACK:
        options.say("vlmfix: whoever reaches this address may ask: there is no --api-key", err=True)
    if not server.work():  # its thread is still at work, and an interpreter that ends under it is aborted
        sys.stderr.flush()
        os._exit(0)
