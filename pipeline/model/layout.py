"""The table of how each Megatron parameter is made of slices of Hugging Face tensors; every use is derived from it.

A parameter divided over ``n`` tensor-parallel ranks holds, on rank ``r``, the ``r``-th equal part of each of its
sources along one dimension; several sources are interleaved in groups: query, key and value rows per key-value head
(``linear_qkv``), a delta net's per key head (``in_proj``), gate and up halves per rank (``linear_fc1``). Loading,
export, conversion, resharding plans and memory estimates all follow from ``Row.slices``. No torch and no megatron
here.

A family's switches and names (``pipeline.model.architecture.FAMILIES``) say which templates it has, and what its
tensors are called.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from pipeline.model.architecture import Architecture
from pipeline.model.grid import Grid


@dataclass(frozen=True)
class Template:
    """One line of the table.

    ``{layer}`` and ``{expert}`` stand for global numbers, sizes for keys of ``Architecture.sizes``.
    """

    parameter: str  # megatron-core's name (local layer spec, sequential experts)
    sources: tuple[str, ...]  # Llama's Hugging Face names, in the order in which they are interleaved
    shapes: tuple[tuple[str, ...], ...]  # full shape of each source
    split: int | None = None  # dimension divided over TP (experts: expert-TP) ranks; None: every one holds the whole
    grouped: str = ""  # a key of _GROUPS: interleaved per head of that kind; "": once per rank
    place: str = "layer"  # "first" stage | every "layer" | "last" stage
    when: str = "always"  # a key of _CONDITIONS: the models, and the layers, that have it
    float32: bool = False  # whatever the type of the model
    stacked: tuple[tuple[str, ...], ...] = ()  # of each source: lengths of what lies in it end to end; (): one thing


_GROUPS: Mapping[str, Callable[[Architecture], int]] = {
    "": lambda model: 0,
    "key-value heads": lambda model: model.kv_heads,
    "delta key heads": lambda model: model.delta.key_heads if model.delta else 0,
}

_CONDITIONS: Mapping[str, Callable[[Architecture, int | None], bool]] = {
    "always": lambda model, layer: True,
    "untied": lambda model, layer: not model.tied,
    "tied": lambda model, layer: model.tied,
    "dense": lambda model, layer: not model.is_moe(layer),
    "moe": lambda model, layer: model.is_moe(layer),
    "expert bias": lambda model, layer: model.moe is not None and model.is_moe(layer) and model.moe.expert_bias,
    "shared experts": lambda model, layer: model.moe is not None and model.is_moe(layer) and model.moe.shared_ffn > 0,
    "shared gate": lambda model, layer: model.moe is not None and model.is_moe(layer) and model.moe.shared_gate,
    "heads": lambda model, layer: model.mla is None and not model.is_delta(layer),
    "biases": lambda model, layer: model.qkv_bias and not model.is_delta(layer),
    "output bias": lambda model, layer: model.family.biases,
    "sinks": lambda model, layer: model.family.sinks,
    "moe biases": lambda model, layer: model.family.biases and model.is_moe(layer),
    "head norms": lambda model, layer: model.qk_norm and not model.is_delta(layer),
    "delta": lambda model, layer: model.is_delta(layer),
    "delta, joint": lambda model, layer: model.is_delta(layer) and not model.family.delta_apart,
    "delta, apart": lambda model, layer: model.is_delta(layer) and model.family.delta_apart,
    "latent": lambda model, layer: model.mla is not None,
    "query compression": lambda model, layer: model.mla is not None and model.mla.q_lora > 0,
    "plain query": lambda model, layer: model.mla is not None and model.mla.q_lora == 0,
}

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"  # Llama's names
_LAYER = "decoder.layers.{layer}."
_ATTENTION = _LAYER + "self_attention."
_HF = "model.layers.{layer}."
_HF_ATTENTION = _HF + "self_attn."
_HF_DELTA = _HF + "linear_attn."
_QKV = tuple(_HF_ATTENTION + f"{name}_proj." for name in "qkv")


def _feed_forward(megatron: str, hf: str, width: str, when: str) -> tuple[Template, ...]:
    """A gated feed-forward network of ``width``."""
    gate_up = (_HF + hf + "gate_proj.weight", _HF + hf + "up_proj.weight")
    shape = (width, "hidden")
    return (
        Template(_LAYER + megatron + "linear_fc1.weight", gate_up, (shape, shape), split=0, when=when),
        Template(
            _LAYER + megatron + "linear_fc2.weight",
            (_HF + hf + "down_proj.weight",),
            (("hidden", width),),
            split=1,
            when=when,
        ),
    )


ENDS = (
    Template("embedding.word_embeddings.weight", (EMBEDDING,), (("vocab", "hidden"),), 0, place="first"),
    Template("decoder.final_layernorm.weight", ("model.norm.weight",), (("hidden",),), place="last"),
    Template("output_layer.weight", (HEAD,), (("vocab", "hidden"),), 0, place="last", when="untied"),
    Template("output_layer.weight", (EMBEDDING,), (("vocab", "hidden"),), 0, place="last", when="tied"),
)
NORMS = (
    Template(_LAYER + "input_layernorm.weight", (_HF + "input_layernorm.weight",), (("hidden",),)),
    Template(_LAYER + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), (("hidden",),)),
)
ATTENTION = (
    Template(
        _ATTENTION + "linear_qkv.weight",
        tuple(name + "weight" for name in _QKV),
        (("queries", "hidden"), ("kv", "hidden"), ("kv", "hidden")),
        split=0,
        grouped="key-value heads",
    ),
    Template(_ATTENTION + "linear_proj.weight", (_HF_ATTENTION + "o_proj.weight",), (("hidden", "q"),), split=1),
)
QKV_BIAS = (
    Template(
        _ATTENTION + "linear_qkv.bias",
        tuple(name + "bias" for name in _QKV),
        (("queries",), ("kv",), ("kv",)),
        split=0,
        grouped="key-value heads",
    ),
)
OUTPUT_BIAS = (Template(_ATTENTION + "linear_proj.bias", (_HF_ATTENTION + "o_proj.bias",), (("hidden",),)),)
SINKS = (Template(_ATTENTION + "core_attention.softmax_offset", (_HF_ATTENTION + "sinks",), (("heads",),), split=0),)
QK_NORM = (
    Template(_ATTENTION + "q_layernorm.weight", (_HF_ATTENTION + "q_norm.weight",), (("head_dim",),)),
    Template(_ATTENTION + "k_layernorm.weight", (_HF_ATTENTION + "k_norm.weight",), (("head_dim",),)),
)
DENSE = _feed_forward("mlp.", "mlp.", "ffn", "dense")
EXPERTS = (
    Template(_LAYER + "mlp.router.weight", (_HF + "mlp.gate.weight",), (("experts", "hidden"),), when="moe"),
    Template(
        _LAYER + "mlp.router.expert_bias",
        (_HF + "mlp.gate.e_score_correction_bias",),
        (("experts",),),
        when="expert bias",
        float32=True,
    ),
    *_feed_forward("mlp.experts.local_experts.{expert}.", "mlp.experts.{expert}.", "expert_ffn", "moe"),
    *_feed_forward("mlp.shared_experts.", "mlp.shared_experts.", "shared_ffn", "shared experts"),
    Template(
        _LAYER + "mlp.shared_experts.gate_weight",
        (_HF + "mlp.shared_expert_gate.weight",),
        (("one", "hidden"),),
        when="shared gate",
    ),
)
_EXPERT, _HF_EXPERT = _LAYER + "mlp.experts.local_experts.{expert}.", _HF + "mlp.experts.{expert}."
MOE_BIASES = (
    Template(_LAYER + "mlp.router.bias", (_HF + "mlp.gate.bias",), (("experts",),)),
    Template(
        _EXPERT + "linear_fc1.bias",
        (_HF_EXPERT + "gate_proj.bias", _HF_EXPERT + "up_proj.bias"),
        (("expert_ffn",), ("expert_ffn",)),
        split=0,
    ),
    Template(_EXPERT + "linear_fc2.bias", (_HF_EXPERT + "down_proj.bias",), (("hidden",),)),
)
DELTA = (  # a gated delta net (arXiv 2412.06464)
    Template(
        _ATTENTION + "in_proj.weight",  # Qwen3-Next's rows are interleaved per key head in Hugging Face's too
        (_HF_DELTA + "in_proj_qkvz.weight", _HF_DELTA + "in_proj_ba.weight"),
        (("delta_in", "hidden"), ("delta_gates", "hidden")),
        split=0,
        grouped="delta key heads",
        when="delta, joint",
    ),
    Template(
        _ATTENTION + "in_proj.weight",
        tuple(_HF_DELTA + f"in_proj_{name}.weight" for name in ("qkv", "z", "b", "a")),
        (("delta_channels", "hidden"), ("delta_out", "hidden"), ("delta_heads", "hidden"), ("delta_heads", "hidden")),
        split=0,
        grouped="delta key heads",
        when="delta, apart",
        stacked=(("delta_keys", "delta_keys", "delta_out"), (), (), ()),
    ),
    Template(
        _ATTENTION + "conv_weight",  # whole on every rank: a rank's channels are not neighbours
        (_HF_DELTA + "conv1d.weight",),
        (("delta_channels", "one", "delta_kernel"),),
    ),
    Template(_ATTENTION + "dt_bias", (_HF_DELTA + "dt_bias",), (("delta_heads",),), split=0),
    Template(_ATTENTION + "A_log", (_HF_DELTA + "A_log",), (("delta_heads",),), split=0),
    Template(_ATTENTION + "norm_weight", (_HF_DELTA + "norm.weight",), (("delta_head",),)),
    Template(_ATTENTION + "out_proj.weight", (_HF_DELTA + "out_proj.weight",), (("hidden", "delta_out"),), split=1),
)
MLA = (  # multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): low-rank queries, keys and values
    Template(
        _ATTENTION + "linear_q_proj.weight",
        (_HF_ATTENTION + "q_proj.weight",),
        (("mla_q", "hidden"),),
        split=0,
        when="plain query",
    ),
    Template(
        _ATTENTION + "linear_q_down_proj.weight",
        (_HF_ATTENTION + "q_a_proj.weight",),
        (("q_lora", "hidden"),),
        when="query compression",
    ),
    Template(
        _ATTENTION + "q_layernorm.weight",
        (_HF_ATTENTION + "q_a_layernorm.weight",),
        (("q_lora",),),
        when="query compression",
    ),
    Template(
        _ATTENTION + "linear_q_up_proj.weight",
        (_HF_ATTENTION + "q_b_proj.weight",),
        (("mla_q", "q_lora"),),
        split=0,
        when="query compression",
    ),
    Template(
        _ATTENTION + "linear_kv_down_proj.weight",
        (_HF_ATTENTION + "kv_a_proj_with_mqa.weight",),
        (("kv_lora_rope", "hidden"),),
    ),
    Template(_ATTENTION + "kv_layernorm.weight", (_HF_ATTENTION + "kv_a_layernorm.weight",), (("kv_lora",),)),
    Template(
        _ATTENTION + "linear_kv_up_proj.weight",
        (_HF_ATTENTION + "kv_b_proj.weight",),
        (("mla_kv", "kv_lora"),),
        split=0,
    ),
    Template(_ATTENTION + "linear_proj.weight", (_HF_ATTENTION + "o_proj.weight",), (("hidden", "mla_o"),), split=1),
)


def _when(condition: str, templates: Sequence[Template]) -> tuple[Template, ...]:
    """``templates`` for the models of ``condition``, where they have none of their own."""
    return tuple(replace(each, when=condition) if each.when == "always" else each for each in templates)


TEMPLATES = (
    *(*ENDS, *NORMS),
    *_when("heads", ATTENTION),
    *_when("delta", DELTA),
    *_when("latent", MLA),
    *DENSE,
    *_when("biases", QKV_BIAS),
    *_when("output bias", OUTPUT_BIAS),
    *_when("sinks", SINKS),
    *_when("head norms", QK_NORM),
    *EXPERTS,
    *_when("moe biases", MOE_BIASES),
)

# Transformer Engine's modules name some of the same parameters otherwise: norms fused into the linear layer that
# follows, and the experts of one rank in one grouped layer.
ALIASES = (
    (r"\.self_attention\.linear_qkv\.layer_norm_weight$", ".input_layernorm.weight"),
    (r"\.mlp\.linear_fc1\.layer_norm_weight$", ".pre_mlp_layernorm.weight"),
    (r"\.linear_q_up_proj\.layer_norm_weight$", ".q_layernorm.weight"),
    (r"\.linear_kv_up_proj\.layer_norm_weight$", ".kv_layernorm.weight"),
    (r"\.mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$", r".mlp.experts.local_experts.\3.\1.\2"),
)

# Tensors that some checkpoints carry beside the parameters: recomputed buffers.
_IGNORED = ("*.rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Source:
    """One full Hugging Face tensor."""

    name: str
    shape: tuple[int, ...]
    stacked: tuple[int, ...] = ()  # lengths of what lies in it end to end, each divided by itself; (): one thing

    def spans(self, dim: int) -> Iterator[range]:
        """Where each of those lies along ``dim``."""
        start = 0
        for length in self.stacked or (self.shape[dim],):
            yield range(start, start + length)
            start += length


@dataclass(frozen=True)
class Slice:
    """``length`` entries along the split dimension.

    They begin at ``source_start`` of a source and at ``start`` of the local parameter.
    """

    source: int  # index in ``Row.sources``
    source_start: int
    start: int
    length: int


@dataclass(frozen=True)
class Row:
    """One Megatron parameter of one model: where it lives and what it is made of."""

    parameter: str  # with the global layer and expert numbers
    sources: tuple[Source, ...]
    split: int | None
    groups: int  # interleaved groups (heads) in the whole parameter; 0: one per TP rank
    stage: int  # pipeline stage that holds it
    layer: int | None = None  # global number; None: embedding, final norm, output layer
    expert: int | None = None  # global number; None: not part of an expert
    ep: int | None = None  # expert-parallel rank that holds the expert
    float32: bool = False  # kept so whatever the type of the model
    exported: bool = True  # False: a copy of another row's tensor (tied output layer of the last stage)

    @property
    def dim(self) -> int:
        """Dimension along which slices run."""
        return self.split or 0

    @property
    def entries(self) -> int:
        """Numbers in the whole parameter, without padding."""
        return sum(math.prod(source.shape) for source in self.sources)

    def part(self, grid: Grid, rank: int) -> tuple[int, int] | None:
        """``(n, i)`` where global rank ``rank`` holds the ``i``-th of ``n`` parts.

        ``None`` where it holds nothing of this row.
        """
        place = grid.place(rank)
        if place.pp != self.stage or (self.expert is not None and place.ep != self.ep):
            return None
        return (grid.tp, place.tp) if self.expert is None else (grid.expert_tp, place.etp)

    def holders(self, grid: Grid, replica: int = 0) -> tuple[int, ...]:
        """Global ranks of one replica, in the order of their parts."""
        if self.ep is None:
            return tuple(grid.dense_rank(tp, replica, self.stage) for tp in range(grid.tp))
        return tuple(grid.expert_rank(etp, self.ep, replica, self.stage) for etp in range(grid.expert_tp))

    def local_shape(self, tp: int) -> tuple[int, ...]:
        """Shape of the parameter on each of ``tp`` ranks (for an expert, of ``etp``), padding included."""
        shape = list(self.sources[0].shape)
        entries = sum(length for _, _, length in self._spans(tp))
        shape[self.dim] = self._groups(tp) * entries // (tp if self.split is not None else 1)
        return tuple(shape)

    def slices(self, tp: int, rank: int) -> tuple[Slice, ...]:
        """The parameter on rank ``rank`` of ``tp``, in order; entries that no slice covers are padding and hold 0.

        Groups fewer than ranks are cut anywhere, as megatron-core does where key-value heads are fewer than TP.
        """
        first, spans = 0, self._spans(tp)
        size = self.local_shape(tp)[self.dim]
        window = range(0, size) if self.split is None else range(rank * size, (rank + 1) * size)
        slices = []
        for group in range(self._groups(tp)):
            for index, span, length in spans:
                start, stop = max(first, window.start), min(first + length, window.stop)
                source_start = span.start + group * length + start - first
                covered = min(stop - start, span.stop - source_start)
                if covered > 0:
                    slices.append(Slice(index, source_start, start - window.start, covered))
                first += length
        return tuple(slices)

    def _groups(self, tp: int) -> int:
        return 1 if self.split is None else self.groups or tp

    def _spans(self, tp: int) -> list[tuple[int, range, int]]:
        """What is interleaved: a source, where in it, and entries in one group, padding included."""
        spans = [(index, span) for index, source in enumerate(self.sources) for span in source.spans(self.dim)]
        return [(index, span, -(-len(span) // self._groups(tp))) for index, span in spans]

    def __str__(self) -> str:
        sources = " + ".join(f"{source.name}{list(source.shape)}" for source in self.sources)
        over = "" if self.split is None else f", split over {'TP' if self.expert is None else 'expert-TP'} along "
        return f"{self.parameter} = {sources}{over}{'' if self.split is None else self.split}"


_ALONE = Grid()  # one rank, which holds everything


@dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor that is made of a parameter: source ``source`` of ``row``."""

    row: Row
    source: int

    @property
    def name(self) -> str:
        """Hugging Face name."""
        return self.row.sources[self.source].name

    @property
    def shape(self) -> tuple[int, ...]:
        """Full shape."""
        return self.row.sources[self.source].shape


def rows(model: Architecture, grid: Grid = _ALONE) -> tuple[Row, ...]:
    """Every parameter of ``model`` on the ranks of ``grid``, in the order in which they are exported.

    The order is stage by stage, layer by layer, dense ones before those of each expert-parallel rank.

    Raises ``ValueError`` where the layers or the experts cannot be divided so.
    """
    return _rows(model, grid)


@lru_cache(maxsize=2)
def _rows(model: Architecture, grid: Grid) -> tuple[Row, ...]:
    """As ``rows``; a forecast asks five times for those of two grids, half a second each for 235 billion parameters."""
    sizes, stages = model.sizes(), grid.stages(model.layers)
    experts = model.moe.experts if model.moe else 0
    if experts % grid.ep:
        raise ValueError(f"{experts} experts cannot be divided over ep={grid.ep}: choose a divisor")
    found = []
    for template in TEMPLATES:
        for layer in range(model.layers) if template.place == "layer" else (None,):
            # A tied output layer is a parameter of its own only where the embedding is on another stage.
            if not _CONDITIONS[template.when](model, layer) or (template.when == "tied" and grid.pp == 1):
                continue
            stage, order = _place(template, layer, stages, grid.pp)
            for expert in range(experts) if "{expert}" in template.parameter else (None,):
                ep = None if expert is None else expert * grid.ep // experts
                row = _row(template, layer, expert, model, sizes, stage, ep)
                found.append(((stage, order, -1 if ep is None else ep, row.float32), row))
    return tuple(row for _, row in sorted(found, key=lambda item: item[0]))


def names(model: Architecture) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each line of the table that ``model`` has: Megatron's name and Hugging Face's, without numbers."""
    for template in TEMPLATES:
        if any(_CONDITIONS[template.when](model, layer) for layer in range(model.layers)):
            yield template.parameter, tuple(renamed(name, model) for name in template.sources)


def canonical(name: str) -> str:
    """The layout's name of a Megatron parameter that may be named as in Transformer Engine's layers."""
    for pattern, replacement in ALIASES:
        name = re.sub(pattern, replacement, name)
    return name


def tensor_shapes(model: Architecture) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every parameter of a model."""
    return {source.name: source.shape for row in rows(model) for source in row.sources}


def renamed(name: str, model: Architecture) -> str:
    """What the tensor that Llama calls ``name`` is called in the model's family."""
    for old, new in model.family.renamed:
        name = name.replace(old, new)
    return name


def ignored(name: str, model: Architecture) -> bool:
    """Whether a Hugging Face tensor that no row uses may be passed over."""
    if model.tied and name == renamed(HEAD, model):
        return True
    return (
        predicts_ahead(name, model) or sees(name, model) or any(fnmatch.fnmatch(name, pattern) for pattern in _IGNORED)
    )


def predicts_ahead(name: str, model: Architecture) -> bool:
    """Whether a tensor belongs to a multi-token-prediction layer (DeepSeek-V3, arXiv 2412.19437), which is left out."""
    if model.family.ahead:
        return name.startswith(model.family.ahead)
    numbers = range(model.layers, model.layers + model.extra_layers)
    return any(name.startswith(f"model.layers.{number}.") for number in numbers)


def sees(name: str, model: Architecture) -> bool:
    """Whether a tensor belongs to what turns pictures into embeddings, which is left out."""
    return model.family.within is not None and name.startswith("model.visual.")


def _place(template: Template, layer: int | None, stages: Sequence[int], pp: int) -> tuple[int, int]:
    """Sort key of a row: pipeline stage, then layer (the embedding before all layers, the head after)."""
    if layer is None:
        return (0, -1) if template.place == "first" else (pp - 1, len(stages))
    return stages[layer], layer


def _row(
    template: Template,
    layer: int | None,
    expert: int | None,
    model: Architecture,
    sizes: Mapping[str, int],
    stage: int,
    ep: int | None,
) -> Row:
    """``template`` with its layer and expert number and sizes filled in."""
    return Row(
        parameter=template.parameter.format(layer=layer, expert=expert),
        sources=tuple(
            Source(
                renamed(name, model).format(layer=layer, expert=expert),
                tuple(sizes[size] for size in shape),
                tuple(sizes[size] for size in stacked),
            )
            for name, shape, stacked in zip(
                template.sources, template.shapes, template.stacked or ((),) * len(template.sources), strict=True
            )
        ),
        split=template.split,
        groups=_GROUPS[template.grouped](model),
        stage=stage,
        layer=layer,
        expert=expert,
        ep=ep,
        float32=template.float32,
        exported=template.when != "tied",
    )
