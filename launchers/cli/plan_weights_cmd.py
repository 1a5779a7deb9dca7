"""``isentrope plan weights``: predicts the bytes that a weight sync moves from learner to engines, and its seconds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from launchers.cli.arguments import JSON
from launchers.cli.terminal import say
from pipeline.monitoring.console import CleanConsole
from pipeline.units import GIB

LEARNER = ("tp", "pp", "dp", "vpp", "ep", "etp", "first_stage_layers", "last_stage_layers")
ENGINES = ("tp", "ep", "count")


def weights(
    model: str = typer.Option(
        ..., help="Hugging Face folder (config.json is enough), or a name in configs/model such as qwen3-32b."
    ),
    learner: str = typer.Option(
        ..., metavar="K=N,...", help=f"Learner's layout: {', '.join(LEARNER)}; absent sizes are 1."
    ),
    engines: str = typer.Option(..., metavar="K=N,...", help=f"Engines: {', '.join(ENGINES)}; absent sizes are 1."),
    colocated: bool = typer.Option(
        True, "--colocated/--disaggregated", help="Engines on the learner's GPUs, rank by rank, or on GPUs that follow."
    ),
    gpus_per_node: int = typer.Option(8, min=1, help="GPUs of a node; ranks fill nodes in order."),
    bucket_mib: int = typer.Option(512, min=1, help="Bound on the buffers of one GPU, MiB."),
    dtype: str = typer.Option("bf16", help="bf16, fp32 or fp8 (blocks of 128 x 128)."),
    inter_gbps: float = typer.Option(50.0, min=1e-3, help="Network of one GPU, each way, GB/s."),
    intra_gbps: float = typer.Option(400.0, min=1e-3, help="Links of one GPU within its node, each way, GB/s."),
    figure: Path | None = typer.Option(None, help="Also draw bytes per rank and node into this PNG."),
    as_json: bool = JSON,
) -> None:
    """Plan the weight sync from learner to engines: bytes per rank and node, the least possible, buffers, seconds.

    Examples:

      isentrope plan weights --model qwen3-32b --learner tp=8,pp=4 \\
        --engines tp=8,count=4

      isentrope plan weights --model qwen3-32b --learner tp=8,pp=2 \\
        --engines tp=4,count=4 --disaggregated --json
    """
    from pipeline.model.grid import Grid
    from pipeline.reshard.engine_grid import EngineGrid, Placement
    from pipeline.reshard.plan import ITEM_SIZES, BucketError, make_plan
    from pipeline.reshard.report import draw, summary

    if dtype not in ITEM_SIZES:
        raise _bad("--dtype", dtype, f"it must be one of {', '.join(ITEM_SIZES)}")
    architecture = _architecture(model)
    grid = _layout("--learner", learner, LEARNER, Grid)
    engine_grid = _layout("--engines", engines, ENGINES, EngineGrid)
    started = time.perf_counter()
    with _blaming("--learner", learner):
        architecture.check_layout(grid)
    with _blaming("--engines", engines):
        engine_grid.check(architecture)
        placement = Placement.consecutive(grid.world_size, engine_grid.world_size, colocated, gpus_per_node)
    try:
        plan = make_plan(architecture, grid, engine_grid, placement, bucket_mib << 20, dtype)
    except BucketError as error:
        raise _bad("--bucket-mib", str(bucket_mib), str(error)) from error
    except ValueError as error:
        raise _bad("--dtype", dtype, str(error)) from error
    result = {"model": model, "learner": learner, "engines": engines, "colocated": colocated, "dtype": dtype}
    result |= {"plan_seconds": time.perf_counter() - started} | summary(plan, inter_gbps, intra_gbps)
    if figure:
        place = "colocated" if colocated else "disaggregated"
        draw(result, f"{model} {dtype}: learner {learner} to engines {engines}, {place}", figure)
    if as_json:
        say(json.dumps(result))
    else:
        _show(result)


def _architecture(model: str) -> Any:
    """A folder's, or a packaged configuration's, architecture."""
    from pipeline.config.load import PACKAGED
    from pipeline.model.architecture import read

    folder = Path(model) if (Path(model) / "config.json").is_file() else PACKAGED / "model" / model
    if not (folder / "config.json").is_file():
        known = ", ".join(sorted(path.parent.name for path in (PACKAGED / "model").glob("*/config.json")))
        raise _bad("--model", model, f"neither a folder with a config.json nor one of {known}")
    with _blaming("--model", model):
        return read(folder)


def _layout(option: str, text: str, names: Sequence[str], kind: Any) -> Any:
    """``tp=8,pp=4`` as an object of ``kind``."""
    sizes: dict[str, int] = {}
    for word in text.split(","):
        name, _, number = word.strip().partition("=")
        if name not in names:
            raise _bad(option, text, f"{name!r} is not one of {', '.join(names)}: write {names[0]}=8,{names[-1]}=2")
        if name in sizes:
            raise _bad(option, text, f"{name} is given twice: keep one")
        if not number.isdecimal() or int(number) < 1:
            raise _bad(option, text, f"{word.strip()!r} needs a whole number from 1 on, as in {name}=2")
        sizes[name] = int(number)
    with _blaming(option, text):
        return kind(**sizes)


@contextmanager
def _blaming(option: str, value: str) -> Iterator[None]:
    """A ``ValueError`` inside is a mistake in this option."""
    try:
        yield
    except ValueError as error:
        raise _bad(option, value, str(error)) from error


def _bad(option: str, value: str, why: str) -> typer.BadParameter:
    return typer.BadParameter(f"{value}: {why}", param_hint=option)


def _show(result: dict[str, Any]) -> None:
    """The summary as two tables."""
    console = CleanConsole()
    table = Table("GiB received, at most", "plan", "least", "ratio", "gather and broadcast")
    for what, *keys in (
        (
            "by an engine rank",
            "per_rank_ingress_bytes",
            "per_rank_minimum_bytes",
            "per_rank_ingress_ratio",
            "gather_broadcast_per_rank_ingress_bytes",
        ),
        (
            "by a node, from others",
            "inter_node_ingress_bytes",
            "inter_node_lower_bound_bytes",
            "inter_node_ratio",
            "gather_broadcast_inter_node_bytes",
        ),
    ):
        plan, least, ratio, full = (result[key] for key in keys)
        shown = "-" if ratio is None else f"{ratio:.3f}"
        table.add_row(what, f"{plan / GIB:.2f}", f"{least / GIB:.2f}", shown, f"{full / GIB:.2f}")
    console.print(table)
    peak, bound = result["peak_buffer_bytes"] / 2**20, result["bucket_bytes"] / 2**20
    quantise = ", ".join(f"{count} {when}" for when, count in result["quantise"].items() if when != "not")
    for line in (
        f"{result['model']} {result['dtype']}: {result['model_bytes'] / GIB:.2f} GiB, "
        f"{result['total_sent_bytes'] / GIB:.1f} GiB sent, {result['total_local_copy_bytes'] / GIB:.1f} GiB copied on "
        "the spot",
        f"{result['buckets']} buckets, buffers {peak:.0f} of {bound:.0f} MiB per GPU",
        f"predicted {result['predicted_seconds']:.2f} s at {result['inter_gbps']:g} GB/s between and "
        f"{result['intra_gbps']:g} GB/s within nodes, per GPU",
        f"tensors quantised to FP8: {quantise} sending" if quantise else "",
        f"planned {result['tasks']} tasks in {result['plan_seconds']:.2f} s",
    ):
        if line:
            console.print(line, highlight=False)
