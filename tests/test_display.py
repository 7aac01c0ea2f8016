"""What the command line shows while it works."""

import contextlib
import os
import signal

import pytest

from vlmfix.display import counting


def swallow_one():
    with counting("answers") as report:
        report(1, 3)
        with contextlib.suppress(KeyboardInterrupt):  # as Python does where an interrupt falls into a destructor
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 0.1)
        report(2, 3)


def test_an_interrupt_that_was_swallowed_is_raised_at_the_next_report():
    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        swallow_one()
    assert signal.getsignal(signal.SIGINT) is former


def test_without_an_interrupt_nothing_is_raised(capsys):
    with counting("answers") as report:
        report(1, 3)
        report(3, 3)
    assert "3 of 3 answers" in capsys.readouterr().err
