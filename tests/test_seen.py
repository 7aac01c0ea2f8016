"""Which questions a run has met, kept in a few bytes each."""

import tracemalloc

from vlmfix import seen
from vlmfix.seen import Seen


def test_what_was_added_is_known_and_nothing_else():
    held = Seen()
    assert all([held.add(("a", "b")), held.add(("ab", "")), held.add("ab"), held.add("caf\udce9.png")])
    assert not held.add(("a", "b"))
    assert (len(held), ("a", "b") in held, ("", "ab") in held, "ab" in held, "a" in held) == (
        4,
        True,
        False,
        True,
        False,
    )


def test_a_copy_stays_as_it_was():
    held = Seen()
    held.add("a")
    other = held.copy()
    held.add("b")
    assert ("a" in other, "b" in other, len(other), len(held)) == (True, False, 1, 2)


def test_a_digest_that_lies_across_two_others_is_not_taken_for_one(monkeypatch):
    digests = {"one": b"x" * 5 + b"a" * 5, "two": b"a" * 5 + b"x" * 5, "across": b"a" * 10}
    monkeypatch.setattr(seen, "_digest", lambda text: (0, digests[text]))
    held = Seen()
    held.add("one")
    held.add("two")
    assert ("across" in held, "two" in held) == (False, True)


def test_names_however_long_take_few_bytes(monkeypatch):
    monkeypatch.setattr(seen, "BUCKETS", 256)
    count = 20_000
    tracemalloc.start()
    try:
        held = Seen()
        for number in range(count):
            held.add((f"a/long/folder/of/pictures/{number:060d}.jpg", "What is to be seen here, and where?"))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(held), kept < 16 * count) == (count, True)
