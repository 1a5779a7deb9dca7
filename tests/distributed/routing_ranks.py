"""What each rank does in the tests of routing replay; run by ``gang.Gang``."""

from dataclasses import replace

import megatron_ranks as ranks
import torch


def chosen(rank, world, address, folder, rows, config):
    """Of one process: log-probs, the experts of every token in each layer, and gradients, by the routes of ``rows``.

    And the same without routes.
    """
    made = ranks.learner(rank, world, address, folder, 1, 1, **config)
    result = [_chosen(made, each) for each in (rows, replace(rows, routes=None))]
    made.close()
    return result


def _chosen(made, rows):
    found, hooks = [], []
    for layer in made._chunks[0].decoder.layers:
        if hasattr(layer.mlp, "router"):
            hooks.append(layer.mlp.router.register_forward_hook(lambda *said: found.append(said[-1][1].clone())))
    log_probs = made.log_probs(rows)
    for hook in hooks:
        hook.remove()
    return log_probs, torch.stack(found, dim=1), ranks.gradients(made, rows)


def log_probs(rank, world, address, folder, rows, config):
    """By the routes of ``rows``, and without; the reference's, which has no part in routes, both ways."""
    made = ranks.learner(rank, world, address, folder, 1, 1, **config)
    silent = replace(rows, routes=None)
    result = [made.log_probs(rows), made.log_probs(silent)]
    result += [made.log_probs(rows, reference=True), made.log_probs(silent, reference=True)]
    made.close()
    return result


def health(rank, world, address, folder, tp, pp, rows, config):
    """Metrics of two updates, and this rank's biases of experts after them."""
    made = ranks.learner(rank, world, address, folder, tp, pp, **config)
    metrics = [made.update(rows, step).metrics for step in range(2)]
    biases = {n: p.clone() for n, p in made._parameters.items() if n.endswith("expert_bias")}
    made.close()
    return metrics, biases


def gradients(rank, world, address, folder, rows, configs):
    found = []
    for number, config in enumerate(configs):
        made = ranks.learner(rank, world, (address[0], address[1] + number), folder, 1, 1, **config)
        found.append(ranks.gradients(made, rows))
        made.close()
    return found


def refusal(rank, world, address, folder):
    made = ranks.learner(rank, world, address, folder, 1, 1, routing_replay="routes")
    try:
        made.update(ranks.batch(), 0)
    except ValueError as error:
        return str(error)
    finally:
        made.close()
