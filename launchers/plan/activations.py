"""Predicts the bytes that a layer keeps between its forward and its backward pass, for one micro-batch on one rank.

Two implementations. *Local*: megatron-core's own modules, which materialise the attention matrix; counted on real
models by the tests. *Transformer Engine*: read from its source (2.20, ``module/linear.py``, ``layernorm_linear.py``,
``grouped_linear.py``) and megatron-core's (0.16, ``transformer/attention.py``, ``mlp.py``, ``moe/experts.py``), in the
manner of Korthikanti et al. 2022 (arXiv 2205.05198), section 4; not yet measured on a GPU. Both without dropout.
"""

from __future__ import annotations

from dataclasses import dataclass

from launchers.plan.work import Work
from pipeline.model.architecture import DeltaNet, Mla, Moe
from pipeline.units import FP8_BLOCK

_FLOAT, _INDEX = 4, 8  # bytes of float32, int64
TOKEN_ID = _INDEX


@dataclass(frozen=True)
class Layer:
    """Bytes that one layer keeps."""

    attention: float  # norm, projections, the inputs of attention's core
    core: float  # what selective recomputation drops: the attention matrix, repeated keys and values
    core_inputs: float  # and what it keeps that would not be kept otherwise
    again: float  # and what it brings back
    feed_forward: float  # with its norm
    behind: float  # of attention and feed_forward, what the backward pass has freed when it comes to the core
    input: float  # the layer's input, all that full recomputation keeps
    overlap: float  # of it, what the layer itself keeps too
    working: float  # temporaries of the backward pass, at most

    @property
    def saved(self) -> float:
        """Bytes that are kept where nothing is recomputed."""
        return self.attention + self.core + self.feed_forward


@dataclass(frozen=True)
class Instant:
    """Bytes of a model chunk at one instant of the backward pass of a micro-batch through it."""

    kept: float
    recomputed: float
    working: float

    @property
    def total(self) -> float:
        """Bytes of all parts together."""
        return self.kept + self.recomputed + self.working


def layer(work: Work, index: int) -> Layer:
    """Bytes of decoder layer ``index``."""
    model = work.model
    inside = _mixer(work, index)
    moe = model.moe if model.is_moe(index) else None
    norm = _norm(work, model.hidden, work.norm_tokens)
    feed_forward = norm + (_experts(work, moe, index) if moe else _gated(work, index, model.ffn, work.norm_tokens))
    feed_forward += _adapters(work, index, ".mlp.")
    adapted = _adapters(work, index, ".self_attention.")
    stream = work.norm_tokens * model.hidden * work.itemsize
    kept_by_norm = work.transformer_engine or work.itemsize == _FLOAT  # else the norm keeps a float32 copy
    return Layer(
        attention=norm + inside.outside + adapted,
        core=inside.core,
        core_inputs=inside.core_inputs,
        again=inside.again,
        feed_forward=feed_forward,
        behind=feed_forward + inside.projection,
        input=stream,
        overlap=stream if kept_by_norm else 0.0,
        working=max(inside.again, feed_forward) + 2 * work.tokens * model.hidden * work.itemsize,
    )


def _adapters(work: Work, index: int, where: str) -> float:
    """Bytes of what adapters make of a layer's inputs, and of the matrices that they then multiply it by.

    Beside them the layer is counted as if it were trained: what its norms keep less is not subtracted.
    """
    total, moe = 0.0, work.model.moe
    for each in work.layer_adapters.get(index, ()):
        if where in each.base.parameter:
            if moe is not None and each.base.expert is not None:
                tokens, parts = _dispatched(work, moe) * work.grid.ep / moe.experts, work.grid.expert_tp
            else:
                tokens, parts = work.tokens if each.base.split == 0 else work.norm_tokens, work.tp
            width = len(each.sources) * work.learner.lora.rank
            blocks = each.b.local_shape(parts)[0] if len(each.base.sources) > 1 else 0
            total += (tokens + blocks) * width * work.itemsize
    return total


def _dispatched(work: Work, moe: Moe) -> float:
    """Tokens that the experts of one rank get, each as often as it chose one of them."""
    return work.norm_tokens * moe.top_k * work.grid.expert_tp * work.imbalance


def final_norm(work: Work) -> float:
    """Bytes of the norm in front of the output layer."""
    return _norm(work, work.model.hidden, work.norm_tokens)


def backward(work: Work, layers: range) -> list[Instant]:
    """What a model chunk of these layers holds of one micro-batch from its forward pass on, layer by layer backwards.

    The first entry is what waits for the backward pass to begin.
    """
    learner, found = work.learner, [layer(work, index) for index in layers]
    if learner.recompute_granularity == "full":
        return _full(found, learner.recompute_num_layers, uniform=learner.recompute_method == "uniform")
    if learner.recompute_granularity == "none":
        return _remaining([each.saved for each in found], [(0.0, 0.0, each.working) for each in found])
    kept = [each.saved - each.core + each.core_inputs for each in found]
    return _remaining(kept, [(each.behind, each.again, each.working) for each in found])


def _full(found: list[Layer], size: int, *, uniform: bool) -> list[Instant]:
    """Whole layers: all in groups of ``size``, or each of the first ``size``."""
    groups = (
        [found[start : start + size] for start in range(0, len(found), size)] if uniform else [[each] for each in found]
    )
    again = [uniform or index < size for index in range(len(groups))]
    kept = [group[0].input if whole else group[0].saved for group, whole in zip(groups, again, strict=True)]
    changes = [
        (0.0, (sum(each.saved for each in group) - group[0].overlap) * whole, max(each.working for each in group))
        for group, whole in zip(groups, again, strict=True)
    ]
    return _remaining(kept, changes)


def _remaining(kept: list[float], changes: list[tuple[float, float, float]]) -> list[Instant]:
    """What is left of ``kept`` at each entry, from the last to the first.

    What is freed is subtracted; what is computed again and temporaries are added.
    """
    left = sum(kept)
    instants = [Instant(left, 0.0, 0.0)]
    for own, (freed, again, working) in zip(reversed(kept), reversed(changes), strict=True):
        instants.append(Instant(left - freed, again, working))
        left -= own
    return instants


def _linear_size(work: Work, index: int) -> float:
    """Bytes of an entry of a linear layer's input: Transformer Engine keeps it in FP8, without a copy in bf16."""
    precision = work.learner.precision
    inside = not precision.in_bf16(index, work.model.layers)
    per_entry = {"blockwise": 4 / FP8_BLOCK, "mxfp8": 1 / 32}  # 1 x 128 and 1 x 32
    scales = per_entry.get(precision.fp8_recipe, 0.0)
    return 1 + scales if work.fp8 and inside else work.itemsize


def _norm(work: Work, width: float, tokens: float) -> float:
    """Bytes of an RMSNorm.

    Torch's own keeps the input and the normalised input, both in float32; Transformer Engine's its input.
    """
    if work.transformer_engine:
        return tokens * (width * work.itemsize + _FLOAT)
    return tokens * (2 * width * _FLOAT + _FLOAT)


@dataclass(frozen=True)
class _Attention:
    """Bytes of attention without the norm before it; see ``Layer``."""

    outside: float
    core: float
    core_inputs: float
    again: float
    projection: float  # the output projection's input, part of ``outside``


def _mixer(work: Work, index: int) -> _Attention:
    model = work.model
    if model.delta and model.is_delta(index):
        return _delta_net(work, model.delta, index)
    return _latent_attention(work, model.mla) if model.mla else _attention(work, index)


def _delta_net(work: Work, delta: DeltaNet, index: int) -> _Attention:
    """Bytes of a gated delta net, of which selective recomputation drops nothing.

    With Transformer Engine the rule is flash-linear-attention's, which keeps its inputs and a chunk of 64 scores a
    token; else megatron-core's in torch, whose numbers were fitted to what autograd keeps of it, within 1 %.
    """
    size, tokens, heads = work.itemsize, work.tokens, work.tokens * delta.value_heads / work.tp
    keys, values = heads * delta.key_dim, heads * delta.value_dim  # keys repeated for every value head
    channels = tokens * delta.channels / work.tp
    kept = work.norm_tokens * work.model.hidden * _linear_size(work, index)
    kept += channels * 3 * size + 4 * keys / delta.per_key * _FLOAT  # convolution and its SiLU; l2 norms
    kept += heads * (3 * _FLOAT + size) + values * 4 * _FLOAT  # decay and beta; norm and gate
    if work.transformer_engine:
        kept += (2 * keys + values) * size + heads * (64 * size + 2 * _FLOAT)
    else:
        kept += (1743 * heads + 8.3 * keys + 3.5 * values) * _FLOAT
    return _Attention(kept + values * size, 0.0, 0.0, 0.0, values * size)


def _attention(work: Work, index: int) -> _Attention:
    """Bytes of grouped-query attention."""
    model, size, tokens = work.model, work.itemsize, work.tokens
    heads = model.heads / work.tp
    groups = max(1.0, model.kv_heads / work.tp)  # fewer groups than ranks are held by several
    q, kv = (tokens * count * model.head_dim for count in (heads, groups))  # entries
    linear = _linear_size(work, index)
    inputs = work.norm_tokens * model.hidden * linear
    own_queries = groups > 1  # those of several groups are reshaped, those of one are a view of the projection
    if model.qk_norm:
        inputs += tokens * (heads + groups) * _FLOAT  # inverse deviations
    if not work.transformer_engine or (work.cp > 1 and (model.family.sinks or model.window)):
        return _local_attention(work, inputs, heads, groups, own_queries=own_queries)
    if model.qk_norm and own_queries:
        inputs += q * size
    # Values are a view of the whole projection, queries and keys are rotated copies.
    return _flash(work, inputs + (q + 2 * kv) * size + (q + kv) * size, q, tokens * heads, linear)


def _local_attention(work: Work, inputs: float, heads: float, groups: float, *, own_queries: bool) -> _Attention:
    """Bytes of megatron-core's own attention, which repeats keys and values for every head.

    Under context parallelism: of our attention, which gathers them.
    """
    model, size, tokens = work.model, work.itemsize, work.tokens
    q, kv = (tokens * count * model.head_dim for count in (heads, groups))
    repeated, gathered = heads > groups, work.cp > 1
    # A view of the projection is kept by the norm of keys, if that needs no float32 copy, or by attention for its
    # values.
    whole = (model.qk_norm and size == _FLOAT) or not (repeated or gathered)
    inputs += 4 * work.length / work.cp * model.head_dim * size  # cosines and sines, for queries and for keys
    outside = inputs + (q + 2 * kv) * size * whole + q * size  # and the rotated queries
    if model.qk_norm:
        outside += (q + kv) * _FLOAT  # normalised; and the norms' inputs, unless they are views
        outside += (q + kv) * _FLOAT if size < _FLOAT else q * size * own_queries
    if gathered:
        core = 2 * kv * work.cp * size + tokens * heads * _FLOAT + work.length**2 / work.cp * size  # and a mask
        if model.family.sinks:  # torch then computes it step by step, in float32
            core = (q + 2 * kv * work.cp * heads / groups + tokens * heads * (work.length + 1)) * _FLOAT
        again = core + q * size
    else:
        core = again = _matrix(work, heads) + 2 * q * size * repeated
        outside += 0.0 if repeated else q * size  # rotated keys
    unrepeated = kv * size * (repeated or gathered) + (q + 2 * kv) * size * (not whole)
    return _Attention(outside + q * size, core, unrepeated, again, q * size)


def _flash(work: Work, outside: float, output: float, sums: float, linear: float) -> _Attention:
    """Attention whose matrix is never made: it keeps its output and the logarithms of the softmax's sums.

    The output projection keeps the same output, or its own FP8 copy of it.
    """
    kept = output * work.itemsize
    core = sums * _FLOAT + (kept if linear != work.itemsize else 0.0)
    return _Attention(outside + output * linear, core, 0.0, kept + sums * _FLOAT, output * linear)


def _matrix(work: Work, heads: float) -> float:
    """The softmax's output, in float32 and again in the model's type, and the causal mask; sinks are a column more."""
    entry = _FLOAT + (work.itemsize if work.itemsize < _FLOAT else 0)
    sinks = work.tokens * heads * _FLOAT * work.model.family.sinks
    return work.tokens * work.length * heads * entry + sinks + work.length**2 / work.cp


def _latent_attention(work: Work, mla: Mla) -> _Attention:
    """Bytes of multi-head latent attention."""
    size, tokens, heads = work.itemsize, work.tokens, work.model.heads / work.tp
    q, v = tokens * heads * (mla.nope_dim + mla.rope_dim), tokens * heads * mla.v_dim
    own = work.norm_tokens  # the down-projections are whole on every rank, and see this rank's tokens
    inputs = own * work.model.hidden * size + 4 * work.length / work.cp * mla.rope_dim * size
    inputs += _norm(work, mla.kv_lora, own) + own * (mla.kv_lora + mla.q_lora) * size
    inputs += own * mla.rope_dim * size  # the keys' norm keeps a view of the whole down-projection
    if mla.q_lora:
        inputs += _norm(work, mla.q_lora, own)
    outside = inputs + (2 * q + v) * size
    if work.transformer_engine:
        return _flash(work, outside, v, tokens * heads, size)
    core = _matrix(work, heads)
    return _Attention(outside + v * size, core, 0.0, core, v * size)


def _gated(work: Work, index: int, width: int, inputs: float) -> float:
    linear = _linear_size(work, index)
    inner = width / work.tp
    return inputs * work.model.hidden * linear + work.tokens * inner * (_gate(work) * work.itemsize + linear)


def _gate(work: Work) -> int:
    """Entries that the gated SiLU keeps per entry of its result: its two inputs; unfused also silu(gate) and up + 0.

    gpt-oss's keeps, unfused, its clamped gate and the sigmoid of that too.
    """
    return 2 if work.transformer_engine else 6 if work.model.family.clamped else 4


def _experts(work: Work, moe: Moe, index: int) -> float:
    """Router, dispatch, experts and shared experts, without the norm before them."""
    size, tokens, hidden = work.itemsize, work.norm_tokens, work.model.hidden
    linear = _linear_size(work, index)
    router = hidden * size + moe.top_k * (_INDEX + _FLOAT)
    if moe.sigmoid:
        router += moe.experts * (_FLOAT + 1) + _FLOAT
    if moe.groups > 1:
        router += _INDEX * (moe.groups * moe.top_k // moe.top_groups + moe.top_groups)
    dispatch = moe.experts * (1 + _FLOAT) + moe.top_k * _INDEX
    # Each routed token: both linear layers' inputs, the gated SiLU, unfused its result before the router's weight, and
    # that weight.
    inner = moe.ffn / work.grid.expert_tp
    unweighted = 0 if work.transformer_engine else 1
    routed = hidden * linear + inner * ((_gate(work) + unweighted) * size + linear) + _FLOAT
    shared = tokens * (router + dispatch)
    if moe.shared_ffn:
        shared += _gated(work, index, moe.shared_ffn, 0.0 if linear == size else work.norm_tokens)
    return shared + _dispatched(work, moe) * routed
