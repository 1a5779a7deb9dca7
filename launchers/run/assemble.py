"""Wires a run from its configuration: the one place that knows every concrete class."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from launchers.placement import PlacementError, place
from launchers.run.inputs import check_start, model_errors
from launchers.run.resume import check_restorable
from launchers.supervise.sidecar import Sidecar
from launchers.supervise.watchdog import Others, Watchdog
from pipeline.checkpoints import STATE, Checkpoint, CheckpointError, CheckpointStore
from pipeline.config.errors import ConfigError
from pipeline.config.load import resolve_path
from pipeline.config.schema import RunConfig
from pipeline.data import DataError
from pipeline.data.cursor import DataCursor
from pipeline.data.sources import check_prompts, load_prompts
from pipeline.data.tokenizer import Tokenizer, load_tokenizer
from pipeline.disk import reserved
from pipeline.entropy.band import build_band
from pipeline.entropy.factory import OtherConfigurationError, build_controller
from pipeline.evaluation.beside import DrawnBeside
from pipeline.evaluation.evaluate import choose_prompts
from pipeline.evaluation.evaluate import evaluate as evaluate_engine
from pipeline.learner import Learner
from pipeline.loop import LoopState, TrainingLoop
from pipeline.model import architecture
from pipeline.model.grid import grid_of
from pipeline.monitoring.recorder import Recorder
from pipeline.reshard.engine_grid import EngineGrid, Placement
from pipeline.reshard.order import PlanInputs
from pipeline.reshard.plan import BucketError
from pipeline.rewards.stage import VerifierStage
from pipeline.rollout.engine import RolloutEngine
from pipeline.rollout.environment import environment_of
from pipeline.rollout.episode_rollouts import EpisodeRollouts
from pipeline.rollout.episodes import Episodes
from pipeline.rollout.pool import EnginePool
from pipeline.rollout.rollouts import Rollouts
from pipeline.rollout.weight_sync import WeightSync
from pipeline.step.queue import RolloutQueue
from pipeline.types import GenerateRequest, SampleGroup

if TYPE_CHECKING:
    from launchers.run.ray_cluster import Node

log = logging.getLogger(__name__)

_OTHER_CONTROL = (
    "the run was resumed with another one since this checkpoint (or this is another version of isentrope). "
    "--allow-change begins with a new controller again; the old values of `entropy`, given together with "
    "--allow-change, keep what the old controller had learnt"
)


def train(
    config: RunConfig, resume: Path | None, stop_requested: Callable[[], bool], *, allow_change: bool = False
) -> dict[str, Any]:
    """Run training to its end, or on from ``resume`` (a run directory); returns the run's summary.

    Once ``stop_requested``, what is in progress is ended (the start, too), then a checkpoint is written. A run killed
    before its first checkpoint resumes at step 0, which repeats the same steps. With ``allow_change`` other data than
    the run was trained on are begun from their first epoch, and another controller anew.
    """
    check_start(config)
    named = Path(config.run_dir or f"runs/{config.name}-{datetime.now():%Y%m%d-%H%M%S}")
    run_dir = (resume or named).resolve()  # actors may live in another working directory
    with ExitStack() as stack:
        sidecar = stack.enter_context(Sidecar(config, run_dir))
        recorder = stack.enter_context(Recorder(run_dir, config, resumed=resume is not None))
        stack.enter_context(reserved(run_dir))  # given back before the recorder writes how the run ended
        stack.enter_context(Watchdog(recorder, config, _others(config)))
        checkpoints = _checkpoints(run_dir, config)
        checkpoint = checkpoints.latest() if resume else None
        loop = build_loop(config, recorder, stack)
        if checkpoint:
            checkpoints.prune()
            restore(loop, checkpoint, allow_change=allow_change)
            if config.data.environment.name != "single":
                log.warning("episodes that played after step %d begin again, under their seeds", loop.step)
        else:
            with model_errors(config):
                loop.learner.load(hf_path(config))
        recorder.start(loop.step, checkpoint)
        sidecar.start()
        loop.run(stop_requested)
        return recorder.finish(completed=loop.step >= config.steps)


def evaluate(config: RunConfig, run: Path | None = None) -> dict[str, Any]:
    """pass@k and friends of the Hugging Face model, or of ``run``'s newest checkpoint, at the model's own precision."""
    with ExitStack() as stack:
        return evaluator(config, run, stack)(config)


def evaluator(config: RunConfig, run: Path | None, stack: ExitStack) -> Callable[[RunConfig], dict[str, Any]]:
    """``evaluate`` with engines that stay up.

    Its function takes configurations that differ from ``config`` below ``evaluation`` only.
    """
    tokenizer = load_tokenizer(hf_path(config))
    prompts = load_prompts(config.data, tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens)
    verifier = VerifierStage(config.data, tokenizer)
    stack.callback(verifier.close)
    engine, step = serve(config, run, stack)
    generate = generator(config, tokenizer, engine, stack)

    def measure(given: RunConfig) -> dict[str, Any]:
        result = evaluate_engine(generate, verifier, prompts.held_out, given, step)
        return {"model": config.model.hf_path, "run": str(run) if run else None, "step": step, **result.to_dict()}

    return measure


def generator(
    config: RunConfig, tokenizer: Tokenizer, engine: RolloutEngine, stack: ExitStack
) -> Callable[[Sequence[GenerateRequest]], list[SampleGroup]]:
    """What answers requests as the run's step does: the engine alone, or with the run's environment."""
    if config.data.environment.name == "single":
        return engine.generate
    episodes = Episodes(config, tokenizer, engine.stream)
    stack.callback(episodes.close)
    return episodes.generate


def serve(config: RunConfig, run: Path | None, stack: ExitStack) -> tuple[EnginePool, int]:
    """Start engines with the weights of the Hugging Face model, or of the newest checkpoint of ``run``.

    Returns them and the number of updates behind the weights.

    Weights are served at the model's own precision. Raises ``CheckpointError`` when ``run`` has no complete checkpoint,
    ``ConfigError`` when ``config`` cannot read it.
    """
    if run is not None:
        check_restorable(run, config)
    config = replace(config, rollout=replace(config.rollout, weight_dtype="auto"))
    checkpoint = newest_checkpoint(run, "evaluate")
    logs = Path(stack.enter_context(TemporaryDirectory()))
    if checkpoint is None:
        return start_engines(config, logs, stack), 0
    inputs = plan_inputs(config)
    learner = start_learner(config, stack)
    engines = start_engines(config, logs, stack, learner)
    checkpoint.restore(learner.restore)
    weight_sync(config, inputs, learner, engines).push(checkpoint.step)
    return engines, checkpoint.step


def build_loop(config: RunConfig, recorder: Recorder, stack: ExitStack) -> TrainingLoop:
    """Every part of a run, started and registered for closing on ``stack``; what can be refused is refused first."""
    tokenizer = load_tokenizer(hf_path(config))
    prompts = load_prompts(config.data, tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens)
    check_prompts(prompts, config)
    recorder.data(prompts, tokenizer)
    band = build_band(config.entropy.band, config.steps)
    controller = build_controller(config.entropy, band, config.rollout.prompts_per_step)
    verifier = VerifierStage(config.data, tokenizer)
    stack.callback(verifier.close)
    inputs = plan_inputs(config)
    learner = start_learner(config, stack)
    engines = start_engines(config, recorder.run_dir / "logs", stack, learner)
    colocated = config.rollout.colocated
    sync = weight_sync(config, inputs, learner, engines)
    given = (engines, learner, sync, hf_path(config), recorder.fault)
    if config.data.environment.name == "single":
        rollouts = Rollouts(*given, colocated=colocated)
    else:
        rollouts = EpisodeRollouts(*given, colocated=colocated, episodes=partial(Episodes, config, tokenizer))
        stack.callback(rollouts.close)
    cursor = DataCursor(prompts.train, config.seed, shuffled=config.data.order == "shuffled")
    repeated = choose_prompts(prompts.held_out, config.entropy.repeated_prompts)
    queue = RolloutQueue(config, cursor, rollouts, verifier, repeated)
    beside = DrawnBeside(rollouts)
    stack.callback(beside.close)
    stack.callback(queue.close)
    return TrainingLoop(
        config=config,
        rollouts=rollouts,
        learner=learner,
        verifier=verifier,
        cursor=cursor,
        queue=queue,
        band=band,
        controller=controller,
        held_out=prompts.held_out,
        recorder=recorder,
        checkpoints=_checkpoints(recorder.run_dir, config),
        decision=controller.initial(),
        drawn_beside=beside,
    )


def restore(loop: TrainingLoop, checkpoint: Checkpoint, *, allow_change: bool = False) -> None:
    """Put every stateful part back to where ``checkpoint`` was taken.

    With ``allow_change``, the place in the data is kept only if the data are the same, and what the controller has
    learnt only if it is configured the same.

    Raises ``DataError`` where they are not, and ``CheckpointError`` for a damaged file.
    """
    plain = checkpoint.state()
    with checkpoint.examined(STATE):
        state = msgspec.convert(plain, LoopState)
        if state.step != checkpoint.step:
            raise ValueError(f"step is {state.step}")
        if not allow_change or loop.cursor.fits(state.cursor):
            loop.cursor.load_state_dict(state.cursor)
        loop.queue.load_state_dict(state.queue, checkpoint.arrays())
        try:
            loop.controller.load_state_dict(state.controller)
            loop.decision = state.decision
        except OtherConfigurationError as error:
            if not allow_change:
                raise DataError(f"{checkpoint.path}: {error}: {_OTHER_CONTROL}") from error
    loop.step, loop.evaluation_due = state.step, state.evaluation_due
    checkpoint.restore(loop.learner.restore)


def start_learner(config: RunConfig, stack: ExitStack) -> Learner:
    """The learner's processes, not yet loaded."""
    if config.runtime == "inline":
        learner: Learner = build_learner_rank(config, 0, ("127.0.0.1", 0))  # it alone has to know which port that is
    else:
        from launchers.run.actors import LearnerRank, RayLearner
        from launchers.run.ray_cluster import variables

        nodes, placement = _placed(config)
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": int(torch.cuda.is_available())}
        options["runtime_env"] = {"env_vars": variables(learner=True)}
        ranks = [
            LearnerRank.options(  # type: ignore[attr-defined]  # Ray makes an actor class of it
                **options, scheduling_strategy=nodes[node].affinity()
            ).remote()
            for node in placement.learner_nodes
        ]
        learner = RayLearner(partial(build_learner_rank, config), ranks)
    stack.callback(learner.close)
    return learner


def build_learner_rank(config: RunConfig, rank: int, address: tuple[str, int]) -> Learner:
    """The learner of one rank, in this process."""
    from megatron_ext import topology
    from megatron_ext.learner import MegatronLearner

    layout = config.learner
    placed = topology.initialize(rank, address, grid_of(layout), config.seed)
    model = replace(config.model, hf_path=str(hf_path(config)))
    return MegatronLearner(
        layout,
        model,
        config.objective,
        total_steps=config.steps,
        seed=config.seed,
        topology=placed,
    )


def start_engines(config: RunConfig, log_dir: Path, stack: ExitStack, learner: Learner | None = None) -> EnginePool:
    """All engines behind one, started with the model's weights.

    Colocated ones use the GPUs of ``learner``, if there is one.

    Raises ``ConfigError`` where they are to share GPUs and there are none.
    """
    if config.rollout.colocated and not torch.cuda.is_available():
        remedy = "set rollout.placement=disaggregated"
        raise ConfigError("rollout.placement", "colocated", "no CUDA device is visible here", remedy)
    builders = [partial(build_engine, config, index, log_dir) for index in range(config.rollout.engines)]
    inline = config.runtime == "inline"
    engines = [build() for build in builders] if inline else _ray_engines(config, builders, learner)
    # SGLang takes minutes to start again; the native engine seconds, and then its samples are the same to the bit: so
    # they are as long as who draws which depends on nobody's speed.
    sglang = config.rollout.engine == "sglang"
    pool = EnginePool(engines, take_over=sglang, measured=sglang)
    stack.callback(pool.close)
    pool.start(hf_path(config))
    return pool


def _ray_engines(
    config: RunConfig, builders: Sequence[Callable[[], RolloutEngine]], learner: Learner | None
) -> list[RolloutEngine]:
    """Engines in processes of their own, on GPUs of their own or on those of ``learner``."""
    from launchers.run.actors import EngineProcess, RayEngine, RayLearner
    from launchers.run.ray_cluster import variables

    rollout = config.rollout
    nodes, placement = _placed(config)
    own_gpus = {"num_cpus": 0, "num_gpus": engine_gpus(config), "runtime_env": {"env_vars": variables(learner=False)}}
    options: list[dict[str, Any]] = [own_gpus] * rollout.engines
    if rollout.colocated and isinstance(learner, RayLearner):
        options = shared_gpus(learner.gpus(), rollout.engines, rollout.tensor_parallel_size)
    on_nodes = placement.engine_nodes(max(1, engine_gpus(config)))
    homes = [
        EngineProcess.options(  # type: ignore[attr-defined]  # Ray makes an actor class of it
            **option, scheduling_strategy=nodes[node].affinity()
        )
        for option, node in zip(options, on_nodes, strict=True)
    ]
    return [
        RayEngine(partial(home.remote, build), f"engine {i}", rollout.weight_sync_timeout_s)
        for i, (home, build) in enumerate(zip(homes, builders, strict=True))
    ]


def plan_inputs(config: RunConfig) -> PlanInputs:
    """What the plan of a run's weight updates is made from; a plan that cannot be made raises ``ConfigError``.

    An engine rank on a learner rank's GPU shares its process in the plan. Others have their own, also where learner and
    engines run inline, in one process.
    """
    rollout, layout = config.rollout, config.learner
    whole = rollout.engine == "native" or rollout.weight_transport == "disk"  # taken by the engine's own process
    colocated = rollout.colocated and not whole
    ranks = 1 if whole else rollout.tensor_parallel_size
    learners: tuple[int, ...] = (0,)
    homes: tuple[int, ...] = (0,) * rollout.engines
    if config.runtime != "inline":
        _, placed = _placed(config)
        learners, homes = placed.learner_nodes, placed.engine_nodes(max(1, engine_gpus(config)))
    own = () if colocated else (home for home in homes for _ in range(ranks))
    inputs = PlanInputs(
        model_path=str(hf_path(config)),
        learner=grid_of(layout),
        engines=EngineGrid(ranks, 1 if whole else rollout.sglang.expert_groups, rollout.engines),
        placement=Placement(len(learners), rollout.engines * ranks, colocated=colocated, nodes=(*learners, *own)),
        bucket_bytes=layout.bucket_bytes,
        dtype=_sent_type(config),
    )
    try:
        inputs.plan()
    except BucketError as error:
        raise ConfigError("learner.bucket_mib", layout.bucket_mib, str(error), "raise it") from error
    except ValueError as error:
        remedy = "choose another rollout.tensor_parallel_size, or set rollout.weight_transport=disk"
        raise ConfigError("rollout.tensor_parallel_size", ranks, str(error), remedy) from error
    return inputs


def weight_sync(config: RunConfig, inputs: PlanInputs, learner: Learner, engines: RolloutEngine) -> WeightSync:
    """Moves the weights of ``learner`` into ``engines``, by the plan of ``inputs``."""
    rollout = config.rollout
    on_gpus = engine_gpus(config) and rollout.weight_transport == "plan"
    return WeightSync(
        learner,
        engines,
        inputs,
        rollout.weight_sync_timeout_s,
        backend="nccl" if on_gpus else "gloo",
        probe=rollout.engine == "sglang",
    )


def _sent_type(config: RunConfig) -> str:
    """The type in which weights travel: the learner's, or the server's where that is smaller."""
    if config.rollout.weight_dtype == "fp8":
        return "fp8 fp32" if config.rollout.engine == "native" and config.model.dtype == "fp32" else "fp8"
    if config.rollout.engine == "native" or config.model.dtype == "bf16":
        return config.model.dtype
    served = config.rollout.sglang.dtype
    if served == "auto":
        served = architecture.stored_dtype(architecture.read_config(hf_path(config)))
    return "fp32" if served == "float32" else "bf16"


def shared_gpus(gpus: Sequence[str], engines: int, size: int) -> list[dict[str, Any]]:
    """Ray's options for every engine that shares GPUs with the learner.

    Engine ``i`` sees the GPUs of learner ranks ``i * size`` and following, which Ray has given to them.

    ``gpus``: of the ranks. Ray would otherwise hide every GPU from an actor that asks for none.
    """
    from launchers.run.ray_cluster import variables

    own = variables(learner=False) | {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    seen = [",".join(gpus[i * size : (i + 1) * size]) for i in range(engines)]
    return [
        {"num_cpus": 0, "num_gpus": 0, "runtime_env": {"env_vars": own | {"CUDA_VISIBLE_DEVICES": names}}}
        for names in seen
    ]


def build_engine(config: RunConfig, index: int, log_dir: Path) -> RolloutEngine:
    """One engine, in this process, not yet started."""
    record_routes = config.learner.routing_replay == "routes"
    if config.rollout.engine == "sglang":
        from pipeline.rollout.sglang.engine import SglangEngine

        return SglangEngine(
            config.rollout,
            index=index,
            log_dir=log_dir,
            seed=config.seed,
            record_routes=record_routes,
            longest=config.longest_row,
            own_stops=environment_of(config.data).APART,
        )
    from pipeline.rollout.native.engine import NativeEngine

    rollout = config.rollout
    return NativeEngine(
        weight_sync_timeout_s=rollout.weight_sync_timeout_s,
        stop=tuple(rollout.stop),
        stop_token_ids=tuple(rollout.stop_token_ids),
        record_routes=record_routes,
    )


def engine_gpus(config: RunConfig) -> int:
    """GPUs of one engine; the native engine computes on the CPU."""
    uses_gpus = torch.cuda.is_available() and config.rollout.engine == "sglang"
    return config.rollout.tensor_parallel_size if uses_gpus else 0


def _placed(config: RunConfig) -> tuple[list[Node], Placement]:
    """The nodes of the Ray cluster and who goes where.

    Raises ``ConfigError`` when GPUs are short: actors would wait for ever.
    """
    from launchers.run import ray_cluster

    nodes = ray_cluster.join()
    gpus = [node.gpus if torch.cuda.is_available() else 0 for node in nodes]
    layout, rollout = config.learner, config.rollout
    tensor_parallel, engine = layout.tensor_model_parallel_size, engine_gpus(config)
    try:
        processes = layout.world_size, tensor_parallel, rollout.engines, engine
        return nodes, place(*processes, gpus, colocated=rollout.colocated)
    except PlacementError as error:
        remedy = "use more nodes, a smaller layout, or fewer rollout.engines or rollout.tensor_parallel_size"
        raise ConfigError("learner.tensor_model_parallel_size", tensor_parallel, str(error), remedy) from error


def _others(config: RunConfig) -> Others | None:
    """Who else there is to ask where they stand; None: nobody."""
    if config.runtime == "inline":
        return None
    from launchers.supervise.roll_call import ROLL_CALL

    return ROLL_CALL


def newest_checkpoint(run: Path | None, instead: str) -> Checkpoint | None:
    """The newest complete checkpoint of a run folder; None without one to look in. Raises ``CheckpointError``.

    ``instead``: what may be done with the run's model where there is no checkpoint.
    """
    if run is None:
        return None
    checkpoint = CheckpointStore(run.resolve() / "checkpoints", keep_last=1).latest()
    if checkpoint is None:
        raise CheckpointError(f"{run} holds no complete checkpoint; {instead} its model with --config instead")
    return checkpoint


def hf_path(config: RunConfig) -> Path:
    """The model's folder, absolute: actors may live in another working directory."""
    return resolve_path(config.model.hf_path).resolve()


def _checkpoints(run_dir: Path, config: RunConfig) -> CheckpointStore:
    return CheckpointStore(run_dir / "checkpoints", config.checkpoint.keep_last)
