"""The one place that knows every concrete class: it wires a run from its configuration."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.checkpoints import CheckpointStore
from pipeline.config.load import resolve_path
from pipeline.config.schema import RunConfig
from pipeline.data.cursor import DataCursor
from pipeline.data.sources import load_prompts
from pipeline.data.tokenizer import load_tokenizer
from pipeline.entropy.factory import build_controller
from pipeline.evaluation.evaluate import evaluate as evaluate_engine
from pipeline.learner import Learner
from pipeline.loop import TrainingLoop
from pipeline.monitoring.recorder import Recorder
from pipeline.rewards.stage import VerifierStage
from pipeline.rollout.engine import RolloutEngine
from pipeline.rollout.pool import EnginePool
from pipeline.rollout.weight_sync import push_weights
from pipeline.types import ControlDecision

log = logging.getLogger(__name__)


def train(config: RunConfig, resume: Path | None = None) -> dict[str, Any]:
    """Run training to its end, to a signal, or on from ``resume`` (a run directory); returns the run's summary.

    SIGTERM, SIGUSR1 and ctrl-C end the step in progress, then a checkpoint is written.
    """
    run_dir = resume or Path(config.run_dir or f"runs/{config.name}-{datetime.now():%Y%m%d-%H%M%S}")
    with ExitStack() as stack:
        recorder = stack.enter_context(Recorder(run_dir, config, resumed=resume is not None))
        stop_requested = stack.enter_context(_signals())
        loop = build_loop(config, recorder, stack)
        checkpoint = loop.checkpoints.latest() if resume else None
        if checkpoint:
            restore(loop, checkpoint)
        else:
            loop.learner.load(resolve_path(config.model.hf_path))
        recorder.start(loop.step)
        loop.run(stop_requested)
        return recorder.finish(completed=loop.step >= config.steps)


def evaluate(config: RunConfig, run: Path | None = None) -> dict[str, Any]:
    """pass@k and friends of the Hugging Face model, or of the newest checkpoint of ``run``."""
    with ExitStack() as stack:
        tokenizer = load_tokenizer(resolve_path(config.model.hf_path))
        prompts = load_prompts(
            config.data, tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens, seed=config.seed
        )
        verifier = VerifierStage(config.data, tokenizer)
        stack.callback(verifier.close)
        log_dir = (run or Path("runs")) / "logs"
        engine = start_engines(config, log_dir, stack)
        step = 0
        if run is not None:
            checkpoint = CheckpointStore(run / "checkpoints", config.checkpoint.keep_last).latest()
            learner = start_learner(config, stack)
            learner.restore(checkpoint.learner)
            step = checkpoint.step
            push_weights(learner, engine, step)
        result = evaluate_engine(engine, verifier, prompts.held_out, config, step)
        return {"model": str(config.model.hf_path), "run": str(run) if run else None, "step": step, **result.to_dict()}


def build_loop(config: RunConfig, recorder: Recorder, stack: ExitStack) -> TrainingLoop:
    """Every part of a run, started and registered for closing on ``stack``."""
    hf_path = resolve_path(config.model.hf_path)
    tokenizer = load_tokenizer(hf_path)
    prompts = load_prompts(config.data, tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens, seed=config.seed)
    recorder.data(prompts)
    verifier = VerifierStage(config.data, tokenizer)
    stack.callback(verifier.close)
    controller = build_controller(config.entropy, config.steps, config.rollout.prompts_per_step)
    learner = start_learner(config, stack)
    return TrainingLoop(
        config=config,
        engine=start_engines(config, recorder.run_dir / "logs", stack),
        learner=learner,
        verifier=verifier,
        cursor=DataCursor(prompts.train, config.seed),
        controller=controller,
        held_out=prompts.held_out,
        recorder=recorder,
        checkpoints=CheckpointStore(recorder.run_dir / "checkpoints", config.checkpoint.keep_last),
        pad_token_id=tokenizer.pad_token_id,
        decision=controller.initial(),
    )


def restore(loop: TrainingLoop, checkpoint: Any) -> None:
    """Put every stateful part back to where ``checkpoint`` was taken."""
    state = checkpoint.state()
    loop.learner.restore(checkpoint.learner)
    loop.cursor.load_state_dict(state["cursor"])
    loop.controller.load_state_dict(state["controller"])
    loop.decision = ControlDecision(**state["decision"])
    loop.step = state["step"]


def start_learner(config: RunConfig, stack: ExitStack) -> Learner:
    """The learner's processes, not yet loaded."""
    address = ("127.0.0.1", _free_port())
    if config.runtime == "inline":
        learner = build_learner_rank(config, 0, address)
    else:
        from launchers.actors import LearnerRank, RayLearner

        _start_ray(config)
        ranks = [
            LearnerRank.options(num_cpus=0, num_gpus=_gpus()).remote(config, rank, address)
            for rank in range(world_size(config))
        ]
        learner = RayLearner(ranks)
    stack.callback(learner.close)
    return learner


def build_learner_rank(config: RunConfig, rank: int, address: tuple[str, int]) -> Learner:
    """The learner of one rank, in this process."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megatron_ext import topology
    from megatron_ext.learner import MegatronLearner

    layout = config.learner
    placed = topology.initialize(
        rank,
        world_size(config),
        address,
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        config.seed,
    )
    model = replace(config.model, hf_path=str(resolve_path(config.model.hf_path)))
    return MegatronLearner(layout, model, config.objective, total_steps=config.steps, seed=config.seed, topology=placed)


def start_engines(config: RunConfig, log_dir: Path, stack: ExitStack) -> RolloutEngine:
    """All engines behind one, started with the model's weights."""
    builders = [partial(build_engine, config, index, log_dir) for index in range(config.rollout.engines)]
    if config.runtime == "inline":
        engines = [build() for build in builders]
    else:
        from launchers.actors import EngineProcess, RayEngine

        _start_ray(config)
        options = {"num_cpus": 0, "num_gpus": _gpus() * config.rollout.tensor_parallel_size}
        engines = [
            RayEngine(EngineProcess.options(**options).remote(build), f"engine {i}") for i, build in enumerate(builders)
        ]
    pool = EnginePool(engines)
    stack.callback(pool.close)
    pool.start(resolve_path(config.model.hf_path))
    return pool


def build_engine(config: RunConfig, index: int, log_dir: Path) -> RolloutEngine:
    """One engine, in this process, not yet started."""
    if config.rollout.engine == "sglang":
        from pipeline.rollout.sglang import SglangEngine

        return SglangEngine(config.rollout, index=index, log_dir=log_dir, seed=config.seed)
    from pipeline.rollout.native import NativeEngine

    return NativeEngine()


def world_size(config: RunConfig) -> int:
    """Learner processes: TP x PP x DP."""
    layout = config.learner
    return layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size * layout.data_parallel_size


def _gpus() -> int:
    """GPUs per learner rank or engine TP rank: 1 where there are any."""
    import torch

    return int(torch.cuda.is_available())


def _start_ray(config: RunConfig) -> None:
    """A local Ray cluster, unless one is already joined."""
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
