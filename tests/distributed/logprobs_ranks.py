"""What each rank does in the vocabulary-parallel log-prob tests; run by ``gang.Gang``."""

import contextlib
import math
from types import SimpleNamespace

import torch
import torch.distributed as dist

COLUMNS = 40


def whole(vocab_size: int):
    """Logits over the whole padded vocabulary, targets, temperatures, and upstream gradients of both outputs."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(12, COLUMNS, generator=generator) * 4
    logits[0] = -math.inf  # but for one: a rank without any finite logit
    logits[0, vocab_size - 1] = 1.0
    targets = torch.randint(0, vocab_size, (12,), generator=generator)
    targets[0] = vocab_size - 1
    return logits, targets, 0.3 + torch.rand(12, generator=generator), torch.randn(2, 12, generator=generator)


def factors():
    """Hidden states and output weight."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 6, generator=generator), torch.randn(COLUMNS, 6, generator=generator)


def from_logits(inputs, vocab_size, group):
    """The four outputs ``[4, n]`` and the gradient of a loss through both differentiable ones."""
    from megatron_ext.logprobs import log_probs_and_entropy

    logits, targets, temperature, weights = inputs
    leaf = logits.clone().requires_grad_(True)
    values = log_probs_and_entropy(
        leaf * 1, targets, vocab_size=vocab_size, group=group, temperature=temperature, entropy_grad=True, moment=True
    )
    (torch.stack(values[:2]) * weights).sum().backward()
    return torch.stack(values).detach(), leaf.grad


def from_hidden(inputs, vocab_size, group, tile=None):
    """The same of ``factors``, with the gradients of hidden states and weight."""
    from megatron_ext.logprobs import linear_log_probs_and_entropy

    hidden, weight, targets, temperature, weights = inputs
    hidden, weight = hidden.clone().requires_grad_(True), weight.clone().requires_grad_(True)
    entered = hidden
    if group is not None:
        from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

        entered = copy_to_tensor_model_parallel_region(hidden, group=group)
    values = linear_log_probs_and_entropy(
        entered,
        weight,
        targets,
        vocab_size=vocab_size,
        group=group,
        temperature=temperature,
        entropy_grad=True,
        moment=True,
        tile=tile,
    )
    (torch.stack(values[:2]) * weights).sum().backward()
    return torch.stack(values).detach(), hidden.grad, weight.grad


@contextlib.contextmanager
def joined(rank, world, address):
    """A group of all; within, a list of the reductions made is filled."""
    dist.init_process_group("gloo", init_method=f"tcp://{address[0]}:{address[1]}", rank=rank, world_size=world)
    calls, real = [], dist.all_reduce

    def counted(tensor, op=dist.ReduceOp.SUM, group=None):
        calls.append(f"{op.name if hasattr(op, 'name') else str(op).rsplit('.')[-1]} {list(tensor.shape)}")
        return real(tensor, op=op, group=group)

    dist.all_reduce = counted
    try:
        yield calls
    finally:
        dist.all_reduce = real
        dist.destroy_process_group()


def run(rank, world, address, vocab_size):
    """Values, gradient of this rank's shard, and the collectives it took."""
    with joined(rank, world, address) as calls:
        logits, *others = whole(vocab_size)
        shard = logits.tensor_split(world, 1)[rank]
        values, grad = from_logits((shard, *others), vocab_size, dist.group.WORLD)
        return values.numpy(), grad.numpy(), calls


def run_linear(rank, world, address, vocab_size, tile):
    """Values, gradients of hidden states and of this rank's weight, and the collectives it took."""
    with joined(rank, world, address) as calls:
        hidden, weight = factors()
        shard = weight.tensor_split(world)[rank]
        inputs = (hidden, shard, *whole(vocab_size)[1:])
        return (*(r.numpy() for r in from_hidden(inputs, vocab_size, dist.group.WORLD, tile)), calls)


class Decoder(torch.nn.Module):
    """The part of megatron's GPTModel that the head deals with: hidden states in, what the output layer says out."""

    def __init__(self, weight: torch.Tensor, sequence_parallel: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(sequence_parallel=sequence_parallel)
        self.post_process, self.share_embeddings_and_output_weights = True, False
        self.output_layer = torch.nn.Linear(1, 1, bias=False)
        self.output_layer.weight = torch.nn.Parameter(weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits, _ = self.output_layer(hidden, weight=None, runtime_gather_output=None)
        return logits.transpose(0, 1).contiguous()


def run_head(rank, world, address, kernel, sequence_parallel):
    """Through the head, hidden states ``[seq, rows, h]`` divided along the sequence or not: values, gradients of all
    positions.
    """
    from megatron_ext.head import Head

    with joined(rank, world, address) as calls:
        hidden, weight = factors()
        _, targets, _, upstream = whole(37)
        mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1]], dtype=torch.bool)
        states = hidden.view(3, 4, 6).transpose(0, 1).contiguous()
        if sequence_parallel:
            states = states.tensor_split(world)[rank].contiguous()
        states.requires_grad_(True)
        decoder = Decoder(weight.tensor_split(world)[rank].clone(), sequence_parallel)
        head = Head(decoder, 37, dist.group.WORLD, torch.device("cpu"), kernel)
        with head.selecting(mask):
            chosen = decoder(states)
        forward = decoder.output_layer.forward.__func__ is torch.nn.Linear.forward  # put back
        values = head(chosen, targets.view(3, 4)[mask], temperature=1.3, entropy_grad=True)
        (torch.stack(values[:2]) * upstream.view(2, 3, 4)[:, mask]).sum().backward()
        grads = states.grad.numpy(), decoder.output_layer.weight.grad.numpy()
        return torch.stack(values[:3]).detach().numpy(), *grads, calls, forward
