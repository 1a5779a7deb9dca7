"""What a run is at, and how long that took before."""

import math

from pipeline.monitoring import activity
from pipeline.monitoring.activity import Activity


def test_each_kind_is_compared_with_its_own_past(monkeypatch):
    now = 100.0
    monkeypatch.setattr(activity.time, "monotonic", lambda: now)
    doing = Activity()
    assert (doing.kind, doing.number) == ("start", 0)
    assert math.isnan(doing.typical())
    seen = []
    # The first step takes 60 s (kernels compile), a checkpoint 30, then steps take 2, 4 and 3.
    for kind, seconds in [("step", 7), ("step", 60), ("checkpoint", 2), ("step", 30), ("step", 4), ("checkpoint", 3)]:
        now += seconds
        doing.begin(kind)
        seen.append(doing.typical())
    # Medians of [], [60], [], [60, 2], [60, 2, 4], [30].
    assert [value for value in seen if not math.isnan(value)] == [60, 31, 4, 30]
    assert [math.isnan(value) for value in seen] == [True, False, True, False, False, False]
    assert doing.number == 6
