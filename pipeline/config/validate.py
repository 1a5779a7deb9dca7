"""Checks a configuration beyond types: each key's own constraints, then the rules between keys.

Rules between keys stand in ``<section>_rules``, what the model's folder allows in ``model_rules``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.config.check import key_problems
from pipeline.config.data_rules import data_file_problems, data_problems
from pipeline.config.entropy_rules import entropy_problems
from pipeline.config.errors import Problem
from pipeline.config.learner_rules import learner_problems
from pipeline.config.lora_rules import lora_problems
from pipeline.config.model_rules import model_problems
from pipeline.config.monitoring_rules import sink_problems
from pipeline.config.objective_rules import objective_problems
from pipeline.config.precision_rules import precision_problems
from pipeline.config.rollout_rules import rollout_problems
from pipeline.config.schema import RunConfig

RULES: tuple[Callable[[RunConfig], Iterator[Problem]], ...] = (
    learner_problems,
    lora_problems,
    rollout_problems,
    data_problems,
    entropy_problems,
    sink_problems,
    objective_problems,
    precision_problems,
)


def problems_of(config: RunConfig, model_folder: Path, found: Callable[[str], Path] | None) -> list[Problem]:
    """Every rule that ``config`` breaks.

    Rules on combinations speak only when each value is possible by itself.

    Args:
        config: the run.
        model_folder: ``model.hf_path``, resolved.
        found: where a file that it names lies; None: the data are not on this machine.
    """
    problems = list(key_problems(config))
    if not problems:
        problems = [problem for rule in RULES for problem in rule(config)]
        problems += data_file_problems(config, found) if found else ()
    return problems + list(model_problems(config, model_folder))
