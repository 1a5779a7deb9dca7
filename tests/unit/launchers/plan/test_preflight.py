"""The plan of a run in words, and what stops it."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launchers.plan.preflight import check
from launchers.plan.setting import Setting, prepared, with_absolute_paths
from launchers.slurm.cluster import load_cluster
from pipeline.config.errors import ConfigError
from pipeline.config.load import load_config, resolve_path

BIG = ["data.source.kind=reasoning_gym", "data.source.task=chain_sum", "data.source.size=2000"]


def setting(tmp_path, *overrides, nodes=1, cluster=(), recipe="quickstart.yaml", **more):
    config = load_config(Path(recipe), overrides)
    described = load_cluster(Path("cluster/plain.yaml"), [f"scratch='{tmp_path}'", *cluster])
    return Setting(config, described, nodes, tmp_path / "run", **more)


def line(report, begin):
    (found,) = [line for line in report.lines if line.startswith(begin)]
    return found


def test_the_batch_in_words(tmp_path):
    overrides = ["rollout.prompts_per_step=1024", "learner.data_parallel_size=128", "learner.micro_batch_size=4"]
    (first, *_) = check(setting(tmp_path, *overrides, *BIG, nodes=33)).lines
    assert first == (
        "batch: 1,024 prompts x 16 = 16,384 samples a step = 128 per data-parallel rank and update = 32 micro-batches "
        "of 4"
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


ROUTED = ["rollout.samples_per_prompt=16", "rollout.max_prompt_tokens=1000", "rollout.max_new_tokens=8192"]
SHIPPED = ["qwen2.5-32b", "qwen3-32b", "qwen3-32b-32k", "qwen3-235b-a22b", "qwen3-30b-a3b", "papers/qwen2.5-32b"]


@pytest.mark.parametrize("cluster", ["plain", "pyxis"])
@pytest.mark.parametrize("recipe", SHIPPED)
def test_shipped_recipes_and_clusters_fit_each_other(recipe, cluster, tmp_path):
    """As the files are, but for the data of the papers' recipes, which is not packaged; nodes follow from the plan."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    data = [f"data.source.path={prompts}"] if recipe.startswith("papers/") else []
    described = load_cluster(Path(f"cluster/{cluster}.yaml"))
    with prepared(Path(f"recipe/{recipe}.yaml"), data, described) as found:
        report = check(found)
    assert not report.problems
    assert not [said for said in report.lines if said.startswith("note: a step")]
    assert line(report, "nodes:") == f"nodes: {found.nodes}, as many as the run needs (--nodes says otherwise)"
    assert set(range(found.nodes)) == set(found.placed().nodes)


def test_predicted_seconds_are_for_an_average_response_and_memory_for_the_longest(tmp_path):
    more = {"recipe": "recipe/qwen3-32b.yaml", "nodes": 8}
    assumed, longest = setting(tmp_path, **more), setting(tmp_path, **more, stated_response=8192)
    said = line(check(assumed), "responses:")
    assert said.startswith("responses: 2,458 tokens on average (assumed: 30% of the limit; --mean-response states it)")
    assert assumed.forecast.step_seconds < longest.forecast.step_seconds / 3
    assert assumed.forecast.memory == longest.forecast.memory


def test_a_mean_response_above_the_limit_is_refused():
    with (
        pytest.raises(ConfigError, match=r"--mean-response: 8193\n.*above rollout.max_new_tokens=8192"),
        prepared(Path("recipe/qwen3-32b.yaml"), [], None, mean_response=8193),
    ):
        pass


def test_no_number_of_nodes_helps_an_engine_that_is_larger_than_a_node(tmp_path):
    report = check(setting(tmp_path, recipe="recipe/qwen3-235b-a22b.yaml", nodes=0, cluster=["gpus_per_node=4"]))
    (problem,) = [problem for problem in report.problems if problem.key == "cluster.gpus_per_node"]
    assert "an engine needs 8 GPUs, a node has 4" in problem.problem
    assert "rollout.tensor_parallel_size" in problem.remedy


def test_weights_of_engines_on_the_learners_gpus_go_between_the_gpus(tmp_path):
    colocated = ["rollout.placement=colocated", "rollout.engines=4", "learner.data_parallel_size=1"]
    slow, fast = (
        setting(tmp_path, *colocated, recipe="recipe/qwen3-32b.yaml", nodes=4, cluster=[speed]).forecast.sync
        for speed in ("gpu_network_gb_s=1", "gpu_network_gb_s=1e9")
    )
    assert slow.node_bytes > 0
    assert slow.seconds > fast.seconds + slow.node_bytes / 8e9  # what enters a node is divided over its 8 GPUs
    assert 0 < fast.seconds < slow.model_bytes / 4e9


@pytest.mark.parametrize(
    ("overrides", "nodes", "cluster", "key", "said"),
    [
        (["learner.data_parallel_size=8"], 1, [], "cluster.nodes", "needs 16 GPUs and would get 1 node of 8"),
        ([], 2, [], "cluster.nodes", "node 1 would have nothing to do"),
        ([], 1, ["walltime='00:15:30'"], "cluster.save_before_s", "leaves 30 s of 930"),
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


def test_seconds_and_gpu_hours_of_a_32b_run(tmp_path):
    """The parts are those of the estimates, which have their own tests; here is what the plan makes of them."""
    found = setting(
        tmp_path, recipe="recipe/qwen3-32b.yaml", nodes=8, cluster=["save_before_s=1200"], stated_response=2500
    )
    report, forecast = check(found), found.forecast
    assert forecast.sync.model_bytes == 32_762_123_264 * 2
    model_gb = forecast.sync.model_bytes / 1e9
    # No learner is on an engine's node, so the whole model enters it, over the network of its eight GPUs.
    assert forecast.sync.node_bytes == forecast.sync.model_bytes
    assert model_gb / 8 / 50 < forecast.sync.seconds < 2 * model_gb / 8 / 50
    parts = forecast.rollouts.seconds, forecast.train_seconds, forecast.sync.seconds
    assert forecast.step_seconds == pytest.approx(sum(parts))
    said = line(report, "step: about")
    assert "rollouts 70.6 s + training 110.4 s + weight sync 0.3 s, were all responses equally long:" in said
    assert line(report, "responses:").startswith("responses: 2,500 tokens on average (stated)")
    hours = 500 * forecast.step_seconds / 3600
    assert f"500 steps in {hours:.1f} h on 64 GPUs = {hours * 64:,.1f} GPU-hours" in line(report, "cost:")
    # 25.2 h in pieces of 4 h - 20 min
    assert "about 7 time limits of 04:00:00 (predicted, at that step;" in line(report, "cost:")
    assert "50 steps = about 2.5 h of the 3.7 h before saving begins" in line(report, "save interval:")
    assert "3 checkpoints of about 427.2 GiB" in line(report, "disk:")  # 32.8e9 x (2 + 3 x 4) bytes


@pytest.mark.parametrize(
    ("save_before", "every", "key", "said"),
    [
        (1200, 50, None, None),
        # A step of 14.6 min, then a checkpoint of 114.7 GB a node at 1 GB/s; 12 h between checkpoints.
        (600, 50, "cluster.save_before_s", "raise it to 1020 or more"),
        (600, 10, None, "cluster.save_before_s=1020 would save it"),
    ],
)
def test_a_step_must_end_before_the_time_limit(tmp_path, save_before, every, key, said):
    more = {"recipe": "recipe/qwen3-32b.yaml", "nodes": 8, "cluster": [f"save_before_s={save_before}"]}
    more["stated_response"] = 8192
    report = check(setting(tmp_path, f"checkpoint.every={every}", **more))
    problems = {problem.key: problem for problem in report.problems if problem.key != "checkpoint.keep_last"}
    assert set(problems) == ({key} if key else set())
    assert said is None or said in (problems[key].remedy if key else line(report, "note: a step takes about"))


def test_the_last_checkpoint_must_be_written_before_the_time_limit(tmp_path):
    """427.2 GiB over 32 learner ranks, 8 a node: 114.7 GB at the cluster's rate, which one kind of node has."""
    more = {"recipe": "recipe/qwen3-32b.yaml", "nodes": 8, "stated_response": 2500}

    def planned(disk_gb_s, *keys):
        return check(setting(tmp_path, *keys, cluster=["save_before_s=900", f"disk_gb_s={disk_gb_s}"], **more))

    quick = planned(1)
    assert "up to 106.8 GiB a node" in line(quick, "saving:")
    assert "in about 114.7 s" in line(quick, "saving:")
    assert "cluster.save_before_s" not in {problem.key for problem in quick.problems}
    slow = {problem.key: problem for problem in planned(0.1).problems}["cluster.save_before_s"]
    assert slow.value == 900
    assert "writing a checkpoint takes about 19.1 min" in slow.problem
    assert slow.remedy.startswith("raise it to 2340 or more")  # twice 1,147 s, then 20 s
    assert "the run will wait for it" in line(planned(0.1, "checkpoint.every=2"), "note: writing a checkpoint")


@pytest.mark.parametrize(("memory", "refused"), [("0", False), ("106G", True), ("107G", False)])
def test_a_node_s_memory_holds_its_copy_of_a_checkpoint(tmp_path, memory, refused):
    """106.8 GiB on each of four learner nodes."""
    more = {"recipe": "recipe/qwen3-32b.yaml", "nodes": 8, "stated_response": 2500}
    report = check(setting(tmp_path, cluster=["save_before_s=1200", f"memory_per_node={memory}"], **more))
    found = [problem for problem in report.problems if problem.key == "cluster.memory_per_node"]
    assert len(found) == refused
    for problem in found:
        assert problem.value == memory
        assert "106.8 GiB of 106.0 GiB" in problem.problem
        assert "above 107G" in problem.remedy


def test_an_engine_s_memory(tmp_path):
    more = {"recipe": "recipe/qwen3-32b.yaml", "nodes": 8, "cluster": ["save_before_s=1200"]}
    report = check(setting(tmp_path, **more))
    # 65,524,246,528 bytes of weights on 4 GPUs; 0.8 x 80 GiB less them; 65,536 bytes a token.
    assert "15.3 GiB of weights and 48.7 GiB of cache on every GPU: 798,620 tokens, 229 of an engine's 256" in line(
        report, "engine memory:"
    )
    problems = check(setting(tmp_path, "rollout.sglang.mem_fraction_static=0.1", **more)).problems
    (problem,) = [problem for problem in problems if problem.key == "rollout.sglang.mem_fraction_static"]
    # (15.26 + 9216 x 65536 / 2^30 = 0.56) / 80 GiB
    assert "raise it above 0.20" in problem.remedy


def test_the_routes_that_samples_carry(tmp_path):
    """48 layers of 8 experts: 384 bytes a token of prompt and response."""
    more = {"recipe": "recipe/qwen3-30b-a3b.yaml", "nodes": 8, "stated_response": 2000}
    found = setting(tmp_path, "learner.routing_replay=routes", "rollout.prompts_per_step=64", *ROUTED, **more)
    assert line(check(found), "routes:") == (
        "routes: 384 bytes a token, about 1.1 GiB a step from engines to learner, at most 3.4 GiB "
        "(learner.routing_replay=routes)"
    )
    assert not [said for said in check(setting(tmp_path, **more)).lines if said.startswith("routes:")]


def test_engines_on_the_learner_s_gpus(tmp_path):
    together = ["rollout.placement=colocated", "checkpoint.every=10"]
    more = {"recipe": "recipe/qwen3-32b.yaml", "nodes": 4, "cluster": ["save_before_s=1200"]}
    found = setting(tmp_path, *together, "rollout.sglang.mem_fraction_static=0.5", **more)
    report, memory = check(found), found.forecast.memory
    assert line(report, "engines:") == "engines: 8 sglang of TP 4, on the learner's GPUs"
    assert line(report, "node 3:") == "node 3: 8 learner processes, 2 engines"
    assert "on 32 GPUs" in line(report, "cost:")
    assert memory.together == max(memory.steady + memory.engine, memory.learner) + 3
    assert line(report, "together:").startswith(f"together: {memory.together:.1f} of 80 GiB")
    assert "rollout.placement" not in {problem.key for problem in report.problems}
    problems = check(setting(tmp_path, *together, "rollout.sglang.mem_fraction_static=0.9", **more)).problems
    (problem,) = [problem for problem in problems if problem.key == "rollout.placement"]
    assert "makes" in problem.problem
    assert "of 80 GiB" in problem.problem
    # With such buckets the fullest is a weight sync: weights of both, what is sent, what is handed over; no cache.
    syncing = setting(tmp_path, *together, "rollout.sglang.mem_fraction_static=0.3", "learner.bucket_mib=8192", **more)
    drawn, memory = syncing.forecast.rollouts, syncing.forecast.memory
    assert memory.together == pytest.approx(memory.steady + drawn.weights_bytes / 2**30 + 3 * 8 + 3)


def test_there_must_be_gpus_to_share(tmp_path):
    keys = ["rollout.placement=colocated", "rollout.engine=sglang"]
    (problem,) = check(setting(tmp_path, *keys, cluster=["gpus_per_node=0"])).problems
    assert (problem.key, problem.problem) == ("rollout.placement", "the cluster has no GPUs to share")


def test_a_cluster_without_gpus_has_no_forecast(tmp_path):
    lines = check(setting(tmp_path, cluster=["gpus_per_node=0"])).lines
    assert not [line for line in lines if "predicted" in line]


ABSENT = ["python=/nowhere/python", "container.mounts=[/nowhere/models:/models]"]


def test_what_is_absent_stops_a_launch_and_is_told_to_a_plan(tmp_path):
    keys = ["cluster.scratch", "cluster.container.mounts", "cluster.python"]
    cluster = [*ABSENT, f"scratch='{tmp_path}/none'"]
    report = check(setting(tmp_path, cluster=cluster, submits=True))
    assert [problem.key for problem in report.problems] == keys
    assert all(problem.remedy for problem in report.problems)
    assert "no such folder here" in report.problems[0].problem
    planned = check(setting(tmp_path, cluster=cluster))
    assert not planned.problems
    assert [line.split("=")[0] for line in planned.lines if line.startswith("note:")] == [
        f"note: {key}" for key in keys
    ]


def test_a_model_without_weights_is_not_launched(tmp_path):
    packaged = setting(tmp_path, recipe="recipe/qwen3-32b.yaml", nodes=8, cluster=["save_before_s=1200"], submits=True)
    said = [problem.problem for problem in check(packaged).problems if problem.key == "model.hf_path"]
    assert said == ["only the packaged config.json, no weights"]
    folder = tmp_path / "a model"
    folder.mkdir()
    shutil.copy(resolve_path("model/pm4-100k") / "config.json", folder)
    own = setting(tmp_path, f"model.hf_path='{folder}'", submits=True)
    assert ("model.hf_path", "no *.safetensors here") in [(p.key, p.problem) for p in check(own).problems]
    shutil.copy(resolve_path("model/pm4-100k") / "model.safetensors", folder)
    own = setting(tmp_path, f"model.hf_path='{folder}'", submits=True)
    assert "model.hf_path" not in [problem.key for problem in check(own).problems]


def test_versions_are_asked_of_the_run_s_python(tmp_path):
    own = setting(tmp_path, cluster=[f"python={sys.executable}", "gpus_per_node=0"], submits=True)
    assert "torch" in line(check(own), "versions:")
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho no module named packaging >&2; exit 1")
    other.chmod(0o755)
    report = check(setting(tmp_path, cluster=[f"python={other}", "gpus_per_node=0"], submits=True))
    (problem,) = report.problems
    assert problem.key == "cluster.python"
    assert "no module named packaging" in problem.problem


def test_paths_of_another_machine_are_absolute_and_left_alone():
    config = load_config(None, ["model.hf_path=/a/../model", "data.source.path=/b/c.jsonl"], check=False)
    assert with_absolute_paths(config, elsewhere=True) == config
    packaged = load_config(Path("quickstart.yaml"))
    assert with_absolute_paths(packaged, elsewhere=True).model.hf_path == "model/pm4-100k"
    relative = load_config(None, ["model.hf_path=mine"], check=False, model_elsewhere=Path)
    with pytest.raises(ConfigError, match=r"model\.hf_path") as error:
        with_absolute_paths(relative, elsewhere=True)
    assert "absolute path on the cluster" in str(error.value)
