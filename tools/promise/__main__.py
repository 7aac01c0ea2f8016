"""The command line of ``tools.promise``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from tools.entry import run
from tools.promise import Plan, keep


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A folder that is not there yet.")
@click.option("--pictures", default=1_000_000, help="Number of pictures.")
@click.option("--workers", default=64, help="Processes at a time.")
@click.option("--kills", default=100, help="Times that a worker is killed.")
@click.option("--stalls", default=10, help="Times that a worker is stopped for longer than its lease.")
@click.option("--hangs", default=5, help="Times that the answering of a worker hangs.")
@click.option("--full", default=5, help="Times that the disk is full.")
@click.option("--poison", default=4, help="Pictures on which the process dies.")
@click.option("--lease", default=60.0, help="Seconds of a lease.")
@click.option("--rows", default=32, help="Rows of a batch.")
@click.option("--model", default="", help="A model to answer in place of the stub.")
@click.option("--seed", default=0, help="Seed of all chance.")
def command(out: Path, **options: Any) -> None:
    """Try whether a shared run keeps its promise; the exit code says so."""
    if out.exists():
        raise click.UsageError(f"{out} is there already")
    plan = Plan(**options)
    kept = keep(plan, out / "run", report=lambda text: click.echo(text, err=True))
    click.echo(
        f"{plan.pictures:,} pictures, {plan.workers} workers, answered by {plan.model or 'a stub'}\n"
        f"{kept.kills} killed, {plan.stalls} stopped, {plan.hangs} hung, {plan.full} times a full disk, by which "
        f"{kept.early} ended; {kept.deaths} died of {plan.poison} pictures; {kept.starts} starts\n"
        f"{kept.answers:,} answers, {kept.failures:,} failures, {kept.given_up} given up; "
        f"{kept.lost} lost, {kept.twice} twice, {kept.wrong} wrong; {kept.repeated:.3%} of the work repeated\n"
        f"{kept.seconds:.0f} s, merged in {kept.merged:.0f} s; the coordinator held {kept.peak / 1e6:.0f} MB"
    )
    sys.exit(bool(kept.given_up != plan.poison or kept.lost or kept.twice or kept.wrong or kept.repeated >= 0.01))


run(command)
