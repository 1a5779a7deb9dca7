"""What each rank does in the tests of adapters; run by ``gang.Gang``."""

from dataclasses import dataclass, replace
from pathlib import Path

import megatron_ranks as ranks
import torch

from pipeline.config.schema import LoraConfig
from pipeline.types import StepStats

LORA = LoraConfig(rank=4, alpha=6.0)


@dataclass
class Found:
    """What one rank says."""

    start: torch.Tensor  # log-probs of the adapters that a run starts with
    sent_at_start: dict[str, torch.Tensor]
    before: torch.Tensor  # of random ones
    sent: dict[str, torch.Tensor]  # with random ones
    gradients: list[tuple[str, int, int, torch.Tensor]]  # of adapters: source, dimension, first entry, values
    stats: list[StepStats]
    after: torch.Tensor
    sent_after: dict[str, torch.Tensor]
    trained: int  # entries of main gradients on this rank
    adapted: int  # entries of its adapters
    base_unchanged: bool


def randomise(made, seed=3):
    """Random ``B``, the same in every layout, so that ``A`` has a gradient."""
    for adapter in made._adapters.values():
        whole = [torch.empty(source.shape) for source in adapter.spec.b.sources]
        for index, source in enumerate(adapter.spec.b.sources):
            generator = torch.Generator().manual_seed(hash((seed, *map(ord, source.name))) % 2**31)
            whole[index].normal_(0, 0.1, generator=generator)
        for cut in adapter.spec.b.slices(*adapter._part):
            values = whole[cut.source].narrow(adapter.spec.b.dim, cut.source_start, cut.length)
            adapter.B.data.narrow(adapter.spec.b.dim, cut.start, cut.length).copy_(values)
    made._optimizer.reload_model_params()


def trained(rank, world, address, folder, tp, pp, batches, config):
    """A learner with adapters: before, at and after updates by ``batches``."""
    made = ranks.learner(rank, world, address, folder, tp, pp, **{"lora": LORA} | config)
    base = {name: tensor.detach().clone() for name, tensor in made._parameters.items()}
    start, sent_at_start = made.log_probs(batches[0]), ranks.exported(made)
    randomise(made)
    before, sent = made.log_probs(batches[0]), ranks.exported(made)
    share = made._share(batches[0], for_update=False)
    made._accumulate(share.batch, 0, share.micro_batches[0])
    gradients = [] if made._config.optimizer.distributed else list(_gradients(made))
    stats = [replace(made.update(each, step), seconds=0.0) for step, each in enumerate(batches)]
    found = Found(
        start,
        sent_at_start,
        before,
        sent,
        gradients,
        stats,
        made.log_probs(batches[0]),
        ranks.exported(made),
        sum(p.main_grad.numel() for gpt in made._chunks for p in gpt.parameters() if hasattr(p, "main_grad")),
        sum(each.A.numel() + each.B.numel() for each in made._adapters.values()),
        all(torch.equal(base[name], tensor) for name, tensor in made._parameters.items()),
    )
    made.close()
    return found


def _gradients(made):
    for adapter in made._adapters.values():
        for row, parameter in ((adapter.spec.a, adapter.A), (adapter.spec.b, adapter.B)):
            for cut in row.slices(*adapter._part):
                values = parameter.main_grad.narrow(row.dim, cut.start, cut.length).clone()
                yield row.sources[cut.source].name, row.dim, cut.source_start, values


def whole_model(rank, world, address, folder, batch):
    """Log-probs of a learner without adapters, and what it sends."""
    made = ranks.learner(rank, world, address, folder, 1, 1)
    found = made.log_probs(batch), ranks.exported(made)
    made.close()
    return found


def reference(rank, world, address, folder, batch, objective):
    """Log-probs of policy and reference, with random adapters; and the bytes that the reference takes."""
    made = ranks.learner(rank, world, address, folder, 1, world, lora=LORA, objective=objective)
    start = made.log_probs(batch)
    randomise(made)
    found = start, made.log_probs(batch), made.log_probs(batch, reference=True), len(made._reference)
    made.close()
    return found


def other_adapters(rank, world, address, folder, directory):
    """What a learner says to a checkpoint of adapters of another rank."""
    made = ranks.learner(rank, world, address, folder, 1, 1, lora=LORA)
    files = ranks.everyones(made.save(Path(directory))())
    changed = replace(made._config, lora=replace(LORA, rank=2))
    return ranks.refusal_to_restore(ranks._other_topology(made, folder, 1, 1, {}, changed), directory, files)


def saved(rank, world, address, folder, directory, tp, pp, config):
    """A checkpoint with random adapters, and what engines would get of it."""
    made = ranks.learner(rank, world, address, folder, tp, pp, lora=LORA, **config)
    randomise(made)
    made.save(Path(directory))()
    sent = ranks.exported(made)
    made.close()
    return sent


def converted(rank, world, address, directory, folder, out):
    """What ``--verify`` compared, logits included."""
    from megatron_ext.weights import convert

    return convert.megatron_to_hf(Path(directory), Path(folder), Path(out), verify=True)
