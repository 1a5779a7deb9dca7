"""Measurements that need a model: the asymmetry probe, and the excitation that identifies a plant before a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from launchers.run import assemble
from pipeline.config.schema import RunConfig
from pipeline.data.sources import load_prompts
from pipeline.data.tokenizer import load_tokenizer
from pipeline.entropy.excitation import Excitation
from pipeline.entropy.identify import Record
from pipeline.evaluation.probe import Asymmetry, Probe, probe_config
from pipeline.monitoring.plant_data import record_of
from pipeline.monitoring.recorder import Recorder
from pipeline.monitoring.summary import read_run
from pipeline.rewards.stage import VerifierStage


def probe(
    config: RunConfig,
    run: Path | None,
    temperatures: Sequence[float],
    repeats: int,
    prompts_per_update: int,
    step_size: float,
    said: Callable[[str], None],
) -> Asymmetry:
    """The asymmetry of ``config``'s model, or of the newest checkpoint of ``run``.

    Raises ``CheckpointError`` without one.
    """
    config = probe_config(config, step_size)
    checkpoint = assemble.newest_checkpoint(run, "start from")
    with ExitStack() as stack:
        tokenizer = load_tokenizer(assemble.hf_path(config))
        prompts = load_prompts(config.data, tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens)
        verifier = VerifierStage(config.data, tokenizer)
        stack.callback(verifier.close)
        folder = Path(stack.enter_context(TemporaryDirectory()))
        inputs = assemble.plan_inputs(config)
        engine = assemble.start_engines(config, folder / "logs", stack)
        learner = assemble.start_learner(config, stack)
        if checkpoint:
            checkpoint.restore(learner.restore)
        else:
            learner.load(assemble.hf_path(config))
        state = folder / "state"
        state.mkdir()
        sync = assemble.weight_sync(config, inputs, learner, engine)
        generate = assemble.generator(config, tokenizer, engine, stack)
        parts = Probe(learner, generate, sync, verifier, prompts.train, config, state)
        return parts.run(temperatures, repeats, prompts_per_update, said)


def excite(config: RunConfig, run: Path | None, steps: int) -> Record:
    """Train ``steps`` steps while the command switches between two levels, and return how the entropy responded.

    The run's folder is thrown away.

    Starts from ``config``'s model, or from the newest checkpoint of ``run``, optimizer state included.
    """
    checkpoint = assemble.newest_checkpoint(run, "start from")
    config = _without_side_effects(config, steps)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        recorder = stack.enter_context(Recorder(Path(folder) / "run", config))
        loop = assemble.build_loop(config, recorder, stack)
        loop.controller = Excitation(config.entropy)
        loop.decision = loop.controller.initial()
        if checkpoint:
            checkpoint.restore(loop.learner.restore)
        else:
            loop.learner.load(assemble.hf_path(config))
        recorder.start(0)
        loop.run(lambda: False)
        recorder.finish(completed=True)
        return record_of(read_run(recorder.run_dir))


def _without_side_effects(config: RunConfig, steps: int) -> RunConfig:
    """The configuration for ``steps`` steps under control, with evaluation, checkpoints, samples and sinks off."""
    controlled = "pi" if config.entropy.controller == "none" else config.entropy.controller
    return replace(
        config,
        steps=steps,
        entropy=replace(config.entropy, controller=controlled),
        evaluation=replace(config.evaluation, every=0, at_start=False, at_end=False),
        checkpoint=replace(config.checkpoint, every=0),
        monitoring=replace(config.monitoring, samples_per_step=0, progress=False, sinks=[]),
    )
