"""What each rank does in the tests of micro-batches; run by ``gang.Gang``."""

import pickle
from dataclasses import replace

import torch
from megatron_ranks import batch, exported, gradients, learner
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.step.kept import measure


class MasksMoved(torch.overrides.TorchFunctionMode):
    """Counts the elements of masks that are asked to another device."""

    elements = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to and args[0].dtype == torch.bool:
            self.elements += args[0].numel()
        return function(*args, **(kwargs or {}))


def traffic(rank, world, address, folder, config):
    """What ``statistics`` of a batch moves and returns: mask elements to the device, bytes pickled and bytes of the
    grids.
    """
    made = learner(rank, world, address, folder, 1, 1, **config)
    with MasksMoved() as moved:
        grids = made.statistics(batch())
    made.close()
    return moved.elements, len(pickle.dumps(grids)), sum(grid.nbytes for grid in grids.values())


def train(rank, world, address, folder, tp, pp, batches, config):
    """Log-probs and full gradients of the first batch, then statistics of an update on each and the weights after."""
    align = config.pop("align", 1)  # what FP8 asks for
    made = learner(rank, world, address, folder, tp, pp, **config)
    made.dealer = replace(made.dealer, cut=replace(made.dealer.cut, align=align * made.dealer.cut.align))
    log_probs, grads = made.log_probs(batches[0]), gradients(made, batches[0])
    stats = [made.update(rows, step) for step, rows in enumerate(batches)]
    weights = exported(made)
    made.close()
    return log_probs, grads, stats, weights


def shaped(rank, world, address, folder, tp, pp, rows, shown, config):
    """Statistics of the rows, full gradients of their loss, and what a run keeps of the rollouts ``shown``."""
    made = learner(rank, world, address, folder, tp, pp, **config)
    found = made.statistics(rows), gradients(made, rows), measure(shown, made, step=0)
    made.close()
    return found


class Collectives(TorchDispatchMode):
    """Counts the entries that this rank gives to sums over ranks."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "allreduce" in str(function):
            self.entries += sum(tensor.numel() for tensor in args[0])
        return function(*args, **(kwargs or {}))


def measured(rank, world, address, folder, tp, pp, config):
    """Statistics of the whole batch; those of this rank's share, whose they are, and entries that were summed
    meanwhile.
    """
    made, rows = learner(rank, world, address, folder, tp, pp, **config), batch()
    with Collectives() as in_whole:
        whole = made.statistics(rows)
    everybody = list(made.dealer.shares(rows, range(made.dealer.ranks), for_update=False))
    with Collectives() as in_part:
        part = made.statistics(everybody[made.data_parallel_rank])
    places = [share.place for share in everybody]
    found = whole, part, places, made.data_parallel_rank, made.speaks, (in_whole.entries, in_part.entries)
    made.close()
    return found


def log_probs(rank, world, address, folder, batches, config):
    made = learner(rank, world, address, folder, 1, 1, **config)
    found = [made.log_probs(rows) for rows in batches]
    made.close()
    return found


def too_long(rank, world, address, folder):
    """What a learner says to a row that its budget cannot hold."""
    made = learner(rank, world, address, folder, 1, 1, max_tokens_per_micro_batch=5)
    try:
        made.update(batch(), 0)
    except ValueError as error:
        return str(error)
    finally:
        made.close()
