"""Fills a sharded Megatron model from a Hugging Face folder, by the slices of ``pipeline.model.layout``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_ext.topology import Topology
from pipeline.model.architecture import Architecture
from pipeline.model.folder import Folder, check
from pipeline.model.layout import Row


def load(
    parameters: Mapping[str, torch.Tensor],
    rows: Sequence[Row],
    model: Architecture,
    hf_path: Path,
    topology: Topology,
) -> None:
    """Fill this rank's ``parameters`` (under layout names) from a Hugging Face folder, padding with zeros.

    ``rows`` are those of the whole model, so that every rank refuses a folder with missing, misshapen or unknown
    tensors. NaN and infinite values are refused by the rank that reads them. Raises ``ValueError`` that names the
    tensor, with both shapes and the layout row, or with its file.
    """
    folder = Folder(hf_path, model)
    check(folder, rows, model)
    mine = {row: part for row in rows if (part := row.part(topology.grid, topology.rank))}
    if unmatched := set(parameters) ^ {row.parameter for row in mine}:
        raise ValueError(f"model and layout table disagree on {', '.join(sorted(unmatched))}")
    for row, (count, index) in mine.items():
        parameter = parameters[row.parameter].data
        if tuple(parameter.shape) != row.local_shape(count):
            raise ValueError(f"{row}: the model has {list(parameter.shape)}, the table {list(row.local_shape(count))}")
        parameter.zero_()
        for piece in row.slices(count, index):
            name, place = row.sources[piece.source].name, parameter.narrow(row.dim, piece.start, piece.length)
            place.copy_(folder.read(name, row.dim, piece.source_start, piece.length))
            folder.require_finite(name, place)  # where the parameter is: a GPU reads it again in no time
