"""What each rank does in the vocabulary-parallel log-prob tests; run by ``gang.Gang``."""

import math

import torch
import torch.distributed as dist

from megatron_ext.logprobs import log_probs_and_entropy

COLUMNS = 40


def whole(vocab_size: int):
    """Logits over the whole padded vocabulary, targets, and upstream gradients of both outputs."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(12, COLUMNS, generator=generator) * 4
    logits[0] = -math.inf  # but for one: a rank without any finite logit
    logits[0, vocab_size - 1] = 1.0
    targets = torch.randint(0, vocab_size, (12,), generator=generator)
    targets[0] = vocab_size - 1
    return logits, targets, torch.randn(2, 12, generator=generator)


def differentiate(logits, targets, weights, vocab_size, group, chunk=4096):
    """The three outputs ``[3, n]`` and the gradient of a loss through both differentiable ones."""
    leaf = logits.clone().requires_grad_(True)
    log_probs, entropy, tempered = log_probs_and_entropy(
        leaf * 1, targets, vocab_size=vocab_size, group=group, temperature=0.7, entropy_grad=True, chunk=chunk
    )
    ((log_probs * weights[0]).sum() + (entropy * weights[1]).sum()).backward()
    return torch.stack([log_probs, entropy, tempered]).detach(), leaf.grad


def run(rank, world, address, vocab_size, chunk):
    """Values, gradient of this rank's shard, and the collectives it took."""
    store = f"tcp://{address[0]}:{address[1]}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    calls, real = [], dist.all_reduce

    def counted(tensor, op=dist.ReduceOp.SUM, group=None):
        calls.append(str(op))
        return real(tensor, op=op, group=group)

    dist.all_reduce = counted
    try:
        logits, targets, weights = whole(vocab_size)
        width = COLUMNS // world
        shard = logits[:, rank * width : (rank + 1) * width]
        values, grad = differentiate(shard, targets, weights, vocab_size, dist.group.WORLD, chunk)
        return values.numpy(), grad.numpy(), calls
    finally:
        dist.all_reduce = real
        dist.destroy_process_group()
