"""Computes what the two sides of a weight update compare: the digest of a tensor's bytes, and that of a plan."""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple
from functools import lru_cache

import numpy as np
import torch

from pipeline.reshard.plan import Plan

_WIDTH = 4096  # 64-bit words of a line
_LENGTH = 0x9E3779B97F4A7C15  # weight of the number of bytes: 2**64 over the golden ratio
_LINES = 16  # lines added up at a time on a CPU: half a MiB, which stays in its caches


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of ``tensor`` in row-major order, uint8; a view where it has no strides."""
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)  # a column is flat and strided


def content(tensor: torch.Tensor) -> torch.Tensor:
    """A 64-bit sum over the bytes of ``tensor``, int64 of shape ``[]`` on its device, computed there.

    The bytes are taken in row-major order, whatever the strides, as 64-bit words in lines of ``_WIDTH``, filled up with
    zeros. The words of each column are added up, and those of each line; these sums and the words of a last, shorter
    line are mixed, multiplied with a weight each and added up, with the number of bytes times a weight of its own, all
    modulo 2**64. Another value of one word, and words or bytes that changed places, show but for a chance of about
    2**-63. (Not mixed, the highest byte of a word would meet the lowest eight bits of its weight only.) CPU and CUDA
    give the same number: addition of integers has no order.
    """
    data = as_bytes(tensor)
    size = data.numel()
    if size % 8:
        data = torch.nn.functional.pad(data, (0, -size % 8))
    elif data.storage_offset() % 8:
        data = data.clone()  # words begin where words may
    words, length = data.view(torch.int64), _signed(size * _LENGTH)
    whole = size // (8 * _WIDTH)
    if not whole:
        return (_weights(_WIDTH, data.device, 1)[: words.numel()] * _mixed(words)).sum() + length
    return _lines(words, whole) + length


@lru_cache(maxsize=2)
def plan_digest(plan: Plan) -> str:
    """SHA-256 over everything a plan was made from and everything it says: equal where two processes may act on it."""
    found = hashlib.sha256()
    inputs = plan.model.record(), astuple(plan.learner), astuple(plan.engines), astuple(plan.placement)
    tensors = [astuple(tensor) for tensor in plan.tensors]
    found.update(json.dumps([inputs, plan.bucket_bytes, plan.buckets, tensors]).encode())
    for block in plan.blocks:
        for column in (block.tensors, block.turns, block.buckets, *vars(block.pieces).values()):
            found.update(json.dumps(column.shape).encode())
            found.update(column.astype(np.int64).tobytes())
        found.update(json.dumps([block.entry_bytes, block.chunks]).encode())
    return found.hexdigest()


def _lines(words: torch.Tensor, whole: int) -> torch.Tensor:
    """Of at least one ``whole`` line."""
    columns, lines = _weights(_WIDTH, words.device, 0), _weights(whole + 1, words.device, 1)
    rest = words[whole * _WIDTH :]
    found = ((columns[: rest.numel()] + lines[whole]) * _mixed(rest)).sum()
    words = words[: whole * _WIDTH].view(whole, _WIDTH)
    step = _LINES if words.device.type == "cpu" else whole
    by_column, by_line = torch.zeros_like(columns), torch.empty_like(lines[:whole])
    for first in range(0, whole, step):
        block = words[first : first + step]
        by_column += block.sum(0)
        torch.sum(block, 1, out=by_line[first : first + step])
    return found + (columns * _mixed(by_column)).sum() + (lines[:whole] * _mixed(by_line)).sum()


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """Another word for each, none twice: its high bits come down, and all are spread (SplitMix64's last steps)."""
    words = (words ^ (words >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    return words ^ (words >> 27 & (1 << 37) - 1)


def _signed(number: int) -> int:
    """``number`` modulo 2**64, as int64 has it."""
    return (number + 2**63) % 2**64 - 2**63


def _weights(count: int, device: torch.device, parity: int) -> torch.Tensor:
    """At least ``count`` weights, even (0: of columns) or odd (1: of lines)."""
    return _cached_weights(1 << max(0, count - 1).bit_length(), device, parity)


@lru_cache(maxsize=64)
def _cached_weights(count: int, device: torch.device, parity: int) -> torch.Tensor:
    """SplitMix64 (Steele, Lea and Flood 2014) of 0, 1, ... (+ 2**32 for lines)."""
    with np.errstate(over="ignore"):
        word = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(parity << 32)) * np.uint64(_LENGTH)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        word = (word ^ (word >> np.uint64(31))) & np.uint64(2**64 - 2) | np.uint64(parity)
    return torch.from_numpy(word.view(np.int64)).to(device)
