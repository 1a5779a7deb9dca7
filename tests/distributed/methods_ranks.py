"""Short runs of every method in one process; run by ``gang.Gang``."""

import json
from contextlib import ExitStack
from pathlib import Path

SMALL = (
    "runtime=inline",
    "learner.tensor_model_parallel_size=1",
    "steps=3",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=8",
    "evaluation.at_start=false",
    "evaluation.at_end=false",
    "entropy.auxiliary_prompts=2",
    "entropy.auxiliary_samples=8",
    "entropy.band.low=0.8",  # above what is measured, so that controllers push
    "entropy.band.high=0.9",
    "monitoring.progress=false",
    "monitoring.samples_per_step=0",
)


def train(rank, world, address, recipe, run_dir, overrides):
    """The step events of three steps, without the checkpoint and the report that end a run."""
    from launchers.run.assemble import build_loop
    from pipeline.config.load import load_config, resolve_path
    from pipeline.monitoring.recorder import Recorder

    config = load_config(Path(recipe), [*SMALL, *overrides])
    with ExitStack() as stack:
        recorder = stack.enter_context(Recorder(Path(run_dir), config))
        loop = build_loop(config, recorder, stack)
        loop.learner.load(resolve_path(config.model.hf_path))
        recorder.start(0)
        loop.rollouts.push(0)
        for _ in range(config.steps):
            loop.train_step()
        events = map(json.loads, (Path(run_dir) / "events.jsonl").read_text().splitlines())
        return [event for event in events if event["kind"] == "step"]
