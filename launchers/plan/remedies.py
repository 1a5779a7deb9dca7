"""A plan of a learner as numbers and as a picture, with the keys that would make it smaller."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launchers.plan import memory
from launchers.plan.speed import Machine, speed
from launchers.plan.work import Work, from_config
from pipeline.config.schema import RunConfig
from pipeline.model.architecture import Architecture
from pipeline.units import GIB

COLOURS = {
    "parameters": "#2f6db3",
    "gradients": "#7fa8d6",
    "optimizer": "#1d3f66",
    "fp8_weights": "#9b6fb3",
    "reference": "#6f8f9b",
    "context": "#c9cdd2",
    "activations": "#e07b39",
    "recompute": "#f0b48a",
    "logits": "#b3412f",
    "working": "#d9c65a",
    "communication": "#6aa56a",
}


def summary(
    model: Architecture, config: RunConfig, machine: Machine, gpu_bytes: float, mean_response: int, imbalance: float
) -> dict[str, Any]:
    """The plan for JSON: bytes per GPU of every stage, the verdict, a step's operations and seconds.

    Remedies are there where the model does not fit.

    ``mean_response`` and ``imbalance`` are those of ``work.from_config``; memory is for the longest responses.
    Raises ``ValueError`` on a layout that does not fit the model.
    """
    work = from_config(model, config, mean_response, imbalance)
    stages = memory.stages(from_config(model, config, imbalance=imbalance))
    peak = max(stage.total for stage in stages)
    return {
        "gpus": work.grid.world_size,
        "layout": _layout(work),
        "layers": "transformer_engine" if work.transformer_engine else "local",
        "stages": [_stage(stage) for stage in stages],
        "peak_bytes": peak,
        "gpu_bytes": gpu_bytes,
        "fits": peak <= gpu_bytes,
        "remedies": remedies(model, config, peak, imbalance) if peak > gpu_bytes else [],
        "micro_batch": {
            "tokens": work.rows * work.length,
            "longest_row": work.length,
            "targets": work.targets,
            "per_update": work.micro_batches,
        },
        "step": _step(work, machine),
        "assumptions": {
            "context_bytes": memory.CONTEXT_BYTES,
            **vars(machine),
            "mean_response": mean_response,
            "imbalance": imbalance,
        },
    }


def remedies(model: Architecture, config: RunConfig, peak: float, imbalance: float = 1.0) -> list[dict[str, Any]]:
    """Single keys that lower the peak, the strongest first: value, bytes saved on the fullest GPU, GPUs then needed."""
    found = []
    for key, value in _changes(config):
        changed = copy.deepcopy(config)
        section = changed
        *path, name = key.split(".")
        for part in path:
            section = getattr(section, part)
        setattr(section, name, value)
        try:
            work = from_config(model, changed, imbalance=imbalance)
            saved = peak - max(stage.total for stage in memory.stages(work))
        except ValueError:  # the model cannot be cut so
            continue
        if saved > 0.05 * GIB:
            found.append({"key": key, "value": value, "saves_bytes": saved, "gpus": work.grid.world_size})
    return sorted(found, key=lambda remedy: -remedy["saves_bytes"])


def draw(result: Mapping[str, Any], title: str, path: Path) -> None:
    """A picture of ``summary``: GiB of one GPU of every pipeline stage, stacked by what holds them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stages, limit = result["stages"], result["gpu_bytes"] / GIB
    figure, axes = plt.subplots(figsize=(max(6.0, 2.5 + 0.9 * len(stages)), 4.2), layout="constrained")
    bottom = [0.0] * len(stages)
    for part, colour in COLOURS.items():
        heights = [stage["bytes"][part] / GIB for stage in stages]
        if any(heights):
            axes.bar(range(len(stages)), heights, 0.7, bottom, label=part.replace("_", " "), color=colour)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.axhline(limit, color="#444444", linewidth=1, linestyle="--")
    axes.annotate(f"{limit:g} GiB", (len(stages) - 0.5, limit), ha="right", va="bottom", fontsize=8)
    axes.set(xlabel="pipeline stage", ylabel="GiB of one GPU", title=title, ylim=(0, 1.12 * max(limit, *bottom)))
    axes.set_xticks(range(len(stages)))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *(entries[::-1] for entries in axes.get_legend_handles_labels()), loc="outside right center", frameon=False
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _layout(work: Work) -> dict[str, int]:
    """Sizes of the parallel groups; data parallelism without context parallelism."""
    grid = work.grid
    sizes = {"tp": grid.tp, "cp": work.cp, "pp": grid.pp, "vpp": grid.vpp, "dp": grid.dp // work.cp}
    return sizes | ({"ep": grid.ep, "etp": grid.expert_tp} if work.model.moe else {})


def _stage(stage: memory.Stage) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "layers": stage.layers,
        "micro_batches_under_way": stage.under_way,
        "bytes": dict(stage.parts),
        "sync_bytes": stage.sync,
        "total_bytes": stage.total,
    }


def _step(work: Work, machine: Machine) -> dict[str, float]:
    """Operations and seconds of one step's train phase."""
    return {"tokens": work.step_rows * work.expected_length, "rows": work.step_rows, **vars(speed(work, machine))}


def _changes(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Keys that trade memory for time, GPUs or another setting, with the next value to try."""
    learner = config.learner
    granularity = {"none": ("selective", "full"), "selective": ("full",)}.get(learner.recompute_granularity, ())
    yield from (("learner.recompute_granularity", value) for value in granularity)
    for name in ("tensor_model", "pipeline_model", "context", "data", "expert_model"):
        key = f"{name}_parallel_size"
        yield f"learner.{key}", 2 * getattr(learner, key)
    conditional: tuple[tuple[bool, str, Any], ...] = (
        (not learner.optimizer.distributed, "learner.optimizer.distributed", True),
        (learner.tensor_model_parallel_size > 1, "learner.sequence_parallel", True),
        (learner.virtual_pipeline_model_parallel_size > 1, "learner.virtual_pipeline_model_parallel_size", 1),
        (learner.log_prob_kernel not in ("auto", "fused"), "learner.log_prob_kernel", "fused"),
        (learner.precision.fp8 != "none", "learner.precision.fp8_param", True),
        (learner.precision.fp8 != "none", "learner.precision.fp8", "none"),
        (config.model.dtype == "fp32", "model.dtype", "bf16"),
        (config.objective.kl_coef > 0, "objective.kl_coef", 0.0),
        (not learner.max_tokens_per_micro_batch, "learner.micro_batch_size", max(1, learner.micro_batch_size // 2)),
        (
            learner.max_tokens_per_micro_batch > 0,
            "learner.max_tokens_per_micro_batch",
            learner.max_tokens_per_micro_batch // 2,
        ),
    )
    yield from ((key, value) for applies, key, value in conditional if applies)
