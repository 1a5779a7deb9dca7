"""Every benchmark of tools/bench runs, at a size that takes seconds; what it measures there means nothing."""

import json
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.integration.forks import FORKS, isentrope

ROOT = Path(__file__).resolve().parents[2]
MODEL = "configs/model/pm4-100k"
LIBRARIES = {"alert_traces", "layouts", "live_sync", "logprob_peers", "step_peers"}  # used by other benchmarks, not run
# Run by test_bridge_oracle, in the environment that has megatron-bridge; by tests/unit/tools/test_target_regret.
ELSEWHERE = {"bridge", "target_regret"}
# OUT is a folder of the test's own, RUNS holds a finished run.
SMALL = {
    "alert_quality": "--seeds 1 --recorded RUNS/pi",
    "batching": "--rows 32 --ranks 2 --repeat 1",
    "checkpoints": "--only 1",
    "client": "--requests 64 --tokens 8 --json OUT/client.json",
    "controllers": "--seeds 1 --json OUT/controllers.json",
    "conversion": "--megabytes 1 --repeat 1 --workers 1 --work OUT",
    "driver": "--rows 48 --mean 100 --longest 700 --json OUT/driver.json",
    "episodes": "--agents 8 --turns 2 --json OUT/episodes.json",
    "event_log": "--steps 300 --out OUT/event_log",
    "fp8_effect": f"--config quickstart.yaml --model {MODEL} --prompts 1 --samples 1 --new-tokens 4",
    "frontier": "RUNS --temperatures 1.0 --workers 1",
    "held": "--rounds 1 --groups 1 --samples 2 --prompt 4 --tokens 24 --json OUT/held.json",
    "logprobs": "--rounds 1 --shrink 64",
    "monitoring_cost": "--pairs 1 --steps 2 --sinks tensorboard",
    "overlap": "--steps 3 --hidden 64 --layers 1 --prompts 2 --samples 2 --new-tokens 8 --json OUT/overlap.json",
    "reading_noise": "RUNS",
    "step_time": "--sides inline --rounds 1 --threads 1",
    "web_page": "--steps 200",
    "weight_sync": "--only apart",
}
NEEDS = {
    "client": ["aiohttp"],
    "episodes": ["aiohttp"],
    "event_log": ["tensorboard"],
    "held": ["sglang"],
    "monitoring_cost": ["tensorboard"],
    "overlap": ["sglang"],
}
STEPS = 45  # reading_noise looks at windows of 20

# overlap starts three servers, 80 s on an idle machine and 300 s beside two other workers
pytestmark = [pytest.mark.xdist_group("benches"), pytest.mark.timeout(600)]


def test_every_benchmark_is_listed():
    files = {path.stem for path in (ROOT / "tools/bench").glob("*.py")}
    assert files == LIBRARIES | ELSEWHERE | SMALL.keys()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    words = [
        "runtime=inline",
        "learner.tensor_model_parallel_size=1",
        "evaluation.every=0",
        "monitoring.progress=false",
    ]
    words += ["evaluation.at_start=false", "evaluation.at_end=false", f"steps={STEPS}", f"run_dir={folder}/pi"]
    done = isentrope("train", "--config", "quickstart.yaml", *words, cwd=folder, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def bench(name: str, words: list[str], out: Path) -> None:
    """The benchmark's command line, in a process of its own."""
    with out.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    sys.argv = [name, *words]
    import_module(f"tools.bench.{name}").main()
    sys.stdout.flush()


def test_the_plan_brings_a_live_server_its_slices_and_no_other_byte(tmp_path):
    pytest.importorskip("sglang")
    words = [
        "--live",
        "--learner",
        "tp=2,pp=1,dp=1",
        "--engines",
        "tp=2,count=1",
        "--megabytes",
        "1",
        "--repeat",
        "1",
        "--json",
    ]
    words.append(f"{tmp_path}/figures")
    process = FORKS.Process(target=bench, args=("weight_sync", words, tmp_path / "said"))
    process.start()
    process.join(560)
    process.kill()
    process.join()
    assert process.exitcode == 0, (tmp_path / "said").read_text()[-3000:]
    found = json.loads((tmp_path / "figures").read_text())
    assert found["received_bytes_per_rank"] == found["minimum_bytes_per_rank"]
    assert min(found["minimum_bytes_per_rank"]) > 0
    assert {"seconds", "gather_broadcast_seconds"} <= found.keys()


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_runs(name, request, tmp_path):
    for module in NEEDS.get(name, []):
        pytest.importorskip(module)
    if name == "web_page" and shutil.which("chromium") is None:
        pytest.skip("needs chromium")
    given = SMALL[name].replace("OUT", str(tmp_path))
    if "RUNS" in given:
        given = given.replace("RUNS", str(request.getfixturevalue("runs")))
    process = FORKS.Process(target=bench, args=(name, given.split(), tmp_path / "said"))
    process.start()
    process.join(560)
    over = process.exitcode is not None
    process.kill()  # one that is still at it; of one that has ended nothing is left to kill
    process.join()
    said = (tmp_path / "said").read_text()
    assert over, f"still at it after 560 s: {said[-3000:]}"
    assert process.exitcode == 0, said[-3000:]
    assert "|---" in said or "| --- |" in said or "{" in said, "a table, or JSON"
