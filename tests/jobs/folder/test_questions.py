from pathlib import Path

import pytest

from vlmfix.errors import UsageError
from vlmfix.images import Found
from vlmfix.jobs.folder import Questions


def written(tmp_path, text):
    path = tmp_path / "prompts.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_one_prompt_for_all():
    assert Questions.text("What?").of_picture(Found("any.png", Path())) == ("What?",)


def test_a_column_of_prompts_is_for_every_picture(tmp_path):
    questions = Questions.file(written(tmp_path, 'prompt\nA?\n"B, or\nC?"\n'))
    assert questions.of_picture(Found("x.png", Path())) == ("A?", "B, or\nC?")
    questions.check([])


def test_rows_with_pictures_are_for_those_pictures(tmp_path):
    text = "\ufeffimage,prompt\r\na/x.png,A?\r\nb.png,B?\r\na/x.png,C\u2028?\r\n"
    questions = Questions.file(written(tmp_path, text))
    assert questions.of_picture(Found("a/x.png", Path())) == ("A?", "C\u2028?")
    assert questions.of_picture(Found("b.png", Path())) == ("B?",)
    assert questions.of_picture(Found("other.png", Path())) == ()
    assert questions.file_name.endswith("prompts.csv")


def test_all_missing_pictures_are_listed(tmp_path):
    questions = Questions.file(written(tmp_path, "image,prompt\n" + "".join(f"{n:02d}.png,A?\n" for n in range(13))))
    with pytest.raises(UsageError, match=r"12 pictures .* 00\.png, .*, 10\.png and 2 more") as caught:
        questions.check([Found("05.png", Path())])
    assert "05.png" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", r"columns \(none\)"),
        ("prompt\n", "no prompt"),
        ("question\nA?\n", "columns question"),
        ("image,prompt,extra\na,b,c\n", "columns image, prompt, extra"),
        ("prompt\nA?\nB?\nA?\n", "line 4 repeats line 2"),
        ("image,prompt\na.png,\n", "line 2 has an empty field"),
        ("image,prompt\n,A?\n", "line 2 has an empty field"),
        ("image,prompt\na.png\n", "line 2 has an empty field"),
        ("prompt\nA, B?\n", "line 2 has too many fields"),
        ('prompt\n"A?\n', "unexpected end of data"),
        (b"prompt\n\xff\xfe\n", "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path, text, problem):
    with pytest.raises(UsageError, match=problem):
        Questions.file(written(tmp_path, text))


def test_no_file_and_no_prompt(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        Questions.file(tmp_path / "none.csv")
    with pytest.raises(UsageError, match="empty"):
        Questions.text(" ")
