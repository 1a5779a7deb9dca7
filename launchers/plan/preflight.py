"""What a run will do and whether it can, in words, before anything starts: ``isentrope plan run``, and first in every launch.

The configuration itself has been checked when it was loaded; here are the checks that relate it to machines. A check is a function in
``CHECKS`` from a ``Setting`` to lines and problems.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from launchers.doctor import BAD
from launchers.placement import PlacementError, place
from launchers.plan.site import Elsewhere, Site, look, versions
from launchers.slurm.cluster import ClusterConfig, seconds
from launchers.slurm.jobs import Shell, local, shell
from pipeline.config.errors import ConfigError, Problem
from pipeline.config.load import PACKAGED, load_config, resolve_path
from pipeline.config.schema import MonitoringConfig, RunConfig
from pipeline.monitoring.alerts.rules import rules_of
from pipeline.monitoring.events import FILE_NAME
from pipeline.monitoring.memory import GIB
from pipeline.monitoring.sinks.alert_delivery import webhook_problems
from pipeline.reshard.engine_grid import Placement

if TYPE_CHECKING:
    from launchers.plan.forecast import Forecast
    from pipeline.model.architecture import Architecture

STOP_S = 20  # before its limit a job is requeued whatever the run does (launchers/slurm/job.sh.j2)


@dataclass(frozen=True)
class Setting:
    """A run and the machines for it; ``cluster`` is None for this machine.

    ``model_folder`` has the model's config.json, where that is not at its own path. ``shell`` reaches the machine that submits. ``submits``:
    whether what is absent there stops the run, or is only told.
    """

    config: RunConfig
    cluster: ClusterConfig | None
    nodes: int
    run_dir: Path
    resumed: bool = False
    model_folder: Path | None = None
    shell: Shell = local
    submits: bool = False
    mean_response: int = 0  # expected tokens; 0: as long as they may be

    @property
    def engine_gpus(self) -> int:
        """GPUs of one engine."""
        on_gpus = self.cluster is not None and self.cluster.gpus_per_node and self.config.rollout.engine == "sglang"
        return self.config.rollout.tensor_parallel_size if on_gpus else 0

    def placed(self) -> Placement:
        """Which node every process is on. Raises ``PlacementError``."""
        gpus = [self.cluster.gpus_per_node if self.cluster else 0] * self.nodes
        rollout = self.config.rollout
        tensor_parallel = self.config.learner.tensor_model_parallel_size
        together = rollout.placement == "colocated"
        return place(
            self.config.learner.world_size, tensor_parallel, rollout.engines, self.engine_gpus, gpus, colocated=together
        )

    @property
    def python(self) -> str:
        """The interpreter of the run, where it is not inside a container; else ""."""
        if self.cluster is None:
            return sys.executable
        return self.cluster.python if self.cluster.container.runtime == "none" else ""

    @cached_property
    def site(self) -> Site:
        """What is where on the machine that submits."""
        paths = [path for _, path, _, _ in needed_paths(self.config, self.cluster)]
        model = str(resolve_path(self.config.model.hf_path))
        return look(self.shell, self.run_dir, model, self.python or "true", [*paths, str(self.run_dir / FILE_NAME)])

    @cached_property
    def model(self) -> Architecture:
        """The model's sizes. Raises ``ValueError``, but not for a configuration that was checked."""
        from pipeline.model import architecture  # torch: only where there is something to estimate

        return architecture.read(self.model_folder or resolve_path(self.config.model.hf_path))

    @cached_property
    def forecast(self) -> Forecast | None:
        """What a step will cost; None without GPUs, or where the processes do not fit. Raises ``ValueError``."""
        if self.cluster is None or not self.cluster.gpus_per_node:
            return None
        from launchers.plan.forecast import forecast

        try:
            placed = self.placed()
        except PlacementError:
            return None
        return forecast(self.model, self.config, self.cluster, placed, self.mean_response)


@contextmanager
def prepared(
    file: Path | None,
    overrides: Sequence[str],
    cluster: ClusterConfig | None,
    *,
    nodes: int | None = None,
    resume: Path | None = None,
    submits: bool = False,
    mean_response: int = 0,
) -> Iterator[Setting]:
    """The run of a configuration file, or of the run folder ``resume``, ready to be checked and started from any folder.

    With ``cluster.ssh`` the model's config.json, and the configuration of a run that is resumed, are read over the connection; the copies are
    gone after the block. Raises ``ConfigError``.
    """
    run = shell(cluster.ssh) if cluster else local
    with TemporaryDirectory(prefix="isentrope-") as folder:
        elsewhere = Elsewhere(run, Path(folder)) if cluster and cluster.ssh.host else None
        if resume:
            resume = resume if elsewhere else resume.resolve()
            file = elsewhere.copy(f"{resume}/config.yaml") if elsewhere else resume / "config.yaml"
        loaded = load_config(file, overrides, model_elsewhere=elsewhere.model if elsewhere else None)
        resolved = with_absolute_paths(loaded, elsewhere=elsewhere is not None)
        runs = Path(cluster.scratch) / "runs" if cluster else Path("runs").resolve()
        dated = f"{loaded.name}-{datetime.now():%Y%m%d-%H%M%S}" if submits else loaded.name
        run_dir = resume or Path(loaded.run_dir or runs / dated)
        run_dir = run_dir if elsewhere else run_dir.resolve()
        yield Setting(
            config=replace(resolved, run_dir=str(run_dir)),
            cluster=cluster,
            nodes=nodes or (cluster.nodes if cluster else 1),
            run_dir=run_dir,
            resumed=resume is not None,
            model_folder=elsewhere.model(loaded.model.hf_path) if elsewhere else None,
            shell=run,
            submits=submits or elsewhere is not None,
            mean_response=mean_response,
        )


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


def with_absolute_paths(config: RunConfig, *, elsewhere: bool = False) -> RunConfig:
    """The run as it can be started in another folder: relative paths made absolute, but for packaged files, which travel with the code.

    ``elsewhere``: on another machine, whose paths are absolute already. Raises ``ConfigError`` where one is not.
    """
    source = config.data.source
    if elsewhere:
        given = {"model.hf_path": config.model.hf_path, "data.source.path": source.path}
        lost = [
            (key, path) for key, path in given.items() if path and not (_packaged(path) or Path(path).is_absolute())
        ]
        if lost:
            remedy = "give the absolute path on the cluster"
            raise ConfigError.of(
                [Problem(*each, "a relative path, and the run starts on another machine", remedy) for each in lost]
            )
        return config
    path = str(Path(source.path).resolve()) if source.path else ""
    data = replace(config.data, source=replace(source, path=path))
    model = replace(config.model, hf_path=_anywhere(config.model.hf_path))
    return replace(config, model=model, data=data, monitoring=_monitoring_anywhere(config.monitoring))


def _monitoring_anywhere(monitoring: MonitoringConfig) -> MonitoringConfig:
    alerts = monitoring.alerts
    rules = _anywhere(alerts.rules) if alerts.rules else ""
    webhook_file = str(Path(alerts.webhook_file).expanduser().resolve()) if alerts.webhook_file else ""
    return replace(monitoring, alerts=replace(alerts, rules=rules, webhook_file=webhook_file))


def _packaged(path: str) -> bool:
    """Whether a path is found below ``configs/``, wherever the code is."""
    return not Path(path).is_absolute() and (PACKAGED / path).exists()


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
    shown = " x ".join(f"{name} {size}" for name, size in layout.items() if size > 1 or name == "TP")
    yield f"learner: {shown} = {_count(learner.world_size, 'process')}"
    server = f" of TP {rollout.tensor_parallel_size}" if rollout.engine == "sglang" else ""
    shared = ", on the learner's GPUs" if rollout.placement == "colocated" else ""
    yield f"engines: {rollout.engines} {rollout.engine}{server}{shared}"
    if cluster is None:
        return
    if shared and not cluster.gpus_per_node:
        remedy = "set rollout.placement=disaggregated, or cluster.gpus_per_node"
        yield Problem("rollout.placement", rollout.placement, "the cluster has no GPUs to share", remedy)
        return
    try:
        placed = setting.placed()
    except PlacementError as error:
        own = 0 if shared else rollout.engines * setting.engine_gpus
        what = f"the run needs {learner.world_size + own} GPUs and would get {_count(setting.nodes, 'node')} of {cluster.gpus_per_node}: {error}"
        yield Problem(
            "cluster.nodes", setting.nodes, what, "use more nodes (--nodes), a smaller layout or fewer engines"
        )
        return
    ranks, engines = Counter(placed.learner_nodes), Counter(placed.engine_nodes(max(1, setting.engine_gpus)))
    for node in range(setting.nodes):
        idle = cluster.gpus_per_node - ranks[node] - (0 if shared else engines[node] * setting.engine_gpus)
        rest = f", {idle} GPUs idle" if cluster.gpus_per_node and idle else ""
        yield f"node {node}: {_count(ranks[node], 'learner process')}, {_count(engines[node], 'engine')}{rest}"
        if not ranks[node] and not engines[node]:
            remedy = f"launch with --nodes {max(placed.nodes) + 1}, or enlarge the layout"
            yield Problem("cluster.nodes", setting.nodes, f"node {node} would have nothing to do", remedy)
            return


def _memory(setting: Setting) -> Iterator[str | Problem]:
    """What ``isentrope plan learner`` says, in a line, and what engines hold."""
    try:
        forecast = setting.forecast
    except ValueError as error:
        yield Problem(
            "rollout.tensor_parallel_size", setting.config.rollout.tensor_parallel_size, str(error), "change the layout"
        )
        return
    if forecast is None or setting.cluster is None:
        return
    gib, memory = setting.cluster.gpu_gib, forecast.memory
    yield f"memory: {memory.learner:,.1f} of {gib:g} GiB on the fullest learner GPU (predicted; isentrope plan learner has the parts)"
    if memory.learner > gib:
        from launchers.plan.remedies import remedies

        found = remedies(setting.model, setting.config, memory.learner * GIB, mean_response=setting.mean_response)
        keys = [f"{remedy['key']}={remedy['value']}" for remedy in found[:3]]
        what = f"a learner GPU would need {memory.learner:,.1f} GiB"
        yield Problem("cluster.gpu_gib", gib, what, f"try {' or '.join(keys) or 'a larger layout'}")
    yield from _engine_memory(setting.config, gib, forecast)


def _engine_memory(config: RunConfig, gib: float, forecast: Forecast) -> Iterator[str | Problem]:
    drawn, memory = forecast.rollouts, forecast.memory
    if drawn is None:
        return
    key, share = "rollout.sglang.mem_fraction_static", config.rollout.sglang.mem_fraction_static
    weights, length = drawn.weights_bytes / GIB, config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    if drawn.kv_tokens < length:
        least = (drawn.weights_bytes + length * drawn.kv_token_bytes) / GIB / memory.engine * share
        what = f"{memory.engine:,.1f} GiB of an engine's GPU, for {weights:,.1f} GiB of weights and a cache of {length:,} tokens at least"
        enough = f"raise it above {least:.2f}, or " if least < 0.95 else ""
        yield Problem(key, share, what, f"{enough}raise rollout.tensor_parallel_size")
        return
    yield (
        f"engine memory: {weights:,.1f} GiB of weights and {drawn.kv_bytes / GIB:,.1f} GiB of cache on every GPU: {drawn.kv_tokens:,} tokens, "
        f"{drawn.concurrent:,} of an engine's {drawn.samples:,} samples at a time (predicted)"
    )
    if memory.together:
        yield f"together: {memory.together:,.1f} of {gib:g} GiB where learner and engine share a GPU (predicted)"
    if memory.together > gib:
        what = f"an engine with {memory.engine:,.1f} GiB beside the learner's {memory.steady:,.1f} makes {memory.together:,.1f} of {gib:g} GiB"
        remedy = f"lower {key}, shard the learner further, or set rollout.placement=disaggregated"
        yield Problem("rollout.placement", config.rollout.placement, what, remedy)


def _speed(setting: Setting) -> Iterator[str | Problem]:
    """Seconds of a step and GPU-hours of the run; the problems are ``_memory``'s and ``_time``'s."""
    try:
        forecast = setting.forecast
    except ValueError:
        return
    if forecast is None or setting.cluster is None:
        return
    train, sync = forecast.train_seconds, forecast.sync
    across = f", {_size(sync.node_bytes)} of it into a node from others" if sync.node_bytes else ""
    yield f"weight sync: {_size(sync.model_bytes)}{across}: about {_duration(sync.seconds)} (predicted)"
    drawn, step = forecast.rollouts, forecast.step_seconds
    if drawn is None or step is None:
        yield f"train phase: about {_duration(train)} a step (predicted); engines that compute on the CPU are not estimated"
        return
    length = f"{setting.mean_response:,} tokens each" if setting.mean_response else "all as long as they may be"
    yield (
        f"step: about {_duration(step)} = rollouts {_duration(drawn.seconds)} + training {_duration(train)} + weight sync "
        f"{_duration(sync.seconds)}, responses {length} (a roofline at the cluster file's speeds, not a measurement)"
    )
    steps, gpus = setting.config.steps, setting.nodes * setting.cluster.gpus_per_node
    usable = seconds(setting.cluster.walltime) - setting.cluster.save_before_s
    jobs = math.ceil(steps * step / usable)
    yield (
        f"cost: {steps:,} steps in {_duration(steps * step)} on {gpus:,} GPUs = {steps * step / 3600 * gpus:,.1f} GPU-hours, about "
        f"{_count(jobs, 'time limit')} of {setting.cluster.walltime} (predicted; without start-up, evaluation and saving)"
    )


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
    yield from _save_interval(setting, cluster, limit - cluster.save_before_s)


def _save_interval(setting: Setting, cluster: ClusterConfig, usable: int) -> Iterator[str | Problem]:
    """Whether the step in progress ends, and checkpoints come, before the time is up."""
    try:
        step = setting.forecast.step_seconds if setting.forecast else None
    except ValueError:
        return
    if step is None:
        return
    every, steps = setting.config.checkpoint.every, setting.config.steps
    if every:
        yield f"save interval: {every} steps = about {_duration(every * step)} of the {_duration(usable)} before saving begins (predicted)"
    if step + STOP_S <= cluster.save_before_s:
        return
    enough = math.ceil((step + STOP_S) / 60) * 60
    what = f"a step takes about {_duration(step)} (predicted): the one in progress would not end before the job does"
    between = min(every or steps, steps) * step
    if between > usable:
        saved = f"no checkpoint comes before, so that every attempt begins at the same step ({_duration(between)} between checkpoints)"
        remedy = f"raise it to {enough} or more (and cluster.walltime above that), or lower checkpoint.every"
        yield Problem("cluster.save_before_s", cluster.save_before_s, f"{what}, and {saved}", remedy)
    else:
        yield f"note: {what}, and be done again; cluster.save_before_s={enough} would save it"


def _files(setting: Setting) -> Iterator[str | Problem]:
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
        yield f"disk: {keep} checkpoints of about {_size(needed / keep)}"
        return
    yield f"disk: {keep} checkpoints of about {_size(needed / keep)}, {_size(site.free)} free"
    if needed > site.free:
        what = f"{keep} checkpoints need about {_size(needed)}, {site.above} has {_size(site.free)} free"
        yield Problem("checkpoint.keep_last", keep - 1, what, "keep fewer, make room, or choose another run_dir")


def _alerts(setting: Setting) -> Iterator[str | Problem]:
    """The rules and the webhook's file; what only the node of the run has is looked at there."""
    if setting.cluster is not None and setting.cluster.ssh.host:
        return
    try:
        rules = rules_of(setting.config)
    except ConfigError as error:
        yield from error.problems
    else:
        yield f"alerts: {_count(len(rules), 'rule')}"
    yield from webhook_problems(setting.config)


def _absent(setting: Setting, site: Site) -> Iterator[Problem]:
    """Paths that the run needs where it will run, each with its key."""
    config, cluster = setting.config, setting.cluster
    where = f"on {cluster.ssh.host}" if cluster and cluster.ssh.host else "here"
    for key, path, wanted, remedy in needed_paths(config, cluster):
        kind = site.kinds.get(path, "absent")
        if kind == "absent" or (wanted != "any" and kind != wanted):
            yield Problem(key, path, f"no such {'path' if wanted == 'any' else wanted} {where}", remedy)
    if not site.weights and not _packaged(config.model.hf_path):
        yield Problem(
            "model.hf_path", config.model.hf_path, f"no *.safetensors {where}", "download or convert the model first"
        )
    if _packaged(config.model.hf_path) and not list((PACKAGED / config.model.hf_path).glob("*.safetensors")):
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


def needed_paths(config: RunConfig, cluster: ClusterConfig | None) -> list[tuple[str, str, str, str]]:
    """Key, path, kind (file, folder, any) and remedy of everything that must be there before a run starts."""
    found = []
    if not _packaged(config.model.hf_path):
        found.append(
            ("model.hf_path", config.model.hf_path, "folder", "copy the model there, or give its folder there")
        )
    if config.data.source.kind == "jsonl":
        found.append(
            ("data.source.path", config.data.source.path, "file", "copy the data there, or give its path there")
        )
    if cluster is not None:
        found.append(("cluster.scratch", cluster.scratch, "folder", "make it, on a file system that every node shares"))
        image = cluster.container.image
        if image.startswith("/"):
            found.append(("cluster.container.image", image, "any", "import the image first (Dockerfile)"))
        sources = [mount.partition(":")[0] for mount in cluster.container.mounts]
        found += [("cluster.container.mounts", path, "any", "make it, or remove the mount") for path in sources]
    return found


def _versions(setting: Setting) -> Iterator[str | Problem]:
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


CHECKS: Sequence[Callable[[Setting], Iterator[str | Problem]]] = (
    _batch,
    _machines,
    _memory,
    _speed,
    _time,
    _files,
    _alerts,
    _versions,
)


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


def _duration(length: float) -> str:
    """Seconds in a unit that leaves few digits."""
    if length < 120:
        return f"{length:,.1f} s"
    return f"{length / 60:,.1f} min" if length < 7200 else f"{length / 3600:,.1f} h"
