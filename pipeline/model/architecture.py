"""Reads a Hugging Face ``config.json``: returns the model's architecture, or every reason why it cannot be used.

The only reader of a ``config.json``: the configuration's check, the learner, the native engine, the converter and the
estimates all take an :class:`Architecture` from here. A key that is absent means what transformers 5.12 takes for it.
No torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.model.grid import Grid


@dataclass(frozen=True)
class Refusal:
    """One reason why a model cannot be used."""

    problem: str  # what is wrong, one sentence
    remedy: str  # what to do, one sentence


class ModelError(ValueError):
    """A model, or a folder of one, that cannot be used. Holds every refusal found; its text shows them all."""

    def __init__(self, refusals: Sequence[Refusal], where: str = "") -> None:
        """``where``: the folder or file that is refused."""
        super().__init__(refusals, where)
        self.refusals = tuple(refusals)
        self.where = where

    def __str__(self) -> str:
        text = "; ".join(f"{refusal.problem}: {refusal.remedy}" for refusal in self.refusals)
        return f"{self.where}: {text}" if self.where else text


@dataclass(frozen=True)
class Fixed:
    """A key of ``config.json`` of which one value alone is built."""

    key: str
    value: Any
    why: str
    absent: Any = ...  # what transformers takes where the key is absent; ...: ``value``

    def refusal(self, config: Mapping[str, Any]) -> Refusal | None:
        """Why ``config`` is refused, or ``None``."""
        given = config.get(self.key, self.value if self.absent is ... else self.absent)
        if given == self.value:
            return None
        said = f"{self.key}={given!r}"
        if self.key not in config:
            said = f"{self.key}, which is absent and then {given!r},"
        wanted = "null" if self.value is None else repr(self.value)
        return Refusal(
            f"config.json: {said} is not supported: {self.why}", f"use a model in which {self.key} is {wanted}"
        )


@dataclass(frozen=True)
class Moe:
    """A mixture of experts: which layers have one, and how tokens are routed."""

    layers: tuple[bool, ...]  # by layer: experts (True) or one dense feed-forward network
    experts: int
    ffn: int  # of one expert
    top_k: int
    shared_ffn: int = 0  # of all shared experts together; 0: none
    expert_bias: bool = False  # a correction bias on the router's scores (DeepSeek-V3, arXiv 2408.15664)
    sigmoid: bool = False  # score function of the router; else softmax
    normalize: bool = True  # the top_k probabilities are made to sum to one
    scaling: float = 1.0  # and multiplied by this
    groups: int = 1  # experts are chosen within the best top_groups of these
    top_groups: int = 1


@dataclass(frozen=True)
class LinearScaling:
    """Linear rotary scaling: every frequency divided by ``factor`` (arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's rotary scaling.

    Long wavelengths are divided by ``factor``, short ones kept, those between interpolated.
    """

    factor: float
    low: float  # low_freq_factor
    high: float  # high_freq_factor
    original_positions: int


@dataclass(frozen=True)
class Yarn:
    """YaRN rotary scaling (arXiv 2309.00071) with DeepSeek's two magnitudes."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

    q_lora: int  # 0: queries are not compressed
    kv_lora: int
    nope_dim: int  # of a head, without position
    rope_dim: int  # of a head, rotated
    v_dim: int


class _Said:
    """A ``config.json`` while it is read: hands out checked values and collects every refusal."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self._missing: list[str] = []
        self._refusals: list[Refusal] = []

    def refuse(self, problem: str, remedy: str = "restore the model folder") -> None:
        """Note a refusal; :meth:`check` raises it."""
        self._refusals.append(Refusal(f"config.json: {problem}", remedy))

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least ``least``; where it is absent or null ``default``, or a refusal."""
        value = self.config.get(key)
        if value is None:
            if default is None:
                self._missing.append(key)
            return least if default is None else default
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.refuse(f"{key}={value!r} is not a whole number of at least {least}")
            return least
        return value

    def number(self, key: str) -> float:
        """A finite number above 0."""
        value: Any = self.config.get(key)
        if _positive(value):
            return float(value)
        if value is None:
            self._missing.append(key)
        else:
            self.refuse(f"{key}={value!r} is not a number above 0")
        return 1.0

    def quote(self, key: str, default: Any) -> str:
        """A key as ``config.json`` has it, or what its absence means."""
        return f"{key}={self.config[key]!r}" if key in self.config else f"{key} (absent, so {default!r})"

    def fixed(self, rules: Sequence[Fixed]) -> None:
        """Refuse every value that is not the one that is built."""
        self._refusals += [refusal for rule in rules if (refusal := rule.refusal(self.config))]

    def check(self) -> None:
        """Raise ``ModelError`` if anything was refused."""
        if self._missing:
            said = Refusal(f"config.json does not say {', '.join(self._missing)}", "restore the model folder")
            self._refusals.append(said)
        if self._refusals:
            raise ModelError(self._refusals)


@dataclass(frozen=True)
class Family:
    """One entry of ``FAMILIES``: what sets a model family apart from Llama's decoder.

    Everything that the project knows of a dense family stands here: its parameters follow from the switches and names.
    """

    name: str  # model_type in config.json
    qkv_bias: bool = False  # biases on the query, key and value projections
    qk_norm: bool = False  # RMSNorm over each query and key head
    rope: tuple[str, ...] = ("default", "linear", "llama3")  # rotary scalings that are built
    head_dim: int | None = None  # where config.json has none; None: hidden_size / num_attention_heads
    kv_heads: int | None = None  # where config.json has none; None: as many as query heads
    fixed: tuple[Fixed, ...] = ()  # besides those of every family
    renamed: tuple[tuple[str, str], ...] = ()  # from Llama's names of tensors to this family's, replaced in this order
    mla: bool = False  # latent attention
    moe: Callable[[_Said, int], Moe] | None = None  # reads the experts, given the number of layers


def _qwen3_moe(said: _Said, layers: int) -> Moe:
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


def _deepseek_moe(said: _Said, layers: int) -> Moe:
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
    Fixed("use_sliding_window", False, "sliding-window attention is not built"),
)
_NO_BIAS = Fixed("attention_bias", False, "biases of attention's output are not built")
_DEEPSEEK = (
    Fixed("topk_method", "noaux_tc", "other ways of choosing experts are not built"),
    Fixed("scoring_func", "sigmoid", "other router scores are not built"),
    Fixed("rope_interleave", True, "megatron-core's latent attention takes rotary pairs interleaved"),
    Fixed("moe_layer_freq", 1, "transformers has experts in every layer from first_k_dense_replace on"),
)
_WINDOW = Fixed("sliding_window", None, "sliding-window attention is not built", absent=4096)

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("mistral", kv_heads=8, fixed=(_WINDOW,)),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, kv_heads=32),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, head_dim=128, kv_heads=32),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", qk_norm=True, kv_heads=4, moe=_qwen3_moe),
    "DeepseekV3ForCausalLM": Family(
        "deepseek_v3", rope=("default", "yarn"), kv_heads=128, fixed=_DEEPSEEK, mla=True, moe=_deepseek_moe
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
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: LinearScaling | Llama3Scaling | Yarn | None  # None: plain rotary embedding
    tied: bool  # the output layer is the embedding
    moe: Moe | None = None
    mla: Mla | None = None
    extra_layers: int = 0  # multi-token-prediction layers stored after the last one (DeepSeek-V3); left out

    def record(self) -> dict[str, Any]:
        """The fields as JSON has them, the family by its name: what a checkpoint remembers of its model."""
        fields = asdict(self) | {"family": self.family.name}
        return dict(json.loads(json.dumps(fields)))

    @property
    def native(self) -> bool:
        """Whether the native engine computes it: plain attention, and experts chosen by their softmax alone."""
        moe = self.moe
        return self.mla is None and (moe is None or not (moe.sigmoid or moe.shared_ffn or moe.groups > 1))

    def is_moe(self, layer: int | None) -> bool:
        """Whether a layer has experts."""
        return self.moe is not None and layer is not None and self.moe.layers[layer]

    def sizes(self) -> Mapping[str, int]:
        """The dimensions of parameters, by the names that layout templates use."""
        sizes = {
            "vocab": self.vocab,
            "hidden": self.hidden,
            "ffn": self.ffn,
            "q": self.heads * self.head_dim,
            "kv": self.kv_heads * self.head_dim,
            "head_dim": self.head_dim,
        }
        if self.moe:
            sizes |= {"experts": self.moe.experts, "expert_ffn": self.moe.ffn, "shared_ffn": self.moe.shared_ffn}
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
        return -(-self.vocab // tp) * tp

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
            yield "tp", tp, (self.heads + 2 * self.kv_heads) * self.head_dim, "query, key and value rows"
        if self.moe:
            yield "tp", tp, self.moe.shared_ffn, "shared experts' columns"
            yield "etp", expert_tp, self.moe.ffn, "feed-forward columns of an expert"
            yield "ep", ep, self.moe.experts, "experts"

    def check_layout(self, grid: Grid) -> None:
        """Raise ``ValueError`` where the model cannot be cut so."""
        if grid.ep > 1 and not self.moe:
            raise ValueError(f"expert-parallel size (ep)={grid.ep}: a {self.family.name} model has no experts; use 1")
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


def read(folder: Path) -> Architecture:
    """The architecture of a Hugging Face folder; see :func:`parse`."""
    config = read_config(folder)
    try:
        return parse(config)
    except ModelError as error:
        raise ModelError(error.refusals, str(folder)) from error


def parse(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a ``config.json`` describes, as transformers 4 or 5 writes it.

    Raises ``ModelError`` with everything that is not supported or not there: key, value and remedy.
    """
    family = _family(config)
    said = _Said(config)
    said.fixed((*_FIXED, *family.fixed, *(() if family.qkv_bias else (_NO_BIAS,))))
    _refuse_quantised(said)
    layers, hidden, ffn = map(said.count, ("num_hidden_layers", "hidden_size", "intermediate_size"))
    heads, vocab, positions = map(said.count, ("num_attention_heads", "vocab_size", "max_position_embeddings"))
    norm_eps = said.number("rms_norm_eps")
    mla = _mla(said) if family.mla else None
    moe = family.moe(said, layers) if family.moe else None
    said.check()
    kv_heads, head_dim = _heads(said, family, heads, hidden)
    theta, scaling = _rope(said, family, positions)
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
        max_positions=positions,
        norm_eps=norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        tied=bool(config.get("tie_word_embeddings", False)),
        moe=moe,
        mla=mla,
        extra_layers=said.count("num_nextn_predict_layers", 0, least=0),
    )


def _family(config: Mapping[str, Any]) -> Family:
    kind, named = config.get("model_type"), config.get("architectures")
    known = {family.name: name for name, family in FAMILIES.items()}
    if not isinstance(kind, str) or kind not in known:
        remedy = f"use a model of one of the families {', '.join(known)}"
        raise ModelError([Refusal(f"config.json: model_type {kind!r} is not supported", remedy)])
    if not isinstance(named, list) or named[:1] != [known[kind]]:
        problem = f"config.json: architectures {named!r} is not supported for model_type {kind!r}"
        raise ModelError([Refusal(problem, f"use a causal language model: architectures [{known[kind]!r}]")])
    return FAMILIES[known[kind]]


def _refuse_quantised(said: _Said) -> None:
    quantised = said.config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        said.refuse(
            f"quantization_config (quant_method {method!r}) is not supported: weights are trained in 16 or 32 bits",
            "give the folder of the same model in 16 or 32 bits; where its tensors are that, "
            "remove quantization_config",
        )
    kinds = said.config.get("layer_types")
    if others := sorted({str(kind) for kind in kinds or ()} - {"full_attention"}):
        said.refuse(f"layer_types with {', '.join(others)} is not supported", "use a model of full attention alone")


def _heads(said: _Said, family: Family, heads: int, hidden: int) -> tuple[int, int]:
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


def _mla(said: _Said) -> Mla:
    sizes = map(said.count, ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    return Mla(said.count("q_lora_rank", 0, least=0), *sizes)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _rope(said: _Said, family: Family, positions: int) -> tuple[float, LinearScaling | Llama3Scaling | Yarn | None]:
    """Rotary base and scaling.

    transformers takes ``rope_scaling`` before ``rope_parameters`` where both are there, and ignores the other: two that
    do not say the same are refused, because nobody can tell with which the model was trained.
    """
    given: dict[str, Any] = {
        key: said.config[key] for key in ("rope_scaling", "rope_parameters") if said.config.get(key)
    }
    for key, rope in given.items():
        if not isinstance(rope, dict) or any(isinstance(value, (dict, list)) for value in rope.values()):
            said.refuse(f"{key}={rope!r} is not supported: one set of numbers for all layers is built")
            return 1.0, None
    readings = [_scaling(said, family, positions, rope) for rope in list(given.values()) or [{}]]
    if len(readings) > 1 and readings[0] != readings[1]:
        said.refuse(
            " and ".join(f"{key}={rope!r}" for key, rope in given.items()) + " contradict one another",
            "remove the one with which the model was not trained (transformers and SGLang take rope_scaling)",
        )
    return readings[0]


def _scaling(
    said: _Said, family: Family, positions: int, rope: Mapping[str, Any]
) -> tuple[float, LinearScaling | Llama3Scaling | Yarn | None]:
    """As :func:`_rope`, of one of the two keys."""
    config, kind = said.config, rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if not _positive(theta):
        said.refuse(f"rope_theta={theta!r} is not a number above 0")
        return 1.0, None
    if kind not in family.rope:
        said.refuse(f"rope_type={kind!r} is not supported", f"use a model with rope_type {' or '.join(family.rope)}")
        return 1.0, None
    turned = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if turned not in (None, 1):
        said.refuse(f"partial_rotary_factor={turned!r} is not supported", "use a model that rotates whole heads")
    # The top-level key wins in transformers, and a type that needs the length falls back to the model's own.
    original = config.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", positions))
    needed: dict[str, Any] = {key: rope.get(key) for key in _ROPE_NUMBERS[kind]}
    if kind in ("llama3", "yarn"):
        needed["original_max_position_embeddings"] = original
    if wrong := [f"{key}={value!r}" for key, value in needed.items() if not _positive(value)]:
        said.refuse(f"{kind} rope needs numbers above 0, but has {', '.join(wrong)}")
        return 1.0, None
    if kind == "default":
        return float(theta), None
    if kind == "linear":
        return float(theta), LinearScaling(float(rope["factor"]))
    if kind == "yarn":
        return float(theta), _yarn(said, rope, original)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    if high <= low:
        said.refuse(f"llama3 rope with high_freq_factor={high:g} at or below low_freq_factor={low:g}")
    return float(theta), Llama3Scaling(float(rope["factor"]), low, high, int(original))


_ROPE_NUMBERS: Mapping[str, tuple[str, ...]] = {  # that transformers insists on
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


def _yarn(said: _Said, rope: Mapping[str, Any], original: float) -> Yarn:
    """YaRN as transformers reads it: of ``mscale`` and ``mscale_all_dim`` both or none."""
    if rope.get("attention_factor") is not None or not rope.get("truncate", True):
        named = " and ".join(f"{key}={rope[key]!r}" for key in ("attention_factor", "truncate") if key in rope)
        said.refuse(f"yarn rope with {named} is not supported", "use a model without them")
    if bool(rope.get("mscale")) != bool(rope.get("mscale_all_dim")):
        said.refuse("yarn rope with only one of mscale and mscale_all_dim is not supported", "use one with both")
    return Yarn(
        factor=float(rope["factor"]),
        original_positions=int(original),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        mscale=float(rope.get("mscale") or 1),
        mscale_all_dim=float(rope.get("mscale_all_dim") or 0),
    )
