import time

from vlmfix.view.marks import Piece, differences, pieces, side_by_side


def marked(first, second):
    found = differences(first, second)
    return [[text[start:end] for start, end in spans] for text, spans in zip((first, second), found, strict=True)]


def test_the_words_are_found_that_the_other_text_lacks():
    assert marked("A red dog sits.", "A blue dog sits, too.") == [["red"], ["blue", ", too"]]
    assert marked("A dog", "A dog") == [[], []]
    assert marked("", "A dog") == [[], ["A dog"]]
    assert marked("the dog's ball", "the dog ball") == [["dog's"], ["dog"]]


def test_white_space_is_no_difference():
    assert marked("A dog\n\n sits.", "A dog sits.") == [[], []]


def test_words_in_a_row_are_one_place():
    assert marked("There is a cat.", "There is a very small dog.") == [["cat"], ["very small dog"]]


def test_texts_that_repeat_themselves_without_end_take_no_time():
    begun = time.perf_counter()
    first, second = "so on and " * 3000 + "x", "and so on " * 3000 + "y"
    before, after = differences(first, second)
    assert time.perf_counter() - begun < 5
    assert (before, after) == ([(0, len(first))], [(0, len(second))])


def test_of_two_answers_both_are_marked_and_of_more_all_but_the_first():
    assert side_by_side(["a b", None, "a c"]) == [[(2, 3)], [], [(2, 3)]]
    assert side_by_side(["a b", "a b", "a c"]) == [[], [], [(2, 3)]]
    assert side_by_side(["a b"]) == [[]]
    assert side_by_side([None, None]) == [[], []]


def test_pieces_are_the_text_with_both_kinds_of_marks():
    text = "A red dog and a cat."
    found = pieces(text, [(6, 9, "absent"), (16, 19, "present")], [(2, 9)])
    assert "".join(piece.text for piece in found) == text
    assert [piece for piece in found if piece.kind or piece.differs] == [
        Piece("red ", differs=True),
        Piece("dog", "absent", differs=True),
        Piece("cat", "present"),
    ]
    assert pieces("") == []
