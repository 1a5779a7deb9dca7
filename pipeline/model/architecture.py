"""Reads a Hugging Face ``config.json``: returns the model's architecture, or every reason why it cannot be used.

The only reader of a ``config.json``: the configuration's check, the learner, the native engine, the converter and the
estimates all take an ``Architecture`` from here. A key that is absent means what transformers 5.12 takes for it.
No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

from pipeline.model.grid import Grid
from pipeline.model.reading import Fixed, ModelError, Refusal, Said
from pipeline.model.rope import ANY_ROPE, LongRope, RopeRules, Scaling, read_rope
from pipeline.units import FP8_BLOCK, round_up

VOCAB_MULTIPLE = 64  # to which SGLang pads a vocabulary


@dataclass(frozen=True)
class Moe:
    """A mixture of experts: which layers have one, and how tokens are routed."""

    layers: tuple[bool, ...]  # by layer: experts (True) or one dense feed-forward network
    experts: int
    ffn: int  # of one expert
    top_k: int
    shared_ffn: int = 0  # of all shared experts together; 0: none
    shared_gate: bool = False  # their output is multiplied by a gate's sigmoid (Qwen2-MoE)
    expert_bias: bool = False  # a correction bias on the router's scores (DeepSeek-V3, arXiv 2408.15664)
    sigmoid: bool = False  # score function of the router; else softmax
    normalize: bool = True  # the top_k probabilities are made to sum to one
    scaling: float = 1.0  # and multiplied by this
    groups: int = 1  # experts are chosen within the best top_groups of these
    top_groups: int = 1

    @property
    def chosen(self) -> float:
        """Share of the experts that a token goes through."""
        return self.top_k / self.experts


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

    q_lora: int  # 0: queries are not compressed
    kv_lora: int
    nope_dim: int  # of a head, without position
    rope_dim: int  # of a head, rotated
    v_dim: int


@dataclass(frozen=True)
class DeltaNet:
    """Gated delta nets (arXiv 2412.06464), which stand in for attention in some layers."""

    layers: tuple[bool, ...]  # by layer: a delta net (True) or attention
    key_heads: int  # of queries too
    value_heads: int  # a multiple of key_heads
    key_dim: int  # of a head
    value_dim: int  # of a head
    kernel: int  # tokens that the convolution before it sees

    @property
    def per_key(self) -> int:
        """Value heads that share a key head."""
        return self.value_heads // self.key_heads

    @property
    def channels(self) -> int:
        """Entries of all queries, keys and values of a token: channels of the convolution."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True)
class Window:
    """Sliding-window attention: in some layers a token sees the last tokens only."""

    layers: tuple[bool, ...]  # by layer: a window (True) or the whole row
    tokens: int  # that a token sees, itself among them


_ReadWindow = Callable[[Said, int], Window | None]


@dataclass(frozen=True)
class Switch:
    """A key of ``config.json`` that says whether a model has something."""

    key: str
    absent: bool = False  # what transformers takes where the key is absent

    def read(self, config: Mapping[str, Any]) -> bool:
        """Whether the model has it."""
        return bool(config.get(self.key, self.absent))


@dataclass(frozen=True)
class Family:
    """One entry of ``FAMILIES``: what sets a model family apart from Llama's decoder.

    Everything that the project knows of a dense family stands here: its parameters follow from the switches and names.
    """

    name: str  # model_type in config.json
    qkv_bias: bool | Switch = False  # biases on the query, key and value projections
    qk_norm: bool | Switch = False  # RMSNorm over each query and key head
    output_gate: bool = False  # attention's output is multiplied by a gate's sigmoid, which the query projection has
    zero_centred: bool = False  # norms multiply by 1 + weight
    biases: bool = False  # on attention's output, the router and the experts too
    sinks: bool = False  # each head attends to a learnt score beside the tokens'
    clamped: bool = False  # feed-forwards are gpt-oss's: both halves clamped, x sigmoid(1.702 x) of one, 1 + the other
    stacked: bool = False  # a folder has one tensor for all experts of a layer (pipeline.model.stacked)
    rope: RopeRules = ANY_ROPE
    head_dim: int | None = None  # where config.json has none; None: hidden_size / num_attention_heads
    kv_heads: int | None = None  # where config.json has none; None: as many as query heads
    fixed: tuple[Fixed, ...] = ()  # besides those of every family
    renamed: tuple[tuple[str, str], ...] = ()  # from Llama's names of tensors to this family's, replaced in this order
    aliases: tuple[str, ...] = ()  # other names that model_type gives to the same computation
    mla: bool = False  # latent attention
    moe: Callable[[Said, int], Moe] | None = None  # reads the experts, given the number of layers
    delta: Callable[[Said, int], DeltaNet] | None = None  # reads the delta nets, given the number of layers
    window: _ReadWindow | None = None  # reads the sliding window, given the number of layers
    ahead: str | None = None  # how names of multi-token-prediction layers begin; None: with the numbers after the last
    delta_apart: bool = False  # a delta net's gates, and what it multiplies by, have projections of their own
    within: str | None = None  # model_type of models that also see, and have one of this family as their text_config


def _qwen_moe(said: Said, layers: int) -> Moe:
    config = said.config
    # transformers 5 may write num_local_experts instead.
    experts = said.count("num_local_experts" if config.get("num_local_experts") is not None else "num_experts")
    ffn, top_k = said.count("moe_intermediate_size"), said.count("num_experts_per_tok")
    step, dense = said.count("decoder_sparse_step", 1), set(config.get("mlp_only_layers") or ())
    return Moe(
        layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers)),
        experts=experts,
        ffn=ffn,
        top_k=top_k,
        normalize=bool(config.get("norm_topk_prob", False)),
    )


def _qwen2_moe(said: Said, layers: int) -> Moe:
    return replace(_qwen_moe(said, layers), shared_ffn=said.count("shared_expert_intermediate_size"), shared_gate=True)


def _qwen3_next_moe(said: Said, layers: int) -> Moe:
    return replace(_qwen2_moe(said, layers), normalize=bool(said.config.get("norm_topk_prob", True)))


def _qwen3_5_moe(said: Said, layers: int) -> Moe:
    """transformers has experts in every layer, and no key of ``norm_topk_prob``."""
    return replace(_qwen2_moe(said, layers), layers=(True,) * layers, normalize=True)


def _qwen3_next_delta(said: Said, layers: int) -> DeltaNet:
    interval = said.count("full_attention_interval", 4)
    usual = tuple((layer + 1) % interval != 0 for layer in range(layers))
    nets = _layers_of(said, "linear_attention", usual)
    defaults = {"num_key_heads": 16, "num_value_heads": 32, "key_head_dim": 128, "value_head_dim": 128}
    keys, values, key_dim, value_dim = (said.count(f"linear_{key}", absent) for key, absent in defaults.items())
    kernel = said.count("linear_conv_kernel_dim", 4)
    if values % keys:
        said.refuse(f"linear_num_value_heads={values} is not a multiple of linear_num_key_heads={keys}")
    return DeltaNet(nets, keys, values, key_dim, value_dim, kernel)


def _layers_of(said: Said, kind: str, usual: tuple[bool, ...]) -> tuple[bool, ...]:
    """Whether each layer is of ``kind`` and not of full attention; ``usual``: where there is no ``layer_types``."""
    kinds = said.config.get("layer_types")
    if kinds is None:
        return usual
    if not isinstance(kinds, list) or len(kinds) != len(usual) or {*kinds} - {"full_attention", kind}:
        said.refuse(
            f"layer_types={kinds!r} is not supported: it needs one of full_attention and {kind} for each of "
            f"num_hidden_layers={len(usual)}"
        )
        return usual
    return tuple(each == kind for each in kinds)


def _window_of_all(said: Said, layers: int, absent: int | None) -> Window | None:
    """The same in all layers; ``absent``: its tokens where the key is absent."""
    _refuse_other_layers(said)
    if said.config.get("sliding_window", absent) is None:
        return None
    return Window((True,) * layers, said.count("sliding_window", absent))


def _if_used(read: _ReadWindow) -> _ReadWindow:
    """Qwen's switch ``use_sliding_window``, off where it is absent."""

    @wraps(read)  # its name, too, by which it is pickled
    def window(said: Said, layers: int) -> Window | None:
        if said.config.get("use_sliding_window") and said.config.get("sliding_window", 4096) is not None:
            return read(said, layers)
        _refuse_other_layers(said)
        return None

    return window


@_if_used
def _qwen_window(said: Said, layers: int) -> Window:
    """Of the layers from ``max_window_layers`` on."""
    first = said.count("max_window_layers", 28, least=0)
    usual = tuple(layer >= first for layer in range(layers))
    return Window(_layers_of(said, "sliding_attention", usual), said.count("sliding_window", 4096))


@_if_used
def _qwen2_moe_window(said: Said, layers: int) -> Window:
    """Of every other layer before ``max_window_layers``: so it stands in transformers."""
    end = said.count("max_window_layers", 28, least=0)
    usual = tuple(layer % 2 == 0 and layer < end for layer in range(layers))
    return Window(_layers_of(said, "sliding_attention", usual), said.count("sliding_window", 4096))


@_if_used
def _qwen3_moe_window(said: Said, layers: int) -> Window | None:
    """transformers does not read ``max_window_layers`` here."""
    return _window_of_all(said, layers, 4096)


def _gpt_oss_window(said: Said, layers: int) -> Window:
    usual = tuple(layer % 2 == 0 for layer in range(layers))
    return Window(_layers_of(said, "sliding_attention", usual), said.count("sliding_window", 128))


def _mixtral_moe(said: Said, layers: int) -> Moe:
    experts, ffn, top_k = map(said.count, ("num_local_experts", "intermediate_size", "num_experts_per_tok"))
    return Moe(layers=(True,) * layers, experts=experts, ffn=ffn, top_k=top_k)


def _deepseek_moe(said: Said, layers: int) -> Moe:
    experts, ffn, top_k = map(said.count, ("n_routed_experts", "moe_intermediate_size", "num_experts_per_tok"))
    counts = ("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace")
    shared, groups, top_groups, first = (said.count(key, least=0) for key in counts)
    scaling = said.number("routed_scaling_factor")
    said.check()
    if bool(said.config.get("norm_topk_prob", True)) != (top_k > 1):
        said.refuse(
            f"{said.quote('norm_topk_prob', True)} with num_experts_per_tok={top_k} is not supported: megatron-core "
            "normalises sigmoid scores where it takes several experts, and only there",
            "use a model that normalises the scores of several experts, as DeepSeek-V3 does",
        )
    if groups > 1 and top_k != 2 * top_groups:
        said.refuse(
            f"num_experts_per_tok={top_k} with n_group={groups}, topk_group={top_groups} is not supported: "
            f"megatron-core ranks groups as DeepSeek-V3 does only at num_experts_per_tok={2 * top_groups}",
            "use a model with num_experts_per_tok = 2 x topk_group, as DeepSeek-V3's",
        )
    return Moe(
        layers=tuple(layer >= first for layer in range(layers)),
        experts=experts,
        ffn=ffn,
        top_k=top_k,
        shared_ffn=shared * ffn,
        expert_bias=True,
        sigmoid=True,
        scaling=scaling,
        groups=max(1, groups),
        top_groups=max(1, top_groups),
    )


_FIXED = (
    Fixed("hidden_act", "silu", "only the gated SiLU feed-forward is built"),
    Fixed("mlp_bias", False, "feed-forward biases are not built"),
)
_NO_WINDOW = Fixed("use_sliding_window", False, "a sliding window of this family is not built")
_NO_BIAS = Fixed("attention_bias", False, "biases of attention's output are not built")
_ROUTER = (
    Fixed("topk_method", "noaux_tc", "other ways of choosing experts are not built"),
    Fixed("scoring_func", "sigmoid", "other router scores are not built"),
)
_DEEPSEEK = (
    *_ROUTER,
    Fixed("rope_interleave", True, "megatron-core's latent attention takes rotary pairs interleaved"),
    Fixed("moe_layer_freq", 1, "transformers has experts in every layer from first_k_dense_replace on"),
)
_GPT_OSS = (
    Fixed("attention_bias", True, "attention is built with its biases"),
    Fixed("swiglu_limit", 7.0, "transformers clamps feed-forwards at 7, whatever this says"),
)
_MIXTRAL_NAMES = (
    ("mlp.", "block_sparse_moe."),
    (".gate_proj.", ".w1."),
    (".up_proj.", ".w3."),
    (".down_proj.", ".w2."),
)

_QWEN3_NEXT = Family(
    "qwen3_next",
    qk_norm=True,
    output_gate=True,
    zero_centred=True,
    rope=RopeRules(partial=0.25),
    head_dim=256,
    kv_heads=2,
    renamed=((".shared_experts.", ".shared_expert."),),
    moe=_qwen3_next_moe,
    delta=_qwen3_next_delta,
    ahead="mtp.",
)

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("mistral", kv_heads=8, window=partial(_window_of_all, absent=4096)),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, kv_heads=32, window=_qwen_window),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, head_dim=128, kv_heads=32, window=_qwen_window),
    "MixtralForCausalLM": Family(
        "mixtral",
        rope=RopeRules(theta=1e6),
        kv_heads=8,
        window=partial(_window_of_all, absent=None),
        renamed=_MIXTRAL_NAMES,
        moe=_mixtral_moe,
    ),
    "Qwen2MoeForCausalLM": Family(
        "qwen2_moe",
        qkv_bias=Switch("qkv_bias", absent=True),
        kv_heads=16,
        renamed=((".shared_experts.", ".shared_expert."),),
        moe=_qwen2_moe,
        window=_qwen2_moe_window,
    ),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", qk_norm=True, kv_heads=4, moe=_qwen_moe, window=_qwen3_moe_window),
    "Qwen3NextForCausalLM": _QWEN3_NEXT,
    "Qwen3_5ForCausalLM": replace(
        _QWEN3_NEXT, name="qwen3_5_text", within="qwen3_5", kv_heads=4, moe=None, delta_apart=True
    ),
    "Qwen3_5MoeForCausalLM": replace(
        _QWEN3_NEXT, name="qwen3_5_moe_text", within="qwen3_5_moe", moe=_qwen3_5_moe, delta_apart=True
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        qkv_bias=True,
        biases=True,
        sinks=True,
        clamped=True,
        stacked=True,
        rope=RopeRules(theta=150_000.0, required=True),
        head_dim=64,
        kv_heads=8,
        fixed=_GPT_OSS,
        renamed=((".mlp.gate.", ".mlp.router."),),
        moe=_mixtral_moe,
        window=_gpt_oss_window,
    ),
    "Glm4MoeForCausalLM": Family(
        "glm4_moe",
        qkv_bias=Switch("attention_bias"),
        qk_norm=Switch("use_qk_norm"),
        rope=RopeRules(partial=0.5),
        kv_heads=8,
        fixed=_ROUTER,
        moe=_deepseek_moe,
    ),
    "DeepseekV3ForCausalLM": Family(
        "deepseek_v3",
        rope=RopeRules(kinds=("default", "yarn"), latent=True),
        kv_heads=128,
        fixed=_DEEPSEEK,
        aliases=("kimi_k2",),
        mla=True,
        moe=_deepseek_moe,
    ),
}


@dataclass(frozen=True)
class Architecture:
    """Sizes and switches of one decoder-only model."""

    family: Family
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int  # entries of the Hugging Face embedding
    max_positions: int  # of a row, at most; with LongRoPE those for which the frequencies hold
    norm_eps: float
    rope_theta: float
    rope_scaling: Scaling | None  # None: plain rotary embedding
    tied: bool  # the output layer is the embedding
    moe: Moe | None = None
    mla: Mla | None = None
    delta: DeltaNet | None = None
    window: Window | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    partial_rotary: float = 1.0  # share of a head that is rotated, its first entries
    extra_layers: int = 0  # multi-token-prediction layers stored after the last one (DeepSeek-V3); left out

    def record(self) -> dict[str, Any]:
        """The fields as JSON has them, the family by its name: what a checkpoint remembers of its model."""
        fields = asdict(self) | {"family": self.family.name}
        return dict(json.loads(json.dumps(fields)))

    @property
    def native(self) -> bool:
        """Whether the native engine has a decoder of its own for it.

        That takes heads that are rotated whole and see the whole row, and experts that are chosen by their softmax
        alone.
        """
        moe, plain = self.moe, self.mla is None and self.delta is None and self.window is None
        whole = plain and self.partial_rotary == 1 and not self.family.sinks
        return whole and (moe is None or not (moe.sigmoid or moe.shared_ffn or moe.groups > 1))

    @property
    def rotary_dim(self) -> int:
        """Entries of a head that are rotated; with latent attention those that have a projection of their own."""
        return self.mla.rope_dim if self.mla else int(self.head_dim * self.partial_rotary)

    def is_moe(self, layer: int | None) -> bool:
        """Whether a layer has experts."""
        return self.moe is not None and layer is not None and self.moe.layers[layer]

    def is_delta(self, layer: int | None) -> bool:
        """Whether a layer has a delta net, not attention."""
        return self.delta is not None and layer is not None and self.delta.layers[layer]

    @property
    def attention_layers(self) -> int:
        """Layers that have attention."""
        return self.layers - (sum(self.delta.layers) if self.delta else 0)

    @property
    def query_rows(self) -> int:
        """Rows of the query projection, with the gate's."""
        return (1 + self.family.output_gate) * self.heads * self.head_dim

    def sizes(self) -> Mapping[str, int]:
        """The dimensions of parameters, by the names that layout templates use."""
        sizes = {
            "one": 1,
            "vocab": self.vocab,
            "hidden": self.hidden,
            "ffn": self.ffn,
            "queries": self.query_rows,
            "q": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "head_dim": self.head_dim,
            "heads": self.heads,
        }
        if self.moe:
            sizes |= {"experts": self.moe.experts, "expert_ffn": self.moe.ffn, "shared_ffn": self.moe.shared_ffn}
        if self.delta:
            values = self.delta.value_heads * self.delta.value_dim
            sizes |= {
                "delta_in": self.delta.channels + values,
                "delta_keys": self.delta.key_heads * self.delta.key_dim,
                "delta_gates": 2 * self.delta.value_heads,
                "delta_channels": self.delta.channels,
                "delta_kernel": self.delta.kernel,
                "delta_heads": self.delta.value_heads,
                "delta_head": self.delta.value_dim,
                "delta_out": values,
            }
        if self.mla:
            sizes |= {
                "q_lora": self.mla.q_lora,
                "kv_lora": self.mla.kv_lora,
                "kv_lora_rope": self.mla.kv_lora + self.mla.rope_dim,
                "mla_q": self.heads * (self.mla.nope_dim + self.mla.rope_dim),
                "mla_kv": self.heads * (self.mla.nope_dim + self.mla.v_dim),
                "mla_o": self.heads * self.mla.v_dim,
            }
        return sizes

    def padded_vocab(self, tp: int) -> int:
        """Vocabulary rounded up to a multiple of ``tp``; the added rows are zero and never sampled or exported."""
        return round_up(self.vocab, tp)

    def divisions(self, tp: int, expert_tp: int, ep: int) -> Iterator[tuple[str, int, int, str]]:
        """What parallel sizes must divide: (name of the size, size, dimension, what the dimension is).

        Key-value heads may be fewer than ``tp`` ranks if they divide ``tp``: several ranks then share a head.
        """
        yield "tp", tp, self.heads, "attention heads"
        if not all(self.is_moe(layer) for layer in range(self.layers)):
            yield "tp", tp, self.ffn, "feed-forward columns"
        if not self.mla:
            if tp % self.kv_heads:
                yield "tp", tp, self.kv_heads, "key-value heads"
            yield "tp", tp, self.query_rows + 2 * self.kv_heads * self.head_dim, "query, key and value rows"
        if self.delta:
            yield "tp", tp, self.delta.key_heads, "key heads of delta nets"
        if self.moe:
            yield "tp", tp, self.moe.shared_ffn, "shared experts' columns"
            yield "etp", expert_tp, self.moe.ffn, "feed-forward columns of an expert"
            yield "ep", ep, self.moe.experts, "experts"

    def engine_limits(self, tp: int, ep: int) -> Iterator[tuple[str, str]]:
        """Why the ``tp`` ranks of an SGLang server cannot hold the model, its experts on ``ep`` groups of them.

        Each as (name of the size, problem). The rules are those of ``pipeline.reshard.engine_grid``.
        """
        if ep < 1 or tp % ep:
            yield "ep", f"ep={ep} does not divide tp={tp}: choose a divisor of tp"
            return
        padded = round_up(self.vocab, VOCAB_MULTIPLE)
        parts = [
            ("tp", tp, "num_attention_heads", self.heads),
            ("tp", tp, f"the vocabulary padded to a multiple of {VOCAB_MULTIPLE}", padded),
        ]
        if not all(self.is_moe(layer) for layer in range(self.layers)):
            parts.append(("tp", tp, "intermediate_size", self.ffn))
        if self.moe:
            parts += [
                ("ep", ep, "the number of experts", self.moe.experts),
                ("tp / ep", tp // ep, "moe_intermediate_size", self.moe.ffn),
                ("tp", tp, "the width of the shared experts", self.moe.shared_ffn),
            ]
        elif ep > 1:
            yield "ep", f"ep={ep}: the model has no experts; leave ep out"
        for name, parts_of, what, size in parts:
            if size % parts_of:
                yield name, f"{name}={parts_of} does not divide {what}={size}: choose a divisor"
        if self.delta and tp > 1:
            problem = "SGLang divides the convolution of a delta net into parts of its queries, keys and values"
            yield "tp", f"tp={tp}: {problem}, and an update brings it whole; use tp=1"
        if not self.mla and tp % self.kv_heads and self.kv_heads % tp:
            problem = f"neither a divisor nor a multiple of num_key_value_heads={self.kv_heads}"
            yield "tp", f"tp={tp} is {problem}: choose one"

    def check_layout(self, grid: Grid) -> None:
        """Raise ``ValueError`` where the model cannot be cut so."""
        if grid.ep > 1 and not self.moe:
            raise ValueError(f"expert-parallel size (ep)={grid.ep}: a {self.family.name} model has no experts; use 1")
        if grid.cp > 1 and self.delta:
            raise ValueError(
                f"learner.context_parallel_size={grid.cp} is not supported for {self.family.name}: the state of a "
                "delta net passes from token to token through the whole row; use 1"
            )
        cuts = list(self.divisions(grid.tp, grid.expert_tp, grid.ep))
        if grid.first_stage_layers is None and grid.last_stage_layers is None:
            cuts.append(("pp", grid.pp, self.layers, "layers"))
        for name, size, dimension, what in cuts:
            if dimension % size:
                key = _SIZES[name]
                raise ValueError(f"{key}={size} does not divide the model's {dimension} {what}: choose a divisor")
        grid.chunks(self.layers)


_SIZES = {
    "tp": "learner.tensor_model_parallel_size",
    "pp": "learner.pipeline_model_parallel_size",
    "etp": "expert tensor-parallel size (etp)",
    "ep": "expert-parallel size (ep)",
}


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a Hugging Face folder, or what it says of its model of text (``of_text``).

    Raises ``ModelError`` where there is none.
    """
    return of_text(read_whole_config(folder))


def of_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``config.json`` says of the model of text: its ``text_config``, where the model also sees.

    What stands beside ``text_config`` counts for the whole model. Any other ``config.json`` is given back.
    """
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return dict(config)
    for name, family in FAMILIES.items():
        if family.within is not None and config.get("model_type") == family.within:
            shared = {key: config[key] for key in ("tie_word_embeddings", "quantization_config") if key in config}
            named = config.get("architectures")
            seeing = [name.replace("ForCausalLM", "ForConditionalGeneration")]
            return {**inner, **shared, "architectures": [name] if named == seeing else named, "model_type": family.name}
    return dict(config)


def read_whole_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a Hugging Face folder as it stands. Raises ``ModelError`` where there is none."""
    path = folder / "config.json"
    where = "a Hugging Face model folder is needed: download or convert the model first"
    if not path.is_file():
        problem = "this folder has no config.json" if folder.is_dir() else "no such folder"
        raise ModelError([Refusal(problem, where)], str(folder))
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        problem = f"config.json is not JSON: {error}"
        raise ModelError([Refusal(problem, "restore the model folder")], str(folder)) from error
    if not isinstance(config, dict):
        raise ModelError([Refusal("config.json is not a JSON object", "restore the model folder")], str(folder))
    return config


def stored_dtype(config: Mapping[str, Any]) -> str:
    """The type that a ``config.json`` names for its weights, e.g. "float32"; of one that names none, bfloat16."""
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def read(folder: Path) -> Architecture:
    """The architecture of a Hugging Face folder; see ``parse``."""
    config = read_config(folder)
    try:
        return parse(config)
    except ModelError as error:
        raise ModelError(error.refusals, str(folder)) from error


def parse(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a ``config.json`` describes, as transformers 4 or 5 writes it.

    Raises ``ModelError`` with everything that is not supported or not there: key, value and remedy.
    """
    config = of_text(config)
    family = _family(config)
    said = Said(config)
    absent = (*(() if family.qkv_bias else (_NO_BIAS,)), *(() if family.window else (_NO_WINDOW,)))
    said.fixed((*_FIXED, *family.fixed, *absent))
    _refuse_quantised(said, family)
    if not family.delta and not family.window:
        _refuse_other_layers(said)
    layers, hidden = map(said.count, ("num_hidden_layers", "hidden_size"))
    heads, vocab, positions = map(said.count, ("num_attention_heads", "vocab_size", "max_position_embeddings"))
    norm_eps = said.number("rms_norm_eps")
    mla = _mla(said) if family.mla else None
    moe = family.moe(said, layers) if family.moe else None
    ffn = said.count("intermediate_size", 0 if moe and all(moe.layers) else None)  # of the layers without experts
    delta = family.delta(said, layers) if family.delta else None
    window = family.window(said, layers) if family.window else None
    said.check()
    kv_heads, head_dim = _heads(said, family, heads, hidden)
    rope = read_rope(said, family.rope, positions, mla.rope_dim if mla else head_dim)
    said.check()
    return Architecture(
        family=family,
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        max_positions=min(positions, rope.scaling.original_positions)
        if isinstance(rope.scaling, LongRope)
        else positions,
        norm_eps=norm_eps,
        rope_theta=rope.theta,
        rope_scaling=rope.scaling,
        tied=bool(config.get("tie_word_embeddings", False)),
        moe=moe,
        mla=mla,
        delta=delta,
        window=window if window and any(window.layers) and window.tokens < positions else None,
        qkv_bias=_has(family.qkv_bias, config),
        qk_norm=_has(family.qk_norm, config),
        partial_rotary=rope.partial,
        extra_layers=said.count("num_nextn_predict_layers", 0, least=0),
    )


def _has(switch: bool | Switch, config: Mapping[str, Any]) -> bool:
    return switch.read(config) if isinstance(switch, Switch) else switch


def _family(config: Mapping[str, Any]) -> Family:
    kind, named = config.get("model_type"), config.get("architectures")
    known = {kind: name for name, family in FAMILIES.items() for kind in (family.name, *family.aliases)}
    if not isinstance(kind, str) or kind not in known:
        seeing = [family.within for family in FAMILIES.values() if family.within]
        remedy = f"use a model of one of the families {', '.join([*known, *seeing])}"
        raise ModelError([Refusal(f"config.json: model_type {kind!r} is not supported", remedy)])
    if not isinstance(named, list) or named[:1] != [known[kind]]:
        problem = f"config.json: architectures {named!r} is not supported for model_type {kind!r}"
        raise ModelError([Refusal(problem, f"use a causal language model: architectures [{known[kind]!r}]")])
    return FAMILIES[known[kind]]


def _refuse_quantised(said: Said, family: Family) -> None:
    """Of quantised folders those are read whose matrices are FP8 codes in blocks, as DeepSeek-V3's, or whose stacked
    experts are MXFP4 codes, as gpt-oss's.
    """
    quantised = said.config.get("quantization_config")
    read = stored_in_mxfp4(said.config) if family.stacked else stored_in_fp8(said.config)
    if quantised is not None and not read:
        described = quantised if isinstance(quantised, dict) else {"quant_method": quantised}
        named = ", ".join(f"{key} {described.get(key)!r}" for key in ("quant_method", "weight_block_size"))
        codes = f"FP8 codes (quant_method 'fp8') in blocks of [{FP8_BLOCK}, {FP8_BLOCK}]"
        if family.stacked:
            codes = "MXFP4 codes (quant_method 'mxfp4') of experts"
        said.refuse(
            f"quantization_config ({named}) is not supported: weights in 16 or 32 bits are read, and {codes}",
            "give the folder of the same model in 16 or 32 bits; where its tensors are that, "
            "remove quantization_config",
        )


def _refuse_other_layers(said: Said) -> None:
    kinds = said.config.get("layer_types")
    if others := sorted({str(kind) for kind in kinds or ()} - {"full_attention"}):
        said.refuse(f"layer_types with {', '.join(others)} is not supported", "use a model of full attention alone")


def stored_in_fp8(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` says that its folder holds matrices as FP8 codes in blocks, which are read."""
    quantised = config.get("quantization_config")
    return (
        isinstance(quantised, dict)
        and quantised.get("quant_method") == "fp8"
        and quantised.get("weight_block_size") == [FP8_BLOCK, FP8_BLOCK]
    )


def stored_in_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` says that its folder holds experts as MXFP4 codes."""
    quantised = config.get("quantization_config")
    return isinstance(quantised, dict) and quantised.get("quant_method") == "mxfp4"


def _heads(said: Said, family: Family, heads: int, hidden: int) -> tuple[int, int]:
    """Key-value heads and the size of a head; of an absent key what the family's own configuration class takes."""
    config = said.config
    default = family.kv_heads if family.kv_heads and "num_key_value_heads" not in config else heads
    kv_heads = said.count("num_key_value_heads", default)
    if heads % kv_heads:
        quoted = said.quote("num_key_value_heads", kv_heads)
        said.refuse(f"{quoted} does not divide num_attention_heads={heads}")
    if config.get("head_dim") is None and family.head_dim is None and hidden % heads and not family.mla:
        said.refuse(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}, and there is no head_dim")
    return kv_heads, said.count("head_dim", family.head_dim or max(1, hidden // heads))


def _mla(said: Said) -> Mla:
    sizes = map(said.count, ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    return Mla(said.count("q_lora_rank", 0, least=0), *sizes)
