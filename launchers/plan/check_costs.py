"""Checks what a run costs: memory, seconds, GPU-hours, and whether a step and its checkpoint fit into a job's time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from launchers.plan.setting import Setting
from launchers.plan.words import count, duration, size
from launchers.plan.work import EXPECTED_SHARE
from launchers.slurm.cluster import ClusterConfig, memory_bytes, seconds
from pipeline.config.errors import Problem
from pipeline.config.schema import RunConfig
from pipeline.units import GIB

if TYPE_CHECKING:
    from launchers.plan.forecast import Forecast

STOP_S = 20  # before its limit a job is requeued whatever the run does (launchers/slurm/job.sh.j2)


def memory(setting: Setting) -> Iterator[str | Problem]:
    """One line with the result of ``isentrope plan learner``, and the memory of engines."""
    try:
        forecast = setting.forecast
    except ValueError as error:
        yield Problem(
            "rollout.tensor_parallel_size", setting.config.rollout.tensor_parallel_size, str(error), "change the layout"
        )
        return
    if forecast is None or setting.cluster is None:
        return
    gib, memory = setting.cluster.gpu_gib, forecast.memory
    yield (
        f"memory: {memory.learner:,.1f} of {gib:g} GiB on the fullest learner GPU (predicted; "
        "isentrope plan learner has the parts)"
    )
    if memory.learner > gib:
        from launchers.plan.remedies import remedies

        found = remedies(setting.model, setting.config, memory.learner * GIB)
        keys = [f"{remedy['key']}={remedy['value']}" for remedy in found[:3]]
        what = f"a learner GPU would need {memory.learner:,.1f} GiB"
        yield Problem("cluster.gpu_gib", gib, what, f"try {' or '.join(keys) or 'a larger layout'}")
    yield from _engine_memory(setting.config, gib, forecast)
    yield from _node_memory(setting.cluster, forecast.saving.node_bytes)


def _engine_memory(config: RunConfig, gib: float, forecast: Forecast) -> Iterator[str | Problem]:
    drawn, memory = forecast.rollouts, forecast.memory
    if drawn is None:
        return
    key, share = "rollout.sglang.mem_fraction_static", config.rollout.sglang.mem_fraction_static
    weights, length = drawn.weights_bytes / GIB, config.longest_row
    if drawn.kv_tokens < length:
        least = (drawn.weights_bytes + length * drawn.kv_token_bytes) / GIB / memory.engine * share
        what = (
            f"{memory.engine:,.1f} GiB of an engine's GPU, for {weights:,.1f} GiB of weights and a cache of {length:,} "
            "tokens at least"
        )
        enough = f"raise it above {least:.2f}, or " if least < 0.95 else ""
        yield Problem(key, share, what, f"{enough}raise rollout.tensor_parallel_size")
        return
    yield (
        f"engine memory: {weights:,.1f} GiB of weights and {drawn.kv_bytes / GIB:,.1f} GiB of cache on every GPU: "
        f"{drawn.kv_tokens:,} tokens, {drawn.concurrent:,} of an engine's {drawn.samples:,} samples at a time "
        "(predicted)"
    )
    if memory.together:
        yield f"together: {memory.together:,.1f} of {gib:g} GiB where learner and engine share a GPU (predicted)"
    if memory.together > gib:
        what = (
            f"an engine with {memory.engine:,.1f} GiB beside the learner's {memory.steady:,.1f} makes "
            f"{memory.together:,.1f} of {gib:g} GiB"
        )
        remedy = f"lower {key}, shard the learner further, or set rollout.placement=disaggregated"
        yield Problem("rollout.placement", config.rollout.placement, what, remedy)


def _node_memory(cluster: ClusterConfig, copied: int) -> Iterator[Problem]:
    """Whether a node's memory holds its copy of a checkpoint, beside which everything else of the run lives."""
    stated = memory_bytes(cluster.memory_per_node)
    if stated and copied >= stated:
        what = (
            f"a checkpoint is copied into the nodes' memory before it is written: {size(copied)} of {size(stated)} on "
            "the node with most learner processes (predicted), beside the run itself"
        )
        enough = math.ceil(copied / GIB)
        remedy = f"raise it well above {enough}G, set it to 0 (all of a node), or give the learner more nodes"
        yield Problem("cluster.memory_per_node", cluster.memory_per_node, what, remedy)


def routes(setting: Setting) -> Iterator[str]:
    """Bytes of the experts that samples carry to the learner (``learner.routing_replay``)."""
    rollout, learner = setting.config.rollout, setting.config.learner
    if learner.routing_replay == "off" or setting.model.moe is None:
        return
    from pipeline.model.routing import token_bytes

    token = token_bytes(setting.model.moe)
    rows = rollout.prompts_per_step * rollout.samples_per_prompt
    step, most = (rows * (rollout.max_prompt_tokens + n) * token for n in (setting.response, rollout.max_new_tokens))
    waits = f"; as much again for each of the {rollout.staleness} steps that wait" if rollout.staleness else ""
    yield (
        f"routes: {token:,} bytes a token, about {size(step)} a step from engines to learner, at most {size(most)}"
        f"{waits} (learner.routing_replay={learner.routing_replay})"
    )


def speed(setting: Setting) -> Iterator[str | Problem]:
    """Seconds of a step and GPU-hours of the run; ``memory`` and ``time`` report the problems."""
    try:
        forecast = setting.forecast
    except ValueError:
        return
    if forecast is None or setting.cluster is None:
        return
    train, sync = forecast.train_seconds, forecast.sync
    across = f", {size(sync.node_bytes)} of it into a node from others" if sync.node_bytes else ""
    yield f"weight sync: {size(sync.model_bytes)}{across}: about {duration(sync.seconds)} (predicted)"
    drawn, step = forecast.rollouts, forecast.step_seconds
    if drawn is None or step is None:
        yield (
            f"train phase: about {duration(train)} a step (predicted); engines that compute on the CPU are not "
            "estimated"
        )
        return
    yield (
        f"step: about {duration(step)} = rollouts {duration(drawn.seconds)} + training {duration(train)} + weight sync "
        f"{duration(sync.seconds)}, were all responses equally long: the longest add to it (a roofline at the cluster "
        "file's speeds, not a measurement)"
    )
    yield f"responses: {_response(setting)}; times are for these, memory is for the longest"
    steps, gpus = setting.config.steps, setting.nodes * setting.cluster.gpus_per_node
    usable = seconds(setting.cluster.walltime) - setting.cluster.save_before_s
    jobs = math.ceil(steps * step / usable)
    yield (
        f"cost: {steps:,} steps in {duration(steps * step)} on {gpus:,} GPUs = {steps * step / 3600 * gpus:,.1f} "
        f"GPU-hours, about {count(jobs, 'time limit')} of {setting.cluster.walltime} (predicted, at that step; without "
        "start-up, evaluation and saving)"
    )


def _response(setting: Setting) -> str:
    """How long an average response is taken to be, and who says so."""
    stated = (
        "stated"
        if setting.stated_response
        else f"assumed: {EXPECTED_SHARE:.0%} of the limit; --mean-response states it"
    )
    return f"{setting.response:,} tokens on average ({stated})"


def overlap(setting: Setting) -> Iterator[str]:
    """What a step would take were engines to draw the next steps while the learner trains, by simulation.

    Nothing where engines compute on the CPU, share the learner's GPUs, or have no room; ``memory`` reports that.
    """
    forecast, rollout = setting.forecast, setting.config.rollout
    if forecast is None or forecast.rollouts is None or rollout.colocated:
        return
    drawn = forecast.rollouts
    if drawn.kv_tokens < setting.config.longest_row:
        return
    from launchers.plan.overlap import SIGMA, heavy_tailed, plant, predict

    what = plant(setting.config, drawn, forecast.train_seconds, forecast.sync.seconds)
    yield (
        "overlap: a step if engines draw while the learner trains (simulated: log-normal responses, sigma "
        f"{SIGMA:g}, at most {rollout.max_new_tokens:,} tokens)"
    )
    for staleness, partial in ((0, False), (1, False), (1, True), (4, False), (4, True)):
        lengths = heavy_tailed(setting.response, rollout.max_new_tokens)
        found = predict(what, lengths, staleness, partial=partial)
        before = "held by a sync and continued" if partial else "end before a sync"
        answers = f", running answers {before}" if staleness else ", in turns (`step:` with such lengths)"
        yield (
            f"overlap: staleness {staleness}{answers}: {duration(found.step_seconds)}; the learner waits "
            f"{found.learner_waits:.0%} of the time, the engines {found.engines_wait:.0%}"
        )


def time(setting: Setting) -> Iterator[str | Problem]:
    """When the run saves, and whether what is in progress can end before the job does."""
    cluster, every = setting.cluster, setting.config.checkpoint.every
    if cluster is None:
        return
    limit = seconds(cluster.walltime)
    again = "requeued" if cluster.requeue else f"followed by the next of {count(cluster.chain, 'job')}"
    yield (
        f"time: saves {cluster.save_before_s} s (or up to a minute more) before {cluster.walltime} is over, "
        f"then is {again}"
    )
    saves = f"every {every} steps" if every else "only at the end and before the time limit"
    yield (
        f"checkpoints: {saves}, in {setting.run_dir / 'checkpoints'}, the last {setting.config.checkpoint.keep_last} "
        "kept"
    )
    if limit - cluster.save_before_s < 60:
        what = f"leaves {limit - cluster.save_before_s} s of {limit} for start-up and training"
        yield Problem("cluster.save_before_s", cluster.save_before_s, what, "lower it or raise cluster.walltime")
    if not every and not cluster.requeue and cluster.chain == 1:
        what = "a job that is lost, or out of time, would lose everything"
        yield Problem("checkpoint.every", every, what, "save every so many steps, or set cluster.requeue=true")
    yield from _save_interval(setting, cluster, limit - cluster.save_before_s)


def _save_interval(setting: Setting, cluster: ClusterConfig, usable: int) -> Iterator[str | Problem]:
    """Whether the step in progress and its checkpoint end, and checkpoints come, before the time is up."""
    try:
        forecast = setting.forecast
    except ValueError:
        return
    step = forecast.step_seconds if forecast else None
    if forecast is None or step is None:
        return
    every, steps, saving = setting.config.checkpoint.every, setting.config.steps, forecast.saving
    yield (
        f"saving: up to {size(saving.node_bytes)} a node are copied into its memory, then written in about "
        f"{duration(saving.seconds)} while the run goes on (predicted)"
    )
    if every:
        yield (
            f"save interval: {every} steps = about {duration(every * step)} of the {duration(usable)} before saving "
            "begins (predicted)"
        )
        if saving.seconds > every * step:
            yield "note: writing a checkpoint takes longer than that: the run will wait for it; raise checkpoint.every"
    # A checkpoint in the making is completed beside the step in progress; then the last one is written.
    needed = max(step, saving.seconds) + saving.seconds + STOP_S
    if needed <= cluster.save_before_s:
        return
    enough = math.ceil(needed / 60) * 60
    what = (
        f"a step takes about {duration(step)} and a checkpoint {duration(saving.seconds)} (predicted): the one in "
        "progress would not be saved before the job ends"
    )
    remedy = f"raise it to {enough} or more (and cluster.walltime above that)"
    between = min(every or steps, steps) * step
    if saving.seconds + STOP_S > cluster.save_before_s:
        what = (
            f"writing a checkpoint takes about {duration(saving.seconds)} (predicted), so that none would be complete"
        )
        remedy += ", use more nodes, or correct cluster.disk_gb_s"
        yield Problem("cluster.save_before_s", cluster.save_before_s, what, remedy)
    elif between > usable:
        saved = (
            f"no checkpoint comes before, so that every attempt begins at the same step ({duration(between)} between "
            "checkpoints)"
        )
        remedy += ", or lower checkpoint.every"
        yield Problem("cluster.save_before_s", cluster.save_before_s, f"{what}, and {saved}", remedy)
    else:
        yield f"note: {what}, and be done again; cluster.save_before_s={enough} would save it"
