import io
import json
import re
from base64 import b64decode

import pytest
from PIL import Image

from tests.view.made import answers, caption, evaluation, flags, lines, parsed, picture, run
from vlmfix.evals.task import Sample

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`&amp; \ud800 \0 \u202e {{ 7 * 7 }} {% raw %}"
SHOWN = NASTY.replace("\ud800", "\\ud800").replace("\0", "\\u0000").replace("\u202e", "\\u202e")


@pytest.fixture
def pictures(tmp_path):
    for number, colour in enumerate(("red", "green", "blue")):
        picture(tmp_path / "pictures" / f"{number}.png", colour, (1200, 600) if number == 0 else (30, 20))
    return tmp_path / "pictures"


@pytest.fixture
def view(vlmfix, tmp_path):
    """Makes a page with the command; gives it as a tree, with what was said on the standard error."""

    def call(*arguments, code=0):
        out = tmp_path / "page.html"
        ended, said, err = vlmfix("view", *arguments, "--out", out)
        assert (ended, said) == (code, ""), err
        return (parsed(out.read_text()) if code == 0 else None), err

    return call


def plain(pictures, tmp_path, name="plain", **how):
    told = [(f"{number}.png", "What?", f"A dog and {number} cats.") for number in range(3)]
    return run(tmp_path / name, pictures, told, **how)


def test_a_run_is_shown_with_its_pictures(view, pictures, tmp_path):
    page, err = view(plain(pictures, tmp_path, quantize="4bit", max_pixels=None))
    assert "the answers beside their pictures" in err
    assert answers(page) == [["A dog and 0 cats."], ["A dog and 1 cats."], ["A dog and 2 cats."]]
    sources = [b64decode(image.attributes["src"].partition(",")[2]) for image in page.all("img")]
    sizes = [Image.open(io.BytesIO(source)).size for source in sources]
    assert sizes == [(480, 240), (30, 20), (30, 20)]
    assert [image.attributes["alt"] for image in page.all("img")] == ["0.png", "1.png", "2.png"]
    (facts,) = page.all("table")
    subtitle = "tiny (abc) · 2026-11-29 07:50 to 2026-11-29 08:00 · vlmfix 0.1.0 · torch 2.14.1 · transformers 5.24.0"
    assert [line.text for line in page.all("p", "intro")] == [subtitle]
    for fact in ("tiny (abc)", "greedy", "up to 128 tokens", "2026-11-29 07:50 to 2026-11-29 08:00", "4bit"):
        assert fact in facts.text
    assert [asked.text.split("  ")[0].strip() for asked in page.all("p", "asked")] == [
        "Asked about every picture What?"
    ]


def test_nothing_is_loaded_from_elsewhere_and_nothing_foreign_may_run(view, pictures, tmp_path):
    page, _ = view(plain(pictures, tmp_path), plain(pictures, tmp_path, "other", decoder="vcd"))
    text = (tmp_path / "page.html").read_text()
    assert not re.findall(
        r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[\w+/=]+", "", text).replace("// a page", "")
    )
    named = [
        node.attributes[name]
        for tag in ("img", "link", "script", "a", "form")
        for node in page.all(tag)
        for name in ("src", "href", "action")
        if name in node.attributes
    ]
    assert named
    assert all(name.startswith("data:") for name in named)
    (policy,) = [meta.attributes["content"] for meta in page.all("meta") if "http-equiv" in meta.attributes]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert len(list(page.all("script"))) == 1


def test_what_names_and_answers_hold_is_text(view, pictures, tmp_path):
    asked, label = f"Prompt {NASTY}", f"vcd {NASTY}"
    image = "a<b>'\".png"
    (pictures / "0.png").rename(pictures / image)
    folder = run(
        tmp_path / "run",
        pictures,
        [(image, asked, f"Answer {NASTY}", {"finish": NASTY})],
        [{"image": NASTY, "reason": f"Reason {NASTY}"}],
        decoder=label,
        model=f"Model {NASTY}",
    )
    page, err = view(folder)
    assert answers(page) == [[], [f"Answer {SHOWN}"]]
    assert f"Reason {SHOWN}" in next(page.all("p", "none")).text
    assert f"Prompt {SHOWN}" in next(page.all("header")).text
    assert [name.text for name in page.all("p", "name")] == [SHOWN, image]
    assert f"Model {SHOWN}" in next(page.all("table")).text
    assert [(len(list(page.all(tag)))) for tag in ("script", "img")] == [1, 1]
    assert not [node for node in page.all("img") if "onerror" in node.attributes]
    assert "\0" not in (tmp_path / "page.html").read_text() + err


def test_answers_of_two_folders_stand_side_by_side_with_the_words_that_differ(view, pictures, tmp_path):
    first = plain(pictures, tmp_path)
    second = run(
        tmp_path / "second",
        pictures,
        [("1.png", "What?", "A dog and 1 cats."), ("0.png", "What?", "A cat and 0 cats.", {"finish": "length"})],
        [{"image": "2.png", "prompt": "What?", "reason": "ValueError: odd"}],
        decoder="vcd:contrast=0.5+spin:preset=paper",
    )
    page, _ = view(first, second)
    assert answers(page) == [
        ["A dog and 0 cats.", "A cat and 0 cats."],
        ["A dog and 1 cats."] * 2,
        ["A dog and 2 cats."],
    ]
    assert flags(page) == [["differs", "cut"], [], ["failed"]]
    row = next(page.all("section", "row"))
    assert [mark.text for mark in row.all("span", "differs")] == ["dog", "cat"]
    assert [head.text for head in row.all("h3")] == ["greedy", "vcd+spin"]
    chips = {
        chip.attributes["data-filter"]: chip.text.split()[-1]
        for chip in page.all("button", "chip")
        if "data-filter" in chip.attributes
    }
    assert chips == {"": "3", "differs": "1", "failed": "1", "cut": "1"}


def test_pictures_are_the_same_by_their_content_and_not_by_their_name(view, pictures, tmp_path):
    first = plain(pictures, tmp_path)
    others = tmp_path / "others"
    picture(others / "other" / "name.png", "green")
    picture(others / "0.png", "yellow")
    told = [("other/name.png", "What?", "Green."), ("0.png", "What?", "Yellow.")]
    page, err = view(first, run(tmp_path / "second", others, told))
    assert answers(page) == [["A dog and 0 cats."], ["A dog and 1 cats.", "Green."], ["A dog and 2 cats."], ["Yellow."]]
    assert [head.text for head in next(page.all("section", "row")).all("h3")] == ["plain: greedy", "second: greedy"]
    for note in (
        f"1 picture not in {first}: 0.png; 1 of them have the same name and other contents there.",
        f"2 pictures not in {tmp_path}/second: 0.png, 2.png; 1 of them have the same name and other contents there.",
    ):
        assert note in [shown.text for shown in page.all("p", "note")]
        assert note in err
    assert "without an answer" not in err


def test_copies_and_several_prompts_stay_apart(view, pictures, tmp_path):
    (pictures / "copy.png").write_bytes((pictures / "1.png").read_bytes())
    told = [(name, prompt, f"{prompt} {name}") for name in ("1.png", "copy.png") for prompt in ("A?", "B?")]
    page, _ = view(run(tmp_path / "one", pictures, told), run(tmp_path / "two", pictures, told[::-1], decoder="vcd"))
    assert [[text for text in row] for row in answers(page)] == [
        ["A? 1.png"] * 2,
        ["B? 1.png"] * 2,
        ["A? copy.png"] * 2,
        ["B? copy.png"] * 2,
    ]
    assert [len(list(card.all("section", "row"))) for card in page.all("article")] == [2, 2]
    assert [head.text for head in page.all("h2")][:2] == ["A?", "B?"]


def test_pictures_that_are_gone_changed_or_elsewhere_are_said(view, pictures, tmp_path):
    told = [(f"{number}.png", "What?", "A dog.") for number in range(3)]
    secret = picture(tmp_path / "secret.png", "black")
    told += [
        ("../secret.png", "What?", "Black.", {"sha256": secret}),
        (str(tmp_path / "secret.png"), "What?", "Black.", {"sha256": secret}),
    ]
    folder = run(tmp_path / "run", pictures, told, [{"image": "text.png", "reason": "not a picture"}])
    (pictures / "text.png").write_text("nothing")
    (pictures / "0.png").unlink()
    picture(pictures / "1.png", "white")
    page, _ = view(folder)
    found = {
        card.all("p", "name").__next__().text: [gone.text for gone in card.all("p", "gone")]
        for card in page.all("article")
    }
    assert found == {
        "../secret.png": ["The name leads out of the folder of the pictures."],
        str(tmp_path / "secret.png"): ["The name leads out of the folder of the pictures."],
        "0.png": ["The picture is no longer where it was."],
        "1.png": ["The file was changed since: the model saw another picture."],
        "2.png": [],
        "text.png": ["The picture cannot be shown: not a picture (JPEG, PNG, WEBP, TIFF, BMP, GIF are read)."],
    }
    moved = tmp_path / "moved"
    pictures.rename(moved)
    page, _ = view(folder, "--images", moved)
    assert len(list(page.all("img"))) == 1


def test_a_picture_that_failed_in_one_folder_is_held_to_the_digest_of_another(view, pictures, tmp_path):
    first = run(tmp_path / "first", pictures, [], [{"image": "0.png", "reason": "odd"}])
    second = run(tmp_path / "second", pictures, [("0.png", "What?", "Red.")], decoder="vcd")
    picture(pictures / "0.png", "white")
    page, _ = view(first, second)
    assert [gone.text for gone in page.all("p", "gone")] == [
        "The file was changed since: the model saw another picture."
    ]
    assert flags(page) == [["failed"], []]


def test_the_one_picture_of_a_run_is_found(view, pictures, tmp_path):
    folder = run(tmp_path / "run", pictures, [("0.png", "What?", "Red.")])
    card = json.loads((folder / "run.json").read_text())
    card["settings"]["pictures"] = str(pictures / "0.png")
    (folder / "run.json").write_text(json.dumps(card))
    page, _ = view(folder)
    assert len(list(page.all("img"))) == 1


def test_captions_are_held_to_the_truth(view, pictures, tmp_path):
    samples = [caption(0, ["dog"]), caption(1, ["cat"])]
    arms = {"greedy": ["A dog and a <kite>.", "A cat."], "vcd": ["A puppy.", None]}
    page, err = view(evaluation(tmp_path / "chair", "chair", samples, pictures, arms))
    assert flags(page) == [["differs", "absent"], []]
    first = next(page.all("article"))
    assert [mark.text for mark in first.all("del", "absent")] == ["kite"]
    assert [mark.text for mark in first.all("b")] == ["dog", "puppy"]
    assert "not there: kite" in first.text
    assert "In the picture: dog" in next(first.all("div", "picture")).text
    assert "1 of 3 objects mentioned are not in the picture" in next(page.all("ul", "summary")).text
    assert "1 question about the same pictures without an answer by vcd." in err
    assert "unfinished" in next(page.all("table")).text


def test_what_a_contrast_left_alone_stands_beside_the_answers_of_an_evaluation(view, pictures, tmp_path):
    folder = evaluation(tmp_path / "eval", "chair", [caption(0)], pictures, {"greedy": ["A dog."], "vcd": ["A cat."]})
    assert "left alone" not in view(folder)[0].text
    file = folder / "vcd" / "answers.jsonl"
    (line,) = map(json.loads, file.read_text().splitlines())
    lines(file, [line | {"ids": [1, 2, 3], "skipped": 2}])
    page, _ = view(folder)
    assert [tag.text for tag in page.all("span", "tag") if "left" in tag.text] == ["left alone: 2 of 3 tokens"]


def test_a_yes_to_what_is_not_there_names_something_absent(view, pictures, tmp_path):
    samples = [
        Sample(id=f"random/{n}", image="0.png", prompt=f"Is there a {name}?", target={"label": label}, group="random")
        for n, (name, label) in enumerate((("dog", "yes"), ("cat", "no"), ("kite", "no")))
    ]
    arms = {"greedy": ["Yes.", "Well, yes.", "No."], "vcd": ["No.", "No.", "No."]}
    page, _ = view(evaluation(tmp_path / "pope", "pope", samples, pictures, arms))
    assert flags(page) == [["differs", "wrong"], ["differs", "absent", "wrong"], []]
    assert [mark.text for mark in page.all("del", "absent")] == ["yes"]
    assert len(list(page.all("article"))) == len(list(page.all("img"))) == 1
    assert "Right answer: no" in list(page.all("h2"))[1].text
    assert "2 of 3 right" in next(page.all("ul", "summary")).text


def test_a_run_beside_an_evaluation_is_held_to_its_truth(view, pictures, tmp_path):
    checked = evaluation(tmp_path / "chair", "chair", [caption(0)], pictures, {"greedy": ["A dog."]})
    page, _ = view(run(tmp_path / "run", pictures, [("0.png", "Describe.", "A kite.")], decoder="vcd"), checked)
    assert [mark.text for mark in page.all("del", "absent")] == ["kite"]


def test_a_page_has_so_many_pictures_and_says_how_to_see_the_rest(view, pictures, tmp_path):
    page, err = view(plain(pictures, tmp_path), "--limit", 2)
    assert len(list(page.all("article"))) == 2
    (note,) = [note.text for note in page.all("p", "note")]
    assert note.startswith("The first 2 of 3 pictures are on this page, 1 are left out: --limit")
    assert "--serve" in note
    assert "1 of 3 pictures are left out; see --limit and --serve" in err
    assert "3 answers" in next(page.all("ul", "summary")).text


def test_a_folder_without_answers_makes_a_page(view, pictures, tmp_path):
    page, _ = view(run(tmp_path / "empty", pictures, []))
    assert answers(page) == []
    assert [
        node for node in page.all("p") if node.attributes.get("id") == "nothing" and "hidden" not in node.attributes
    ]


@pytest.mark.parametrize("name", ["run.json", "answers.jsonl", "failed.jsonl"])
@pytest.mark.parametrize("content", ["{}\n", "[]\n", '{"image": 3}\n', "nonsense\n", "\0\n"])
def test_a_broken_folder_is_named(view, pictures, tmp_path, name, content):
    folder = plain(pictures, tmp_path)
    (folder / name).write_text(content)
    _, err = view(folder, code=1)
    assert str(folder / name) in err
    assert not (tmp_path / "page.html").exists()


def test_settings_of_a_wrong_kind_are_named(view, pictures, tmp_path):
    _, err = view(plain(pictures, tmp_path, temperature="hot"), code=1)
    assert "settings.temperature is 'hot', not a number" in err


def test_a_folder_of_something_else_is_refused(view, pictures, tmp_path):
    _, err = view(pictures, code=1)
    assert "holds neither run.json nor card.json" in err
    folder = plain(pictures, tmp_path)
    _, err = view(folder, folder / ".." / "plain", code=2)
    assert "is given twice" in err
    picture(tmp_path / "apart" / "0.png", "yellow")
    _, err = view(folder, run(tmp_path / "other", tmp_path / "apart", [("0.png", "What?", "Yellow.")]), code=2)
    assert "no picture is in all of" in err


def test_the_page_lies_in_the_first_folder_and_replaces_only_its_own(vlmfix, pictures, tmp_path):
    folder = plain(pictures, tmp_path)
    for _ in range(2):
        code, _, err = vlmfix("view", folder)
        assert code == 0, err
    page = folder / "view.html"
    assert "A dog and 0 cats." in page.read_text()
    for foreign in ("<!doctype html>\n<title>mine</title>", ""):
        page.write_text(foreign)
        code, _, err = vlmfix("view", folder)
        assert code == 1
        assert "view.html is there and is no page of vlmfix view" in err
        assert page.read_text() == foreign
    code, _, err = vlmfix("view", folder, "--out", tmp_path)
    assert (code, "is no page of vlmfix view" in err) == (1, True)


def test_an_unfinished_last_line_is_passed_over(view, pictures, tmp_path):
    folder = plain(pictures, tmp_path)
    with (folder / "answers.jsonl").open("a") as file:
        file.write('{"image": "2.png", "pro')
    page, _ = view(folder)
    assert len(answers(page)) == 3


def test_runs_of_earlier_versions_are_shown(view, pictures, tmp_path):
    folder = plain(pictures, tmp_path)
    told = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    lines(folder / "answers.jsonl", [{k: v for k, v in line.items() if k not in ("sha256", "finish")} for line in told])
    page, _ = view(folder)
    assert len(list(page.all("img"))) == 3
