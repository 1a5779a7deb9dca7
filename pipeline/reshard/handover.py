"""Hands weights over from a learner rank to the engine rank on the same GPU, through memory that both see.

The learner rank takes part in the plan for both. What it packs or receives for the engine lies in one buffer, which the
engine's process maps: by CUDA IPC on a GPU, as shared memory on a CPU. Both processes know the plan, so they lay the
same messages out in that buffer, and a note says only that they are filled. The engine writes them to its parameters,
checks the first sender's digests there, and answers; then the buffer is filled again.
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.multiprocessing import reductions

from pipeline.reshard.execute import EngineShards, Exchange, Moved, Stage
from pipeline.reshard.messages import Buffer, Layout, Message
from pipeline.reshard.plan import Tensor

LEARNER, ENGINE = 0, 1  # who is who in a pair


class Handover:
    """The learner rank's side: an ``Engine`` for ``Mover.move``. ``finish`` ends it, ``close`` gives it up."""

    def __init__(self, stages: Sequence[Stage], pair: Exchange, device: torch.device) -> None:
        """Make the buffer, and have the engine rank at the other end of ``pair`` map it."""
        self._pair, self._device = pair, device
        self._kept: list[Message] = []  # since the buffer was last filled from its beginning
        with _shared(_size(stages), device) as (memory, place):
            self._buffer: Buffer | None = Buffer(device, memory)
            text = torch.frombuffer(bytearray(place), dtype=torch.uint8)
            pair.exchange([(ENGINE, torch.tensor([len(text)]))], [])
            pair.exchange([(ENGINE, text)], [(ENGINE, _note())])

    def read(self, tensor: Tensor, start: int, length: int) -> list[torch.Tensor]:
        """What arrived of these entries in the bucket's first stage."""
        found = []
        for piece, view in (each for message in self._kept for each in message.pieces()):
            first, last = max(start, piece.start), min(start + length, piece.start + piece.length)
            if piece.tensor is tensor and first < last:
                found.append((first, view.narrow(tensor.dim, first - piece.start, last - first)))
        return [view for _, view in sorted(found, key=lambda each: each[0])]

    def room(self, layouts: Sequence[Layout], device: torch.device, *, fresh: bool) -> list[Message]:
        """Messages in the buffer, from its beginning if ``fresh``."""
        self._kept = [] if fresh else self._kept
        assert self._buffer is not None  # not closed
        return self._buffer.messages(layouts, fresh=fresh)

    def arrived(self, messages: Sequence[Message]) -> None:
        """Tell the engine rank, and wait until it has copied them. Raises what ``pair`` raises."""
        self._kept += messages
        if messages:
            _settle(self._device)
            self._pair.exchange([(ENGINE, _note())], [(ENGINE, _note())])

    def finish(self) -> None:
        """Wait until the engine does not see the buffer any more, and free it. Raises what ``pair`` raises."""
        self._pair.exchange([], [(ENGINE, _note())])
        self.close()

    def close(self) -> None:
        """Free the buffer. Idempotent."""
        self._kept, self._buffer = [], None
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()


def take(stages: Sequence[Stage], engine: EngineShards, pair: Exchange, device: torch.device) -> Moved:
    """The engine rank's side: ``stages`` are those of the learner rank's share of the plan.

    Raises ``DigestError``, ``ValueError`` where this process does not see the learner's GPU, and what ``pair`` raises.
    """
    length = _note()
    pair.exchange([], [(LEARNER, length)])
    text = torch.empty(int(length), dtype=torch.uint8)
    pair.exchange([], [(LEARNER, text)])
    buffer = Buffer(device, _mapped(text.numpy().tobytes()))
    pair.exchange([(LEARNER, _note())], [])
    moved = Moved()
    for layouts, fresh in _turns(stages):
        pair.exchange([], [(LEARNER, _note())])
        engine.arrived(buffer.messages(layouts, fresh=fresh))
        _settle(device)
        pair.exchange([(LEARNER, _note())], [])
        moved.received += sum(layout.nbytes for layout in layouts)
    del buffer
    pair.exchange([(LEARNER, _note())], [])
    return moved


def _note() -> torch.Tensor:
    """What the two tell each other: that it is the other's turn."""
    return torch.zeros(1, dtype=torch.int64)


def _turns(stages: Sequence[Stage]) -> Iterator[tuple[Sequence[Layout], bool]]:
    """What is handed over at a time, and whether it lies at the buffer's beginning."""
    for stage in stages:
        for layout in stage.own:
            yield [layout], True
        if stage.receives:
            yield stage.receives, stage.fresh


def _size(stages: Sequence[Stage]) -> int:
    """Bytes that the buffer must have."""
    most = at = 0
    for layouts, fresh in _turns(stages):
        at = sum(layout.size for layout in layouts) + (0 if fresh else at)
        most = max(most, at)
    return max(most, 1)


@contextmanager
def _shared(size: int, device: torch.device) -> Iterator[tuple[torch.Tensor, bytes]]:
    """Bytes that another process can map within the context, and what tells it how."""
    if device.type == "cuda":
        memory = _own_segment(size, device)
        gpu = str(torch.cuda.get_device_properties(device).uuid)
        yield memory, pickle.dumps((gpu, reductions.reduce_tensor(memory)[1]))
        return
    with open(os.memfd_create("weights"), "r+b") as file:  # has no name that a killed process would leave behind
        file.truncate(size)
        memory = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
        yield memory, pickle.dumps(("", f"/proc/{os.getpid()}/fd/{file.fileno()}"))


def _mapped(place: bytes) -> torch.Tensor:
    """What another process shares. Raises ``ValueError`` where this process does not see the GPU."""
    gpu, found = pickle.loads(place)
    if not gpu:
        with open(found, "r+b") as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
    seen = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    if gpu not in seen:
        raise ValueError(f"the learner rank's GPU {gpu} is none of this process's ({', '.join(seen)})")
    # The 7th argument is the device as the other process numbers it, see reductions.reduce_tensor; SGLang puts its own
    # number there too (sglang/srt/utils/patch_torch.py).
    arguments = [*found[:6], seen.index(gpu), *found[7:]]
    return reductions.rebuild_cuda_tensor(*arguments)


def _own_segment(size: int, device: torch.device) -> torch.Tensor:
    """GPU memory that CUDA IPC can share.

    Expandable segments, which launchers turn on for learners, would be passed as file descriptors, for which a process
    must be allowed to trace the other. The allocator takes no block of theirs while they are off.
    """
    settings = torch._C._accelerator_getAllocatorSettings()
    torch.cuda.memory._set_allocator_settings("expandable_segments:False")
    try:
        return torch.empty(size, dtype=torch.uint8, device=device)
    finally:
        torch.cuda.memory._set_allocator_settings(settings)


def _settle(device: torch.device) -> None:
    """Wait until what was asked of the GPU is done: another process looks at it next."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
