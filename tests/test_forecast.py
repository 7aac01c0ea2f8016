"""What a run says beforehand of its time and memory."""

from __future__ import annotations

from vlmfix import display
from vlmfix.display import Forecast, run_display
from vlmfix.jobs.folder import Progress
from vlmfix.jobs.folder.output import Totals


def state(done, tokens, *, total=1000, before=0):
    return Progress(total, before, done, done - before, Totals(answers=done, tokens=tokens), 4, 3 << 30)


def test_a_forecast_is_made_once_from_the_batches_behind_the_first():
    clock = iter([0, 100, 102, 104, 106])
    forecast = Forecast(lambda: next(clock))
    assert [forecast.of(state(done, 10 * done)) for done in (0, 4, 8)] == ["", "", ""]
    assert forecast.of(state(9, 80)) == ""  # a picture that cannot be read
    said = forecast.of(state(12, 120))
    assert said == (
        "forecast, by 2 batches of 4: 0:08:14 for the 988 questions that are left, 20 tokens/s, "
        "at most 3.0 GiB of memory so far"
    )
    assert forecast.of(state(16, 160)) == ""


def test_a_start_that_goes_on_counts_from_where_it_began():
    clock = iter([0, 1, 2, 3])
    forecast = Forecast(lambda: next(clock))
    said = [forecast.of(state(done, done, before=500)) for done in (500, 502, 504, 506)]
    assert said[:3] == ["", "", ""]
    assert "0:04:07 for the 494 questions that are left, 2 tokens/s" in said[3]


def test_short_work_needs_none():
    clock = iter([0, 1, 2, 3, 4])
    forecast = Forecast(lambda: next(clock))
    assert not any(forecast.of(state(done, done, total=20)) for done in (0, 4, 8, 12, 16))


def test_it_waits_until_there_is_a_rate_and_is_printed(monkeypatch, capsys):
    clock = iter([0, 1, 1.1, 1.2, 5])
    monkeypatch.setattr(display, "Forecast", lambda: Forecast(lambda: next(clock)))
    with run_display() as report:
        for done in (0, 4, 8, 12, 16):
            report(state(done, done))
    told = capsys.readouterr().err
    assert told.count("vlmfix: forecast, by 3 batches of 4: ") == 1
