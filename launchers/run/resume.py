"""Examines how a run would be resumed, before anything starts: the step, what has changed, whether it can."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from launchers.supervise.attempts import begun, progress
from pipeline.checkpoints import CheckpointStore
from pipeline.config.errors import ConfigError, Problem
from pipeline.config.keys import flat
from pipeline.config.load import UNHASHED, load_config
from pipeline.config.schema import LoraConfig, RunConfig
from pipeline.entropy.actuator import acting
from pipeline.entropy.band import build_band
from pipeline.model.grid import KEYS

# A checkpoint is restored by as many ranks, each with the same part, that wrote it, in the same number format and with
# the same adapters.
_FIXED = (
    *("model.dtype", *(f"learner.{key}" for key in KEYS.values()), "learner.optimizer.distributed"),
    *(f"learner.lora.{each.name}" for each in fields(LoraConfig)),
)
# What makes it another experiment under the same name.
_IDENTITY = (
    *("seed", "model.hf_path", "rollout.max_prompt_tokens"),
    *("data.source", "data.held_out", "data.chat_template", "data.chat_template_file", "data.chat_template_kwargs"),
    *("data.system_prompt", "data.examples", "data.verifier", "rollout.stop", "rollout.stop_token_ids"),
)
# With which pass@k before and after cannot be compared.
_EVALUATED = ("evaluation.prompts", "evaluation.temperature")


@dataclass(frozen=True)
class Resumption:
    """How a run goes on from a checkpoint."""

    step: int  # updates in its newest checkpoint
    steps: int  # at which it will be complete
    changed: dict[str, tuple[Any, Any]]  # key -> value so far, value from now on
    complete: bool  # nothing is left to do

    def __str__(self) -> str:
        """The resumption in one line."""
        changes = ", ".join(f"{key} {before!r} -> {after!r}" for key, (before, after) in self.changed.items())
        return f"from step {self.step} of {self.steps}; changed: {changes or 'nothing'}"


def run_to_resume(folder: Path) -> Path:
    """``folder``, which holds a run. Raises ``ConfigError`` naming the nearest that does."""
    folder = folder.expanduser()
    if begun(folder):
        return folder
    beside = [path for path in folder.absolute().parent.glob("*") if begun(path)]
    near = difflib.get_close_matches(folder.name, [path.name for path in beside], n=1, cutoff=0.4)
    remedy = f"did you mean {folder.parent / near[0]}?" if near else "`isentrope train --config` starts a new run"
    what = "this folder holds no run" if folder.is_dir() else "no such run"
    raise ConfigError("--resume", str(folder), f"{what} ({folder.absolute()})", remedy)


def resumption(run: Path, config: RunConfig, *, allow_change: bool) -> Resumption:
    """How ``run`` would go on with ``config``. Raises ``ConfigError`` where it cannot, or only by ``allow_change``."""
    before = load_config(run / "config.yaml", check=False)
    changed = _changed(before, config)
    at = progress(run)
    saved = CheckpointStore(run / "checkpoints", keep_last=1).complete()
    step = saved[-1].step if saved else 0
    problems = [*_steps(config, step), *_restorable(changed), *(() if allow_change else _identity(changed))]
    if saved:
        refused = list(_other_control(before, config))
        problems += refused or ([] if allow_change else _control(before, config, changed))
    if problems:
        raise ConfigError.of(problems)
    complete = at.status == "completed" and step == config.steps
    return Resumption(step, config.steps, changed, complete)


def _changed(before: RunConfig, after: RunConfig) -> dict[str, tuple[Any, Any]]:
    new = flat(after)
    return {key: (old, new[key]) for key, old in flat(before).items() if old != new[key] and key not in UNHASHED}


def _steps(config: RunConfig, step: int) -> Iterator[Problem]:
    if config.steps < step:
        yield Problem("steps", config.steps, f"the run has done {step} steps already", f"give more than {step}")


def _other_control(before: RunConfig, after: RunConfig) -> Iterator[Problem]:
    """Changes after which the figures of one run would be of two kinds: one actuator's, or of a run without control."""
    was, will = acting(before.entropy), acting(after.entropy)
    if was is None or was == will:
        return
    key = "actuator" if will else "controller" if after.entropy.controller == "none" else "alpha"
    what = f"the run's figures so far are those of {was.name} under {before.entropy.controller}"
    remedy = "keep it, or start a new run from `isentrope convert megatron-to-hf`"
    yield Problem(f"entropy.{key}", getattr(after.entropy, key), what, remedy)


def _control(before: RunConfig, after: RunConfig, changed: dict[str, tuple[Any, Any]]) -> Iterator[Problem]:
    """Changes with which the controller cannot go on from what it has learnt."""
    if acting(before.entropy) is None and acting(after.entropy) is None:
        return
    bands = [build_band(config.entropy.band, config.steps).fingerprint for config in (before, after)]
    same_band = bands[0] == bands[1]
    keys = [key for key in changed if key.startswith("entropy.") and not (same_band and ".band." in key)]
    for key in keys:
        old, new = changed[key]
        what = f"the run's controller was set up with {old!r}"
        yield Problem(
            key, new, what, "keep it, or say --allow-change: then a new controller begins, with nothing learnt"
        )
    if not keys and not same_band:
        what = f"the band moves until the last step, which was {before.steps}: with more steps it is another"
        steps = before.steps - before.entropy.band.hold_steps
        remedy = f"set entropy.band.schedule_steps={steps}, or say --allow-change: then a new controller begins"
        yield Problem("steps", after.steps, what, remedy)
    for key in _EVALUATED if after.entropy.band.schedule == "auto" else ():
        if key in changed:
            old, new = changed[key]
            what = f"the band is found from how pass@k moves, and it was measured with {old!r}"
            yield Problem(key, new, what, "keep it, or say --allow-change: then the band may be found from the jump")


def check_restorable(run: Path, config: RunConfig) -> None:
    """Raise ``ConfigError`` where ``config`` differs from ``run``'s in what its checkpoints can only be read with."""
    if problems := list(_restorable(_changed(load_config(run / "config.yaml", check=False), config))):
        raise ConfigError.of(problems)


def _restorable(changed: dict[str, tuple[Any, Any]]) -> Iterator[Problem]:
    for key in (key for key in changed if key in _FIXED):
        old, new = changed[key]
        what = f"the run's checkpoints were written with {old!r} and can only be restored so"
        remedy = f"keep {key}={old}, or start a new run from `isentrope convert megatron-to-hf`"
        yield Problem(key, new, what, remedy)


def _identity(changed: dict[str, tuple[Any, Any]]) -> Iterator[Problem]:
    for key in changed:
        if any(key == name or key.startswith(f"{name}.") for name in _IDENTITY):
            old, new = changed[key]
            remedy = "keep it, start a new run, or say --allow-change to go on under the same name"
            yield Problem(key, new, f"the run was trained with {old!r}: this makes it another experiment", remedy)
