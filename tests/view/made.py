"""Folders of answers made without a model, and pages read back as a tree."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from html.parser import HTMLParser

from PIL import Image

from vlmfix.evals.record import FORMAT, digest
from vlmfix.evals.task import Sample

VOID = {"meta", "link", "img", "input", "wbr"}
DECODING = {"max_new_tokens": 128, "num_beams": 1, "temperature": 0.0, "seed": 0}
SESSION = {
    "started": "2026-11-29T07:50:07+00:00",
    "device": "cpu",
    "peak_memory": 1,
    "versions": {"vlmfix": "0.1.0", "torch": "2.14.1", "transformers": "5.24.0"},
}


def picture(path, colour, size=(30, 20)):
    """Draws a picture; gives the digest of its file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, "PNG")
    return sha256(path)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lines(path, objects):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in objects))


def run(folder, pictures, answers, failed=(), decoder="greedy", **changed):
    """Writes what `vlmfix run` writes; an answer is (image, prompt, text) with digest and finish as they come."""
    told = []
    for image, prompt, text, *more in answers:
        known = {"sha256": sha256(pictures / image)} if (pictures / image).is_file() else {}
        line = {"image": image, **known, "prompt": prompt, "answer": text, "tokens": 3, "finish": "eos", "seconds": 0.5}
        told.append(line | (more[0] if more else {}))
    lines(folder / "answers.jsonl", told)
    lines(folder / "failed.jsonl", failed)
    settings = {"pictures": str(pictures), "model": "tiny", "decoder": decoder, "commit": "abc", **DECODING}
    card = {"settings": settings | changed, "sessions": [SESSION], "finished": True, "updated": "2026-11-29T08:00:00"}
    (folder / "run.json").write_text(json.dumps(card))
    return folder


def evaluation(folder, task, samples, pictures, arms, options=None):
    """Writes what `vlmfix eval` writes; each arm has one answer per sample, or None for one not yet asked."""
    lines(folder / "samples.jsonl", [asdict(sample) for sample in samples])
    for arm, said in arms.items():
        answered = [
            {
                "id": sample.id,
                "image": sample.image,
                "sha256": sha256(pictures / sample.image),
                "answer": text,
                "ids": [1],
                "finish": "eos",
            }
            for sample, text in zip(samples, said, strict=True)
            if text is not None
        ]
        lines(folder / arm / "answers.jsonl", answered)
    card = {
        "format": FORMAT,
        "task": task,
        "options": options or {},
        "data": {},
        "samples": digest(samples),
        "count": len(samples),
        "images": str(pictures),
        "model": "tiny",
        "decoding": DECODING,
        "arms": {arm: {"spec": arm, "parameters": {}} for arm in arms},
        "sessions": [{"versions": SESSION["versions"]}],
    }
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def caption(number, objects=("dog",)):
    target = {"objects": list(objects), "captions": ["A picture."]}
    return Sample(id=str(number), image=f"{number}.png", prompt="Describe.", target=target)


@dataclass
class Node:
    tag: str
    attributes: dict
    inside: list = field(default_factory=list)

    @property
    def text(self):
        return "".join(part if isinstance(part, str) else part.text for part in self.inside)

    def all(self, tag, name=""):
        """Every element of a tag below, with the class if one is named."""
        for part in self.inside:
            if isinstance(part, Node):
                if part.tag == tag and (not name or name in part.attributes.get("class", "").split()):
                    yield part
                yield from part.all(tag, name)


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open = [Node("", {})]

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs))
        node = Node(tag, dict(attrs))
        self.open[-1].inside.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> in <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].inside.append(data)


def parsed(text):
    """A page as a tree; every element that is opened is closed."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert len(reader.open) == 1
    return reader.open[0]


def answers(page):
    """For each question of a page the texts that its answers show."""
    return [[text.text for text in row.all("p", "text")] for row in page.all("section", "row")]


def flags(page):
    return [row.attributes["data-flags"].split() for row in page.all("section", "row")]
