"""Predicts the bytes of one GPU of every pipeline stage, at the moment of a step that needs most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launchers.plan import activations, parameters
from launchers.plan.parameters import entries
from launchers.plan.schedule import under_way
from launchers.plan.work import Work, table
from pipeline.units import GIB

# A stated constant, not a computed one: CUDA context and libraries, cuBLAS and cuDNN workspaces, NCCL's channels of
# five to seven groups, and what the caching allocator cannot use again.
CONTEXT_BYTES = 3 * GIB
# What the log-prob kernels work on at a time on a GPU (megatron_ext.logprobs): ``torch`` on so many logits in three
# float32 temporaries, ``fused`` on a tile of tokens and columns, with the tile's hidden states in float32 and their
# gradient.
_CHUNK_LOGITS, _TILE = 1 << 24, (4096, 8192)
_FLOAT = 4
_LOSS = 13 * _FLOAT  # per target: what the policy loss keeps (pipeline.objectives.loss)


@dataclass(frozen=True)
class Stage:
    """Bytes of one GPU of a pipeline stage by what they hold, and what a weight sync needs meanwhile.

    The order is that of the picture.
    """

    stage: int
    layers: int
    under_way: float  # micro-batches whose activations are kept, at most
    parts: Mapping[str, float]
    sync: float  # buffers of a weight sync, between updates, on the rank that has most

    @property
    def total(self) -> float:
        """At the busier of the two: training, or the weight sync, for which activations are gone."""
        return max(sum(self.parts.values()), self.steady + self.sync)

    @property
    def steady(self) -> float:
        """What stays between updates."""
        return sum(self.parts[name] for name in STEADY)


STEADY = ("parameters", "gradients", "optimizer", "fp8_weights", "reference", "context")
TRAINING = ("activations", "recompute", "logits", "working", "communication")
PARTS = (*STEADY, *TRAINING)


def stages(work: Work) -> tuple[Stage, ...]:
    """Every pipeline stage's rank with the most bytes.

    Raises ``ValueError`` where layers or experts cannot be divided so.
    """
    return tuple(_stage(work, stage) for stage in range(work.grid.pp))


def _stage(work: Work, stage: int) -> Stage:
    held, instants = parameters.held(work, stage), moments(work, stage)
    steady = {
        "parameters": held.parameters,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
        "fp8_weights": held.fp8,
        "reference": held.reference,
        "context": float(CONTEXT_BYTES),
    }
    worst = max(instants, key=lambda instant: sum(instant.parts.values()))
    return Stage(
        stage=stage,
        layers=sum(len(span) for span in work.grid.chunks(work.model.layers)[stage]),
        under_way=max(instant.under_way for instant in instants) / work.grid.vpp,
        parts=steady | dict(worst.parts) | {"working": worst.parts["working"] + held.largest * work.itemsize},
        sync=_sync(work, stage),
    )


@dataclass(frozen=True)
class Moment:
    """Bytes beside the steady ones at one instant of the backward pass, weight gradients aside."""

    under_way: int  # forward passes of model chunks that await their backward pass
    parts: Mapping[str, float]

    @property
    def saved(self) -> float:
        """Bytes that autograd holds."""
        return self.parts["activations"] + self.parts["recompute"] + self.parts["logits"]


def moments(work: Work, stage: int) -> list[Moment]:
    """The instants at which a stage can hold most: at every backward pass, when the loss is known and in the layers."""
    grid, chunks = work.grid, work.grid.chunks(work.model.layers)[stage]
    last = stage == grid.pp - 1
    instants = [activations.backward(work, span) for span in chunks]
    kept = [each[0].kept for each in instants]
    stream = work.norm_tokens * work.model.hidden * work.itemsize
    ids = activations.TOKEN_ID * work.tokens if stage == 0 else 0.0
    found = []
    for chunk, counts in under_way(stage, grid.pp, grid.vpp, min(work.micro_batches, 2 * grid.pp * grid.vpp)):
        others = sum(count * size for count, size in zip(counts, kept, strict=True)) - kept[chunk] + counts[0] * ids
        edges = sum(counts) + 1 if grid.pp > 1 else 0  # outputs that the schedule keeps, and one gradient on its way
        base = {"communication": edges * stream + _dispatch(work, chunks[chunk])}
        worst = max(instants[chunk], key=lambda instant: instant.total)
        most = max(instants[chunk], key=lambda instant: instant.kept + instant.recomputed)
        for at in (worst, most):
            parts = {"activations": others + at.kept, "recompute": at.recomputed, "logits": 0.0, "working": at.working}
            found.append(Moment(sum(counts), base | parts))
        if last and chunk == grid.vpp - 1:
            saved, temporary = logits(work)
            full = others + kept[chunk] + activations.final_norm(work)
            parts = {"activations": full, "recompute": 0.0, "logits": saved, "working": temporary}
            found.append(Moment(sum(counts), base | parts))
    return found


def logits(work: Work) -> tuple[float, float]:
    """Bytes kept from the hidden states of the targets to their loss, and temporaries: response tokens only.

    ``torch`` and ``triton`` hold the logits in the model's type, a buffer that the backward pass overwrites; ``fused``
    multiplies block by block, forward and backward, and keeps none.
    """
    targets, hidden, size = work.targets / work.cp, work.model.hidden, work.itemsize
    entries = targets * work.model.padded_vocab(work.tp) / work.tp
    saved = targets * hidden * size + work.targets * _LOSS
    temporary = work.tokens * hidden * size  # gradient of the decoder's output
    if work.kernel == "fused":
        tile = min(entries, _TILE[0] * _TILE[1]) * size + min(targets, _TILE[0]) * hidden * (_FLOAT + size)
        return saved, temporary + tile + targets * hidden * size  # the last: gradient of the targets' hidden states
    if work.kernel == "torch":
        temporary += 3 * _FLOAT * min(entries, _CHUNK_LOGITS)
    return saved + entries * size, temporary


def _dispatch(work: Work, span: range) -> float:
    """Send and receive buffers of the experts' all-to-all."""
    moe = work.model.moe
    if moe is None or work.grid.ep == 1 or not any(work.model.is_moe(index) for index in span):
        return 0.0
    return (1 + work.imbalance) * work.norm_tokens * moe.top_k * work.model.hidden * work.itemsize


def _sync(work: Work, stage: int) -> float:
    """What a GPU sends and receives in one bucket (``pipeline.reshard.plan``), at most what its stage holds.

    Engines that share the GPU get theirs through a buffer of what both stages of a bucket bring
    (``pipeline.reshard.handover``), at most about the model.
    """
    held = sum(row.entries * (_FLOAT if row.float32 else work.itemsize) for row in table(work.model, work.grid)[stage])
    bucket = work.learner.bucket_bytes
    handover = min(held * work.grid.pp, 2 * bucket) if work.colocated else 0
    adapted = (entries(work, each.base) for each in work.adapters.values() if each.base.stage == stage)
    merged = max(adapted, default=0) * (2 * work.itemsize + 2 * _FLOAT)  # two, and one in the making
    return float(min(held, bucket) + handover + merged)
