"""Whole runs of the shipped model through the command line: Ray and inline, resume after a kill, alpha = 0."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints import CheckpointStore
from pipeline.config.load import load_config
from pipeline.data.cursor import DataCursor
from pipeline.data.sources import load_prompts
from pipeline.data.tokenizer import load_tokenizer
from pipeline.seeds import sample_seed
from pipeline.types import Role
from tests.distributed.tiny_models import hf_model
from tests.integration.forks import Background, isentrope
from tests.processes import descendants
from tests.step_events import essence
from tests.tiny_folder import write_folder
from tools.bench.overlap import write_model

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "configs/model/pm4-100k"
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


def train(run_dir: Path, *overrides: str) -> list[dict]:
    """Step events of a whole run."""
    done = isentrope("train", *arguments(run_dir, *overrides), cwd=run_dir.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return steps(run_dir)


def arguments(run_dir: Path, *overrides: str) -> list[str]:
    return ["--config", str(ROOT / "configs/quickstart.yaml"), f"run_dir={run_dir}", *SMALL, *overrides]


def launch(run_dir: Path, *overrides: str, by: Sequence[str] = ("train",), **options) -> subprocess.Popen:
    """A process as a user starts it; its output is one pipe."""
    words = [sys.executable, "-m", "launchers.cli.main", *by, *arguments(run_dir, *overrides)]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, cwd=run_dir.parent, **pipe, **options)


def begin(run_dir: Path, *overrides: str) -> Background:
    """The same without the seconds of an import."""
    words = ["train", *arguments(run_dir, *overrides)]
    return Background(*words, cwd=run_dir.parent, log=run_dir.with_suffix(".log"))


def wait_for_steps(process: subprocess.Popen | Background, run_dir: Path, count: int) -> None:
    deadline = time.monotonic() + 240
    while not ((run_dir / "events.jsonl").exists() and len(steps(run_dir)) >= count):
        assert process.poll() is None, process.communicate()[0][-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def events(run_dir: Path) -> list[dict]:
    """Every whole line: the last one may be in the writing."""
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().split("\n")[:-1]]


def steps(run_dir: Path) -> list[dict]:
    """The step events; where a resumed run repeats a step, the later one counts."""
    return list({e["step"]: e for e in events(run_dir) if e["kind"] == "step"}.values())


def samples(run_dir: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((run_dir / "samples").iterdir())}


def assert_entropies_of_the_start(run_dir: Path) -> list[dict]:
    """The samples of step 0 have the entropies of the weights before the update: by transformers, in float64."""
    model, tokenizer = hf_model(MODEL).double(), load_tokenizer(MODEL)
    kept = [json.loads(line) for line in samples(run_dir)["step-000000.jsonl"].splitlines()]
    for line in kept:
        prompt = tokenizer.encode(line["prompt"])
        tokens = torch.tensor([[*prompt, *tokenizer.encode("".join(line["pieces"]))]])
        with torch.no_grad():
            logits = model(tokens).logits[0, len(prompt) - 1 : -1]
        exact = torch.special.entr(logits.softmax(-1)).sum(-1)
        drawn = [value is not None for value in line["log_probs"]]
        assert [value is not None for value in line["entropies"]] == drawn
        told = [value for value in line["entropies"] if value is not None]
        assert told == pytest.approx(exact[torch.tensor(drawn)].tolist(), abs=6e-4)  # three decimals are kept
    return kept


@pytest.mark.parametrize("body", ["raise KeyError('own')", "return 'yes'", "return -3.5"])
def test_a_verifier_that_judges_nothing_ends_the_run_with_2(tmp_path, body):
    """In the first batch, with the first error and its line; its module lies beside the configuration."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "broken_own.py").write_text(f"def score(prompt, text):\n    {body}\n")
    config = tmp_path / "own" / "mine.yaml"
    config.write_text("defaults: [quickstart.yaml]\ndata: {verifier: 'broken_own:score'}\n")
    words = ["train", "--config", str(config), f"run_dir={tmp_path}/run", *SMALL, *ALPHA_ZERO]
    done = isentrope(*words, cwd=tmp_path)
    said = "verifier 'broken_own:score' could judge none of "
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr
    assert ("(broken_own.py, line 2)" in done.stderr) == ("raise" in body)
    assert events(tmp_path / "run")[-1]["status"] == "failed"


def test_a_checkpoint_that_would_run_code_ends_a_resume_with_2(tmp_path):
    run_dir = tmp_path / "run"
    train(run_dir, *ALPHA_ZERO, "steps=2", "checkpoint.every=2", "entropy.controller=none")
    folder = next((run_dir / "checkpoints").glob("step-*"))
    poisoned = folder / "learner" / ".metadata"
    poisoned.write_bytes(f"cposix\nsystem\n(S'touch {tmp_path}/ran'\ntR.".encode())
    manifest = json.loads((folder / "manifest.json").read_text())
    data = poisoned.read_bytes()
    manifest["files"]["learner/.metadata"] |= {"bytes": len(data), "crc32": zlib.crc32(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for words in (["train", "--resume", str(run_dir), "steps=4"], ["evaluate", "--run", str(run_dir)]):
        done = isentrope(*words, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert f"{poisoned} was not loaded, since loading it could execute code" in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def grpo(tmp_path_factory):
    return train(tmp_path_factory.mktemp("grpo") / "run", *ALPHA_ZERO, "entropy.controller=none")


@pytest.mark.xdist_group("alpha zero")  # the run that the others are compared with is made once
@pytest.mark.parametrize("actuator", ["resample", "reweight", "fc"])
def test_alpha_zero_is_grpo_bit_for_bit(tmp_path, grpo, actuator):
    zero = train(tmp_path / "zero", *ALPHA_ZERO, f"entropy.actuator={actuator}", "entropy.alpha=0")
    keys = ("entropy", "loss", "grad_norm", "reward")
    assert [[s[k] for k in keys] for s in grpo] == [[s[k] for k in keys] for s in zero]


def test_killed_while_answers_are_held_then_resumed_trains_on_each_once(tmp_path):
    """Time decides at which token an answer is held, and no run repeats; which answers a step trains on is fixed."""
    write_model(tmp_path / "model", 64, 2, 256)  # its answers end at random, the longest far behind the others
    run_dir = tmp_path / "run"
    options = [*INLINE, f"model.hf_path={tmp_path}/model", "rollout.max_new_tokens=192"]
    options += ["rollout.staleness=2", "rollout.partial=true", "steps=100", "checkpoint.every=1", "evaluation.every=0"]
    options += ["evaluation.at_start=false", "evaluation.at_end=false", "rollout.samples_per_prompt=2"]
    process = begin(run_dir, *options, "entropy.controller=none")
    store, count, held = CheckpointStore(run_dir / "checkpoints", 1), 1, False
    while not held:
        count += 1
        wait_for_steps(process, run_dir, count)
        process.send_signal(signal.SIGSTOP)  # so that the newest checkpoint stays the newest
        newest = store.latest()
        unfinished = [drawn["rest"]["requests"] for drawn in newest.state()["queue"] if drawn["rest"]] if newest else []
        held = any(request["begun"] for requests in unfinished for request in requests)
        process.send_signal(signal.SIGKILL if held else signal.SIGCONT)
    process.communicate()
    last = len(steps(run_dir)) + 2
    done = isentrope("train", "--resume", str(run_dir), f"steps={last}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(e["step"], e["stale_samples"], e["unjudged"]) for e in steps(run_dir)] == [(i, 0, 0) for i in range(last)]
    config = load_config(run_dir / "config.yaml", [])
    prompts = load_prompts(config.data, load_tokenizer(MODEL), max_prompt_tokens=config.rollout.max_prompt_tokens)
    cursor, versions = DataCursor(prompts.train, config.seed), 0
    for step, (_, text) in enumerate(samples(run_dir).items()):
        kept = [json.loads(line) for line in text.splitlines()]
        seeds = [(p.id, sample_seed(config.seed, step, p.id, step % 2, Role.MAIN)) for p in cursor.take(4)]
        assert [(line["prompt_id"], line["seed"]) for line in kept] == seeds
        assert {line["finish_reason"] for line in kept} <= {"stop", "length"}
        versions = max(versions, *(len(line["weight_versions"]) for line in kept))
    assert versions > 1


@pytest.mark.parametrize(
    "more",
    [
        ["entropy.actuator=reweight", "data.environment={name: tools, max_turns: 3}"],
        ["entropy.actuator=resample"],
        ["entropy.actuator=resample", "rollout.staleness=3", "entropy.repeated_prompts=8"],
        ["entropy.actuator=resample", "rollout.staleness=3", "rollout.partial=true", "rollout.deterministic=true"],
    ],
)
def test_killed_between_steps_then_resumed_continues_bit_for_bit(tmp_path, more):
    options = [*INLINE, "steps=8", "checkpoint.every=2", *more, "evaluation.at_start=false"]
    whole = train(tmp_path / "whole", *options)
    run_dir = tmp_path / "killed"
    process = begin(run_dir, *options)
    wait_for_steps(process, run_dir, 5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(steps(run_dir)) < 8
    done = isentrope("train", "--resume", str(run_dir), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [essence(s) for s in steps(run_dir)] == [essence(s) for s in whole]
    assert samples(run_dir) == samples(tmp_path / "whole")
    assert ("episodes that played after step" in done.stderr) == ("environment" in str(more))
    kept = assert_entropies_of_the_start(run_dir)
    if "entropy.actuator=resample" in more:
        assert any(line["role"] == "auxiliary" and line["reward"] < 1 for line in kept), "no row of the batch"


@pytest.mark.parametrize(
    ("start", "runtime", "number"),
    [(begin, INLINE, signal.SIGUSR1), (launch, [], signal.SIGTERM)],
    ids=["inline", "ray, TP 2"],
)
def test_a_signal_ends_in_a_checkpoint_and_resume_finishes(tmp_path, start, runtime, number):
    run_dir = tmp_path / "run"
    process = start(run_dir, *runtime, "steps=2000")
    wait_for_steps(process, run_dir, 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=240)
    done = len(steps(run_dir))
    assert process.returncode == 0, output[-2000:]
    last = f"stopped after {done} of 2000 steps, checkpoint saved; go on with: isentrope train --resume {run_dir}"
    assert output.splitlines()[-1] == last
    assert (run_dir / "checkpoints" / f"step-{done:08d}" / "manifest.json").is_file()
    assert isentrope("train", "--resume", str(run_dir), f"steps={done + 2}", cwd=tmp_path).returncode == 0
    assert [s["step"] for s in steps(run_dir)] == list(range(done + 2))
    assert all(0.1 < s["entropy"] < 1.5 for s in steps(run_dir))
    for step in steps(run_dir):
        assert step["engines"] == {"alive": 1, "total": 1}
        assert step["sync"] == {"bytes": 4 * 99648, "buckets": 1}  # every parameter of pm4-100k in float32
        assert step["memory"].keys() == ({"driver"} if runtime else {"driver", "learner"})
        assert all(0.1 < gib < 10 for gib in step["memory"].values())
    assert [e["attempt"] for e in events(run_dir) if e["kind"] in ("run_start", "resume")] == [1, 2]
    assert_entropies_of_the_start(run_dir)
    # The engine's log-probs are those of the weights just synced, whatever the learner's layout.
    assert max(s["metrics"]["mismatch_max"] for s in steps(run_dir)) < 1e-3
    kinds = {event["kind"] for event in events(run_dir)}
    assert kinds >= {"run_start", "step", "evaluation", "checkpoint", "resume", "run_end"}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Ray, TP 2: the run's folder and its steps."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    return run_dir, train(run_dir, "steps=3", "evaluation.at_start=false", "evaluation.every=0")


@pytest.mark.xdist_group("two ranks")
def test_a_flipped_bit_that_a_rank_finds_ends_the_resume(two_ranks, tmp_path):
    """The file of rank 1, which the driver does not read."""
    run_dir, _ = two_ranks
    (file,) = (run_dir / "checkpoints/step-00000003/learner").glob("__1_*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    ended = isentrope("train", "--resume", str(run_dir), "steps=5", cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr[-2000:]
    said = f"{file} differs from the manifest: its checksum is another; delete {file.parents[1]} to resume from an"
    assert said in " ".join(ended.stderr.split())


def test_ctrl_c_while_the_run_starts_ends_in_its_first_checkpoint(tmp_path):
    run_dir = tmp_path / "run"
    # A process group of its own, as a terminal's job has.
    process = launch(run_dir, "steps=2000", start_new_session=True)
    while not (run_dir / "heartbeat.json").exists():
        assert process.poll() is None, process.communicate()[0][-2000:]
        time.sleep(0.05)
    assert not (run_dir / "events.jsonl").exists()
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-2000:]
    assert output.splitlines()[-1].startswith("stopped after 0 of 2000 steps, checkpoint saved; go on with: ")
    assert (run_dir / "checkpoints/step-00000000/manifest.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "ctrl-C"])
def test_a_signal_ends_a_local_launch_in_a_checkpoint(tmp_path, number):
    """SIGTERM goes to the command alone, ctrl-C to every process of the terminal's job.

    Neither is answered by a new attempt.
    """
    run_dir = tmp_path / "run"
    process = launch(run_dir, "steps=2000", by=("launch", "local"), start_new_session=True)
    wait_for_steps(process, run_dir, 2)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    output, _ = process.communicate(timeout=240)
    done = len(steps(run_dir))
    assert process.returncode == 0, output[-2000:]
    *_, verdict, how = output.splitlines()
    assert verdict == f"saved: checkpoint after {done} of 2000 steps"
    assert how == f"go on with: isentrope launch local --resume {run_dir}"
    assert (run_dir / f"checkpoints/step-{done:08d}/manifest.json").is_file()
    attempts = [json.loads(line) for line in (run_dir / "launch/attempts.jsonl").read_text().splitlines()]
    assert [attempt.get("end") for attempt in attempts] == [None, "saved"]


def test_a_second_signal_ends_a_local_launch_at_once(tmp_path):
    run_dir = tmp_path / "run"
    process = launch(run_dir, "steps=2000", by=("launch", "local"), start_new_session=True)
    while not descendants(process.pid, "ray::LearnerRank"):
        assert process.poll() is None, process.communicate()[0][-2000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    while "SIGTERM: finishing" not in (line := process.stdout.readline()):
        assert line, "it ended before it had said so"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output[-2000:]
    *_, verdict, how = output.splitlines()
    assert verdict == "cancelled: the training process ended with SIGTERM"
    assert how == f"go on with: isentrope launch local --resume {run_dir}"
    assert len((run_dir / "launch/attempts.jsonl").read_text().splitlines()) == 2, "one attempt, its start and its end"


@pytest.mark.parametrize("runtime", [INLINE, []], ids=["inline", "ray, TP 2"])
def test_stale_rollouts_are_drawn_with_older_weights_and_meet_a_ratio(tmp_path, runtime):
    done = train(tmp_path / "run", *runtime, "steps=6", "rollout.staleness=2", "evaluation.at_start=false")
    assert [s["weight_version"] for s in done] == [0, 0, 0, 1, 2, 3]
    assert done[0]["metrics"]["ratio"] == 1.0
    assert all(0 < abs(s["metrics"]["ratio"] - 1) < 0.1 for s in done[1:])
    # Old log-probs of stale rows are the engine's: nobody knows what the learner of that time would have said.
    assert done[0]["metrics"]["mismatch_max"] < 1e-3
    assert not any("mismatch_max" in s["metrics"] for s in done[1:])
    assert len({s["reward"] for s in done}) > 1


@pytest.mark.parametrize("more", [[], ["rollout.staleness=1"]], ids=["in turns", "drawn ahead"])
def test_evaluations_beside_the_training_find_the_same_and_change_nothing(tmp_path, more):
    options = [*INLINE, "steps=4", "evaluation.every=2", *more]
    alone = train(tmp_path / "alone", *options)
    beside = train(tmp_path / "beside", *options, "evaluation.beside_training=true")
    assert [essence(s) for s in beside] == [essence(s) for s in alone]

    def found(name):
        clocks = ("time", "seconds")
        told = [event for event in events(tmp_path / name) if event["kind"] == "evaluation"]
        return [{key: value for key, value in event.items() if key not in clocks} for event in told]

    assert [event["step"] for event in found("beside")] == [0, 2, 4]
    assert found("beside") == found("alone"), "each is of its own version, not of the next"
    kinds = [event["kind"] for event in events(tmp_path / "beside") if event["kind"] in ("step", "evaluation")]
    assert kinds == ["step", "evaluation", "step", "step", "evaluation", "step", "evaluation"]


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


def test_routes_are_replayed_in_a_whole_run(tmp_path):
    """Of routers that transformers' model has on the native engine; a learner that gets no routes refuses the step."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    write_folder(folder, "glm4_moe", vocab_size=16, max_position_embeddings=64, eos_token_id=15)
    more = ["steps=2", f"model.hf_path={folder}", "learner.routing_replay=routes", "evaluation.at_start=false"]
    done = train(tmp_path / "run", *INLINE, *more)
    assert [len(done), done[-1]["weight_version"]] == [2, 1]
    assert max(step["metrics"]["mismatch_max"] for step in done) < 1e-4


@pytest.mark.xdist_group("two ranks")
def test_rollouts_in_fp8_show_as_a_small_mismatch(two_ranks, tmp_path):
    """The learner's bits go out rounded to FP8, over TP 2 and Ray; the engine draws from what arrives."""
    _, exact = two_ranks
    done = train(tmp_path / "run", "steps=3", "evaluation.at_start=false", "rollout.weight_dtype=fp8")
    assert all(1e-3 < s["metrics"]["mismatch_mean"] < 0.1 for s in done)
    assert all(s["metrics"]["mismatch_mean"] < 1e-5 for s in exact)
