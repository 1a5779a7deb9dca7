"""Sends weights to an SGLang server on this machine as handles of shared memory; HTTP carries the handles only."""

from __future__ import annotations

import base64
import importlib
import io
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing as torch_multiprocessing

from pipeline.rollout.sglang.server import SglangServer
from pipeline.rollout.sglang.session import ServerSession
from pipeline.rollout.transport import Deadline
from pipeline.types import WeightBucket

_SHARING = threading.Lock()


class TensorTransport:
    """``WeightTransport`` by /update_weights_from_tensor: shared memory on the CPU, CUDA IPC for tensors on a GPU.

    A handle gives every tensor-parallel rank of the server the full tensor, and its weight loaders copy only the rank's
    slice out of it. From shared memory on a CPU server, and from a tensor on the rank's own GPU, no other byte moves. A
    rank on another device than the tensor's first copies all of it there (SGLang's ``_unwrap_tensor`` says
    ``tensor.to(device)`` before any loader sees it), so there each rank's ingress is the whole model, not the minimum.
    """

    def __init__(self, server: SglangServer, ranks: int) -> None:
        """``ranks``: the server's tensor-parallel size."""
        self._server = server
        self._ranks = ranks
        self.session = ServerSession(server)
        self._version = 0
        self._flushed = False  # the KV cache of the old weights, in this update

    def connect(self, deadline: Deadline) -> None:
        """Nothing lasts longer than an update."""

    def begin(self, version: int, deadline: Deadline) -> None:
        """Open the server's update session."""
        self.session.begin(deadline)
        self._version, self._flushed = version, False

    def send(self, bucket: WeightBucket, deadline: Deadline) -> None:
        """Have every rank of the server load the bucket.

        The first also empties the KV cache; paused, it stays empty.
        """
        with shared(bucket.tensors) as payload:
            self._server.post(
                "/update_weights_from_tensor",
                serialized_named_tensors=[payload] * self._ranks,
                flush_cache=not self._flushed,
                weight_version=str(self._version),
                timeout_s=deadline.remaining_s(),
            )
        self._flushed = True

    def verify(self, deadline: Deadline) -> None:
        """Let the server finish loading."""
        self.session.end(deadline)

    def commit(self) -> None:
        """Nothing is left to do."""

    def abort(self) -> None:
        """The server's session stays open; the next ``begin`` ends it."""

    def close(self) -> None:
        """Nothing to take down."""


@contextmanager
def shared(tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Handles of tensors, as SGLang's MultiprocessingSerializer writes them, in base64; valid until the block ends.

    Tensors on a GPU are handed out where they are, those on the CPU as a copy in shared memory.
    """
    buffer = io.BytesIO()
    on_gpu = any(tensor.is_cuda for tensor in tensors.values())
    if on_gpu:
        _name_gpus_by_uuid()
    with nullcontext() if on_gpu else _file_system_sharing():
        held = [(name, _shareable(tensor.detach())) for name, tensor in tensors.items()]
        ForkingPickler(buffer).dump(held)
    yield base64.b64encode(buffer.getvalue()).decode()  # meanwhile this frame keeps ``held`` alive


def _shareable(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_cuda:
        return tensor.contiguous()
    return tensor.to("cpu", copy=True).share_memory_()


def _name_gpus_by_uuid() -> None:
    """A CUDA handle names its device by index, which means another GPU where CUDA_VISIBLE_DEVICES differs.

    SGLang's own patch of torch's reductions (sglang/srt/utils/patch_torch.py, all releases served) writes the UUID
    instead; the server reads both. Can go with https://github.com/pytorch/pytorch/pull/149248.
    """
    importlib.import_module("sglang.srt.utils.patch_torch").monkey_patch_torch_reductions()


@contextmanager
def _file_system_sharing() -> Iterator[None]:
    """Share by file: the default (descriptors passed over a socket) ends the server when its sender is gone.

    The setting is the process's, and engines of one pool load buckets in threads: one at a time.
    """
    with _SHARING:
        strategy = torch_multiprocessing.get_sharing_strategy()
        torch_multiprocessing.set_sharing_strategy("file_system")
        try:
            yield
        finally:
            torch_multiprocessing.set_sharing_strategy(strategy)
