"""What each rank does in the FP8 tests; run by ``gang.Gang``."""

from dataclasses import replace

import torch


def two_layers(rank, world, address, recipe, sequence_parallel, passes):
    """A column-parallel layer and a row-parallel one in emulated FP8: whole output, input gradient and weight
    gradients.

    Every number is a small integer, so that sums are exact in any order.
    """
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from megatron_ext import topology
    from megatron_ext.fp8 import emulate
    from pipeline.config.schema import PrecisionConfig
    from pipeline.model.grid import Grid

    placed = topology.initialize(rank, address, Grid(tp=world), seed=0)
    config = ModelParallelConfig(
        tensor_model_parallel_size=world,
        sequence_parallel=sequence_parallel and world > 1,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    g = torch.Generator().manual_seed(0)
    up, down, x, r = (
        torch.randint(-3, 4, shape, generator=g).float()
        for shape in ((512, 256), (256, 512), (8, 32, 256), (8, 32, 256))
    )
    common = {"config": config, "init_method": None, "bias": False, "skip_bias_add": False}
    first = ColumnParallelLinear(256, 512, gather_output=False, **common)
    second = RowParallelLinear(512, 256, input_is_parallel=True, **common)
    for layer, weight, dim in ((first, up, 0), (second, down, 1)):
        layer.weight.data = weight.chunk(world, dim)[rank].contiguous()
        emulate.convert(layer, PrecisionConfig(fp8="hybrid", fp8_recipe=recipe, emulate=True))
    part = (lambda t: t.chunk(world)[rank].contiguous()) if config.sequence_parallel else (lambda t: t)
    for _ in range(passes):
        x_part = part(x).clone().requires_grad_()
        first.weight.grad = second.weight.grad = None
        y, _ = second(first(x_part)[0])
        (y * part(r)).sum().backward()
    result = (_whole(y, 0, placed, config), _whole(x_part.grad, 0, placed, config))
    weights = [_gathered(layer.weight.grad, dim, placed) for layer, dim in ((first, 0), (second, 1))]
    topology.shutdown()
    return (*(tensor.detach() for tensor in result), *weights)


def _whole(tensor, dim, placed, config):
    return _gathered(tensor, dim, placed) if config.sequence_parallel else tensor


def _gathered(tensor, dim, placed):
    parts = [torch.empty_like(tensor) for _ in range(placed.tp_size)]
    torch.distributed.all_gather(parts, tensor.detach().contiguous(), group=placed.tp_group)
    return torch.cat(parts, dim)


def emulated_layers(rank, world, address, folder, precision):
    """Names of the modules that compute in FP8, and whether a forward and backward pass gives finite gradients
    everywhere.
    """
    from megatron_ext import models, topology
    from megatron_ext.weights import hf
    from pipeline.config.schema import LearnerConfig
    from pipeline.model import architecture, layout
    from pipeline.model.grid import Grid

    placed = topology.initialize(rank, address, Grid(), seed=0)
    model = architecture.read(folder)
    gpt = models.build(model, placed, options=LearnerConfig(transformer_impl="local", precision=precision))
    hf.load(models.global_parameters(gpt), layout.rows(model, placed.grid), model, folder, placed)
    gpt(torch.arange(24).view(2, 12), None, None).square().mean().backward()
    names = [name for name, module in gpt.named_modules() if "_forward_impl" in vars(module)]
    finite = all(p.grad.isfinite().all() for p in gpt.parameters() if p.grad is not None)
    topology.shutdown()
    return names, finite


def padded(rank, world, address, folder, multiples, rows):
    """Log-probs, and statistics of one update, with sequences padded to each of ``multiples``."""
    import megatron_ranks as ranks

    made = ranks.learner(rank, world, address, folder, 1, world, optimizer={"lr": 0.0})
    found = []
    for align in multiples:
        made.dealer = replace(made.dealer, cut=replace(made.dealer.cut, align=align))
        found.append((made.log_probs(rows), made.update(rows, 0)))
    made.close()
    return found
