"""What a run will do and whether it can, in words, before anything starts: ``isentrope plan run``, and first in every launch.

The configuration itself has been checked when it was loaded; here are the checks that relate it to machines. A check is a function in
``CHECKS`` from a ``Setting`` to lines and problems.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from launchers.placement import PlacementError, place
from launchers.slurm.cluster import ClusterConfig, seconds
from pipeline.config.errors import ConfigError, Problem
from pipeline.config.load import PACKAGED, resolve_path
from pipeline.config.schema import MonitoringConfig, RunConfig
from pipeline.monitoring.alerts.rules import rules_of
from pipeline.monitoring.events import FILE_NAME
from pipeline.monitoring.sinks.alert_delivery import webhook_problems

BYTES_PER_PARAMETER = 12  # of a checkpoint: float32 weights and Adam's two moments


@dataclass(frozen=True)
class Setting:
    """A run and the machines for it; ``cluster`` is None for this machine."""

    config: RunConfig
    cluster: ClusterConfig | None
    nodes: int
    run_dir: Path
    resumed: bool = False

    @property
    def local_files(self) -> bool:
        """Whether the paths of the run can be looked at from here."""
        return self.cluster is None or not self.cluster.ssh.host


@dataclass
class Report:
    """What the checks found."""

    lines: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def raise_problems(self) -> None:
        """Raises ``ConfigError`` with every problem, if there are any."""
        if self.problems:
            raise ConfigError.of(self.problems)


def check(setting: Setting) -> Report:
    """Every check, in the order in which a reader wants to know."""
    report = Report()
    for each in CHECKS:
        for found in each(setting):
            (report.lines if isinstance(found, str) else report.problems).append(found)  # type: ignore[arg-type]
    return report


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The run as it can be started in another folder: relative paths made absolute, but for packaged files, which travel with the code."""
    source = config.data.source
    path = str(Path(source.path).resolve()) if source.path else ""
    data = replace(config.data, source=replace(source, path=path))
    model = replace(config.model, hf_path=_anywhere(config.model.hf_path))
    return replace(config, model=model, data=data, monitoring=_monitoring_anywhere(config.monitoring))


def _monitoring_anywhere(monitoring: MonitoringConfig) -> MonitoringConfig:
    alerts = monitoring.alerts
    rules = _anywhere(alerts.rules) if alerts.rules else ""
    webhook_file = str(Path(alerts.webhook_file).expanduser().resolve()) if alerts.webhook_file else ""
    return replace(monitoring, alerts=replace(alerts, rules=rules, webhook_file=webhook_file))


def _anywhere(path: str) -> str:
    found = resolve_path(path).resolve()
    return str(found.relative_to(PACKAGED)) if found.is_relative_to(PACKAGED) else str(found)


def _batch(setting: Setting) -> Iterator[str | Problem]:
    rollout, learner = setting.config.rollout, setting.config.learner
    rows = rollout.prompts_per_step * rollout.samples_per_prompt
    per_update = rows // learner.updates_per_step
    per_rank = math.ceil(per_update / learner.data_parallel_size)
    words = f"batch: {rollout.prompts_per_step:,} prompts x {rollout.samples_per_prompt} = {rows:,} samples a step"
    if learner.updates_per_step > 1:
        words += f" = {learner.updates_per_step} updates of {per_update:,}"
    words += f" = {per_rank:,} per data-parallel rank and update"
    if learner.max_tokens_per_micro_batch:
        yield f"{words}, in micro-batches of at most {learner.max_tokens_per_micro_batch:,} tokens"
    else:
        size = min(learner.micro_batch_size, per_rank)
        yield f"{words} = {_count(math.ceil(per_rank / size), 'micro-batch')} of {size}"
    length = rollout.max_prompt_tokens + rollout.max_new_tokens
    yield f"tokens: at most {rows:,} x {length:,} = {rows * length:,} a step, prompts included"
    if setting.config.entropy.actuator == "resample" and setting.config.entropy.controller != "none":
        entropy = setting.config.entropy
        more = f"{entropy.auxiliary_prompts} prompts x {entropy.auxiliary_samples}"
        yield f"auxiliary: {more} = {entropy.auxiliary_prompts * entropy.auxiliary_samples:,} further samples at T+"


def _machines(setting: Setting) -> Iterator[str | Problem]:
    learner, rollout, cluster = setting.config.learner, setting.config.rollout, setting.cluster
    layout = {
        "TP": learner.tensor_model_parallel_size,
        "CP": learner.context_parallel_size,
        "PP": learner.pipeline_model_parallel_size,
        "DP": learner.data_parallel_size,
    }
    world = math.prod(layout.values())
    shown = " x ".join(f"{name} {size}" for name, size in layout.items() if size > 1 or name == "TP")
    yield f"learner: {shown} = {_count(world, 'process')}"
    server = f" of TP {rollout.tensor_parallel_size}" if rollout.engine == "sglang" else ""
    yield f"engines: {rollout.engines} {rollout.engine}{server}"
    if cluster is None:
        return
    engine = rollout.tensor_parallel_size if cluster.gpus_per_node and rollout.engine == "sglang" else 0
    gpus = [cluster.gpus_per_node] * setting.nodes
    try:
        placed = place(world, layout["TP"], rollout.engines, engine, gpus)
    except PlacementError as error:
        needed = world + rollout.engines * engine
        what = f"the run needs {needed} GPUs and would get {_count(setting.nodes, 'node')} of {gpus[0]}: {error}"
        yield Problem(
            "cluster.nodes", setting.nodes, what, "use more nodes (--nodes), a smaller layout or fewer engines"
        )
        return
    ranks, engines = Counter(placed.ranks), Counter(placed.engines)
    for node in range(setting.nodes):
        idle = cluster.gpus_per_node - ranks[node] - engines[node] * engine
        rest = f", {idle} GPUs idle" if cluster.gpus_per_node and idle else ""
        yield f"node {node}: {_count(ranks[node], 'learner process')}, {_count(engines[node], 'engine')}{rest}"
        if not ranks[node] and not engines[node]:
            remedy = f"launch with --nodes {max([*placed.ranks, *placed.engines]) + 1}, or enlarge the layout"
            yield Problem("cluster.nodes", setting.nodes, f"node {node} would have nothing to do", remedy)
            return


def _memory(setting: Setting) -> Iterator[str | Problem]:
    """What ``isentrope plan learner`` says, in two lines."""
    cluster = setting.cluster
    if cluster is None or not cluster.gpus_per_node or not setting.local_files:
        return
    from megatron_ext import architecture  # torch: only where there is something to estimate
    from megatron_ext.estimate.report import GIB, summary
    from megatron_ext.estimate.speed import Machine

    model = architecture.read(resolve_path(setting.config.model.hf_path))
    plan = summary(model, setting.config, Machine(), cluster.gpu_gib * GIB)
    peak, step = plan["peak_bytes"] / GIB, plan["step"]["seconds"]
    yield f"memory: {peak:,.1f} of {cluster.gpu_gib:g} GiB on the fullest learner GPU (predicted; isentrope plan learner has the parts)"
    yield f"train phase: about {step:,.1f} s a step on H100s, without rollouts (predicted)"
    if not plan["fits"]:
        remedies = [f"{remedy['key']}={remedy['value']}" for remedy in plan["remedies"][:3]]
        what = f"a learner GPU would need {peak:,.1f} GiB"
        yield Problem("cluster.gpu_gib", cluster.gpu_gib, what, f"try {' or '.join(remedies) or 'a larger layout'}")


def _time(setting: Setting) -> Iterator[str | Problem]:
    cluster, every = setting.cluster, setting.config.checkpoint.every
    if cluster is None:
        return
    limit = seconds(cluster.walltime)
    again = "requeued" if cluster.requeue else f"followed by the next of {_count(cluster.chain, 'job')}"
    yield f"time: saves {cluster.save_before_s} s (or up to a minute more) before {cluster.walltime} is over, then is {again}"
    saves = f"every {every} steps" if every else "only at the end and before the time limit"
    yield f"checkpoints: {saves}, in {setting.run_dir / 'checkpoints'}, the last {setting.config.checkpoint.keep_last} kept"
    if limit - cluster.save_before_s < 60:
        what = f"leaves {limit - cluster.save_before_s} s of {limit} for start-up and training"
        yield Problem("cluster.save_before_s", cluster.save_before_s, what, "lower it or raise cluster.walltime")
    if not every and not cluster.requeue and cluster.chain == 1:
        what = "a job that is lost, or out of time, would lose everything"
        yield Problem("checkpoint.every", every, what, "save every so many steps, or set cluster.requeue=true")


def _files(setting: Setting) -> Iterator[str | Problem]:
    run_dir = setting.run_dir
    yield f"run folder: {run_dir}"
    if not setting.local_files:
        yield f"model: {setting.config.model.hf_path} (on the cluster; not looked at from here)"
        return
    if (run_dir / FILE_NAME).exists() and not setting.resumed:
        remedy = f"continue it with --resume {run_dir}, or choose another run_dir"
        yield Problem("run_dir", str(run_dir), "this folder already holds a run", remedy)
    above = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    weights = sum(path.stat().st_size for path in resolve_path(setting.config.model.hf_path).glob("*.safetensors"))
    parameters = weights // (4 if setting.config.model.dtype == "fp32" else 2)
    keep = setting.config.checkpoint.keep_last + 1  # the oldest goes when the newest is complete
    needed, free = keep * parameters * BYTES_PER_PARAMETER, shutil.disk_usage(above).free
    yield f"disk: {keep} checkpoints of about {_size(needed / keep)}, {_size(free)} free"
    if needed > free:
        what = f"{keep} checkpoints need about {_size(needed)}, {above} has {_size(free)} free"
        yield Problem("checkpoint.keep_last", keep - 1, what, "keep fewer, make room, or choose another run_dir")


def _alerts(setting: Setting) -> Iterator[str | Problem]:
    """The rules and the webhook's file; what only the node of the run has is looked at there."""
    if not setting.local_files:
        return
    try:
        rules = rules_of(setting.config)
    except ConfigError as error:
        yield from error.problems
    else:
        yield f"alerts: {_count(len(rules), 'rule')}"
    yield from webhook_problems(setting.config)


CHECKS: Sequence[Callable[[Setting], Iterator[str | Problem]]] = (_batch, _machines, _memory, _time, _files, _alerts)


def _size(count: float) -> str:
    """Bytes in a unit that leaves few digits."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if count >= 2**power:
            return f"{count / 2**power:,.1f} {unit}"
    return f"{count / 2**10:,.1f} KiB"


def _count(number: int, what: str) -> str:
    if number == 1:
        return f"1 {what}"
    return f"{number:,} {what}{'es' if what.endswith(('s', 'ch')) else 's'}"
