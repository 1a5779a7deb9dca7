"""What a run says after its first step."""

import re
from dataclasses import fields

import pytest

from pipeline.config.load import load_config
from pipeline.monitoring.event_kinds import StepRecord
from pipeline.monitoring.start_note import start_note


def record(**values):
    blank = {f.name: 0 for f in fields(StepRecord) if f.name not in ("metrics", "seconds", "tokens", "sync", "memory")}
    return StepRecord(
        **(blank | {"entropy_count": 100.0, "state": "tracking", "band_low": 0.27, "band_high": 0.33} | values)
    )


@pytest.mark.parametrize(("start", "place"), [(0.56, "above"), (0.3, "in"), (0.1, "below")])
def test_it_says_where_the_entropy_starts_and_how_to_choose(start, place):
    note = start_note(record(entropy_sum=100 * start), "constant")
    assert f"entropy at the start: {start:.3g} nats per token" in note
    assert f"starts {place} its band, 0.27 to 0.33" in note
    assert "by half within 70 to 190 steps" in note


def test_the_keys_that_it_proposes_are_valid():
    words = re.findall(r"entropy\.band\.\w+=[\d.]+", start_note(record(entropy_sum=56.0), "constant"))
    band = load_config(None, [*words, "model.hf_path=model/pm4-100k"], check=False).entropy.band
    assert (band.low, band.high) == (0.25, 0.31)


def test_without_a_controller_nothing_holds_it():
    assert "nothing holds it" in start_note(record(entropy_sum=56.0, state="off"), "constant")


def test_a_run_that_finds_its_band_is_above_none_and_given_none():
    note = start_note(record(entropy_sum=56.0, state="holding"), "auto")
    assert "the run finds its band itself, at 0.27 to 0.33 or above, by its evaluations" in note
    assert "above its band" not in note
    assert "entropy.band" not in note
