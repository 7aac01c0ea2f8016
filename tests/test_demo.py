import pytest

from tests.view.made import answers, parsed
from vlmfix.demo import demonstrate, describe, page
from vlmfix.display import comparison_text
from vlmfix.errors import DataError, UsageError
from vlmfix.generation import Answer
from vlmfix.world.scenes import scene


def test_objects_are_marked_where_they_are_named():
    text = "A hot dog and two Dogs; a teddy bear. No bear, three people."
    described = describe(text, ("hot dog", "person"))
    assert "".join(words for words, _ in described.pieces) == text
    assert [piece for piece in described.pieces if piece[1]] == [
        ("hot dog", "present"),
        ("Dogs", "absent"),
        ("teddy bear", "absent"),
        ("bear", "absent"),
        ("people", "present"),
    ]
    assert described.named == ("hot dog", "dog", "teddy bear", "bear", "person")
    assert describe("Nothing.", ()).pieces == (("Nothing.", ""),)


class Speaker:
    """Names what is in the scene; plain, also what is not."""

    def __init__(self):
        self.asked = []

    def generate(self, pictures, prompts, *, decoder, max_new_tokens):
        self.asked.append(decoder.name)
        more = " and <a kite>" if decoder.name == "greedy" else ""
        present = [
            next(name for name in scene(5, number).counts() if name != "kite") for number in range(len(pictures))
        ]
        return [Answer(f"A {name}{more}", 4, "eos", 0.1, (5, 6, 7, 2)) for name in present]


def test_a_demonstration_counts_and_shows_both(tmp_path):
    speaker = Speaker()
    shown = demonstrate(tmp_path / "demo", decoder="vcd", seed=5, count=3, loader=lambda model: speaker)
    assert speaker.asked == ["greedy", "vcd"]
    plain, mitigated = shown.counts.values()
    kites = sum("kite" in scene(5, number).counts() for number in range(3))
    assert (plain.mentioned, plain.hallucinated, plain.found) == (6, 3 - kites, 3 + kites)
    assert (mitigated.mentioned, mitigated.hallucinated, mitigated.found) == (3, 0, 3)
    assert plain.present == mitigated.present == sum(len(scene(5, number).counts()) for number in range(3))
    text = comparison_text(shown)
    assert text.count("[kite]") == 3 - kites
    assert f"greedy: {3 - kites} of 6 objects mentioned are not in the picture" in text
    html = (tmp_path / "demo" / "index.html").read_text()
    assert html == page(shown)
    read = parsed(html)
    assert [mark.text for mark in read.all("del", "absent")] == ["kite"] * (3 - kites)
    assert html.count('src="data:image/jpeg;base64,') == 3
    assert answers(read)[0][0].endswith(" and <a kite>")
    assert f"{3 - kites} of 6 objects mentioned are not in the picture" in next(read.all("ul", "summary")).text


def test_a_bad_decoder_draws_nothing(tmp_path):
    with pytest.raises(UsageError, match="unknown decoder"):
        demonstrate(tmp_path / "demo", decoder="nonsense", seed=1)
    assert not (tmp_path / "demo").exists()


def test_a_page_of_something_else_is_not_touched(tmp_path):
    for text in ("<!doctype html>\n<title>mine</title>", ""):
        (tmp_path / "index.html").write_text(text)
        with pytest.raises(DataError, match="is no page of vlmfix demo"):
            demonstrate(tmp_path, decoder="vcd", seed=5, count=1, loader=lambda *_: Speaker())
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("index.html", text)]
    (tmp_path / "index.html").unlink()
    for _ in range(2):
        demonstrate(tmp_path, decoder="vcd", seed=5, count=1, loader=lambda *_: Speaker())
    assert "vlmfix demo" in (tmp_path / "index.html").read_text()


def test_a_full_disk_is_told_in_words(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    demonstrate(tmp_path, decoder="vcd", seed=5, count=1, loader=lambda *_: Speaker())
    before = (tmp_path / "index.html").read_text()
    monkeypatch.setattr("vlmfix.files.os.fsync", full)
    with pytest.raises(DataError, match=r"cannot write .*index\.html: No space left on device"):
        demonstrate(tmp_path, decoder="vcd", seed=5, count=1, loader=lambda *_: Speaker())
    assert (tmp_path / "index.html").read_text() == before
