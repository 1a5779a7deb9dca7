"""What `tools.bench.target_regret` prints of three runs whose figures are known."""

import sys

import pytest

from tests.unit.pipeline.monitoring import run_writer
from tools.bench import target_regret

EVERY = 4
FALL = [0.80, 0.90, 0.90, 0.80, 0.70, 0.70, 0.70]  # pass@k of the run without control, evaluation by evaluation


def run(folder, controller, entropy, values):
    recorder = run_writer.open_run(folder, f"entropy.controller={controller}")
    for at, value in enumerate(values):
        for step in range(EVERY * (at - 1), EVERY * at) if at else ():
            run_writer.record_step(recorder, step, entropy(step))
        estimate = {"value": value, "low": value - 0.01, "high": value + 0.01}
        estimates = {str(k): estimate for k in target_regret.KS}
        recorder.evaluation(EVERY * at, run_writer.evaluation(value, value) | {"pass_at_k": estimates})
    run_writer.end(recorder)
    recorder._lock.close()


def test_regret_is_what_the_named_band_loses_against_the_best_fixed_one(tmp_path, monkeypatch, capsys):
    run(tmp_path / "alone", "none", lambda step: max(0.1, 0.5 - 0.03 * step), FALL)
    run(tmp_path / "low", "pi", lambda step: 0.20, [0.7] * 7)
    run(tmp_path / "high", "pi", lambda step: 0.40, [0.9] * 7)
    monkeypatch.setattr(sys, "argv", ["target_regret", str(tmp_path)])
    target_regret.main()
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(target_regret.KS)
    _, k, row, named, regret, _, _ = (cell.strip() for cell in lines[0].split("|"))
    assert (k, row) == ("1", "entropy target")
    # Between the two fixed bands pass@k grows by one for every nat.
    assert float(regret) == pytest.approx(max(0.0, 0.40 - float(named)), abs=2e-3)
    assert 0.2 < float(named) < 0.45
    assert lines[1].startswith("| 1 | as good from | 0.395 |")  # an evaluation earlier than the chosen one
