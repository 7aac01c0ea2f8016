"""What a page says of single words: how probable they were, and what they owe to which part of the picture."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from PIL import Image

from tests.jobs.fake import draw
from tests.view.made import flags, parsed, picture, run
from vlmfix.view.marks import Piece, pieces
from vlmfix.view.sheet import Word

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def pictures(tmp_path):
    for number in range(12):
        picture(tmp_path / "pictures" / f"{number}.png", (20 * number, 0, 0))
    return tmp_path / "pictures"


def page_of(vlmfix, *arguments):
    code, _, told = vlmfix("view", *arguments)
    assert code == 0, told
    return parsed((arguments[0] / "view.html").read_text())


def test_pieces_are_cut_at_words_too():
    words = (Word(2, 5, 0.5), Word(5, 6))
    cut = pieces("a dog.", [(2, 5, "absent")], [(0, 3)], words)
    assert cut == [
        Piece("a ", "", True),
        Piece("d", "absent", True, words[0]),
        Piece("og", "absent", False, words[0]),
        Piece(".", "", False, words[1]),
    ]


def test_doubtful_words_are_underlined_and_say_how_probable_they_were(vlmfix, pictures, tmp_path):
    known = {"words": [[0, 1, -0.01], [2, 5, -3.0], [5, 6, -0.6]]}
    page = page_of(vlmfix, run(tmp_path / "out", pictures, [("0.png", "What?", "A dog.", known)]))
    assert [(word.text, word.attributes["class"], word.attributes["title"]) for word in page.all("span", "word")] == [
        ("dog", "word doubt-1", "probability 5 %"),
        (".", "word doubt-3", "probability 55 %"),
    ]
    assert "under 10%" in next(page.all("p", "legend")).text
    assert not next(page.all("p", "text")).attributes.get("data-grid")


def test_uncertainty_stands_under_the_answer_and_on_its_words_and_flags_stand_out(vlmfix, pictures, tmp_path):
    scored = [
        [0, 1, -0.01, 0.1, 0.001, 0.2],
        [1, 3, -2.0, 1.0, 0.2, 0.1],
        [3, 5, -1.0, 1.0, 0.1, 0.1],
        [5, 6, 0, 0, 0, 0.3],
    ]
    named = {"word": "dog", "begin": 2, "end": 5, "sar": 0.3, "picture": 0.1, "flagged": True}
    known = {"sar": 0.301, "scored": scored, "objects": [named]}
    page = page_of(vlmfix, run(tmp_path / "out", pictures, [("0.png", "What?", "A dog.", known)]))
    assert [(word.text, word.attributes["class"], word.attributes["title"]) for word in page.all("span", "word")] == [
        ("dog", "word flagged doubt-1", "probability 5 %, SAR 0.3")
    ]
    assert [tag.text for tag in page.all("span", "tag")] == ["SAR 0.30"]
    assert "owe little to the picture" in next(page.all("p", "legend")).text


@pytest.mark.parametrize("words", [[[2, 9, -1]], [[3, 2, -1]], [[2, 5, -1], [4, 6, -1]]])
def test_places_that_fit_the_text_no_more_are_left_out(vlmfix, pictures, tmp_path, words):
    page = page_of(vlmfix, run(tmp_path / "out", pictures, [("0.png", "What?", "A dog.", {"words": words})]))
    assert [text.text for text in page.all("p", "text")] == ["A dog."]
    assert not list(page.all("span", "word"))


def test_the_least_sure_answers_of_a_column_can_be_filtered(vlmfix, pictures, tmp_path):
    told = [(f"{n}.png", "What?", "A dog.", {"logprob": -0.1 * n}) for n in range(12)]
    page = page_of(vlmfix, run(tmp_path / "out", pictures, told))
    names = [name.text for name in page.all("p", "name")]
    assert [name for name, found in zip(names, flags(page), strict=True) if "unsure" in found] == ["10.png", "11.png"]
    tags = [tag.text for tag in page.all("span", "unsure")]
    assert tags == ["least sure: 37% per token", "least sure: 33% per token"]
    assert "least sure 2" in [button.text for button in page.all("button", "chip")]
    few = page_of(vlmfix, run(tmp_path / "few", pictures, told[:9]))
    assert not any("unsure" in found for found in flags(few))


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A folder of two answers of the embedded model, and its page with maps."""
    from vlmfix import cli

    place = tmp_path_factory.mktemp("answered")
    draw(place / "in", 1)
    Image.new("RGB", (90, 60), "white").save(place / "in" / "0001.png")
    how = ["--max-new-tokens", "8", "--decoder", "greedy", "--words", "--system", "Be brief."]
    assert cli._run(["run", str(place / "in"), "--out", str(place / "out"), *how]) == 0
    assert cli._run(["view", str(place / "out"), "--grounding"]) == 0
    return place / "out"


def test_words_have_maps_of_their_pictures(answered):
    page = parsed((answered / "view.html").read_text())
    square, wide = page.all("p", "text")
    assert (square.attributes["data-grid"], wide.attributes["data-grid"]) == ("16x16", "16x11")
    for text, cells in ((square, 256), (wide, 176)):
        words = list(text.all("span", "heated"))
        assert [word.text for word in words] == re.findall(r"\w+|[^\w\s]", text.text)
        assert all(re.fullmatch(f"[0-9a-f]{{{cells}}}", word.attributes["data-heat"]) for word in words)
        assert any("f" in word.attributes["data-heat"] for word in words)
        assert all(word.attributes["title"].startswith("probability ") for word in words)


def test_maps_need_the_model_of_the_answers(answered, vlmfix, tmp_path, pictures):
    code, _, told = vlmfix("view", answered, "--model", tmp_path)
    assert (code, "--model is for --grounding alone" in told) == (2, True)
    other = tmp_path / "out"
    shutil.copytree(answered, other)
    card = (other / "run.json").read_text().replace('"model": "tiny"', '"model": "/gone"')
    (other / "run.json").write_text(card)
    code, _, told = vlmfix("view", other, "--grounding")
    assert (code, "the model's directory /gone is not there" in told) == (1, True)
    text = (answered / "answers.jsonl").read_text()
    (answered / "answers.jsonl").write_text(re.sub(r'"answer": "[^"]*"', '"answer": "\\\\u200b\\\\ud83d"', text))
    try:
        code, _, told = vlmfix("view", answered, "--grounding", "--out", tmp_path / "odd.html")
        assert (code, 'data-heat="' in (tmp_path / "odd.html").read_text()) == (0, False), told
    finally:
        (answered / "answers.jsonl").write_text(text)


def test_a_server_gives_maps_with_the_page_that_is_asked_for(answered):
    from vlmfix.view.folders import read_sheet
    from vlmfix.view.heat import Heat
    from vlmfix.view.server import SheetServer

    sheet, loaded = read_sheet([answered]), []

    def loader(model, **how):
        import vlmfix

        loaded.append(model)
        return vlmfix.load(model, **how)

    with SheetServer(sheet, 1, Heat(sheet.columns, loader=loader)) as server:
        assert loaded == []
        assert 'data-heat="' in server.part("", "", 1)
        assert 'data-heat="' in server.part("", "", 2)
    assert loaded == ["tiny"]


def test_grounding_makes_a_page_of_one_answer(vlmfix, tmp_path):
    picture(tmp_path / "a.png", "red")
    how = ("grounding", tmp_path / "a.png", "What?", "--answer", "a dog", "--page", tmp_path / "page.html", "--json")
    code, _, told = vlmfix(*how)
    assert (code, "the words on their picture" in told) == (0, True)
    page = parsed((tmp_path / "page.html").read_text())
    assert [word.text for word in page.all("span", "word")] == ["a", "dog"]
    assert [image.attributes["src"][:22] for image in page.all("img")] == ["data:image/jpeg;base64"]
    assert vlmfix(*how)[0] == 0
    (tmp_path / "page.html").write_text("mine")
    assert vlmfix(*how)[0] == 1


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_a_browser_paints_the_map_of_the_word_that_is_chosen(answered, tmp_path):
    text = (answered / "view.html").read_text()
    text = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    press = "for (const key of 'wwb') dispatchEvent(new KeyboardEvent('keydown', {key}));"
    (tmp_path / "page.html").write_text(text.replace("</body>", f"<script>{press}</script></body>"))
    how = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run(
        [*how, f"file://{tmp_path}/page.html"], capture_output=True, text=True, check=True, timeout=60
    )
    page = parsed(done.stdout)
    (canvas,) = page.all("canvas")
    assert (canvas.attributes["width"], canvas.attributes["height"]) == ("16", "16")
    assert [word.attributes["class"].split()[-1] for word in page.all("span", "on")] == ["on"]
    first = next(page.all("span", "word"))
    assert "on" in first.attributes["class"].split()
