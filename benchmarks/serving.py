"""What it gains to ask ``vlmfix serve`` with many clients at once: answers per second, beside one client at a time.

    python benchmarks/serving.py                                   # captions of as many pictures as there are clients
    python benchmarks/serving.py --pictures 4                      # of four: rows that show one picture share its pass
    python benchmarks/serving.py --pictures 4 --question "Is there a dog in the image?"
    python benchmarks/serving.py --model DIR --tokens 256          # any other model

Starts the command in a process of its own. Every client asks again when it is answered; the one that is alone asks the
same, one request after the other.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from urllib.parse import urlsplit

from PIL import Image

from vlmfix.world.render import render
from vlmfix.world.scenes import scene

QUESTION = "Please describe this image in detail."


@contextmanager
def served(options: Sequence[str]) -> Iterator[str]:
    """Runs the command inside the block, and gives the address when the model is loaded."""
    command = [sys.executable, "-m", "vlmfix", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    address = ""
    try:
        for line in process.stderr:
            address = line.split()[1] if "http://" in line else address
            if "is ready" in line:
                break
        yield address
    finally:
        process.terminate()
        process.wait()


def body(model: str, number: int, question: str, tokens: int) -> bytes:
    """A request about a scene of the drawn world."""
    content = io.BytesIO()
    Image.fromarray(render([scene(0, number)])[0].permute(1, 2, 0).numpy()).save(content, "JPEG", quality=90)
    url = "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
    parts = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
    asked = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": tokens}
    return json.dumps(asked).encode()


def ask(address: str, bodies: Sequence[bytes]) -> int:
    """Asks one request after the other; returns how many tokens were answered."""
    place, tokens = urlsplit(address), 0
    connection = HTTPConnection(place.hostname or "", place.port, timeout=600)
    for content in bodies:
        connection.request("POST", f"{place.path}/chat/completions", content, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        tokens += answer["usage"]["completion_tokens"]
    connection.close()
    return tokens


def rates(address: str, lines: Sequence[Sequence[bytes]]) -> tuple[float, float]:
    """Answers and tokens per second, with a client for each line of requests."""
    started = time.perf_counter()
    with ThreadPoolExecutor(len(lines)) as pool:
        tokens = sum(pool.map(lambda line: ask(address, line), lines))
    seconds = time.perf_counter() - started
    return sum(map(len, lines)) / seconds, tokens / seconds


def main() -> None:
    """Prints the rates in turns, and by how much they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--decoder", default="greedy")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--each", type=int, default=3, help="requests of each client")
    parser.add_argument("--alone", type=int, default=32, help="requests of the one that is alone")
    parser.add_argument("--pictures", type=int, default=64, help="how many different ones are asked about")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    options = ["--model", given.model, "--decoder", given.decoder, "--batch-size", str(given.clients)]
    with served(options) as address:
        place = urlsplit(address)
        connection = HTTPConnection(place.hostname or "", place.port)
        connection.request("GET", "/v1/models")
        name = json.loads(connection.getresponse().read())["data"][0]["id"]
        bodies = [body(name, number % given.pictures, given.question, given.tokens) for number in range(given.clients)]
        rates(address, [[content] for content in bodies])  # to warm up
        for _ in range(given.rounds):
            alone, spoken = rates(address, [(bodies * given.alone)[: given.alone]])
            many, said = rates(address, [[content] * given.each for content in bodies])
            print(
                f"alone {alone:.2f} answers/s ({spoken:.0f} tokens/s), {given.clients} clients {many:.2f} answers/s "
                f"({said:.0f} tokens/s): {many / alone:.1f} times as many",
                flush=True,
            )


if __name__ == "__main__":
    main()
