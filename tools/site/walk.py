"""Copies the commands of the pages that say so, and runs them as a reader would: make walk.

A fenced block below the line ``<!-- runs -->`` is run by bash; the blocks of a page run one after the other in an empty
folder.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^<!-- runs -->\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[str]:
    """Returns the blocks of a page that are to be run, in order."""
    return BLOCK.findall(page)


def commands(page: str) -> Iterator[list[str]]:
    """Reads every call of ``vlmfix`` in the fenced blocks of a page, the ones that are not run too.

    Yields:
        Its arguments. Lines that describe a form, with ``[`` or ``...``, are left out, and so is what stands behind
        two spaces, which explains.
    """
    for _, language, block in FENCE.findall(page):
        if language not in ("", "sh", "bash", "console"):
            continue
        for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
            found = re.search(r"(?:^|\s|\()vlmfix (.*)", line)
            if found and line.lstrip().startswith(("vlmfix", "uvx", "pipx")) and not re.search(r"\[|\.\.\.", found[1]):
                words = shlex.split(re.split(r"  +(?=[a-z])", found[1])[0], comments=True)
                yield words[
                    : next((place for place, word in enumerate(words) if word in ("&&", "|", ">", ";")), len(words))
                ]


def main() -> int:
    """Runs all pages; the exit code is 1 when a block failed."""
    failed = 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for file in PAGES:
        with TemporaryDirectory() as folder:
            for block in blocks(file.read_text(encoding="utf-8")):
                start = time.monotonic()
                run = subprocess.run(
                    ["bash", "-e"], input=block, text=True, cwd=folder, env=environment, capture_output=True
                )
                failed += bool(run.returncode)
                print(f"{file.relative_to(ROOT)}: {block.splitlines()[0]} ... {time.monotonic() - start:.0f} s", end="")
                print(f", exit code {run.returncode}\n{run.stdout}{run.stderr}" if run.returncode else "")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
