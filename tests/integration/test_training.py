"""Whole runs of the shipped model through the command line: Ray and inline, resume after a kill, alpha = 0."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "entropy.auxiliary_prompts=2",
    "entropy.auxiliary_samples=4",
    "evaluation.prompts=8",
    "evaluation.samples=4",
    "evaluation.k=[1,4]",
    "monitoring.samples_per_step=16",
    "monitoring.progress=false",
]
INLINE = ["runtime=inline", "learner.tensor_model_parallel_size=1"]
ALPHA_ZERO = [*INLINE, "steps=4", "evaluation.at_start=false"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "launchers.cli.main", *arguments]


def train(run_dir: Path, *overrides: str) -> list[dict]:
    arguments = ["train", "--config", str(ROOT / "configs/quickstart.yaml"), f"run_dir={run_dir}", *SMALL, *overrides]
    done = subprocess.run(
        command(*arguments), cwd=run_dir.parent, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return steps(run_dir)


def launch(run_dir: Path, *overrides: str) -> subprocess.Popen:
    """The same in the background; its output is one pipe."""
    arguments = ["train", "--config", str(ROOT / "configs/quickstart.yaml"), f"run_dir={run_dir}", *SMALL, *overrides]
    return subprocess.Popen(
        command(*arguments), cwd=run_dir.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_steps(process: subprocess.Popen, run_dir: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not ((run_dir / "events.jsonl").exists() and len(steps(run_dir)) >= count):
        assert process.poll() is None, process.communicate()[0][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def descendants(pid: int, title: str) -> list[int]:
    """Processes below ``pid`` whose command line begins with ``title``."""
    found, parents = [], {pid}
    while parents:
        children = [
            int(child)
            for parent in parents
            for path in Path(f"/proc/{parent}/task").glob("*/children")
            for child in path.read_text().split()
        ]
        found += [child for child in children if Path(f"/proc/{child}/cmdline").read_text().startswith(title)]
        parents = set(children)
    return found


def events(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def steps(run_dir: Path) -> list[dict]:
    """The step events; where a resumed run repeats a step, the later one counts."""
    return list({e["step"]: e for e in events(run_dir) if e["kind"] == "step"}.values())


def essence(step: dict) -> dict:
    """What must repeat bit for bit: no clocks, no memory."""
    return {k: v for k, v in step.items() if k not in ("time", "seconds", "memory")}


def samples(run_dir: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((run_dir / "samples").iterdir())}


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    return train(tmp_path_factory.mktemp("grpo") / "run", *ALPHA_ZERO, "entropy.controller=none")


@pytest.mark.parametrize("actuator", ["resample", "reweight", "fc"])
def test_alpha_zero_is_grpo_bit_for_bit(tmp_path, grpo, actuator):
    zero = train(tmp_path / "zero", *ALPHA_ZERO, f"entropy.actuator={actuator}", "entropy.alpha=0")
    keys = ("entropy", "loss", "grad_norm", "reward")
    assert [[s[k] for k in keys] for s in grpo] == [[s[k] for k in keys] for s in zero]


@pytest.mark.parametrize("actuator", ["reweight", "resample"])
def test_killed_between_steps_then_resumed_continues_bit_for_bit(tmp_path, actuator):
    options = [*INLINE, "steps=8", "checkpoint.every=2", f"entropy.actuator={actuator}", "evaluation.at_start=false"]
    whole = train(tmp_path / "whole", *options)
    run_dir = tmp_path / "killed"
    process = launch(run_dir, *options)
    wait_for_steps(process, run_dir, 5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(steps(run_dir)) < 8
    done = subprocess.run(
        command("train", "--resume", str(run_dir)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [essence(s) for s in steps(run_dir)] == [essence(s) for s in whole]
    assert samples(run_dir) == samples(tmp_path / "whole")


@pytest.mark.parametrize("runtime", [INLINE, []], ids=["inline", "ray, TP 2"])
def test_sigterm_ends_in_a_checkpoint_and_resume_finishes(tmp_path, runtime):
    run_dir = tmp_path / "run"
    process = launch(run_dir, *runtime, "steps=2000")
    wait_for_steps(process, run_dir, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    done = len(steps(run_dir))
    assert process.returncode == 0, output[-2000:]
    assert "--resume" in output, "the last lines say how to go on"
    assert (run_dir / "checkpoints" / f"step-{done:08d}" / "manifest.json").is_file()
    finish = command("train", "--resume", str(run_dir), f"steps={done + 2}")
    assert subprocess.run(finish, cwd=tmp_path, check=False, capture_output=True, timeout=120).returncode == 0
    assert [s["step"] for s in steps(run_dir)] == list(range(done + 2))
    assert all(0.1 < s["entropy"] < 1.5 for s in steps(run_dir))
    for step in steps(run_dir):
        assert step["engines"] == {"alive": 1, "total": 1}
        assert step["sync"] == {"bytes": 4 * 99648, "buckets": 1}  # every parameter of pm4-100k in float32
        assert step["memory"].keys() == ({"driver"} if runtime else {"driver", "learner"})
        assert all(0.1 < gib < 10 for gib in step["memory"].values())
    assert [e["attempt"] for e in events(run_dir) if e["kind"] in ("run_start", "resume")] == [1, 2]
    # The engine's log-probs are those of the weights just synced, whatever the learner's layout.
    assert max(s["metrics"]["mismatch_max"] for s in steps(run_dir)) < 1e-3
    kinds = {event["kind"] for event in events(run_dir)}
    assert kinds >= {"run_start", "step", "evaluation", "checkpoint", "resume", "run_end"}


def test_an_engine_killed_during_the_run_is_started_again_and_changes_nothing(tmp_path):
    options = ["learner.tensor_model_parallel_size=1", "rollout.engines=2", "steps=40", "evaluation.every=0"]
    whole = train(tmp_path / "whole", *options)
    run_dir = tmp_path / "mended"
    process = launch(run_dir, *options)
    wait_for_steps(process, run_dir, 3)
    os.kill(descendants(process.pid, "ray::EngineProcess")[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-2000:]
    (fault,) = [event for event in events(run_dir) if event["kind"] == "fault"]
    assert "was started again" in fault["description"]
    assert [essence(s) for s in steps(run_dir)] == [essence(s) for s in whole]


@pytest.mark.parametrize(
    "overrides",
    [
        ["entropy.actuator=tok"],
        ["entropy.actuator=clip_cov", "entropy.command_max=0.2"],
        ["entropy.actuator=entropy_bonus", "learner.updates_per_step=2"],
        ["entropy.controller=bang_bang", "entropy.actuator=resample", "entropy.band.low=0.8", "entropy.band.high=0.9"],
        [
            "objective.kl_coef=0.1",
            "objective.advantage=dr_grpo",
            "objective.aggregation=dr_grpo",
            "objective.dual_clip=10",
        ],
        [
            "objective.correction.kind=mis",
            "objective.correction.level=sequence",
            "objective.correction.low=0.5",
            "learner.updates_per_step=2",
            "model.dtype=bf16",
        ],
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_actuator_and_objective_trains(tmp_path, overrides):
    band = [] if any("band" in o for o in overrides) else ["entropy.band.low=0.9", "entropy.band.high=1.0"]
    done = train(tmp_path / "run", *INLINE, "steps=4", "evaluation.at_start=false", *band, *overrides)
    assert len(done) == 4
    assert all(s["grad_norm"] > 0 for s in done)
    # With the band above the entropy, the command has left rest by the last step.
    rest = {"tok": 0.0, "clip_cov": 0.0, "entropy_bonus": 0.0}.get(done[-1]["actuator"], 1.0)
    assert done[-1]["command"] > rest


def test_rollouts_in_fp8_show_as_a_small_mismatch(tmp_path):
    """The learner's bits go out rounded to FP8, over TP 2 and Ray; the engine draws from what arrives."""
    done = train(tmp_path / "run", "steps=3", "evaluation.at_start=false", "rollout.weight_dtype=fp8")
    exact = train(tmp_path / "exact", "steps=3", "evaluation.at_start=false")
    assert all(1e-3 < s["metrics"]["mismatch_mean"] < 0.1 for s in done)
    assert all(s["metrics"]["mismatch_mean"] < 1e-5 for s in exact)
