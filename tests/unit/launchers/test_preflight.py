"""The plan of a run in words, and what stops it."""

from dataclasses import replace
from pathlib import Path

import pytest

from launchers.preflight import Setting, check, with_absolute_paths
from launchers.slurm.cluster import load_cluster
from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config, resolve_path


def setting(tmp_path, *overrides, nodes=1, cluster=()):
    config = load_config(Path("quickstart.yaml"), overrides)
    return Setting(config, load_cluster(Path("cluster/plain.yaml"), cluster), nodes, tmp_path / "run")


def test_the_batch_in_words(tmp_path):
    overrides = ["rollout.prompts_per_step=1024", "learner.data_parallel_size=128", "learner.micro_batch_size=4"]
    overrides += ["data.source.kind=reasoning_gym", "data.source.task=chain_sum", "data.source.size=2000"]
    (first, *_) = check(setting(tmp_path, *overrides, nodes=33)).lines
    assert first == (
        "batch: 1,024 prompts x 16 = 16,384 samples a step = 128 per data-parallel rank and update = 32 micro-batches of 4"
    )


def test_updates_and_auxiliary_samples_are_told(tmp_path):
    overrides = ["learner.updates_per_step=4", "entropy.actuator=resample", "learner.micro_batch_size=48"]
    lines = check(setting(tmp_path, *overrides)).lines
    assert (
        "256 samples a step = 4 updates of 64 = 64 per data-parallel rank and update = 2 micro-batches of 48"
        in lines[0]
    )
    assert "auxiliary: 4 prompts x 16 = 64 further samples at T+" in lines


def test_every_node_is_told_its_part(tmp_path):
    overrides = ["learner.data_parallel_size=4", "rollout.engine=sglang", "rollout.engines=2"]
    lines = check(setting(tmp_path, *overrides, "rollout.tensor_parallel_size=2", nodes=2)).lines
    assert "learner: TP 2 x DP 4 = 8 processes" in lines
    assert "node 0: 8 learner processes, 0 engines" in lines
    assert "node 1: 0 learner processes, 2 engines, 4 GPUs idle" in lines


@pytest.mark.parametrize(
    ("overrides", "nodes", "cluster", "key", "said"),
    [
        (["learner.data_parallel_size=8"], 1, [], "cluster.nodes", "needs 16 GPUs and would get 1 node of 8"),
        ([], 2, [], "cluster.nodes", "node 1 would have nothing to do"),
        ([], 1, ["walltime='00:10:30'"], "cluster.save_before_s", "leaves 30 s of 630"),
        (["checkpoint.every=0"], 1, ["requeue=false"], "checkpoint.every", "would lose everything"),
        (["checkpoint.keep_last=100000000"], 1, [], "checkpoint.keep_last", "keep fewer, make room"),
    ],
)
def test_what_stops_a_run(tmp_path, overrides, nodes, cluster, key, said):
    report = check(setting(tmp_path, *overrides, nodes=nodes, cluster=cluster))
    with pytest.raises(ConfigError, match=key) as error:
        report.raise_problems()
    assert said in str(error.value)


def test_a_folder_that_holds_a_run_is_not_taken_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/events.jsonl").touch()
    assert [problem.key for problem in check(setting(tmp_path)).problems] == ["run_dir"]


def test_paths_become_independent_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(None, ["model.hf_path=mine", "data.source.path=a.jsonl"], check=False)
    (tmp_path / "mine").mkdir()
    moved = with_absolute_paths(config)
    assert moved.model.hf_path == str(tmp_path / "mine")
    assert moved.data.source.path == str(tmp_path / "a.jsonl")
    packaged = with_absolute_paths(load_config(Path("quickstart.yaml")))
    assert packaged.model.hf_path == "model/pm4-100k"  # found again below configs/ of the shipped code
    assert (resolve_path(packaged.model.hf_path) / "config.json").is_file()


def test_rules_and_the_webhook_are_looked_at_from_where_they_will_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "mine.yaml").write_text("severity: info\n")
    asked = ["monitoring.alerts.rules=rules", "monitoring.alerts.webhook_file=hook"]
    moved = with_absolute_paths(load_config(Path("quickstart.yaml"), asked))
    alerts = moved.monitoring.alerts
    assert (alerts.rules, alerts.webhook_file) == (str(tmp_path / "rules"), str(tmp_path / "hook"))
    problems = check(replace(setting(tmp_path), config=moved)).problems
    assert [problem.key for problem in problems] == ["message", "remedy", "monitoring.alerts.webhook_file"]
    assert problems[0].source == str(tmp_path / "rules" / "mine.yaml")


def test_memory_of_the_learner_s_gpus(tmp_path):
    report = check(setting(tmp_path))
    assert any(line.startswith("memory: 3.0 of 80 GiB on the fullest learner GPU") for line in report.lines)
    (problem,) = check(setting(tmp_path, cluster=["gpu_gib=2"])).problems
    assert (problem.key, problem.value) == ("cluster.gpu_gib", 2.0)
    assert "would need 3.0 GiB" in problem.problem
