"""What ``--verify`` compares: every tensor bit for bit, the manifest's checksums, and the logits of small models."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_ext.architecture import Architecture
from megatron_ext.weights import safetensors_io, torch_dist
from megatron_ext.weights.layout import Row
from megatron_ext.weights.parts import Budget, ConversionError
from pipeline.checksum import checksum

MANIFEST = "conversion.json"  # in the output folder: per-tensor checksums (pipeline.checksum)
SMALL_MODEL = 10**9  # bytes; below, logits are compared too
LOGITS_TOLERANCE = 1e-4  # both models in float32


def verify(
    directory: Path, hf: Path, written: Path, model: Architecture, rows: Sequence[Row], workers: int, budget: Budget
) -> str:
    """Compare every tensor of a checkpoint and a Hugging Face folder bit for bit, and what was ``written`` with its manifest.

    The logits of small models too. Raises ``ConversionError`` that names the tensors that differ.
    """
    folder, checkpoint = safetensors_io.Folder(hf), torch_dist.Checkpoint(directory, model, rows)
    entries = json.loads((written / MANIFEST).read_text())["tensors"]
    by_row = {row.parameter: row for row in rows}

    def same(row: Row) -> list[str]:
        different = []
        for number, source in enumerate(row.sources):
            with budget.hold(2 * folder.entries[source.name].nbytes):
                theirs, ours = folder.read(source.name, 0, 0, source.shape[0]), checkpoint.read(row, number)
                if not _equal(theirs, ours, written == hf):
                    different.append(source.name)
        return different

    def intact(entry: Mapping[str, Any]) -> list[str]:
        name, shape = entry.get("name") or entry["parameter"], entry["shape"]
        with budget.hold(4 * math.prod(shape)):
            if "name" in entry:
                values = folder.read(name, 0, 0, shape[0])
            else:
                values = checkpoint.box(by_row[name], entry["offset"], shape[by_row[name].dim])
            return [] if checksum({name: values}) == entry["checksum"] else [name]

    with ThreadPoolExecutor(workers) as pool:
        wrong = sorted({name for found in (*pool.map(same, rows), *pool.map(intact, entries)) for name in found})
    if wrong:
        raise ConversionError(f"{len(wrong)} tensors of {written} differ from the source: {', '.join(wrong[:5])}")
    size = sum(entry.nbytes for entry in folder.entries.values())
    if size > SMALL_MODEL:
        return "tensors"
    from megatron_ext.weights import logits  # megatron, transformers: only for small models

    types = {entry.dtype for entry in folder.entries.values()} | {checkpoint.dtype(row) for row in rows}
    difference = logits.difference(directory, hf, model, min(types, key=lambda dtype: dtype.itemsize))
    if not difference <= LOGITS_TOLERANCE:  # also where it is NaN
        raise ConversionError(f"logits of {written} differ from the source's by {difference:.2e}")
    return f"tensors; logits within {difference:.1e}"


def _equal(hf: torch.Tensor, megatron: torch.Tensor, to_hf: bool) -> bool:
    """Whether two tensors are the same bits, the source in the type of what was written."""
    hf, megatron = (hf, megatron.to(hf.dtype)) if to_hf else (hf.to(megatron.dtype), megatron)
    return torch.equal(hf.contiguous().view(torch.uint8), megatron.contiguous().view(torch.uint8))
