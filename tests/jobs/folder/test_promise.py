"""The promise of a shared run, at a small size: `python -m tools.promise` has the large ones."""

from tests.processes import server
from tools.promise import HOSTILE, Plan, keep


def test_nothing_is_lost_and_nothing_twice(tmp_path):
    plan = Plan(pictures=1500, workers=4, kills=6, stalls=1, full=1, lease=0.5, rows=8)
    kept = keep(plan, tmp_path / "promise" / "run", context=server())
    assert (kept.lost, kept.twice, kept.wrong) == (0, 0, 0)
    assert (kept.failures, kept.answers) == (1500 // HOSTILE, 1500 - 1500 // HOSTILE)
    assert kept.kills == 6
    assert kept.repeated < 0.1
