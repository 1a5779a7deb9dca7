"""The endpoint, the shipped alert rules and the Grafana dashboard before a real Prometheus."""

import json
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from launchers.supervise.sidecar import Sidecar
from pipeline.config.load import PACKAGED
from pipeline.monitoring.sinks.prometheus import exported
from pipeline.ports import free_port

sys.path.append(str(Path(__file__).resolve().parents[1] / "unit/pipeline/monitoring"))
import run_writer as runs

SHIPPED = PACKAGED / "monitoring"
pytest.importorskip("prometheus_client", reason="needs requirements/monitor.txt")
pytestmark = pytest.mark.skipif(not shutil.which("prometheus"), reason="needs the Debian package prometheus")


def promtool(*words):
    done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_promtool_accepts_what_is_shipped(tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "monitoring")
    code, said = promtool("check", "config", tmp_path / "monitoring" / "prometheus.yaml")
    assert (code, "rules found" in said) == (0, True), said
    code, said = promtool("test", "rules", Path(__file__).with_name("prometheus_rules_test.yaml"))
    assert code == 0, said


class Server:
    """A Prometheus over the runs that announce themselves in ``folder / targets``, under the shipped rules, with all
    waiting cut short.
    """

    def __init__(self, folder):
        self.port = free_port()
        config = yaml.safe_load((SHIPPED / "prometheus.yaml").read_text())
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        discovery = config["scrape_configs"][0]["file_sd_configs"][0]
        discovery |= {"files": [str(folder / "targets" / "*.json")], "refresh_interval": "1s"}
        rules = yaml.safe_load((SHIPPED / "rules.yaml").read_text())
        for rule in rules["groups"][0]["rules"]:
            rule.pop("for", None)
        (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self.log = (folder / "prometheus.log").open("w")
        self.process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder}/prometheus.yaml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{self.port}",
            ],
            stdout=self.log,
            stderr=self.log,
        )

    def ask(self, path, **parameters):
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}?{query}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as refused:
            if refused.code == 503:  # it listens before it can answer
                raise
            raise AssertionError(f"{parameters}: {refused.read().decode()}") from refused

    def query(self, expression):
        return {
            tuple(sorted(found["metric"].items())): float(found["value"][1])
            for found in self.ask("/api/v1/query", query=expression)["result"]
        }

    def wait(self, expression):
        """What it answers as soon as that is not empty."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self.process.poll() is None
            try:
                found = self.query(expression)
            except OSError:  # not ready yet
                found = {}
            if found:
                return found
            time.sleep(0.2)
        raise AssertionError(f"{expression} stays empty")

    def close(self):
        self.process.terminate()
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run with a real sidecar and a real Prometheus that found it: out of its band, saturated, with an alert of its
    own.
    """
    folder = tmp_path_factory.mktemp("prometheus")
    config = [
        "name=mine",
        "monitoring.sinks=[prometheus]",
        f"monitoring.prometheus.port={free_port()}",
        f"monitoring.prometheus.targets={folder}/targets",
    ]
    server = Server(folder)
    try:
        with Sidecar(runs.config(*config), folder / "run") as sidecar:
            recorder = runs.open_run(folder / "run", *config)
            sidecar.start()
            recorder.evaluation(0, runs.evaluation(0.3, 0.95))
            for step in range(3):
                runs.record_step(recorder, step, 0.125, state="saturated", metrics={"mismatch_kl": 0.002})
            recorder.event("step", **full_step())
            recorder.event("alert", step=3, rule="reward_drop", state="begin", severity="info", reason="why")
            recorder.fault("engine 0 was started again")
            server.wait('count_over_time(isentrope_alert_active{rule="reward_drop"}[1m]) > 1')  # a rate needs two
            yield server
            recorder.event("run_end", status="completed", error="")
        assert not list((folder / "targets").iterdir())
    finally:
        server.close()


def full_step():
    """A step whose mappings hold what a run with engines, syncs and a GPU reports."""
    return {
        "time": time.time(),
        "step": 3,
        **dict.fromkeys(("entropy", "entropy_filtered", "temperature", "command", "reward", "loss"), 0.125),
        **dict.fromkeys(("grad_norm", "all_equal_groups", "truncated", "response_length", "learning_rate"), 0.25),
        **{"band_low": 0.27, "band_high": 0.33, "target": 0.3, "state": "saturated", "reason": "at the upper limit"},
        "metrics": {"mismatch_kl": 0.002},
        "seconds": dict.fromkeys(("sample", "verify", "batch", "train", "sync", "other", "total"), 1.5),
        "tokens": {"main": 100, "auxiliary": 10},
        "sync": {"bytes": 1000, "buckets": 1},
        "memory": {"driver": 1.0, "learner": 2.0, "gpu": 3.0},
        "engines": {"alive": 2, "total": 2},
    }


def test_prometheus_finds_the_run_and_its_entropy(watched):
    ((labels, entropy),) = watched.query("isentrope_entropy_mean").items()
    assert entropy == 0.125
    assert {("run", "mine"), ("seed", "0"), ("job", "isentrope")} < set(labels)
    (step,) = watched.query("isentrope_step").values()
    assert step == 4
    (free,) = watched.query("isentrope_disk_free_bytes / isentrope_disk_size_bytes").values()
    assert 0 <= free <= 1


def test_alerts_fire(watched):
    wanted = {"IsentropeOutOfBand", "IsentropeSaturated", "IsentropeAlert"}
    for name in wanted:
        watched.wait(f'ALERTS{{alertname="{name}", alertstate="firing"}}')
    firing = [dict(labels) for labels in watched.query('ALERTS{alertstate="firing"}')]
    disk = {"IsentropeDiskFilling"}  # that is the machine's own affair
    assert {labels["alertname"] for labels in firing} - disk == wanted
    severity = {labels["alertname"]: labels["severity"] for labels in firing}
    assert severity["IsentropeAlert"] == "info", "as the run itself judged"


def expressions():
    """Every query of rules and dashboard, the dashboard's variables as it would fill them."""
    rules = yaml.safe_load((SHIPPED / "rules.yaml").read_text())["groups"][0]["rules"]
    dashboard = json.loads((SHIPPED / "grafana.json").read_text())
    found = [rule["expr"] for rule in rules]
    found += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    found += [annotation["expr"] for annotation in dashboard["annotations"]["list"]]
    return [expression.replace("$run", "mine|other") for expression in found]


def test_every_metric_that_is_shipped_is_one_that_is_exported(watched):
    exported_names = set(watched.ask("/api/v1/label/__name__/values"))
    used = {name for expression in expressions() for name in re.findall(r"\bisentrope_\w*\w", expression)}
    patterns = {name for name in used if name.endswith("_")}  # of __name__=~"..."
    assert used - patterns - exported_names == set()
    assert all(any(known.startswith(pattern) for known in exported_names) for pattern in patterns)
    assert exported("entropy/controlled") in used


def test_every_panel_of_the_dashboard_has_something_to_show(watched):
    dashboard = json.loads((SHIPPED / "grafana.json").read_text())
    empty = [
        (panel["title"], target["expr"])
        for panel in dashboard["panels"]
        for target in panel["targets"]
        if not watched.query(target["expr"].replace("$run", "mine|other"))
    ]
    assert empty == []
    for expression in expressions():
        watched.query(expression)
    variable = dashboard["templating"]["list"][1]["definition"]
    assert re.fullmatch(r"label_values\(isentrope_run_info, run\)", variable)
    assert watched.ask("/api/v1/label/run/values", **{"match[]": "isentrope_run_info"}) == ["mine"]
