"""Inputs and float64 results for the log-prob kernels, for every device."""

from typing import NamedTuple

import torch


class Case(NamedTuple):
    """Logits as a product too: ``hidden @ weight.T``; ``upstream`` holds the loss's slopes of log-prob and entropy."""

    hidden: torch.Tensor  # [n, h]
    weight: torch.Tensor  # [v, h]
    logits: torch.Tensor  # [n, v], of which the last columns may be padding
    targets: torch.Tensor  # [n]
    temperature: torch.Tensor  # [n]
    upstream: torch.Tensor  # [2, n]
    vocab_size: int


def case(tokens=16, columns=50, padding=0, hidden=8, seed=0, scale=3.0, dtype=torch.float32, device="cpu") -> Case:
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, hidden, generator=g).to(dtype)
    weight = (torch.randn(columns + padding, hidden, generator=g) * scale / hidden**0.5).to(dtype)
    return Case(
        *(tensor.to(device) for tensor in (states, weight, states @ weight.t())),
        torch.randint(0, columns, (tokens,), generator=g).to(device),
        (0.05 + 2 * torch.rand(tokens, generator=g)).to(device),
        torch.randn(2, tokens, generator=g).to(device),
        columns,
    )


def exact(logits, targets, vocab_size, temperature):
    """Log-prob, entropy, tempered log-prob and moment in float64 by plain torch, padding cut off first."""
    z = logits.double()[:, :vocab_size]
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    temperature = torch.as_tensor(temperature, device=z.device).double().expand(len(z))
    tempered = (z / temperature[:, None]).log_softmax(-1)
    moment = torch.where(p > 0, p.square() * (log_p + entropy[:, None]), 0.0).sum(-1)
    return tuple(
        each.gather(1, targets[:, None])[:, 0] if each.dim() == 2 else each
        for each in (log_p, entropy, tempered, moment)
    )


def loss(log_probs, entropy, upstream, entropy_grad):
    """A scalar that weighs every token differently."""
    total = (log_probs * upstream[0]).sum()
    return total + (entropy * upstream[1]).sum() if entropy_grad else total


def exact_gradients(c: Case, entropy_grad: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``loss`` in float64 by autograd: with respect to logits (given as they are), hidden and weight."""
    logits = c.logits.double().requires_grad_(True)
    hidden, weight = c.hidden.double().requires_grad_(True), c.weight.double().requires_grad_(True)
    results = []
    for z, inputs in ((logits, (logits,)), (hidden @ weight.t(), (hidden, weight))):
        log_probs, entropy, *_ = exact(z, c.targets, c.vocab_size, 1.0)
        results += torch.autograd.grad(loss(log_probs, entropy, c.upstream.double(), entropy_grad), inputs)
    return tuple(results)
