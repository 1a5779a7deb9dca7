"""SGLang's own model classes on the CPU, as any rank of an engine would build them: for a process of its own."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.model import architecture
from pipeline.model.grid import Grid
from pipeline.ports import free_port
from pipeline.reshard.engine_grid import EngineGrid, Placement
from pipeline.reshard.engine_parameters import targets
from pipeline.reshard.plan import make_plan
from pipeline.rollout.sglang import cpu
from pipeline.rollout.sglang.receiver import _Parameters

UNTOUCHED = 7.0  # of what no tensor is written to
# Kernels that SGLang's qwen3_5.py names when it is imported on a CPU. PyPI has no CPU build of them: no server runs.
KERNELS = ("sigmoid_mul", "qk_gemma_rmsnorm", "qk_gemma_rmsnorm_with_gate", "qkvzba_split_reshape_cat_contiguous")


def different(folder: Path, tensors, tp: int, ep: int = 1, dtype: str = "fp32", padded: bool = False) -> list[str]:
    """Parameters of any rank that differ between SGLang's loading of ``folder`` and slices written by ``targets``.

    And what no slice was written to, the padding of the vocabulary excepted. ``padded``: the feed-forward too, as
    SGLang does on CPUs; that may hold anything, if it holds zeros. Raises ``ValueError`` where the receiver would
    report a parameter of another shape.
    """
    config = _start(folder, dtype)
    if padded:
        from sglang.srt.configs.load_config import LoadConfig
        from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp

        config = adjust_config_with_unaligned_cpu_tp(config, LoadConfig(), tp)
    said = architecture.read_config(folder)
    model = architecture.parse({key: value for key, value in said.items() if key != "quantization_config"})
    plan = make_plan(model, Grid(), EngineGrid(tp, ep), Placement.consecutive(1, tp, False), dtype=dtype)
    found = []
    for rank in range(tp):
        with _as_rank(rank, tp, ep):
            loaded = _model(config)
        wanted = {name: tensor.clone() for name, tensor in _tensors(loaded)}
        parameters = {name: parameter.data for name, parameter in loaded.named_parameters()}
        _Parameters(parameters, torch.device("cpu")).shards(plan, 1 + rank)
        for tensor in loaded.parameters():
            tensor.data.copy_(torch.full(tensor.shape, 0.0 if padded else UNTOUCHED))
        counts = _write(dict(loaded.named_parameters()), plan, 1 + rank, tensors)
        if hasattr(loaded, "post_load_weights"):
            loaded.post_load_weights()
        for name, tensor in _tensors(loaded):
            writes = counts.get(name, torch.ones(tensor.shape))
            if name in ("model.embed_tokens.weight", "lm_head.weight"):  # padding, which is never read
                rows = int(writes[:, 0].sum())
                tensor, writes, wanted[name] = tensor[:rows], writes[:rows], wanted[name][:rows]
            if not (padded or (writes == 1).all()) or not _equal(tensor, wanted[name]):
                found.append(f"rank {rank}: {name}")
        found += [f"rank {rank}: no {name}" for name in counts.keys() - wanted.keys()]
    return found


def _write(parameters, plan, process, tensors):
    """Every slice to its place, as a receiver would; how often each entry of each parameter was written."""
    places, shapes = targets(plan, process), {tensor.name: tensor for tensor in plan.tensors}
    counts = {name: torch.zeros(tensor.shape) for name, tensor in parameters.items()}
    for index, span in plan.needs(process).items():
        name, to = plan.tensors[index].name, places[plan.tensors[index].name]
        dim = shapes[name].dim
        values = tensors[name].narrow(dim, span.start, len(span))
        for target in (parameters[to.parameter].data, counts[to.parameter]):
            view = target[to.index]
            if to.half is not None:
                view = view.chunk(2, to.dim)[to.half]
            view = view.narrow(to.dim, 0 if to.half else to.start, len(span))
            if target is counts[to.parameter]:
                view += 1
            else:
                assert (view.shape, view.dtype) == (values.shape, values.dtype), name
                view.copy_(values)
    return counts


def _start(folder: Path, dtype: str):
    """SGLang's configuration of a server of one rank on ``folder``; once a process."""
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    sys.path.insert(0, str(cpu.SHIM_FOLDER))
    for name in KERNELS:
        setattr(torch.ops.sgl_kernel, f"fused_{name}_cpu", None)
    from sglang.srt import runtime_context
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import parallel_state
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(
        model_path=str(folder),
        device="cpu",
        dtype={"fp32": "float32", "fp8": "bfloat16"}[dtype],
        skip_tokenizer_init=True,
        attention_backend=cpu.ATTENTION_BACKEND,
        sampling_backend="pytorch",
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        disable_shared_experts_fusion=True,
    )
    runtime_context.publish(arguments, role="scheduler")
    if not torch.distributed.is_initialized():
        address = f"tcp://127.0.0.1:{free_port()}"
        parallel_state.init_distributed_environment(1, 0, address, 0, "gloo")
        parallel_state.initialize_model_parallel(backend="gloo")
    # Ranks are pretended: there is one process, whose groups have one member.
    runtime_context._validate_parallel = lambda *arguments: None
    return ModelConfig.from_server_args(arguments)


@contextmanager
def _as_rank(rank: int, tp: int, ep: int):
    from sglang.srt.runtime_context import get_parallel

    dense = {"tp_size": tp, "tp_rank": rank, "attn_tp_size": tp, "attn_tp_rank": rank}
    experts = {"ep_size": ep, "moe_ep_size": ep, "moe_ep_rank": rank // (tp // ep)}
    experts |= {"moe_tp_size": tp // ep, "moe_tp_rank": rank % (tp // ep)}
    with get_parallel().override(**dense, **experts):
        yield


def _model(config):
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader import get_model

    if config.quantization:
        from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod, Fp8MoEMethod

        for method in (Fp8LinearMethod, Fp8MoEMethod):  # what they would make ready are kernels, which need AMX
            method.process_weights_after_loading = lambda self, layer: None
    return get_model(model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu"))


def _tensors(model):
    """Parameters, and what DeepSeek's attention keeps of them."""
    yield from model.named_parameters()
    for name, module in model.named_modules():
        for copy in ("w_kc", "w_vc"):
            if getattr(module, copy, None) is not None:
                yield f"{name}.{copy}", getattr(module, copy)


def _equal(left, right) -> bool:
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
