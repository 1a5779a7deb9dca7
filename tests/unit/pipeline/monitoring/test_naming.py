"""No two runs shown together are called the same."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pipeline.monitoring.naming import counted, titles


def test_names_then_seeds_then_folders():
    runs = [
        ("grpo", 0, Path("/a/grpo")),
        ("pi", 0, Path("/a/x/pi")),
        ("pi", 1, Path("/a/y/pi")),
        ("pi", 1, Path("/a/z/pi")),
    ]
    assert titles(runs) == ["grpo", "pi s0", "pi s1 (y/pi)", "pi s1 (z/pi)"]


part = st.sampled_from("abc")
folder = st.lists(part, min_size=1, max_size=4).map(lambda parts: Path("/", *parts))


@given(st.lists(st.tuples(part, st.integers(0, 1), folder), max_size=6, unique_by=lambda run: run[2]))
def test_different_folders_have_different_titles(runs):
    found = titles(runs)
    assert len(set(found)) == len(runs)


def test_counts_for_people():
    assert [counted(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
