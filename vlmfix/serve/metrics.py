"""What a server counts, in the format that Prometheus reads."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counts for one server.

    Attributes:
        requests: Requests by result: answered, refused, failed, overloaded, left or late.
        tokens: Tokens, of prompts and of answers.
        first: Seconds from a request's arrival to its first token.
        rows: Answers that were decoded together, by batch.
        waiting: Requests that wait for their turn.
    """

    kind = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("vlmfix_requests", "Requests by result.", ["result"], registry=registry)
        self.tokens = Counter("vlmfix_tokens", "Tokens of prompts and of answers.", ["kind"], registry=registry)
        self.first = Histogram(
            "vlmfix_first_token_seconds", "Seconds to the first token.", buckets=SECONDS, registry=registry
        )
        self.rows = Histogram("vlmfix_batch_rows", "Answers decoded together.", buckets=ROWS, registry=registry)
        self.waiting = Gauge("vlmfix_waiting_requests", "Requests that wait for their turn.", registry=registry)

    def text(self) -> bytes:
        """Returns all counts as Prometheus reads them."""
        return generate_latest(self._registry)
