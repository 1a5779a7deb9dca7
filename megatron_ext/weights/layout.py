"""How each Megatron parameter is made of slices of Hugging Face tensors: one table per family, every use derived from it.

A parameter split over TP holds, on rank ``r`` of ``tp``, the ``r``-th equal part of each of its sources along one dimension;
several sources are interleaved in groups: query, key and value rows per key-value head (``linear_qkv``), gate and up halves per
rank (``linear_fc1``). Loading, export, conversion and resharding plans all follow from :meth:`Row.slices`. No megatron here.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ext.architecture import Architecture


@dataclass(frozen=True)
class Template:
    """One line of a family's table; ``{layer}`` stands for the global layer number, sizes for :func:`_sizes`' keys."""

    parameter: str  # megatron-core's name (local layer spec)
    sources: tuple[str, ...]  # Hugging Face names, in the order in which they are interleaved
    shapes: tuple[tuple[str, ...], ...]  # full shape of each source
    split: int | None = None  # dimension divided over TP ranks; None: every TP rank holds the whole
    grouped: bool = False  # interleaved per key-value head rather than once per rank
    place: str = "layer"  # "first" stage | every "layer" | "last" stage
    head: str = "always"  # output layer: in which models the row exists: "always" | "untied" | "tied"


_ATTENTION = "decoder.layers.{layer}.self_attention."
_MLP = "decoder.layers.{layer}.mlp."
_HF = "model.layers.{layer}."
_QKV = tuple(_HF + f"self_attn.{name}_proj." for name in "qkv")

LLAMA = (
    Template(
        "embedding.word_embeddings.weight",
        ("model.embed_tokens.weight",),
        (("vocab", "hidden"),),
        split=0,
        place="first",
    ),
    Template("decoder.layers.{layer}.input_layernorm.weight", (_HF + "input_layernorm.weight",), (("hidden",),)),
    Template(
        _ATTENTION + "linear_qkv.weight",
        tuple(name + "weight" for name in _QKV),
        (("q", "hidden"), ("kv", "hidden"), ("kv", "hidden")),
        split=0,
        grouped=True,
    ),
    Template(_ATTENTION + "linear_proj.weight", (_HF + "self_attn.o_proj.weight",), (("hidden", "q"),), split=1),
    Template(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), (("hidden",),)
    ),
    Template(
        _MLP + "linear_fc1.weight",
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        (("ffn", "hidden"), ("ffn", "hidden")),
        split=0,
    ),
    Template(_MLP + "linear_fc2.weight", (_HF + "mlp.down_proj.weight",), (("hidden", "ffn"),), split=1),
    Template("decoder.final_layernorm.weight", ("model.norm.weight",), (("hidden",),), place="last"),
    Template("output_layer.weight", ("lm_head.weight",), (("vocab", "hidden"),), split=0, place="last", head="untied"),
    Template(
        "output_layer.weight",
        ("model.embed_tokens.weight",),
        (("vocab", "hidden"),),
        split=0,
        place="last",
        head="tied",
    ),
)
QWEN2 = (
    *LLAMA,
    Template(
        _ATTENTION + "linear_qkv.bias",
        tuple(name + "bias" for name in _QKV),
        (("q",), ("kv",), ("kv",)),
        split=0,
        grouped=True,
    ),
)
QWEN3 = (
    *LLAMA,
    Template(_ATTENTION + "q_layernorm.weight", (_HF + "self_attn.q_norm.weight",), (("head_dim",),)),
    Template(_ATTENTION + "k_layernorm.weight", (_HF + "self_attn.k_norm.weight",), (("head_dim",),)),
)
TABLES: Mapping[str, Sequence[Template]] = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}

# Tensors that some checkpoints carry beside the parameters: recomputed buffers, and the copy of a tied embedding.
IGNORED = ("*.rotary_emb.inv_freq",)
IGNORED_WHEN_TIED = ("lm_head.weight",)


@dataclass(frozen=True)
class Source:
    """One full Hugging Face tensor."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """``length`` entries along the split dimension, from ``source_start`` of a source and ``start`` of the local parameter."""

    source: int  # index in ``Row.sources``
    source_start: int
    start: int
    length: int


@dataclass(frozen=True)
class Row:
    """One Megatron parameter of one model: where it lives and what it is made of."""

    parameter: str  # with the global layer number
    sources: tuple[Source, ...]
    split: int | None
    groups: int  # interleaved groups in the whole parameter; 0: one per TP rank
    stage: int  # pipeline stage that holds it
    exported: bool = True  # False: a copy of another row's tensor (tied output layer of the last stage)

    @property
    def dim(self) -> int:
        """Dimension along which slices run."""
        return self.split or 0

    def shard_length(self, source: int, tp: int) -> int:
        """Entries of a source that each TP rank holds, padding included."""
        length = self.sources[source].shape[self.dim]
        return length if self.split is None else -(-length // tp)

    def local_shape(self, tp: int) -> tuple[int, ...]:
        """Shape of the parameter on each TP rank."""
        shape = list(self.sources[0].shape)
        shape[self.dim] = sum(self.shard_length(source, tp) for source in range(len(self.sources)))
        return tuple(shape)

    def slices(self, tp: int, rank: int) -> tuple[Slice, ...]:
        """The parameter on TP rank ``rank``, in order; entries that no slice covers are padding and hold 0."""
        rank = 0 if self.split is None else rank
        groups = max(1, self.groups // tp)
        slices, start = [], 0
        for group in range(groups):
            for index, source in enumerate(self.sources):
                length = self.shard_length(index, tp) // groups
                source_start = (rank * groups + group) * length
                covered = min(length, source.shape[self.dim] - source_start)
                if covered > 0:
                    slices.append(Slice(index, source_start, start, covered))
                start += length
        return tuple(slices)

    def __str__(self) -> str:
        sources = " + ".join(f"{source.name}{list(source.shape)}" for source in self.sources)
        return f"{self.parameter} = {sources}" + ("" if self.split is None else f", split over TP along {self.split}")


def rows(model: Architecture, pp: int = 1) -> tuple[Row, ...]:
    """Every parameter of ``model`` on ``pp`` stages, stage by stage: the order in which they are exported."""
    sizes = _sizes(model)
    found = []
    for template in TABLES[model.family.name]:
        if not _exists(template, model, pp):
            continue
        for layer in range(model.layers) if template.place == "layer" else (None,):
            found.append((_stage(template, layer, model, pp), _row(template, layer, model, sizes, pp)))
    return tuple(row for _, row in sorted(found, key=lambda item: item[0]))


def ignored(name: str, model: Architecture) -> bool:
    """Whether a Hugging Face tensor that no row uses may be passed over."""
    patterns = IGNORED + (IGNORED_WHEN_TIED if model.tied else ())
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _exists(template: Template, model: Architecture, pp: int) -> bool:
    """Whether ``model`` on ``pp`` stages has the parameter: a tied output layer is a parameter of its own only across stages."""
    return {"always": True, "untied": not model.tied, "tied": model.tied and pp > 1}[template.head]


def _stage(template: Template, layer: int | None, model: Architecture, pp: int) -> tuple[int, int]:
    """Sort key of a row: pipeline stage, then layer (the embedding before all layers, the head after)."""
    if layer is None:
        return (0, -1) if template.place == "first" else (pp - 1, model.layers)
    return layer // (model.layers // pp), layer


def _row(template: Template, layer: int | None, model: Architecture, sizes: Mapping[str, int], pp: int) -> Row:
    """``template`` with its layer number and sizes filled in."""
    return Row(
        parameter=template.parameter.format(layer=layer),
        sources=tuple(
            Source(name.format(layer=layer), tuple(sizes[size] for size in shape))
            for name, shape in zip(template.sources, template.shapes, strict=True)
        ),
        split=template.split,
        groups=model.kv_heads if template.grouped else 0,
        stage=_stage(template, layer, model, pp)[0],
        exported=template.head != "tied",
    )


def _sizes(model: Architecture) -> Mapping[str, int]:
    """The sizes that templates name."""
    return {
        "vocab": model.vocab,
        "hidden": model.hidden,
        "ffn": model.ffn,
        "q": model.heads * model.head_dim,
        "kv": model.kv_heads * model.head_dim,
        "head_dim": model.head_dim,
    }
