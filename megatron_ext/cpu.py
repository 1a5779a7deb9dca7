"""Run megatron-core without CUDA: every patch it needs, in one place.

megatron-core 0.16 to 0.19 names CUDA directly where it only means "this rank's device". ``install`` redirects those
names to the CPU; on a machine with CUDA it does nothing. It runs when ``megatron_ext`` is imported, hence before any
``import megatron``, because megatron binds some of these names at import. It goes when megatron-core takes its device
from the process group.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")


def install() -> None:
    """Patch ``torch`` for megatron-core on CPU. A no-op where CUDA is available, and when called again."""
    if torch.cuda.is_available() or isinstance(torch.cuda.default_generators, _CpuGenerators):
        return
    # core/jit.py makes jit_fuser = torch.compile; on CPU that costs minutes and a C++ compiler, and gains nothing.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # torch.cuda.current_device() as a `device=`: core/pipeline_parallel/p2p_communication.py (receive buffers),
    # core/distributed/param_and_grad_buffer.py, core/models/common/embeddings/rotary_pos_embedding.py.
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    # Streams to wait for, of which there are none: core/pipeline_parallel/p2p_communication.py; from 0.19 also
    # core/distributed/param_and_grad_buffer.py.
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment,return-value]
    # device="cuda" literals: core/optimizer/{clip_grads,optimizer,grad_scaler}.py, core/pipeline_parallel/schedules.py
    # (num_tokens), core/transformer/utils.py (causal mask), core/dist_checkpointing/exchange_utils.py (shards that
    # another rank has read).
    # `with torch.device(...)` keeps a set of these functions from its first use on: make that now, with the originals.
    _device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # weight.data.cuda(): core/models/common/language_module/language_module.py (tied embeddings under PP).
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    # pin_memory=True: core/models/common/embeddings/rope_utils.py (positions under context parallelism).
    # Tensor.type() == "torch.cuda.FloatTensor": core/optimizer/{optimizer,distrib_optimizer,clip_grads}.py.
    torch.Tensor.type = _type(torch.Tensor.type)  # type: ignore[method-assign]
    _redirect_rng()
    # Advice that a CPU cannot follow (Apex, Transformer Engine, CUDA queues), and upstream's own use of what it
    # deprecates.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(megatron\.core|torch\.distributed\.(checkpoint|c10d_logger))"
    )


def install_layers() -> None:
    """Patch megatron-core's experts and latent attention for want of Transformer Engine and, as above, of CUDA.

    Imports them, so it is called before a model is built.
    """
    from megatron.core.post_training.modelopt import layers as modelopt_layers
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # core/transformer/moe/moe_utils.py names te_general_gemm whether or not Transformer Engine was imported (0.16).
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # core/transformer/multi_latent_attention.py takes Transformer Engine for installed when only its own wrapper is
    # (0.16).
    if not isinstance(multi_latent_attention.TELinear, type):  # a stand-in
        multi_latent_attention.HAVE_TE = False
    # core/transformer/multi_latent_attention.py knows the layer that is whole on every rank only beside Transformer
    # Engine (0.19).
    if multi_latent_attention.Linear is None:
        multi_latent_attention.Linear = modelopt_layers.Linear
    if torch.cuda.is_available() or torch.cuda.Stream is _NoStream:
        return
    # core/transformer/moe/token_dispatcher.py: split sizes are handed to all_to_all as arrays only where they came from
    # a GPU.
    moved = token_dispatcher.maybe_move_tensor_to_cpu

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        tensor = moved(tensor, as_numpy, record_stream)
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = move
    # core/transformer/moe/token_dispatcher.py copies those sizes on a stream of its own.
    torch.cuda.Stream = _NoStream  # type: ignore[misc,assignment]
    # core/tensor_parallel/mappings.py: the ranks that share an expert (expert-TP) gather unequal numbers of tokens,
    # which gloo refuses.
    mappings._gather_along_first_dim = _unequal(mappings._gather_along_first_dim, _gather_unequal)
    mappings._reduce_scatter_along_first_dim = _unequal(mappings._reduce_scatter_along_first_dim, _scatter_unequal)


def _unequal(
    original: Callable[..., torch.Tensor], instead: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """``original`` but for parts of given sizes, of which ``instead`` takes care."""

    @functools.wraps(original)
    def collective(
        tensor: torch.Tensor, group: dist.ProcessGroup, sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return original(tensor, group, sizes, use_global_buffer)
        return instead(tensor, group, list(map(int, sizes)))

    return collective


def _gather_unequal(tensor: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]) -> torch.Tensor:
    """All ranks' parts, of ``sizes[rank]`` rows each, one after the other: a sum of what is zero but for the
    own part.
    """
    gathered = tensor.new_zeros(sum(sizes), *tensor.shape[1:])
    gathered.split(sizes)[group.rank()].copy_(tensor)
    dist.all_reduce(gathered, group=group)
    return gathered


def _scatter_unequal(tensor: torch.Tensor, group: dist.ProcessGroup, sizes: list[int]) -> torch.Tensor:
    """This rank's ``sizes[rank]`` rows of the sum."""
    summed = tensor.clone()
    dist.all_reduce(summed, group=group)
    return summed.split(sizes)[group.rank()].clone()


class _NoStream:
    """A stream where all work is done at once."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing is under way."""

    def record_event(self) -> _NoStream:
        """An event that has happened; ``synchronize`` is all that is asked of it."""
        return self

    def synchronize(self) -> None:
        """Nothing is under way."""


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``factory`` with ``device="cuda"`` read as the CPU, and no memory pinned for a copy that is not made."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


class _TypeName(str):
    """A tensor type's name that also equals the name of its CUDA twin."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or str.__eq__(self.replace("torch.", "torch.cuda.", 1), other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _type(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.type`` whose answer compares equal to the CUDA name too."""

    @functools.wraps(original)
    def name_or_cast(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        return _TypeName(answer) if isinstance(answer, str) else answer

    return name_or_cast


class _CpuGenerators:
    """``torch.cuda.default_generators`` with the CPU's generator at every index."""

    def __getitem__(self, index: Any) -> torch.Generator:
        return torch.default_generator


def _redirect_rng() -> None:
    """Let core/tensor_parallel/random.py (the TP RNG tracker) save, seed and restore the CPU generator."""

    def get_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    torch.cuda.default_generators = _CpuGenerators()  # type: ignore[assignment]
    torch.cuda._lazy_call = lambda call, **kwargs: call()
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state, module.set_rng_state = get_state, set_state  # type: ignore[attr-defined]
