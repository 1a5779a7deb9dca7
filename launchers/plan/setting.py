"""A run and the machines for it: the input of every check of a plan, made from a command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from launchers.placement import PlacementError, least_nodes, place
from launchers.plan.site import Elsewhere, Site, look, needed_paths, packaged
from launchers.plan.work import expected_response
from launchers.slurm.cluster import ClusterConfig
from launchers.slurm.jobs import Shell, local, shell
from pipeline.config.errors import ConfigError, Problem
from pipeline.config.keys import flat, leaf_keys
from pipeline.config.load import PACKAGED, load_config, resolve_path
from pipeline.config.schema import MonitoringConfig, RunConfig
from pipeline.monitoring.events import FILE_NAME
from pipeline.reshard.engine_grid import Placement

if TYPE_CHECKING:
    from launchers.plan.forecast import Forecast
    from pipeline.model.architecture import Architecture


@dataclass(frozen=True)
class Setting:
    """A run and the machines for it; ``cluster`` is None for this machine.

    ``model_folder`` has the model's config.json, where that file is not at the model's own path. ``shell`` reaches the
    machine that submits. ``submits``: whether what is absent on that machine stops the run, or is only told.
    """

    config: RunConfig
    cluster: ClusterConfig | None
    stated_nodes: int  # 0: as many as the run needs
    run_dir: Path
    resumed: bool = False
    model_folder: Path | None = None
    shell: Shell = local
    submits: bool = False
    stated_response: int = 0  # expected tokens of a response; 0: a share of the longest

    @property
    def engine_gpus(self) -> int:
        """GPUs of one engine."""
        on_gpus = self.cluster is not None and self.cluster.gpus_per_node and self.config.rollout.engine == "sglang"
        return self.config.rollout.tensor_parallel_size if on_gpus else 0

    @property
    def processes(self) -> tuple[int, int, int, int]:
        """Learner ranks, ranks of a tensor-parallel group, engines, and GPUs of an engine."""
        learner = self.config.learner
        return learner.world_size, learner.tensor_model_parallel_size, self.config.rollout.engines, self.engine_gpus

    @cached_property
    def nodes(self) -> int:
        """Nodes of the job, as stated or as many as the run needs.

        Raises ``PlacementError`` where no number would do.
        """
        return self.stated_nodes or least_nodes(
            *self.processes, self.gpus_per_node, colocated=self.config.rollout.colocated
        )

    @property
    def gpus_per_node(self) -> int:
        """GPUs of a node; 0 on this machine."""
        return self.cluster.gpus_per_node if self.cluster else 0

    def placed(self) -> Placement:
        """Which node every process is on. Raises ``PlacementError``."""
        gpus = [self.gpus_per_node] * self.nodes
        return place(*self.processes, gpus, colocated=self.config.rollout.colocated)

    @property
    def response(self) -> int:
        """Tokens of a response that is neither short nor long: as stated, or assumed."""
        return self.stated_response or expected_response(self.config)

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
        return forecast(self.model, self.config, self.cluster, placed, self.response)


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
    """The run of a configuration file, or of the run folder ``resume``, ready to be checked and started anywhere.

    With ``cluster.ssh`` the model's config.json, and the configuration of a run that is resumed, are read over the
    connection; the copies are gone after the block. Raises ``ConfigError``.
    """
    run = shell(cluster.ssh) if cluster else local
    with TemporaryDirectory(prefix="isentrope-") as folder:
        elsewhere = Elsewhere(run, Path(folder)) if cluster and cluster.ssh.host else None
        if resume:
            resume = resume if elsewhere else resume.resolve()
            file = elsewhere.copy(f"{resume}/config.yaml") if elsewhere else resume / "config.yaml"
        loaded = load_config(file, overrides, model_elsewhere=elsewhere.model if elsewhere else None)
        longest = loaded.rollout.max_new_tokens
        if mean_response > longest:
            why = f"above rollout.max_new_tokens={longest}"
            raise ConfigError("--mean-response", mean_response, why, "lower one or raise the other")
        resolved = with_absolute_paths(loaded, elsewhere=elsewhere is not None)
        runs = Path(cluster.scratch) / "runs" if cluster else Path("runs").resolve()
        dated = f"{loaded.name}-{datetime.now():%Y%m%d-%H%M%S}" if submits else loaded.name
        run_dir = resume or Path(loaded.run_dir or runs / dated)
        run_dir = run_dir if elsewhere else run_dir.resolve()
        yield Setting(
            config=replace(resolved, run_dir=str(run_dir)),
            cluster=cluster,
            stated_nodes=nodes or (cluster.nodes if cluster else 1),
            run_dir=run_dir,
            resumed=resume is not None,
            model_folder=elsewhere.model(loaded.model.hf_path) if elsewhere else None,
            shell=run,
            submits=submits or elsewhere is not None,
            stated_response=mean_response,
        )


def with_absolute_paths(config: RunConfig, *, elsewhere: bool = False) -> RunConfig:
    """The run with absolute paths, so that it can be started in another folder.

    Packaged files keep relative paths: they travel with the code.

    ``elsewhere``: on another machine, whose paths are absolute already. Raises ``ConfigError`` where one is not.
    """
    source, template = config.data.source, config.data.chat_template_file
    if elsewhere:
        given = {key: path for key, path in flat(config).items() if leaf_keys()[key].path}
        lost = [(key, path) for key, path in given.items() if path and not (packaged(path) or Path(path).is_absolute())]
        if lost:
            remedy = "give the absolute path on the cluster"
            raise ConfigError.of(
                [Problem(*each, "a relative path, and the run starts on another machine", remedy) for each in lost]
            )
        return config
    path, template = (str(Path(given).resolve()) if given else "" for given in (source.path, template))
    data = replace(config.data, source=replace(source, path=path), chat_template_file=template)
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
