"""What ``--verify`` compares: every tensor bit for bit, the manifest's checksums, and the logits of small models."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_ext.weights import torch_dist
from megatron_ext.weights.parts import Budget, ConversionError
from pipeline.model import fp8
from pipeline.model.architecture import Architecture
from pipeline.model.checksum import checksum
from pipeline.model.folder import Folder
from pipeline.model.layout import Row

MANIFEST = "conversion.json"  # in the output folder: per-tensor checksums (pipeline.model.checksum)
SMALL_MODEL = 10**9  # bytes; below, logits are compared too
LOGITS_TOLERANCE = 1e-4  # both models in float32


def verify(
    directory: Path, hf: Path, written: Path, model: Architecture, rows: Sequence[Row], workers: int, budget: Budget
) -> str:
    """Compare every tensor of a checkpoint and a Hugging Face folder bit for bit, and what was ``written`` with its
    manifest.

    The logits of small models too. Raises ``ConversionError`` that names the tensors that differ.
    """
    folder, checkpoint = Folder(hf, model), torch_dist.Checkpoint(directory, model, rows)
    entries = json.loads((written / MANIFEST).read_text())["tensors"]
    by_row = {row.parameter: row for row in rows}

    def same(row: Row) -> list[str]:
        different = []
        for number, source in enumerate(row.sources):
            with budget.hold(2 * math.prod(source.shape) * folder.dtype(source.name).itemsize):
                ours = checkpoint.read(row, number)
                if written == hf:  # the source in the type of what was written
                    made = in_hf(source.name, ours, folder.stored(source.name).dtype)
                    pairs = {name: (folder.stored(name), values) for name, values in made.items()}
                else:
                    pairs = {source.name: (folder.tensor(source.name).to(ours.dtype), ours)}
                different += [name for name, pair in pairs.items() if not _equal(*pair)]
        return different

    def intact(entry: Mapping[str, Any]) -> list[str]:
        name, shape = entry.get("name") or entry["parameter"], entry["shape"]
        with budget.hold(4 * math.prod(shape)):
            if "name" in entry:
                values = folder.stored(name)
            else:
                values = checkpoint.box(by_row[name], entry["offset"], shape[by_row[name].dim])
            return [] if checksum({name: values}) == entry["checksum"] else [name]

    with ThreadPoolExecutor(workers) as pool:
        wrong = sorted({name for found in (*pool.map(same, rows), *pool.map(intact, entries)) for name in found})
    if wrong:
        raise ConversionError(f"{len(wrong)} tensors of {written} differ from the source: {', '.join(wrong[:5])}")
    size = sum(entry.nbytes for entry in folder.entries.values())
    types = {entry.dtype for entry in folder.entries.values()} | {checkpoint.dtype(row) for row in rows}
    if size > SMALL_MODEL or types & {fp8.CODES, torch.uint8}:
        return "tensors"
    from megatron_ext.weights import logits  # megatron, transformers: only for small models

    difference = logits.difference(directory, hf, model, min(types, key=lambda dtype: dtype.itemsize))
    if not difference <= LOGITS_TOLERANCE:  # also where it is NaN
        raise ConversionError(f"logits of {written} differ from the source's by {difference:.2e}")
    return f"tensors; logits within {difference:.1e}"


def in_hf(name: str, values: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A Hugging Face tensor as it is written in ``dtype``, contiguous; in FP8 its codes and their scales."""
    if dtype == fp8.CODES:
        return fp8.quantise_tensors({name: values}, (name,))
    return {name: values.to(dtype).contiguous()}


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are the same bits."""
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
