"""The instruments that need a model, on the shipped one, through the command line."""

import json
import math
from pathlib import Path

from tests.integration.forks import isentrope

INLINE = ["runtime=inline", "learner.tensor_model_parallel_size=1"]


def answer(*words: str, cwd: Path) -> dict:
    done = isentrope(*words, "--json", cwd=cwd, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_probe_measures_from_one_state_and_leaves_nothing_behind(tmp_path):
    words = ["entropy", "probe", "--config", "quickstart.yaml", "-t", "0.6", "-t", "1.6", "--repeats", "2"]
    found = answer(*words, *INLINE, cwd=tmp_path)
    effects = {(e["temperature"], e["sign"]): e for e in found["effects"]}
    assert set(effects) == {(t, s) for t in (0.6, 1.6) for s in ("positives", "negatives")}
    assert all(e["repeats"] == 2 and e["error"] > 0 and e["rows"] > 0 for e in effects.values())
    assert all(1e-6 < abs(e["change"]) < 0.05 for e in effects.values())
    assert 0.4 < found["entropy"] < 0.7
    # Every measurement starts from the same state: cold and hot negatives differ by far more than the repeats do.
    assert found["slopes"]["negatives"] < 0
    assert list(tmp_path.iterdir()) == []


def test_excitation_identifies_an_actuator_before_a_run(tmp_path):
    # The bonus works at once; positives are too few at the start for ``reweight`` (docs/control.md).
    settings = [*INLINE, "entropy.actuator=entropy_bonus"]
    words = ["entropy", "calibrate", "--config", "quickstart.yaml", "--excite", "60"]
    found = answer(*words, *(word for o in settings for word in ("--set", o)), cwd=tmp_path)
    low, high = found["plant"]["gain_interval"]
    assert 0 < low < 0.08 < high
    assert found["plant"]["steps"] == 60
    assert 0.02 < found["plant"]["sensor_noise"] < 0.12
    assert found["kp"] > 0
    assert math.isfinite(found["predictions"]["proposed"]["rms"])
    assert list(tmp_path.iterdir()) == []
