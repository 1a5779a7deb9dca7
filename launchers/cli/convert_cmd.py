"""``isentrope convert``: Hugging Face folders to Megatron checkpoints and back."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from launchers.cli.arguments import JSON, USAGE_ERROR, print_result
from launchers.cli.terminal import say
from pipeline.units import GIB

if TYPE_CHECKING:
    from megatron_ext.weights.convert import Progress

log = logging.getLogger(__name__)
app = typer.Typer(help="Convert weights to and from Megatron checkpoints.", no_args_is_help=True)

OUT = typer.Option(
    ...,
    "--out",
    metavar="DIR",
    help="Folder to write; appears when it is complete. Give the same command again to resume.",
)
DTYPE = typer.Option(None, "--dtype", help="Type of the new weights; default: as they are.")
WORKERS = typer.Option(4, "--workers", min=1, help="Threads.")
VERIFY = typer.Option(False, "--verify", help="Read all back and compare bit for bit; below 1 GB also the logits.")
# The errors of weights.convert name configuration keys; here the user gave options.
_OPTIONS = {
    "learner.tensor_model_parallel_size": "--tp",
    "learner.pipeline_model_parallel_size": "--pp",
    "expert-parallel size (ep)": "--ep",
    "model.hf_path": "--hf",
}
_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": GIB,
    "TIB": 2**40,
}


@app.command()
def hf_to_megatron(
    hf: Path = typer.Option(..., "--hf", metavar="DIR", help="Hugging Face folder."),
    out: Path = OUT,
    tp: int = typer.Option(
        1, "--tp", min=1, help="Tensor-parallel ranks for which files are cut; any layout can load them."
    ),
    pp: int = typer.Option(1, "--pp", min=1, help="Pipeline stages."),
    ep: int = typer.Option(1, "--ep", min=1, help="Expert-parallel ranks."),
    dtype: Literal["bf16", "fp32"] | None = DTYPE,
    workers: int = WORKERS,
    verify: bool = VERIFY,
    as_json: bool = JSON,
) -> None:
    """Write a Hugging Face folder as a checkpoint of megatron-core (dist_checkpointing, torch_dist).

    Example:

      isentrope convert hf-to-megatron --hf qwen3 --out checkpoint --tp 2 --verify
    """
    with _usage_errors(), _progress(as_json) as progress:
        from megatron_ext.weights import convert  # torch
        from pipeline.model.grid import Grid

        grid = Grid(tp=tp, pp=pp, dp=ep, ep=ep)
        report = convert.hf_to_megatron(hf, out, grid, dtype, workers, verify, progress)
    print_result(asdict(report), as_json)


@app.command()
def megatron_to_hf(
    checkpoint: Path = typer.Option(
        ..., "--checkpoint", metavar="DIR", help="Checkpoint, step-N folder or run (its newest)."
    ),
    out: Path = OUT,
    hf: Path | None = typer.Option(
        None,
        "--hf",
        metavar="DIR",
        help="Folder with config.json and tokenizer; default: what hf-to-megatron kept, or the run's model.hf_path.",
    ),
    dtype: Literal["bf16", "fp32", "fp8"] | None = typer.Option(
        None,
        "--dtype",
        help="Type of the new weights; default: as they are. fp8: matrices in 128x128 blocks, the rest bf16.",
    ),
    shard_size: str = typer.Option("5GB", "--shard-size", help="Largest safetensors file."),
    workers: int = WORKERS,
    verify: bool = VERIFY,
    as_json: bool = JSON,
) -> None:
    """Write a megatron-core checkpoint, also a training run's, as a Hugging Face folder.

    Example:

      isentrope convert megatron-to-hf --checkpoint runs/pi --out models/pi
    """
    shard_bytes = _bytes(shard_size)
    with _usage_errors(), _progress(as_json) as progress:
        from megatron_ext.weights import convert  # torch

        report = convert.megatron_to_hf(
            checkpoint, hf or convert.model_of(checkpoint), out, dtype, shard_bytes, workers, verify, progress
        )
    print_result(asdict(report), as_json)


@contextmanager
def _usage_errors() -> Iterator[None]:
    """What was asked for cannot be done: one message, exit code 2."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        log.info("where it happened", exc_info=True)  # shown by --debug
        message = str(error)
        for key, option in _OPTIONS.items():
            message = message.replace(key, option)
        say(f"error: {message}", err=True)
        raise typer.Exit(USAGE_ERROR) from error


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """A bar on stderr."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from pipeline.monitoring.console import CleanConsole

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=CleanConsole(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task("")

        def advance(done: int, total: int) -> None:
            bar.update(task, advance=done, total=total)

        yield advance


def _bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)?", size.strip().upper())
    if not found or float(found[1]) == 0:
        raise typer.BadParameter(f"{size!r} is no size; write e.g. 5GB or 500MiB", param_hint="--shard-size")
    return int(float(found[1]) * _UNITS[found[2] or ""])
