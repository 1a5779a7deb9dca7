"""Many tensors as one buffer, so that sending them to another process costs one copy and not one pickle each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import numpy as np
import torch

ALIGNMENT = 64  # bytes; a multiple of every element size, as views need, and of a cache line

Spec = tuple[str, torch.dtype, tuple[int, ...], int]  # name, dtype, shape, offset in bytes


def pack(tensors: Mapping[str, torch.Tensor]) -> tuple[list[Spec], np.ndarray]:
    """The contents of CPU tensors as one uint8 array ``[bytes]``, and where each lies in it."""
    specs: list[Spec] = []
    end = 0
    for name, tensor in tensors.items():
        specs.append((name, tensor.dtype, tuple(tensor.shape), end))
        end += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
    flat = torch.empty(end, dtype=torch.uint8)
    for (_, dtype, shape, offset), tensor in zip(specs, tensors.values(), strict=True):
        flat[offset : offset + tensor.nbytes].view(dtype).view(shape).copy_(tensor)
    return specs, flat.numpy()


def unpack(specs: list[Spec], flat: np.ndarray) -> dict[str, torch.Tensor]:
    """Views into ``flat``, under their names. What came through Ray is read-only memory: never write into these."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        buffer = torch.from_numpy(flat)
    sizes = ((dtype.itemsize * math.prod(shape)) for _, dtype, shape, _ in specs)
    return {
        name: buffer[offset : offset + size].view(dtype).view(shape)
        for (name, dtype, shape, offset), size in zip(specs, sizes, strict=True)
    }
