"""Which layers a model is made of and how they compute: megatron-core's own, Transformer Engine's, FP8, or FP8
emulated.

Everything that is asked of Transformer Engine is here, and refused here where it or the chip is missing. Not yet run on
a GPU.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.config.schema import LearnerConfig, PrecisionConfig

# megatron-core's names, which are this configuration's.
_FP8_FIELDS = (
    "fp8",
    "fp8_recipe",
    "fp8_param",
    "fp8_margin",
    "fp8_amax_history_len",
    "fp8_amax_compute_algo",
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
    "fp8_dot_product_attention",
)


@dataclass(frozen=True)
class Numerics:
    """Whose layers a model is built of (``impl``: "local" | "transformer_engine") and the number format of its linear
    layers.
    """

    impl: str = "local"
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)

    @property
    def emulated(self) -> bool:
        """Whether FP8 is rounded to in torch, without Transformer Engine."""
        return self.precision.fp8 != "none" and self.precision.emulate

    @property
    def fp8(self) -> bool:
        """Whether Transformer Engine computes in FP8."""
        return self.precision.fp8 != "none" and not self.precision.emulate

    def transformer_fields(self, *, mla: bool, moe: bool) -> dict[str, Any]:
        """``TransformerConfig``'s fields for Transformer Engine: its fusions, one grouped product for a rank's experts,
        and FP8.
        """
        if self.impl == "local":
            return {}
        fields: dict[str, Any] = {
            "gradient_accumulation_fusion": True,  # but for the output layer: see own_layers_unfused
            "bias_activation_fusion": True,
            "bias_dropout_fusion": True,
            "apply_rope_fusion": not mla,  # megatron-core: with latent attention for YaRN only
        }
        if moe:
            fields |= dict.fromkeys(("moe_grouped_gemm", "moe_permute_fusion", "moe_router_fusion"), True)
        return fields | ({name: getattr(self.precision, name) for name in _FP8_FIELDS} if self.fp8 else {})


@contextmanager
def own_layers_unfused() -> Iterator[None]:
    """Within, megatron-core's own linear layers (the output layer) are built without fused accumulation of weight
    gradients.

    Transformer Engine's layers fuse by themselves; megatron-core's need an extension of Apex, and refuse a
    configuration that asks for fusion without: a patch of core/tensor_parallel/layers.py (0.16 to 0.19). It goes when
    the output layer has a setting of its own.
    """
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    initialise = ColumnParallelLinear.__init__

    def unfused(self: Any, *args: Any, config: Any, **kwargs: Any) -> None:
        own = copy.copy(config)
        own.gradient_accumulation_fusion = False
        initialise(self, *args, config=own, **kwargs)

    ColumnParallelLinear.__init__ = unfused
    try:
        yield
    finally:
        ColumnParallelLinear.__init__ = initialise


def resolve(learner: LearnerConfig, device: torch.device) -> Numerics:
    """What ``learner.transformer_impl`` and ``learner.precision`` come to on ``device``.

    Raises ``ValueError`` naming key, value and remedy where Transformer Engine or the chip is missing.
    """
    precision, impl = learner.precision, learner.transformer_impl
    numerics = Numerics(impl="transformer_engine", precision=precision)
    if precision.emulate or impl == "local" or (impl == "auto" and not numerics.fp8 and not usable(device)):
        return Numerics(impl="local", precision=precision)
    if numerics.fp8:
        key = f"learner.precision.fp8={precision.fp8}"
        _require(key, device, "learner.precision.emulate=true")
        if problem := chip_problem(precision.fp8_recipe, torch.cuda.get_device_capability(device), torch.version.cuda):
            raise ValueError(f"learner.precision.fp8_recipe={precision.fp8_recipe}: {problem}")
    else:
        _require(f"learner.transformer_impl={impl}", device, "learner.transformer_impl=local")
    return numerics


def usable(device: torch.device) -> bool:
    """Whether Transformer Engine is installed and ``device`` can run it."""
    return device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None


def chip_problem(recipe: str, capability: tuple[int, int], cuda: str | None) -> str | None:
    """Why a chip of compute capability ``capability`` with CUDA ``cuda`` cannot run ``recipe``, and what to choose; or
    ``None``.

    Source: TransformerEngine, ``pytorch/quantization.py``, ``_compute_*_support``.
    """
    found = f"this GPU has {capability[0]}.{capability[1]}"
    version = tuple(int(part) for part in (cuda or "0.0").split(".")[:2])
    if capability < (8, 9):
        return f"FP8 needs compute capability 8.9, {found}; set learner.precision.fp8=none"
    if recipe == "mxfp8" and not (10, 0) <= capability < (12, 0):
        return f"needs Blackwell (compute capability 10.0), {found}; choose blockwise or tensorwise"
    if recipe == "blockwise" and capability < (9, 0):
        return f"needs Hopper (compute capability 9.0), {found}; choose tensorwise"
    if recipe == "blockwise" and version < (12, 9):
        return f"needs CUDA 12.9, torch was built with {cuda}; choose tensorwise, or install a newer torch"
    return None


def _require(key: str, device: torch.device, instead: str) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"{key}: Transformer Engine needs a CUDA GPU, this learner runs on {device.type}; set {instead}"
        )
    if importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            f"{key}: Transformer Engine is not installed; pip install 'isentrope[gpu]' on a GPU machine, or set "
            f"{instead}"
        )
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:
        raise ValueError(
            f"{key}: Transformer Engine cannot be imported ({error}); install it for this torch and CUDA"
        ) from error


def is_quantised(tensor: torch.Tensor) -> bool:
    """Whether a parameter is held in FP8 by Transformer Engine."""
    from megatron.core.fp8_utils import is_float8tensor

    return bool(is_float8tensor(tensor))


def place(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """``model.to(device, dtype)`` that leaves parameters in FP8 as they are: they were made on the device."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_quantised(tensor):
            tensor.data = tensor.data.to(device, dtype if tensor.is_floating_point() else None)


class Dequantised(Mapping[str, torch.Tensor]):
    """Parameters by name, those in FP8 as the values they stand for, made when they are asked for."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self._parameters = parameters

    def __getitem__(self, name: str) -> torch.Tensor:
        parameter = self._parameters[name]
        return parameter.dequantize() if is_quantised(parameter) else parameter

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


@contextmanager
def filling(parameters: Mapping[str, torch.Tensor]) -> Iterator[Mapping[str, torch.Tensor]]:
    """Within, tensors to write ``parameters``' values to, slice by slice; then those in FP8 are rounded to it.

    Parameters of another format are written directly.
    """
    staged = {
        name: torch.empty(p.shape, dtype=p.dtype, device=p.device) for name, p in parameters.items() if is_quantised(p)
    }
    yield {**parameters, **staged}
    with torch.no_grad():
        for name, values in staged.items():
            parameters[name].copy_(values)
