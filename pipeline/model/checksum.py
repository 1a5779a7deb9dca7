"""The checksum of named tensors in the manifest of a conversion."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch


def checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    """CRC-32 over names, dtypes, shapes and bytes, in name order; the same for equal contents on any device."""
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        crc = zlib.crc32(head(name, tensor), crc)
        crc = zlib.crc32(tensor.view(-1).view(torch.uint8).numpy().data, crc)
    return crc


def head(name: str, tensor: torch.Tensor) -> bytes:
    """What the checksum of a tensor covers before its bytes."""
    return f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode()
