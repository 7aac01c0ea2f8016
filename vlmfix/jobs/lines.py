"""What a run over pictures writes: the names of its files and what a line of them holds, known without a model."""

from __future__ import annotations

from vlmfix.shapes import COUNT, DURATION, TEXT, fields

ANSWERS, FAILED, CARD = "answers.jsonl", "failed.jsonl", "run.json"
ANSWER = fields(
    {"image": TEXT, "prompt": TEXT, "answer": TEXT, "tokens": COUNT, "seconds": DURATION},
    {"sha256": TEXT, "finish": TEXT},
)
FAILURE = fields({"image": TEXT, "reason": TEXT}, {"prompt": TEXT})
