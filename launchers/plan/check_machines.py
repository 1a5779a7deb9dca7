"""Checks and describes a step's batch and what each node does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from launchers.placement import PlacementError
from launchers.plan.setting import Setting
from launchers.plan.words import count
from launchers.plan.work import resamples
from pipeline.config.errors import Problem


def batch(setting: Setting) -> Iterator[str | Problem]:
    """Samples and tokens of a step, and how the learner cuts them."""
    rollout, learner = setting.config.rollout, setting.config.learner
    rows = rollout.prompts_per_step * rollout.samples_per_prompt
    per_update = rows // learner.updates_per_step
    per_rank = math.ceil(per_update / learner.data_parallel_size)
    words = f"batch: {rollout.prompts_per_step:,} prompts x {rollout.samples_per_prompt} = {rows:,} samples a step"
    if learner.updates_per_step > 1:
        words += f" = {learner.updates_per_step} updates of {per_update:,}"
    words += f" = {per_rank:,} per data-parallel rank and update"
    if learner.max_tokens_per_micro_batch:
        yield f"{words}, in micro-batches of at most {learner.max_tokens_per_micro_batch:,} tokens"
    else:
        size = min(learner.micro_batch_size, per_rank)
        yield f"{words} = {count(math.ceil(per_rank / size), 'micro-batch')} of {size}"
    length = setting.config.longest_row
    yield f"tokens: at most {rows:,} x {length:,} = {rows * length:,} a step, prompts included"
    entropy = setting.config.entropy
    if resamples(entropy):
        more = f"{entropy.auxiliary_prompts} prompts x {entropy.auxiliary_samples}"
        yield f"auxiliary: {more} = {entropy.auxiliary_prompts * entropy.auxiliary_samples:,} further samples at T+"


def machines(setting: Setting) -> Iterator[str | Problem]:
    """The layout, the number of nodes, and what each of them does."""
    learner, rollout, cluster = setting.config.learner, setting.config.rollout, setting.cluster
    layout = {
        "TP": learner.tensor_model_parallel_size,
        "CP": learner.context_parallel_size,
        "PP": learner.pipeline_model_parallel_size,
        "DP": learner.data_parallel_size,
    }
    shown = " x ".join(f"{name} {size}" for name, size in layout.items() if size > 1 or name == "TP")
    yield f"learner: {shown} = {count(learner.world_size, 'process')}"
    server = f" of TP {rollout.tensor_parallel_size}" if rollout.engine == "sglang" else ""
    shared = ", on the learner's GPUs" if rollout.colocated else ""
    yield f"engines: {rollout.engines} {rollout.engine}{server}{shared}"
    if cluster is None:
        return
    if shared and not cluster.gpus_per_node:
        remedy = "set rollout.placement=disaggregated, or cluster.gpus_per_node"
        yield Problem("rollout.placement", rollout.placement, "the cluster has no GPUs to share", remedy)
        return
    try:
        yield from _nodes(setting, cluster.gpus_per_node)
    except PlacementError as error:
        remedy = "use more nodes (--nodes), a smaller layout or fewer engines"
        if not setting.stated_nodes:
            remedy = (
                "take nodes with more GPUs, or lower learner.tensor_model_parallel_size or rollout.tensor_parallel_size"
            )
            yield Problem("cluster.gpus_per_node", cluster.gpus_per_node, str(error), remedy)
            return
        own = 0 if shared else rollout.engines * setting.engine_gpus
        nodes = f"{count(setting.nodes, 'node')} of {cluster.gpus_per_node}"
        what = f"the run needs {learner.world_size + own} GPUs and would get {nodes}: {error}"
        yield Problem("cluster.nodes", setting.nodes, what, remedy)


def _nodes(setting: Setting, gpus_per_node: int) -> Iterator[str | Problem]:
    """What each node does. Raises ``PlacementError``."""
    placed, stated = setting.placed(), setting.stated_nodes
    colocated, size = placed.colocated, max(1, setting.engine_gpus)
    yield f"nodes: {setting.nodes}, " + (
        "as asked for" if stated else "as many as the run needs (--nodes says otherwise)"
    )
    ranks, engines = Counter(placed.learner_nodes), Counter(placed.engine_nodes(size))
    for node in range(setting.nodes):
        idle = gpus_per_node - ranks[node] - (0 if colocated else engines[node] * setting.engine_gpus)
        rest = f", {idle} GPUs idle" if gpus_per_node and idle else ""
        yield f"node {node}: {count(ranks[node], 'learner process')}, {count(engines[node], 'engine')}{rest}"
        if not ranks[node] and not engines[node]:
            remedy = f"launch with --nodes {max(placed.nodes) + 1}, or without --nodes, or enlarge the layout"
            yield Problem("cluster.nodes", setting.nodes, f"node {node} would have nothing to do", remedy)
            return
