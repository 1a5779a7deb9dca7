"""What the bench of the small step makes of the times of its sides."""

from tools.bench.step_time import compared


def test_ratios_are_taken_within_a_round():
    """In the second round the machine was busy with something else: its own ratio is the others'."""
    times = {
        "torch": [(0.1, 0.09), (0.4, 0.11), (0.1, 0.1)],
        "inline": [(0.12, 0.1), (0.48, 0.1), (0.13, 0.13)],
        "limit": [(0.02, 0.02), (0.08, 0.02), (0.02, 0.02)],
    }
    found = compared(times)
    assert found["inline"] == {"ms": 130.0, "CPU ms": 110.0, "over torch": 1.2, "over limit": 6.0}
    assert (found["torch"]["over torch"], found["limit"]["over limit"]) == (1.0, 1.0)
