"""What a run that was killed and resumed looks like in TensorBoard, W&B, MLflow and Prometheus, each read back with its
own means.
"""

import json
import socket
import struct
import sys
import time
import urllib.request
from importlib import import_module
from pathlib import Path

import pytest

from launchers.supervise.sidecar import Sidecar
from pipeline.config.errors import ConfigError
from pipeline.config.keys import flat
from pipeline.config.load import load_config
from pipeline.config.schema import SINKS
from pipeline.monitoring.events import read_all_events, run_id
from pipeline.monitoring.sinks import factory
from pipeline.ports import free_port

sys.path.append(str(Path(__file__).parent))
import resumed_run
import run_writer as runs


def sink(name, run_dir, *overrides):
    pytest.importorskip(SINKS[name])
    config = runs.config(f"monitoring.sinks=[{name}]", *overrides)
    return factory.build_sinks(config, run_dir)[name]


def both_attempts(name, run_dir, *overrides):
    """Each attempt has a sidecar of its own, the second going on where the first had come."""
    build = sink(name, run_dir, *overrides)
    resumed_run.first_attempt(run_dir)
    position = resumed_run.deliver(build(), run_dir)
    resumed_run.second_attempt(run_dir)
    resumed_run.deliver(build(), run_dir, position)
    return run_dir


def test_tensorboard_shows_each_step_once(tmp_path):
    run_dir = both_attempts("tensorboard", tmp_path)
    accumulator = import_module("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    train, evaluation = (accumulator(str(run_dir / "tensorboard" / part)).Reload() for part in ("train", "evaluation"))

    def series(of, tag):
        return [(point.step, round(point.value, 6)) for point in of.Scalars(tag)]

    assert series(train, "entropy/mean") == [(0, 0.3), (1, 0.3), (2, 0.75), (3, 0.75)]
    assert series(train, "mismatch/kl") == [], "its steps were superseded"
    assert series(evaluation, "evaluation/pass_at_1") == [(0, 0.3), (2, 0.4), (4, 0.5)]
    config = train.Tensors("config")[-1].tensor_proto.string_val[0].decode()
    assert "actuator: reweight" in config
    layout = import_module("tensorboard.plugins.custom_scalar.layout_pb2").Layout()
    layout.ParseFromString(train.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    shown = layout.category[0].chart[0].margin.series[0]
    assert {shown.value, shown.lower, shown.upper} <= set(train.Tags()["scalars"])
    assert "_hparams_/session_start_info" in train.summary_metadata


def test_tensorboard_has_alerts_and_faults(tmp_path):
    resumed_run.first_attempt(tmp_path)
    resumed_run.deliver(sink("tensorboard", tmp_path)(), tmp_path)
    accumulator = import_module("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    train = accumulator(str(tmp_path / "tensorboard" / "train")).Reload()
    texts = {tag: train.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in ("alerts/critical", "faults")}
    assert texts == {"alerts/critical": "**exploding**: lower the target", "faults": resumed_run.FAULT}
    assert train.Tensors("alerts/critical")[0].step == 3


def wandb_records(path):
    """The records of W&B's transaction log: LevelDB's log format after seven bytes of its own, in blocks of 32 KiB."""
    message = import_module("wandb.proto.wandb_internal_pb2").Record
    content, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield message.FromString(record)
            record = b""


def closed_log(path):
    """The records of a log once its last one is there: W&B's own process writes them after ``finish`` returned."""
    deadline = time.monotonic() + 60
    while not any(record.HasField("exit") for record in wandb_records(path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return list(wandb_records(path))


def test_wandb_offline_continues_the_same_run(tmp_path):
    run_dir = both_attempts(
        "wandb", tmp_path, "monitoring.wandb.mode=offline", "monitoring.wandb.group=band", "name=mine"
    )
    records = [closed_log(path) for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))]
    assert len(records) == 2
    opened = [next(record.run for record in attempt if record.HasField("run")) for attempt in records]
    assert {(run.run_id, run.project, run.run_group, run.display_name, run.resume) for run in opened} == {
        (run_id(run_dir), "isentrope", "band", "mine", True)
    }
    assert set(opened[0].tags) == {"pi", "reweight", "pm4-100k"}
    config = {update.key: json.loads(update.value_json) for update in opened[0].config.update}
    assert config["entropy"]["band"]["low"] == 0.27
    rows = [
        {item.nested_key[0] or item.key: json.loads(item.value_json) for item in record.history.item}
        for attempt in records
        for record in attempt
        if record.HasField("history")
    ]
    entropy = [(row["step"], row["entropy/mean"]) for row in rows if "entropy/mean" in row]
    assert entropy == [(0, 0.3), (1, 0.3), (2, 0.5), (3, 0.5), (2, 0.75), (3, 0.75)]
    assert [row["evaluation/pass_at_1"] for row in rows if "evaluation/pass_at_1" in row] == [0.3, 0.4, 0.5]
    metrics = {record.metric.glob_name: record.metric.step_metric for record in records[0] if record.HasField("metric")}
    assert metrics["*"] == "step"
    alerts = [record.alert for attempt in records for record in attempt if record.HasField("alert")]
    assert [(alert.title, alert.text, alert.level) for alert in alerts] == [("exploding", "lower the target", "ERROR")]
    ends = [record.exit.exit_code for attempt in records for record in attempt if record.HasField("exit")]
    assert ends == [1, 0], "the first attempt was killed"


def test_mlflow_continues_the_same_run(tmp_path):
    run_dir = both_attempts("mlflow", tmp_path, "name=mine", "monitoring.mlflow.experiment=band")
    client = import_module("mlflow.tracking").MlflowClient((run_dir / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("band")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params["entropy.band.low"] == "0.27"
    assert set(run.data.params) == set(flat(runs.config()))
    assert run.data.tags["alert.exploding"] == "step 3, critical: lower the target"
    history = client.get_metric_history(run.info.run_id, "entropy/mean")
    assert [(point.step, point.value) for point in history] == [
        (0, 0.3),
        (1, 0.3),
        (2, 0.5),
        (3, 0.5),
        (2, 0.75),
        (3, 0.75),
    ]
    assert run.data.metrics["entropy/mean"] == 0.75
    assert run.data.metrics["evaluation/pass_at_1"] == 0.5


def test_mlflow_says_not_now_when_nobody_answers(tmp_path):
    build = sink("mlflow", tmp_path, f"monitoring.mlflow.tracking_uri=http://127.0.0.1:{free_port()}")
    resumed_run.first_attempt(tmp_path)
    with pytest.raises(ConnectionError, match="refused"):
        build()


def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    parse = import_module("prometheus_client.parser").text_string_to_metric_families
    return {
        (
            sample.name,
            *(value for key, value in sorted(sample.labels.items()) if key not in ("run", "seed")),
        ): sample.value
        for family in parse(text)
        for sample in family.samples
        if not sample.name.startswith("isentrope_run_info")
    }


def test_prometheus_shows_the_newest(tmp_path):
    port = free_port()
    targets = tmp_path / "targets"
    where = [f"monitoring.prometheus.port={port}", f"monitoring.prometheus.targets={targets}"]
    build = sink("prometheus", tmp_path, *where, "checkpoint.every=2")
    resumed_run.first_attempt(tmp_path)
    endpoint = build()
    (target,) = targets.iterdir()
    assert json.loads(target.read_text()) == [{"targets": [f"127.0.0.1:{port}"]}]
    events = read_all_events(tmp_path / "events.jsonl")
    for event in events:
        endpoint.event(event)
    seen = scrape(port)
    wanted = {
        ("isentrope_entropy_mean",): 0.5,
        ("isentrope_entropy_band_low",): 0.27,
        ("isentrope_mismatch_kl",): 0.001,
        ("isentrope_evaluation_pass_at_1",): 0.4,
        ("isentrope_step",): 4,
        ("isentrope_steps_total",): 4,
        ("isentrope_steps_since_checkpoint",): 2,
        ("isentrope_checkpoint_every_steps",): 2,
        ("isentrope_control_state", "tracking"): 1,
        ("isentrope_alert_active", "exploding", "critical"): 1,
        ("isentrope_alerts_total", "exploding", "critical"): 1,
        ("isentrope_faults_total",): 1,
    }
    assert {name: seen[name] for name in wanted} == wanted
    assert 0 <= seen[("isentrope_seconds_since_last_event",)] < 3600
    endpoint.event({**resumed_run.ALERT, "kind": "alert", "time": 0.0, "state": "end"})
    later = scrape(port)
    assert later[("isentrope_alert_active", "exploding", "critical")] == 0
    assert later[("isentrope_seconds_since_last_event",)] > 1e9, "goes on without events"
    resumed_run.second_attempt(tmp_path)
    for event in read_all_events(tmp_path / "events.jsonl")[len(events) :]:
        endpoint.event(event)
    resumed = scrape(port)
    assert resumed[("isentrope_entropy_mean",)] == 0.75
    assert ("isentrope_alert_active", "exploding", "critical") not in resumed
    endpoint.close()
    endpoint.close()
    with pytest.raises(OSError, match="refused"):
        scrape(port)
    assert not target.exists()


@pytest.mark.parametrize(("status", "remains"), [("failed", True), ("stopped", False), (None, True)])
def test_prometheus_is_to_miss_a_run_that_broke_off(tmp_path, status, remains):
    where = [f"monitoring.prometheus.port={free_port()}", f"monitoring.prometheus.targets={tmp_path}/targets"]
    resumed_run.first_attempt(tmp_path)
    endpoint = sink("prometheus", tmp_path, *where)()
    if status:
        endpoint.event({"kind": "run_end", "time": 0.0, "status": status})
    endpoint.close()
    assert bool(list((tmp_path / "targets").iterdir())) == remains


def test_the_run_and_its_seed_are_labels(tmp_path):
    port = free_port()
    build = sink("prometheus", tmp_path, f"monitoring.prometheus.port={port}", "name=mine", "seed=3")
    endpoint = build()
    endpoint.event(read_all_events(resumed_run.first_attempt(tmp_path) / "events.jsonl")[0])
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    endpoint.close()
    assert 'isentrope_step{run="mine",seed="3"} 0.0' in lines
    (info,) = (line for line in lines if line.startswith("isentrope_run_info{"))
    assert f'run_dir="{tmp_path}"' in info
    assert 'megatron_core="' in info


def refusal(run_dir, *overrides):
    (problem,) = factory.problems(runs.config(*overrides))
    assert not list(run_dir.iterdir())
    return problem


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path, monkeypatch):
    pytest.importorskip("prometheus_client")
    monkeypatch.setattr(factory, "PORT_WAIT_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        problem = refusal(tmp_path, "monitoring.sinks=[prometheus]", f"monitoring.prometheus.port={port}")
    assert (problem.key, problem.value) == ("monitoring.prometheus.port", port)
    assert factory.problems(runs.config("monitoring.sinks=[prometheus]", f"monitoring.prometheus.port={port}")) == []


def test_an_address_of_another_machine_is_refused(tmp_path):
    pytest.importorskip("prometheus_client")
    problem = refusal(tmp_path, "monitoring.sinks=[prometheus]", "monitoring.prometheus.host=192.0.2.1")
    assert problem.key == "monitoring.prometheus.host"


@pytest.mark.parametrize("name", SINKS)
def test_a_library_that_is_missing_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(factory, "SINKS", dict.fromkeys(SINKS, "isentrope_no_such_library"))
    problem = refusal(tmp_path, f"monitoring.sinks=[{name}]")
    assert (problem.key, problem.value) == ("monitoring.sinks", [name])
    assert "isentrope[monitor]" in problem.remedy


def test_a_folder_of_the_librarys_name_is_no_library(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "isentrope_folder_only").mkdir()
    assert not factory._installed("isentrope_folder_only")
    assert factory._installed("json")


def test_wandb_online_without_a_key_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    empty = tmp_path / "run"
    empty.mkdir()
    problem = refusal(empty, "monitoring.sinks=[wandb]")
    assert problem.key == "monitoring.wandb.mode"
    host = import_module("wandb").setup().settings.base_url.removeprefix("https://")
    (tmp_path / "netrc").write_text(f"machine {host}\nlogin user\npassword {'0' * 40}\n")
    assert factory.problems(runs.config("monitoring.sinks=[wandb]")) == []


@pytest.mark.parametrize("name", SINKS)
def test_every_sink_is_a_class_of_its_module(name):
    pytest.importorskip(SINKS[name])
    assert hasattr(import_module(f"pipeline.monitoring.sinks.{name}"), f"{name.capitalize()}Sink")


@pytest.mark.parametrize(
    ("override", "key", "said"),
    [
        ("monitoring.sinks=[tensorbord]", "monitoring.sinks", "did you mean 'tensorboard'"),
        ("monitoring.sinks=[wandb,wandb]", "monitoring.sinks", "named twice"),
        ("monitoring.mlflow.tracking_uri=https://me:secret@x.org", "monitoring.mlflow.tracking_uri", "password"),
    ],
)
def test_what_no_machine_could_do_is_refused_with_the_configuration(override, key, said):
    with pytest.raises(ConfigError, match=said) as refused:
        load_config(Path("recipe/pm4.yaml"), [override])
    assert [problem.key for problem in refused.value.problems] == [key]
    assert "secret" not in str(refused.value)


def test_without_sinks_there_is_no_process(tmp_path):
    with Sidecar(runs.config(), tmp_path) as sidecar:
        sidecar.start()
        assert sidecar._process is None
    assert not list(tmp_path.iterdir())


def test_the_identity_follows_the_first_event(tmp_path):
    first = resumed_run.first_attempt(tmp_path / "a")
    known = run_id(first)
    assert len(known) == 16
    resumed_run.second_attempt(first)
    (tmp_path / "a").rename(tmp_path / "moved")
    assert run_id(tmp_path / "moved") == known
    assert run_id(resumed_run.first_attempt(tmp_path / "b")) != known
