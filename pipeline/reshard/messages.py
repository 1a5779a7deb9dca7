"""What one process sends to another at once: pieces of tensors in one flat buffer, and digests of them behind.

The receiver compares the digests with those of what it has written, read back from where it wrote it. Small pieces
share a digest: a digest takes longer to begin than to compute over them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch

from pipeline.model.fp8 import CODES
from pipeline.reshard import digest
from pipeline.reshard.plan import Tensor
from pipeline.units import round_up

DTYPES = {1: CODES, 2: torch.bfloat16, 4: torch.float32}  # by item size
_TOGETHER = 1 << 18  # bytes of pieces that share a digest, at most


class Reader(Protocol):
    """Where a process has, or wants, the entries of tensors."""

    def read(self, tensor: Tensor, start: int, length: int) -> Sequence[torch.Tensor]:
        """Entries ``start .. start + length`` along ``tensor.dim``, as consecutive views along it.

        Only for what the plan says it has.
        """
        ...


class DigestError(RuntimeError):
    """What was written differs from what was sent; the message names the tensor."""


@dataclass(frozen=True)
class Piece:
    """Entries of one tensor."""

    tensor: Tensor
    start: int
    length: int
    nbytes: int

    @property
    def shape(self) -> list[int]:
        """Of these entries."""
        return self.tensor.part_shape(self.length)

    def cut(self, most: int) -> Iterator[Piece]:
        """Itself in parts of at most ``most`` bytes, or of one entry each where an entry is larger."""
        entry = self.nbytes // self.length
        step = max(1, most // entry)
        for at in range(0, self.length, step):
            length = min(step, self.length - at)
            yield Piece(self.tensor, self.start + at, length, length * entry)


@dataclass(frozen=True)
class Layout:
    """What a message holds. Wider numbers come first, so that every piece is aligned."""

    peer: int  # the process at the other end
    pieces: tuple[Piece, ...]

    @cached_property
    def nbytes(self) -> int:
        """Of the pieces."""
        return sum(piece.nbytes for piece in self.pieces)

    @cached_property
    def groups(self) -> list[range]:
        """The pieces that share a digest."""
        found: list[range] = []
        size = 0
        for number, piece in enumerate(self.pieces):
            if found and size + piece.nbytes <= _TOGETHER:
                found[-1], size = range(found[-1].start, number + 1), size + piece.nbytes
            else:
                found.append(range(number, number + 1))
                size = piece.nbytes
        return found

    @property
    def padded(self) -> int:
        """Where the digests begin."""
        return round_up(self.nbytes, 8)

    @property
    def size(self) -> int:
        """Bytes of a buffer, digests and all."""
        return self.padded + 8 * len(self.groups)


class Buffer:
    """Memory on ``device`` that is filled with messages again and again: fresh pages cost as much as the copy does."""

    def __init__(self, device: torch.device, memory: torch.Tensor | None = None) -> None:
        """``memory``: uint8, as much as is needed; made here unless given."""
        self._memory = torch.empty(0, dtype=torch.uint8, device=device) if memory is None else memory
        self._at = 0

    def messages(self, layouts: Sequence[Layout], *, fresh: bool = True) -> list[Message]:
        """Messages to be filled, from the beginning, or unless ``fresh`` behind those of the last call."""
        begin = 0 if fresh else self._at
        self._at = begin + sum(layout.size for layout in layouts)
        if self._at > len(self._memory):
            self._memory = self._memory.new_empty(self._at)
        parts = self._memory[begin : self._at].split([layout.size for layout in layouts])
        return [Message(layout, part) for layout, part in zip(layouts, parts, strict=True)]


class Message:
    """A message under way in ``buffer``, uint8 ``[layout.size]``."""

    def __init__(self, layout: Layout, buffer: torch.Tensor) -> None:
        self.layout, self.buffer = layout, buffer
        self._digests = self.buffer[layout.padded :].view(torch.int64)
        self._ends = [0, *accumulate(piece.nbytes for piece in layout.pieces)]
        parts = self.buffer[: layout.nbytes].split([piece.nbytes for piece in layout.pieces])
        self._views = [
            part.view(DTYPES[piece.tensor.item_size]).view(piece.shape)
            for piece, part in zip(layout.pieces, parts, strict=True)
        ]

    def pieces(self) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Each with its view of the buffer."""
        return zip(self.layout.pieces, self._views, strict=True)

    def pack(self, reader: Reader) -> None:
        """Fill it, and add the digests. Weights of another type are converted."""
        for piece, view in self.pieces():
            at = 0
            for part in reader.read(piece.tensor, piece.start, piece.length):
                length = part.shape[piece.tensor.dim]
                view.narrow(piece.tensor.dim, at, length).copy_(part)
                at += length
        groups = self.layout.groups
        self._digests.copy_(torch.stack([digest.content(self._bytes(group)) for group in groups]))

    def write(self, engine: Reader) -> None:
        """Write it to where it belongs. Raises ``DigestError`` unless what is there then has its digests."""
        targets = []
        for piece, view in self.pieces():
            (target,) = engine.read(piece.tensor, piece.start, piece.length)
            target.copy_(view)
            targets.append(target)
        groups = self.layout.groups
        found = torch.stack([digest.content(self._written(group, targets)) for group in groups])
        differs = found.to(self.buffer.device) != self._digests
        if differs.any():
            wrong = [number for group, bad in zip(groups, differs.tolist(), strict=True) if bad for number in group]
            raise DigestError(self._told(wrong, targets))

    def _bytes(self, group: range) -> torch.Tensor:
        return self.buffer[self._ends[group.start] : self._ends[group.stop]]

    def _written(self, group: range, targets: Sequence[torch.Tensor]) -> torch.Tensor:
        """What is now where the group's pieces belong, in the message's types."""
        parts = [targets[number].to(self._views[number].dtype) for number in group]
        return parts[0] if len(parts) == 1 else torch.cat([digest.as_bytes(part) for part in parts])

    def _told(self, numbers: Sequence[int], targets: Sequence[torch.Tensor]) -> str:
        """What is wrong with pieces of these numbers, whose digests are not those that were sent."""
        changed = []
        for number in numbers:
            group = range(number, number + 1)
            if not digest.as_bytes(self._written(group, targets)).equal(self._bytes(group)):
                changed.append(number)
        names = [repr(self.layout.pieces[number].tensor.name) for number in changed or numbers]
        if changed:
            return (
                f"{len(names)} tensors differ from what process {self.layout.peer} sent, first {names[0]}: the "
                "engine's parameters cannot hold the type that was sent"
            )
        return (
            f"bytes differ from what process {self.layout.peer} sent, within {names[0]} to {names[-1]}: they were lost "
            "on the way"
        )
