"""Checks the paths, the disk, the alert rules and the package versions on the machine where the run will need them."""

from __future__ import annotations

from collections.abc import Iterator

from launchers.doctor import BAD
from launchers.plan.setting import Setting
from launchers.plan.site import Site, needed_paths, packaged, versions
from launchers.plan.words import count, size
from pipeline.config.errors import ConfigError, Problem
from pipeline.config.load import PACKAGED
from pipeline.monitoring.alerts.rules import rules_of
from pipeline.monitoring.events import FILE_NAME
from pipeline.monitoring.sinks.alert_delivery import webhook_problems


def files(setting: Setting) -> Iterator[str | Problem]:
    """The run's folder, what the run needs and does not find, and the disk that its checkpoints take."""
    run_dir, site = setting.run_dir, setting.site
    yield f"run folder: {run_dir}"
    for problem in _absent(setting, site):
        yield problem if setting.submits else f"note: {problem.key}={problem.value}: {problem.problem}"
    if site.kinds[str(run_dir / FILE_NAME)] == "file" and not setting.resumed:
        remedy = f"continue it with --resume {run_dir}, or choose another run_dir"
        yield Problem("run_dir", str(run_dir), "this folder already holds a run", remedy)
    from launchers.plan.forecast import checkpoint_bytes

    keep = setting.config.checkpoint.keep_last + 1  # the oldest goes when the newest is complete
    needed = keep * checkpoint_bytes(setting.model, setting.config)
    if setting.cluster is not None and site.kinds[setting.cluster.scratch] == "absent":
        yield f"disk: {keep} checkpoints of about {size(needed / keep)}"
        return
    yield f"disk: {keep} checkpoints of about {size(needed / keep)}, {size(site.free)} free"
    if needed > site.free:
        what = f"{keep} checkpoints need about {size(needed)}, {site.above} has {size(site.free)} free"
        yield Problem("checkpoint.keep_last", keep - 1, what, "keep fewer, make room, or choose another run_dir")


def _absent(setting: Setting, site: Site) -> Iterator[Problem]:
    """Paths that the run needs where it will run, each with its key."""
    config, cluster = setting.config, setting.cluster
    where = f"on {cluster.ssh.host}" if cluster and cluster.ssh.host else "here"
    for key, path, wanted, remedy in needed_paths(config, cluster):
        kind = site.kinds.get(path, "absent")
        if kind == "absent" or (wanted != "any" and kind != wanted):
            yield Problem(key, path, f"no such {'path' if wanted == 'any' else wanted} {where}", remedy)
    if not site.weights and not packaged(config.model.hf_path):
        yield Problem(
            "model.hf_path", config.model.hf_path, f"no *.safetensors {where}", "download or convert the model first"
        )
    if packaged(config.model.hf_path) and not list((PACKAGED / config.model.hf_path).glob("*.safetensors")):
        remedy = "give the folder that has its *.safetensors"
        yield Problem("model.hf_path", config.model.hf_path, "only the packaged config.json, no weights", remedy)
    if not site.writable:
        yield Problem(
            "run_dir",
            str(setting.run_dir),
            f"{site.above} cannot be written {where}",
            "choose another, or mend its rights",
        )
    if cluster is not None and not site.python:
        remedy = "install it there with requirements (docs/cluster.md), or name the one that has them"
        yield Problem("cluster.python", cluster.python, f"no such program {where}", remedy)


def alerts(setting: Setting) -> Iterator[str | Problem]:
    """The rules and the webhook's file; what only the node of the run has is looked at there."""
    if setting.cluster is not None and setting.cluster.ssh.host:
        return
    try:
        rules = rules_of(setting.config)
    except ConfigError as error:
        yield from error.problems
    else:
        yield f"alerts: {count(len(rules), 'rule')}"
    yield from webhook_problems(setting.config)


def versions_there(setting: Setting) -> Iterator[str | Problem]:
    """Those of the Python that the run will use, where it can be asked before the job."""
    cluster = setting.cluster
    if cluster is None or not setting.submits:
        return
    if not setting.python:
        yield "versions: inside the container, not looked at; `isentrope doctor` in a job says whether they fit"
        return
    for finding in (
        versions(setting.shell, cluster.python, gpus=cluster.gpus_per_node > 0) if setting.site.python else ()
    ):
        if finding.level == BAD:
            yield Problem("cluster.python", cluster.python, f"{finding.subject}: {finding.words}", finding.remedy)
        else:
            yield f"{finding.subject}: {finding.words}"
