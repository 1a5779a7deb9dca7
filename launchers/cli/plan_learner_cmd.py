"""``isentrope plan learner``: predicts the memory of every GPU and the seconds of a step from a configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from launchers.cli.arguments import CONFIG, JSON, MEAN_RESPONSE, OVERRIDES
from launchers.cli.terminal import say
from pipeline.config.errors import ConfigError
from pipeline.monitoring.console import CleanConsole
from pipeline.units import GIB

if TYPE_CHECKING:
    from pipeline.config.schema import RunConfig
    from pipeline.model.architecture import Architecture

FAILED = 1  # it does not fit, or is not built as planned
_SHOWN = 20  # differences; --json has all


def learner(
    config: Path | None = CONFIG,
    overrides: list[str] = OVERRIDES,
    gpu_gib: float = typer.Option(80.0, min=1.0, help="Memory of one GPU, GiB."),
    tflops: float = typer.Option(989.0, min=1e-3, help="Dense bf16 peak of one GPU, 10^12 operations a second."),
    utilization: float = typer.Option(
        0.45, min=1e-3, max=1.0, help="Share of the peak that is reached while computing, communication included."
    ),
    fp8_speedup: float = typer.Option(1.3, min=1e-3, help="Of products in FP8 over bf16, casts included."),
    mean_response: int = MEAN_RESPONSE,
    expert_imbalance: float = typer.Option(
        1.25, min=1.0, help="Tokens of the busiest expert-parallel rank over the mean."
    ),
    figure: Path | None = typer.Option(None, help="Also draw the memory of every stage into this PNG."),
    build: bool = typer.Option(
        False, "--build", help="Also build a rank of each kind, without memory or GPUs, and compare it with the plan."
    ),
    as_json: bool = JSON,
) -> None:
    """Plan the learner: GiB per GPU by pipeline stage, whether it fits, what would lower it, and the seconds of a step.

    For GPUs, with Transformer Engine's layers unless learner.transformer_impl=local; rollout engines need GPUs of their
    own. Exit code 1: it does not fit, or --build found a difference.

    Examples:

      isentrope plan learner --config recipe/qwen3-32b.yaml --build

      isentrope plan learner --config recipe/qwen3-32b.yaml \\
        learner.data_parallel_size=4 --mean-response 3000 --json
    """
    run, folder = _load(config, overrides)
    from launchers.plan.remedies import draw, summary
    from launchers.plan.speed import Machine
    from launchers.plan.work import expected_response
    from pipeline.model import architecture  # only once the configuration is known to be good

    if mean_response > run.rollout.max_new_tokens:
        why = f"above rollout.max_new_tokens={run.rollout.max_new_tokens}: lower one or raise the other"
        raise typer.BadParameter(f"{mean_response}: {why}", param_hint="--mean-response")
    machine = Machine(tflops, utilization, fp8_speedup)
    response = mean_response or expected_response(run)
    try:
        model = architecture.read(folder)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="model.hf_path") from error
    try:
        result = summary(model, run, machine, gpu_gib * GIB, response, expert_imbalance)
        if build:
            result["build"] = _rehearse(model, run)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="learner") from error
    result = {"name": run.name, "model": run.model.hf_path} | result
    if figure:
        draw(result, f"{run.name}: {result['gpus']} GPUs, {_words(result['layout'])}", figure)
    if as_json:
        say(json.dumps(result))
    else:
        _show(result)
    if not result["fits"] or (build and result["build"]["differences"]):
        raise typer.Exit(FAILED)


def _rehearse(model: Architecture, run: RunConfig) -> dict[str, Any]:
    """Ranks of each kind, built and compared with the plans. FP8 is left out: see ``megatron_ext.rehearsal``."""
    from launchers.plan import rehearsal
    from launchers.plan.work import from_config
    from megatron_ext.rehearsal import build
    from pipeline.config.schema import PrecisionConfig

    plain = replace(run, learner=replace(run.learner, precision=PrecisionConfig()))
    work = from_config(model, plain)
    plan = rehearsal.sync_plan(work, plain)
    ranks, differences = [], []
    for rank in rehearsal.kinds(work.grid):
        built = build(model, plain.learner, plain.model.dtype, rank)
        differences += rehearsal.differences(work, plan, built)
        counts = {name: getattr(built, name) for name in ("parameters", "gradients", "optimizer")}
        ranks.append(
            {"rank": rank, "stage": built.place.pp, "tensors": len(built.shapes), "seconds": built.seconds}
            | {f"{name}_bytes": count for name, count in counts.items()}
        )
    return {"layers": "local", "ranks": ranks, "differences": differences}


def _load(config: Path | None, overrides: list[str]) -> tuple[RunConfig, Path]:
    """The checked configuration, and the folder of its model.

    The folder is ``model.hf_path``, or a packaged ``config.json`` of that name.
    """
    from pipeline.config.load import PACKAGED, load_config, override, resolve_path

    run = load_config(config, overrides, check=False)
    folder = resolve_path(run.model.hf_path)
    if not (folder / "config.json").is_file():
        known = sorted(path.parent for path in (PACKAGED / "model").glob("*/config.json"))
        named = [path for path in known if path.name == folder.name.lower()]
        if not named:
            names = ", ".join(path.name for path in known)
            problem = "neither a folder with a config.json nor named as one of those packaged"
            raise ConfigError("model.hf_path", run.model.hf_path, problem, f"give a folder, or one of {names}")
        folder = named[0]
        overrides = [*overrides, override("model.hf_path", folder)]
    return load_config(config, overrides), folder


def _words(layout: Mapping[str, int]) -> str:
    return " ".join(f"{name.upper()}{size}" for name, size in layout.items() if size > 1) or "one GPU"


def _show(result: dict[str, Any]) -> None:
    """The summary as a table of GiB, the verdict, and a few lines."""
    console = CleanConsole()
    stages = result["stages"]
    parts = [part for part in stages[0]["bytes"] if any(stage["bytes"][part] for stage in stages)]
    table = Table("GiB of one GPU", *(f"stage {stage['stage']}" for stage in stages))
    for part in parts:
        table.add_row(part.replace("_", " "), *(f"{stage['bytes'][part] / GIB:.2f}" for stage in stages))
    table.add_section()
    table.add_row("total", *(f"{stage['total_bytes'] / GIB:.2f}" for stage in stages))
    table.add_row("layers", *(str(stage["layers"]) for stage in stages))
    table.add_row("micro-batches under way", *(f"{stage['micro_batches_under_way']:g}" for stage in stages))
    console.print(table)
    verdict = "FIT" if result["fits"] else "DOES NOT FIT"
    micro, step, machine = result["micro_batch"], result["step"], result["assumptions"]
    lines = [
        f"{verdict}: {result['peak_bytes'] / GIB:.1f} of {result['gpu_bytes'] / GIB:g} GiB on each of {result['gpus']} "
        f"GPUs ({_words(result['layout'])}, {result['layers']})",
        f"update: {micro['per_update']} micro-batches per replica, at most {micro['tokens']:.0f} tokens each, "
        f"rows up to {micro['longest_row']}",
        _train_phase(step),
        f"assumed: responses of {machine['mean_response']:,} tokens on average, "
        f"{machine['tflops']:g} TFLOP/s x {machine['utilization']:g}, FP8 x {machine['fp8_speedup']:g}, "
        f"{machine['context_bytes'] / GIB:g} GiB context; predicted, not measured",
    ]
    if not result["fits"]:
        lines.append("what would lower it, one key at a time:")
        for remedy in result["remedies"]:
            lines.append(
                f"  {remedy['key']}={_value(remedy['value'])}: -{remedy['saves_bytes'] / GIB:.1f} GiB, "
                f"{remedy['gpus']} GPUs"
            )
    for line in (*lines, *_build_lines(result.get("build"))):
        console.print(line, highlight=False, soft_wrap=True)


def _build_lines(build: Mapping[str, Any] | None) -> Iterator[str]:
    """What was built and, where it is not as planned, in what it differs."""
    if build is None:
        return
    ranks = build["ranks"]
    numbers, longest = ", ".join(str(rank["rank"]) for rank in ranks), max(rank["seconds"] for rank in ranks)
    yield (
        f"built: ranks {numbers} of megatron-core's own layers, {sum(rank['tensors'] for rank in ranks)} tensors, at "
        f"most {longest:.1f} s a rank"
    )
    if not build["differences"]:
        yield "AS PLANNED: places, names, shapes, bytes, and what a weight sync sends"
        return
    yield f"NOT AS PLANNED: {len(build['differences'])} differences"
    for each in build["differences"][:_SHOWN]:
        yield f"  rank {each['rank']}, {each['what']}: planned {each['planned']}, built {each['built']}"


def _train_phase(step: Mapping[str, Any]) -> str:
    """The predicted speed, of three digits.

    Nothing of a model so small that its kernels take longer to launch than to run.
    """
    if step["seconds"] < 1:
        return (
            f"train phase: under 1 s of arithmetic for {step['rows']} rows; launching kernels takes longer and is not "
            "predicted"
        )
    rate = float(f"{step['tokens_per_second']:.3g}")
    return (
        f"train phase: {step['seconds']:.1f} s for {step['rows']} rows, {rate:,.0f} tokens/s, MFU {step['mfu']:.2f}, "
        f"bubble {step['bubble']:.1%}, slowest stage {step['slowest_stage']:.2f} of the mean"
    )


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
