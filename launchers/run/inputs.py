"""Opens everything that a run reads, before anything starts: packages, run folder, model files, data."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path

from pipeline.config.errors import ConfigError, Problem
from pipeline.config.idle import beyond_the_end, idle_keys
from pipeline.config.load import resolve_path
from pipeline.config.precision_rules import emulated_only
from pipeline.config.schema import RunConfig
from pipeline.data.sources import check_prompts, load_prompts
from pipeline.data.tokenizer import load_tokenizer
from pipeline.model.architecture import read
from pipeline.model.folder import Folder, check
from pipeline.model.layout import rows
from pipeline.model.reading import ModelError
from pipeline.monitoring.sinks.factory import problems as sink_problems
from pipeline.rollout.environment import environment_problems

log = logging.getLogger(__name__)


def check_start(config: RunConfig) -> None:
    """Raise ``ConfigError`` with every reason why a run on this machine could not start; data are not read.

    The log tells which keys have no effect, or none before the run ends, and what a GPU would refuse of an FP8 run that
    is emulated.
    """
    problems = [*_packages(config), *_run_dir(config), *_model(config), *sink_problems(config)]
    problems += environment_problems(config)
    if problems:
        raise ConfigError.of(problems)
    emulated = emulated_only(config, read(resolve_path(config.model.hf_path)))
    for sentence in [*idle_keys(config.entropy), *beyond_the_end(config), emulated]:
        if sentence:
            log.warning(sentence)


def check_inputs(config: RunConfig) -> None:
    """``check_start``, then read tokenizer and data as the run would. Raises ``ConfigError`` and ``DataError``."""
    check_start(config)
    tokenizer = load_tokenizer(resolve_path(config.model.hf_path))
    check_prompts(load_prompts(config.data, tokenizer, max_prompt_tokens=config.rollout.max_prompt_tokens), config)


def _packages(config: RunConfig) -> Iterator[Problem]:
    needed = {  # package, which is also the value that asks for it: key, what to install
        "sglang": ("rollout.engine", "'isentrope[sglang]'"),
        "ray": ("runtime", "ray"),
        "transformer_engine": ("learner.transformer_impl", "'isentrope[gpu]'"),
    }
    for package, (key, install) in needed.items():
        if attrgetter(key)(config) == package and importlib.util.find_spec(package) is None:
            yield Problem(key, package, f"the package {package} is not installed", f"pip install {install}")


def _run_dir(config: RunConfig) -> Iterator[Problem]:
    folder = Path(config.run_dir or "runs").expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        yield Problem("run_dir", config.run_dir, f"{existing} is a file", "choose another run_dir")
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Problem("run_dir", config.run_dir, f"{existing} cannot be written to", "choose another run_dir")


def _model(config: RunConfig) -> Iterator[Problem]:
    path = resolve_path(config.model.hf_path)
    try:
        architecture = read(path)
        check(Folder(path, architecture), rows(architecture), architecture)
    except ModelError as error:
        yield from _refusals(config, error)


@contextmanager
def model_errors(config: RunConfig) -> Iterator[None]:
    """Turn what is wrong with the model's folder into a ``ConfigError`` of ``model.hf_path``."""
    try:
        yield
    except ModelError as error:
        raise ConfigError.of(list(_refusals(config, error))) from error


def _refusals(config: RunConfig, error: ModelError) -> Iterator[Problem]:
    path = resolve_path(config.model.hf_path)
    for refusal in error.refusals:
        yield Problem("model.hf_path", config.model.hf_path, f"{path}: {refusal.problem}", refusal.remedy)
