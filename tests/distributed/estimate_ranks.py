"""Real bytes of a real learner: parameters, gradients, optimizer state, and what autograd keeps, at its peak."""

import gc
from collections import Counter
from pathlib import Path

import megatron_ranks as ranks
import torch


class Live:
    """Bytes of distinct storages that autograd holds; a context that counts them, with their largest sum as ``peak``.

    Views share a storage and count once; parameters do not count. What a graph frees is taken off again, so several
    micro-batches under way, and recomputation, show as they are.
    """

    def __init__(self, parameters):
        self._own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._holders, self._now, self.peak = Counter(), 0, 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _Held(self, tensor), lambda held: held.tensor
        )

    def __enter__(self):
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    def change(self, storage, by):
        """One holder more or less of a storage."""
        key = storage.data_ptr()
        if key in self._own:
            return
        before = self._holders[key] > 0
        self._holders[key] += by
        self._now += (int(self._holders[key] > 0) - int(before)) * storage.nbytes()
        self.peak = max(self.peak, self._now)


class _Held:
    def __init__(self, live, tensor):
        self.live, self.tensor = live, tensor
        live.change(tensor.untyped_storage(), 1)

    def __del__(self):
        self.live.change(self.tensor.untyped_storage(), -1)


def _storages(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _optimizers(optimizer):
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [each.optimizer for each in chained if each.optimizer is not None]


def counted(rank, world, address, folder, tp, pp, rows, config):
    """Bytes of this rank after one update, and autograd's peak within it."""
    made = ranks.learner(rank, world, address, Path(folder), tp, pp, **config)
    made.update(rows, 0)  # Adam's moments exist from the first step on
    parameters = list(made._parameters.values())
    parameters += [tensor for each in made._adapters.values() for tensor in (each.A, each.B)]
    masks = [each._owners for each in made._adapters.values()]  # of zeros and ones, beside B; not planned for
    gc.collect()
    share = made._share(rows, for_update=False)
    with Live([*parameters, *masks]) as live:
        made._accumulate(share.batch, 0, share.micro_batches[0])
    own = {p.untyped_storage().data_ptr() for p in parameters}
    state = [
        t for o in _optimizers(made._optimizer) for s in o.state.values() for t in s.values() if torch.is_tensor(t)
    ]
    main = [p for o in _optimizers(made._optimizer) for group in o.param_groups for p in group["params"]]
    main = [p for p in main if p.untyped_storage().data_ptr() not in own]
    buffers = [buffer for model in made._models for buffer in model.buffers + model.expert_parallel_buffers]
    result = {
        "parameters": _storages(parameters),
        "gradients": _storages([buffer.grad_data for buffer in buffers]),
        "optimizer": _storages([t for t in state if t.numel() > 1]) + _storages(main),
        "saved": live.peak,
    }
    made.close()
    return result
