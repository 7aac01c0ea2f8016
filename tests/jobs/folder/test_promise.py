"""The promise of a shared run, at a small size: `python -m tools.promise` has the large ones."""

from tests.processes import server
from tools.promise import HOSTILE, Plan, keep
from vlmfix.jobs.journal import DEATHS


def test_nothing_is_lost_and_nothing_twice(tmp_path):
    plan = Plan(pictures=1500, workers=4, kills=6, stalls=1, hangs=1, full=1, poison=2, lease=0.5, rows=8)
    kept = keep(plan, tmp_path / "promise" / "run", context=server())
    assert (kept.lost, kept.twice, kept.wrong) == (0, 0, 0)
    assert (kept.failures, kept.answers) == (1500 // HOSTILE + 2, 1500 - 1500 // HOSTILE - 2)
    assert (kept.kills, kept.given_up) == (6, 2)
    assert kept.deaths >= 2 * DEATHS
    assert kept.repeated < 0.1
