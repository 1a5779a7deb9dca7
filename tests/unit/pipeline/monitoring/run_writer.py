"""A small run folder, written by the recorder itself."""

import math
import time
from itertools import starmap
from pathlib import Path

import numpy as np

from pipeline.checkpoints import Checkpoint
from pipeline.config.load import load_config
from pipeline.data.sources import PromptSet
from pipeline.monitoring.recorder import Recorder
from pipeline.step.kept import choose
from pipeline.types import (
    ControlDecision,
    EntropyReading,
    KeptSample,
    Prompt,
    Role,
    Sample,
    SampleGroup,
    StepOutcome,
    StepSamples,
    StepStats,
    WeightSpan,
)

ROLLOUTS = {"sync": {"bytes": 2**20, "buckets": 2}, "engines": {"alive": 1, "total": 1}}
PROMPT = Prompt("q1", (1, 2), "1234>10=", "1234>10", "countdown")


def config(*overrides):
    return load_config(Path("recipe/pm4.yaml"), ["monitoring.progress=false", *overrides])


def sample(reward=1.0, tokens=4, role=Role.MAIN, temperature=1.0, finish="stop", error=""):
    return Sample(
        token_ids=np.arange(tokens),
        log_probs=np.zeros(tokens, np.float32),
        temperature=temperature,
        seed=7,
        role=role,
        finish_reason=finish,
        weight_versions=(WeightSpan(0, 0, tokens),),
        text="1+2+3+4",
        reward=reward,
        correct=reward == 1.0,
        verifier_error=error,
    )


def group(*samples, role=Role.MAIN):
    return SampleGroup(PROMPT, samples, role)


def kept(prompt, sample):
    """As if the policy had chosen the n-th token among e^(n/2) equally likely ones."""
    return KeptSample(prompt, sample, np.arange(len(sample.token_ids), dtype=np.float32) / 2)


def decision(state="tracking", temperature=1.2, reason="H in band"):
    return ControlDecision(temperature, temperature, 0, state, reason, 0.2985, 0.3)


def record_step(recorder, step, entropy=0.3, state="tracking", reason="H in band", main=None, metrics=None):
    clock = recorder.clock()
    with clock("sample"):
        begun = time.perf_counter()
    with clock("train"):
        pass
    drawn = StepSamples([group(sample(), sample(0.0))] if main is None else main, [], 0)
    stats = StepStats(
        -0.1, EntropyReading(entropy * 100, 100.0, step), 1.0, 1e-3, metrics or {"policy_loss": -0.1}, 0.05
    )
    chosen = choose(drawn, recorder._config.monitoring.samples_per_step, step)
    written = list(starmap(kept, chosen))
    recorder.step(outcome(step, drawn, stats, decision(), decision(state, reason=reason), written, begun))


def outcome(step, drawn, stats, used, following, kept=(), begun=0.0):
    return StepOutcome(
        step=step,
        samples=drawn,
        kept=kept,
        stats=stats,
        decision=used,
        following=following,
        band=(0.27, 0.33),
        positives=1,
        rollouts=ROLLOUTS,
        drawing_s=0.0,
        held=0,
        busy=[[(begun, time.perf_counter())]],
    )


def evaluation(pass_at_1, pass_at_16):
    def estimate(value):
        return {"value": value, "low": value - 0.05, "high": value + 0.05}

    return {
        "pass_at_k": {"1": estimate(pass_at_1), "16": estimate(pass_at_16)},
        "avg": pass_at_1,
        "maj_at_k": {"1": pass_at_1},
        "distinct_correct": 3.0,
        "seconds": 2.0,
    }


def open_run(run_dir, *overrides, resumed=False, step=0):
    recorder = Recorder(run_dir, config(*overrides), resumed=resumed)
    recorder.data(PromptSet((PROMPT,), (), 3))
    recorder.start(step)
    return recorder


def end(recorder):
    """As ``finish``, without the page, whose pictures take a second."""
    recorder._end("completed", "")


def write_run(run_dir, *overrides, steps=30, finish=True, entropy=lambda step: 0.3, final=(0.5, 0.9), state="tracking"):
    recorder = open_run(run_dir, *overrides)
    recorder.evaluation(0, evaluation(0.3, 0.95))
    for step in range(steps):
        record_step(recorder, step, entropy(step), state=state)
    recorder.evaluation(steps, evaluation(*final))
    recorder.checkpoint(Checkpoint(steps, run_dir / "checkpoints" / f"step-{steps:08d}"))
    if finish:
        end(recorder)
    recorder._lock.close()  # as the end of a process would, also of a killed one
    return recorder


def collapsing(step):
    return 0.3 * math.exp(-0.05 * step)
