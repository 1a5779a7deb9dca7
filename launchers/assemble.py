"""The one place that knows every concrete class: it wires a run from its configuration."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from launchers.placement import Placement, PlacementError, place
from pipeline.checkpoints import Checkpoint, CheckpointError, CheckpointStore
from pipeline.config.errors import ConfigError
from pipeline.config.load import resolve_path
from pipeline.config.schema import RunConfig
from pipeline.data.cursor import DataCursor
from pipeline.data.sources import check_prompts, load_prompts
from pipeline.data.tokenizer import load_tokenizer
from pipeline.entropy.factory import build_controller
from pipeline.evaluation.evaluate import evaluate as evaluate_engine
from pipeline.learner import Learner
from pipeline.loop import TrainingLoop
from pipeline.monitoring.recorder import Recorder
from pipeline.ports import free_port
from pipeline.rewards.stage import VerifierStage
from pipeline.rollout.engine import RolloutEngine
from pipeline.rollout.pool import EnginePool
from pipeline.rollout.queue import RolloutQueue
from pipeline.rollout.rollouts import Rollouts
from pipeline.rollout.weight_sync import push_weights
from pipeline.types import ControlDecision

if TYPE_CHECKING:
    from launchers.ray_cluster import Node

log = logging.getLogger(__name__)


def train(config: RunConfig, resume: Path | None = None) -> dict[str, Any]:
    """Run training to its end, to a signal, or on from ``resume`` (a run directory); returns the run's summary.

    SIGTERM, SIGUSR1 and ctrl-C end the step in progress, then a checkpoint is written. A run killed before its first
    checkpoint resumes at step 0, which repeats the same steps.
    """
    named = Path(config.run_dir or f"runs/{config.name}-{datetime.now():%Y%m%d-%H%M%S}")
    run_dir = (resume or named).resolve()  # actors may live in another working directory
    with ExitStack() as stack:
        recorder = stack.enter_context(Recorder(run_dir, config, resumed=resume is not None))
        checkpoint = _checkpoints(run_dir, config).latest() if resume else None
        loop = build_loop(config, recorder, stack)
        if checkpoint:
            restore(loop, checkpoint)
        else:
            loop.learner.load(_hf_path(config))
        recorder.start(loop.step)
        # Only now: Ray puts a SIGTERM handler of its own in place when it starts.
        stop_requested = stack.enter_context(_signals())
        loop.run(stop_requested)
        return recorder.finish(completed=loop.step >= config.steps)


def evaluate(config: RunConfig, run: Path | None = None) -> dict[str, Any]:
    """pass@k and friends of the Hugging Face model, or of the newest checkpoint of ``run``, at the model's own precision."""
    config = replace(config, rollout=replace(config.rollout, weight_dtype="auto"))
    checkpoint = _checkpoints(run.resolve(), config).latest() if run else None
    if run and not checkpoint:
        raise CheckpointError(f"{run} holds no complete checkpoint; evaluate its model with --config instead")
    with ExitStack() as stack:
        tokenizer = load_tokenizer(_hf_path(config))
        prompts = load_prompts(config.data, tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens)
        verifier = VerifierStage(config.data, tokenizer)
        stack.callback(verifier.close)
        engine = start_engines(config, Path(stack.enter_context(TemporaryDirectory())), stack)
        step = 0
        if checkpoint:
            learner = start_learner(config, stack)
            learner.restore(checkpoint.learner)
            step = checkpoint.step
            push_weights(learner, engine, step)
        result = evaluate_engine(engine.generate, verifier, prompts.held_out, config, step)
        return {"model": config.model.hf_path, "run": str(run) if run else None, "step": step, **result.to_dict()}


def build_loop(config: RunConfig, recorder: Recorder, stack: ExitStack) -> TrainingLoop:
    """Every part of a run, started and registered for closing on ``stack``; what can be refused is refused first."""
    tokenizer = load_tokenizer(_hf_path(config))
    prompts = load_prompts(config.data, tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens)
    check_prompts(prompts, config)
    recorder.data(prompts)
    controller = build_controller(config.entropy, config.steps, config.rollout.prompts_per_step)
    verifier = VerifierStage(config.data, tokenizer)
    stack.callback(verifier.close)
    learner = start_learner(config, stack)
    engines = start_engines(config, recorder.run_dir / "logs", stack)
    rollouts = Rollouts(engines, learner, _hf_path(config), recorder.fault)
    cursor = DataCursor(prompts.train, config.seed)
    return TrainingLoop(
        config=config,
        rollouts=rollouts,
        learner=learner,
        verifier=verifier,
        cursor=cursor,
        queue=RolloutQueue(config, cursor, rollouts, verifier, learner, tokenizer.pad_token_id),
        controller=controller,
        held_out=prompts.held_out,
        recorder=recorder,
        checkpoints=_checkpoints(recorder.run_dir, config),
        decision=controller.initial(),
    )


def restore(loop: TrainingLoop, checkpoint: Checkpoint) -> None:
    """Put every stateful part back to where ``checkpoint`` was taken."""
    state = checkpoint.state()
    loop.cursor.load_state_dict(state["cursor"])
    loop.queue.load_state_dict(state.get("queue", []))  # older checkpoints have none
    loop.controller.load_state_dict(state["controller"])
    loop.decision = ControlDecision(**state["decision"])
    loop.step = state["step"]
    loop.learner.restore(checkpoint.learner)


def start_learner(config: RunConfig, stack: ExitStack) -> Learner:
    """The learner's processes, not yet loaded."""
    if config.runtime == "inline":
        learner: Learner = build_learner_rank(config, 0, ("127.0.0.1", free_port()))
    else:
        from launchers.actors import LearnerRank, RayLearner

        nodes, placement = _placed(config)
        options = {"num_cpus": 0, "num_gpus": int(torch.cuda.is_available())}
        ranks = [
            LearnerRank.options(**options, scheduling_strategy=nodes[node].affinity()).remote()
            for node in placement.ranks
        ]
        learner = RayLearner(config, ranks)
    stack.callback(learner.close)
    return learner


def build_learner_rank(config: RunConfig, rank: int, address: tuple[str, int]) -> Learner:
    """The learner of one rank, in this process."""
    from megatron_ext import topology
    from megatron_ext.learner import MegatronLearner
    from megatron_ext.weights.grid import grid_of

    layout = config.learner
    placed = topology.initialize(rank, address, grid_of(layout), config.seed)
    model = replace(config.model, hf_path=str(_hf_path(config)))
    return MegatronLearner(
        layout,
        model,
        config.objective,
        total_steps=config.steps,
        seed=config.seed,
        topology=placed,
        weight_dtype=config.rollout.weight_dtype,
    )


def start_engines(config: RunConfig, log_dir: Path, stack: ExitStack) -> EnginePool:
    """All engines behind one, started with the model's weights."""
    builders = [partial(build_engine, config, index, log_dir) for index in range(config.rollout.engines)]
    if config.runtime == "inline":
        engines = [build() for build in builders]
    else:
        from launchers.actors import EngineProcess, RayEngine

        nodes, placement = _placed(config)
        options = {"num_cpus": 0, "num_gpus": engine_gpus(config)}
        timeout_s = config.rollout.weight_sync_timeout_s
        homes = [
            EngineProcess.options(**options, scheduling_strategy=nodes[node].affinity()) for node in placement.engines
        ]
        engines = [
            RayEngine(partial(home.remote, build), f"engine {i}", timeout_s)
            for i, (home, build) in enumerate(zip(homes, builders, strict=True))
        ]
    pool = EnginePool(engines)
    stack.callback(pool.close)
    pool.start(_hf_path(config))
    return pool


def build_engine(config: RunConfig, index: int, log_dir: Path) -> RolloutEngine:
    """One engine, in this process, not yet started."""
    if config.rollout.engine == "sglang":
        from pipeline.rollout.sglang import SglangEngine

        return SglangEngine(config.rollout, index=index, log_dir=log_dir, seed=config.seed)
    from pipeline.rollout.native import NativeEngine

    return NativeEngine(weight_sync_timeout_s=config.rollout.weight_sync_timeout_s)


def world_size(config: RunConfig) -> int:
    """Learner processes: TP x CP x PP x DP."""
    layout = config.learner
    replica = layout.tensor_model_parallel_size * layout.context_parallel_size * layout.pipeline_model_parallel_size
    return replica * layout.data_parallel_size


def engine_gpus(config: RunConfig) -> int:
    """GPUs of one engine; the native engine computes on the CPU."""
    uses_gpus = torch.cuda.is_available() and config.rollout.engine == "sglang"
    return config.rollout.tensor_parallel_size if uses_gpus else 0


def _placed(config: RunConfig) -> tuple[list[Node], Placement]:
    """The nodes of the Ray cluster and who goes where. Raises ``ConfigError`` when GPUs are short: actors would wait for ever."""
    from launchers import ray_cluster

    nodes = ray_cluster.join()
    gpus = [node.gpus if torch.cuda.is_available() else 0 for node in nodes]
    layout, rollout = config.learner, config.rollout
    tensor_parallel, engine = layout.tensor_model_parallel_size, engine_gpus(config)
    try:
        return nodes, place(world_size(config), tensor_parallel, rollout.engines, engine, gpus)
    except PlacementError as error:
        remedy = "use more nodes, a smaller layout, or fewer rollout.engines or rollout.tensor_parallel_size"
        raise ConfigError("learner.tensor_model_parallel_size", tensor_parallel, str(error), remedy) from error


def _hf_path(config: RunConfig) -> Path:
    return resolve_path(config.model.hf_path).resolve()


def _checkpoints(run_dir: Path, config: RunConfig) -> CheckpointStore:
    return CheckpointStore(run_dir / "checkpoints", config.checkpoint.keep_last)


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGTERM, SIGUSR1 or ctrl-C into a flag; a second one acts as usual."""
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        log.warning(
            "%s: finishing this step, then saving a checkpoint (once more to stop at once)", signal.Signals(number).name
        )
        asked.set()
        signal.signal(number, previous[number])

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    previous = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
