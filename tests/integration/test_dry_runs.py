"""Recipes of 32B and more, launched with the example clusters up to the point of submission: the real command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nemo_run")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("recipe", "cluster", "nodes"), [("qwen3-32b", "pyxis", 8), ("qwen3-235b-a22b", "plain", 24)])
def test_a_shipped_recipe_launches_with_a_shipped_cluster(tmp_path, recipe, cluster, nodes):
    words = ["launch", "slurm", "--config", f"recipe/{recipe}.yaml", "--cluster", f"cluster/{cluster}.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", "launchers.cli.main", *words, "--dry-run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NEMORUN_HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"nodes: {nodes}, as many as the run needs" in done.stdout
    assert re.search(r"memory: \d+\.\d of 80 GiB", done.stdout)
    script = done.stdout.partition("--- job script\n")[2]
    assert f"#SBATCH --nodes={nodes}\n" in script
    assert ("--container-image" in script) == (cluster == "pyxis")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
