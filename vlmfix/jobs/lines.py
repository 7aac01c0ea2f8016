"""Names the files of a run over pictures, and declares the shapes of their lines, without loading a model."""

from __future__ import annotations

from vlmfix.shapes import COUNT, DURATION, NUMBER, TEXT, fields

ANSWERS, FAILED, CARD = "answers.jsonl", "failed.jsonl", "run.json"
ANSWER = fields(
    {"image": TEXT, "prompt": TEXT, "answer": TEXT, "tokens": COUNT, "seconds": DURATION},
    {"sha256": TEXT, "finish": TEXT, "logprob": NUMBER.or_null(), "entropy": NUMBER.or_null()},
)
FAILURE = fields({"image": TEXT, "reason": TEXT}, {"prompt": TEXT})
