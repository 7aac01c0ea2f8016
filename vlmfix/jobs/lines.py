"""Names the files of a run over pictures, and declares the shapes of their lines, without loading a model."""

from __future__ import annotations

from vlmfix.shapes import COUNT, DURATION, FLAG, NUMBER, OBJECT, TEXT, TIME, fields, list_of

WORD = list_of(NUMBER, least=3)
"""What a line says of a word: begin and end in the answer, and log-probability."""
SCORED = list_of(NUMBER, least=5)
"""What a line says of a token: begin and end in the answer, log-probability, entropy and SAR; then what it owes to the
picture, where that was measured."""
NAMED = fields(
    {"word": TEXT, "begin": COUNT, "end": COUNT, "sar": NUMBER, "picture": NUMBER.or_null(), "flagged": FLAG}
)
"""What a line says of an object word."""
ANSWERS, FAILED, CARD = "answers.jsonl", "failed.jsonl", "run.json"
ANSWER = fields(
    {"image": TEXT, "prompt": TEXT, "answer": TEXT, "tokens": COUNT, "seconds": DURATION},
    {
        "sha256": TEXT,
        "finish": TEXT,
        "logprob": NUMBER.or_null(),
        "entropy": NUMBER.or_null(),
        "skipped": COUNT,
        "words": list_of(WORD),
        "sar": NUMBER.or_null(),
        "scored": list_of(SCORED),
        "objects": list_of(NAMED),
    },
)
RAY, QUESTIONS, ROWS, ACTORS = "ray", "questions", "answers", "workers"
"""Folder of what a run on Ray keeps below its own; in it those of questions, of answers, and of what actors note."""
ACTOR = fields(
    {
        "settings": OBJECT,
        "session": fields({"started": TEXT, "peak_memory": COUNT}),
        "totals": fields({"answers": COUNT, "failed": COUNT}),
        "updated": TIME,
    }
)
"""Shape of what an actor notes."""
MARKS = 12
"""Most times in a card at which it was noted how many questions were done: half a minute lies between two of them."""
FAILURE = fields({"image": TEXT, "reason": TEXT}, {"prompt": TEXT})
PROGRESS = fields({"total": COUNT, "left": COUNT, "recent": list_of(fields({"time": TIME, "done": COUNT}))})
"""Shape of what a card says of how far the run is."""
