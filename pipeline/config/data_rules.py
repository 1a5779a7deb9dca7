"""Rules between keys of ``data`` and ``evaluation``: prompts, the answers that grade them, and pass@k."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.config.errors import Problem
from pipeline.config.schema import RunConfig


def data_problems(config: RunConfig) -> Iterator[Problem]:
    """Every combination of data and evaluation keys that cannot work, or in which one of them would have no effect."""
    yield from _data(config)
    yield from _chat(config)
    yield from _evaluation(config)


def _data(config: RunConfig) -> Iterator[Problem]:
    source = config.data.source
    if source.kind == "countdown" and not re.fullmatch(r"(pm|cd)[2-5]", source.task):
        remedy = "use pm2 to pm5 (+ and -) or cd2 to cd5 (+, - and *)"
        yield Problem("data.source.task", source.task, "not a countdown task", remedy)
    if source.kind == "reasoning_gym" and not source.task.isidentifier():
        yield Problem(
            "data.source.task", source.task, "not a reasoning-gym dataset name", "name a dataset, e.g. chain_sum"
        )
    if source.kind == "reasoning_gym" and source.size < config.rollout.prompts_per_step:
        yield Problem(
            "data.source.size",
            source.size,
            f"fewer than a step takes (rollout.prompts_per_step = {config.rollout.prompts_per_step})",
            "raise it: a step never holds a prompt twice",
        )
    if source.kind != "reasoning_gym" and source.params:
        yield Problem(
            "data.source.params",
            source.params,
            f"has no effect with data.source.kind={source.kind}",
            "remove it, or set data.source.kind=reasoning_gym",
        )


def _chat(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    for name in ("system_prompt", "chat_template_file", "chat_template_kwargs", "examples"):
        if getattr(data, name) and not data.chat_template:
            yield Problem(
                f"data.{name}",
                getattr(data, name),
                "has no effect without the chat template",
                "set data.chat_template=true or remove it",
            )
    for example in data.examples:
        if len(example) != 2:
            yield Problem("data.examples", example, "not a pair", "write [[question, answer], ...]")


def _evaluation(config: RunConfig) -> Iterator[Problem]:
    evaluation = config.evaluation
    if not evaluation.k or min(evaluation.k) < 1 or max(evaluation.k) > evaluation.samples:
        yield Problem(
            "evaluation.k",
            evaluation.k,
            f"pass@k from {evaluation.samples} samples needs every k between 1 and {evaluation.samples}",
            "raise evaluation.samples or remove the k outside",
        )
    if (evaluation.every or evaluation.at_start or evaluation.at_end) and config.data.held_out == 0:
        yield Problem(
            "data.held_out",
            0.0,
            "evaluation is on but no prompt is held out",
            "set data.held_out, e.g. 0.1, or evaluation.every=0, at_start=false and at_end=false",
        )
    if evaluation.beside_training:
        yield from _beside_training(config)


def _beside_training(config: RunConfig) -> Iterator[Problem]:
    place = "evaluation.beside_training"
    if config.rollout.colocated:
        problem = "engines on the learner's GPUs cannot draw while it trains"
        yield Problem(place, True, problem, "set it to false, or rollout.placement=disaggregated")
    if not (config.evaluation.every or config.evaluation.at_start):
        problem = "has no effect: nothing trains beside the evaluation at the end"
        yield Problem(place, True, problem, "set evaluation.every, or remove it")


def data_file_problems(config: RunConfig, found: Callable[[str], Path]) -> Iterator[Problem]:
    """Whether the files of the data are on this machine, where ``found`` says that they lie."""
    source, template = config.data.source, config.data.chat_template_file
    if template and not found(template).is_file():
        yield Problem("data.chat_template_file", template, "no such file", "give the path of a Jinja file")
    if source.kind == "jsonl" and not found(source.path).is_file():
        yield Problem("data.source.path", source.path, "no such file", "give the path of a JSONL file of prompts")
