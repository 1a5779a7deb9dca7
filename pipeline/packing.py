"""Many tensors as one buffer, so that sending them to another process costs one copy and not one pickle each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import numpy as np
import torch

from pipeline.units import round_up

ALIGNMENT = 64  # bytes; a multiple of every element size, as views need, and of a cache line

Spec = tuple[str, torch.dtype, tuple[int, ...], int]  # name, dtype, shape, offset in bytes


def pack(tensors: Mapping[str, torch.Tensor]) -> tuple[list[Spec], np.ndarray]:
    """The contents of CPU tensors as one uint8 array ``[bytes]``, and where each lies in it."""
    specs: list[Spec] = []
    end = 0
    for name, tensor in tensors.items():
        specs.append((name, tensor.dtype, tuple(tensor.shape), end))
        end += round_up(tensor.nbytes, ALIGNMENT)
    flat = torch.empty(end, dtype=torch.uint8)
    for (_, dtype, shape, offset), tensor in zip(specs, tensors.values(), strict=True):
        _view(flat, dtype, shape, offset).copy_(tensor)
    return specs, flat.numpy()


def unpack(specs: list[Spec], flat: np.ndarray) -> dict[str, torch.Tensor]:
    """Views into ``flat``, under their names. What came through Ray is read-only memory: never write into these."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        buffer = torch.from_numpy(flat)
    return {name: _view(buffer, dtype, shape, offset) for name, dtype, shape, offset in specs}


def _view(buffer: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
    size = dtype.itemsize * math.prod(shape)
    if size == 0:
        return torch.empty(shape, dtype=dtype)  # an empty slice has no type to be viewed as
    return buffer[offset : offset + size].view(dtype).view(shape)
