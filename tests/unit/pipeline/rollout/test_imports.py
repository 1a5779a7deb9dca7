"""Engines know nothing of how a run is watched."""

import subprocess
import sys

import pytest

LOADED = "import sys, {module}; print([name for name in sys.modules if name.startswith('pipeline.monitoring')])"


@pytest.mark.parametrize(
    "module", ["pipeline.rollout.pool", "pipeline.rollout.rollouts", "pipeline.rollout.weight_sync"]
)
def test_engines_load_nothing_of_monitoring(module):
    run = [sys.executable, "-c", LOADED.format(module=module)]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == "[]"
