"""Rules for ``learner.precision``: megatron-core's and Transformer Engine's conditions, checked before anything starts.

Whether Transformer Engine and the chip are there is asked on the machine that runs
(``megatron_ext.fp8.transformer_engine``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from pipeline.config.errors import Problem
from pipeline.config.schema import PrecisionConfig, RunConfig
from pipeline.model.architecture import Architecture
from pipeline.model.fp8_layout import quantised
from pipeline.model.layout import rows

_SECTION = "learner.precision"
_DELAYED_ONLY = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")
_LAYER_COUNTS = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
_DEFAULTS = PrecisionConfig()


def precision_problems(config: RunConfig) -> Iterator[Problem]:
    """Every rule on ``learner.precision`` that ``config`` breaks."""
    precision = config.learner.precision
    if precision.fp8 == "none":
        names = [field.name for field in fields(precision) if field.name != "fp8"]
        yield from _without_effect(
            precision, names, "while learner.precision.fp8=none", "set learner.precision.fp8=hybrid"
        )
        return
    yield from (_emulated if precision.emulate else _computed)(config)
    if precision.fp8_recipe != "delayed":
        where = f"with learner.precision.fp8_recipe={precision.fp8_recipe}"
        yield from _without_effect(precision, _DELAYED_ONLY, where, "set learner.precision.fp8_recipe=delayed")
    elif precision.first_last_layers_bf16:
        yield _problem(
            "first_last_layers_bf16",
            True,
            "delayed scaling is for all layers or none",
            "use another fp8_recipe, or false",
        )
    if not precision.first_last_layers_bf16:
        where = "without learner.precision.first_last_layers_bf16"
        yield from _without_effect(precision, _LAYER_COUNTS, where, "set learner.precision.first_last_layers_bf16=true")


def _emulated(config: RunConfig) -> Iterator[Problem]:
    """Rounding in torch: megatron-core's own layers, their linear layers alone."""
    precision = config.learner.precision
    if config.learner.transformer_impl == "transformer_engine":
        problem = "learner.precision.emulate runs in megatron-core's own layers"
        yield Problem("learner.transformer_impl", "transformer_engine", problem, "use auto or local, or emulate=false")
    for name, what in (
        ("fp8_param", "keeps parameters as they are"),
        ("fp8_dot_product_attention", "leaves attention as it is"),
    ):
        if getattr(precision, name):
            yield _problem(name, True, f"learner.precision.emulate {what}", "remove it, or set emulate=false on a GPU")
    if precision.fp8_recipe == "delayed" and config.learner.recompute_granularity == "full":
        problem = "would note every layer's largest entries twice under learner.precision.emulate"
        yield Problem("learner.recompute_granularity", "full", problem, "use none or selective, or another fp8_recipe")


def _computed(config: RunConfig) -> Iterator[Problem]:
    """FP8 by Transformer Engine."""
    precision = config.learner.precision
    if config.learner.transformer_impl == "local":
        problem = f"megatron-core's own layers have no FP8 (learner.precision.fp8={precision.fp8})"
        yield Problem("learner.transformer_impl", "local", problem, "use auto, or set learner.precision.emulate=true")
    if config.model.dtype != "bf16":
        problem = f"Transformer Engine's FP8 is used on bf16 models (learner.precision.fp8={precision.fp8})"
        yield Problem(
            "model.dtype", config.model.dtype, problem, "set model.dtype=bf16, or learner.precision.emulate=true"
        )
    if precision.fp8_dot_product_attention and precision.fp8_recipe in ("blockwise", "mxfp8"):
        problem = f"megatron-core has no FP8 attention with fp8_recipe={precision.fp8_recipe}"
        yield _problem(
            "fp8_dot_product_attention", True, problem, "set it to false, or fp8_recipe to delayed or tensorwise"
        )
    if precision.fp8_param:
        yield from _fp8_parameters(config)


def _fp8_parameters(config: RunConfig) -> Iterator[Problem]:
    if not config.learner.optimizer.distributed:
        problem = "only the distributed optimizer gathers parameters in FP8"
        yield _problem("fp8_param", True, problem, "set learner.optimizer.distributed=true, or fp8_param=false")
    if config.learner.precision.fp8_recipe == "mxfp8":
        problem = "MXFP8 parameters share their buffer with gradients in megatron-core, which is not built here"
        yield _problem("fp8_param", True, problem, "set fp8_param=false, or another fp8_recipe")
    if config.objective.kl_coef > 0:
        problem = (
            f"the reference policy of objective.kl_coef={config.objective.kl_coef:g} is exchanged with plain parameters"
        )
        yield _problem("fp8_param", True, problem, "set fp8_param=false, or objective.kl_coef=0")


def precision_model_problems(config: RunConfig, model: Architecture) -> Iterator[Problem]:
    """What the dimensions of ``model`` do not allow."""
    precision, learner = config.learner.precision, config.learner
    if precision.fp8 == "none":
        return
    stage = model.layers // max(1, learner.pipeline_model_parallel_size)
    for name in _LAYER_COUNTS if precision.first_last_layers_bf16 else ():
        if getattr(precision, name) > stage:
            yield _problem(
                name, getattr(precision, name), f"a pipeline stage has {stage} layers", f"use at most {stage}"
            )
    if not precision.emulate and (misfit := _misfit(config, model)):
        yield _problem("fp8_recipe", precision.fp8_recipe, misfit, "use a smaller TP, fp8=none, or emulate=true")


def emulated_only(config: RunConfig, model: Architecture) -> str:
    """Why a run that emulates FP8 would be refused by Transformer Engine, on a GPU; "" where it would not."""
    precision = config.learner.precision
    misfit = _misfit(config, model) if precision.fp8 != "none" and precision.emulate else ""
    return misfit and f"learner.precision.emulate=true takes what no GPU run with emulate=false will: {misfit}"


def _misfit(config: RunConfig, model: Architecture) -> str:
    """Which widths Transformer Engine's products do not take, or "".

    They want whole groups (``pytorch/utils.py``, ``assert_dim_for_fp8_exec``), and are of a weight as of its transpose,
    in the backward pass: both of its widths count.
    """
    learner, recipe = config.learner, config.learner.precision.fp8_recipe
    multiple, tensor = 32 if recipe == "mxfp8" else 16, max(1, learner.tensor_model_parallel_size)
    misfits = {}
    for row in filter(quantised, rows(model)):
        shape = row.local_shape(tensor if row.expert is None else learner.expert_tensor_parallel_size or tensor)
        if any(width % multiple for width in shape):
            misfits[re.sub(r"^decoder\.layers\.\d+\.|local_experts\.\d+\.", "", row.parameter)] = list(shape)
    held = ", ".join(f"{name} {shape}" for name, shape in misfits.items())
    return held and f"FP8 products take widths of multiples of {multiple}, but a rank holds {held}"


def _without_effect(precision: PrecisionConfig, names: Any, where: str, remedy: str) -> Iterator[Problem]:
    for name in names:
        value = getattr(precision, name)
        if value != getattr(_DEFAULTS, name):
            yield _problem(name, value, f"has no effect {where}", f"{remedy}, or remove it")


def _problem(name: str, value: Any, problem: str, remedy: str) -> Problem:
    return Problem(f"{_SECTION}.{name}", value, problem, remedy)
