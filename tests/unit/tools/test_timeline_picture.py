"""The picture of a run's timeline."""

import sys

import pytest

from tests.unit.pipeline.monitoring.run_writer import write_run
from tools import timeline_picture


def test_it_is_drawn_of_the_steps_asked_for(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_run(tmp_path / name, steps=6, finish=False)
    out = tmp_path / "picture.png"
    words = [f"in_turns={tmp_path}/a", f"{tmp_path}/b", "--first", "2", "--steps", "3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["timeline_picture", *words])
    timeline_picture.main()
    assert out.read_bytes().startswith(b"\x89PNG")
    figure = timeline_picture.picture({"in turns": tmp_path / "a", "b": tmp_path / "b"}, 2, 3)
    first, second = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["engine 0", "learner", "sync"]
    assert second.get_title(loc="left").startswith("b: ")
    assert [text.get_text() for text in first.texts if text.get_text().startswith(" ")] == [" 2", " 3", " 4"]
    with pytest.raises(SystemExit, match="none of the steps 40 to 42"):
        timeline_picture.picture({"a": tmp_path / "a"}, 40, 3)
