import pytest

from vlmfix.demo import demonstrate, describe, page
from vlmfix.display import comparison_text
from vlmfix.errors import UsageError
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
    assert html.count("<del>kite</del>") == 3 - kites
    assert html.count("data:image/jpeg;base64,") == 3
    assert "&lt;a " in html


def test_a_bad_decoder_draws_nothing(tmp_path):
    with pytest.raises(UsageError, match="unknown decoder"):
        demonstrate(tmp_path / "demo", decoder="nonsense", seed=1)
    assert not (tmp_path / "demo").exists()
