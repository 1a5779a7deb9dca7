"""Reads a model's rotary embedding: the only reader of ``rope_scaling`` and ``rope_parameters`` in ``config.json``.

The numbers mean what they mean in transformers 5.12 (``modeling_rope_utils.py``). ``pipeline.model.rotary`` computes
frequencies of them. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from pipeline.model.reading import Said, positive


@dataclass(frozen=True)
class LinearScaling:
    """Linear rotary scaling: every frequency divided by ``factor`` (arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """Dynamic NTK scaling: a larger base for rows longer than the model's positions.

    No row of a run is longer, so that the frequencies stay the plain ones. SGLang enlarges the base for every row.
    """

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
    attention_factor: float = 1.0  # sine and cosine are multiplied by it
    truncate: bool = True  # the ends of the ramp are whole numbers
    explicit: bool = False  # attention_factor is another than the one that follows from the rest


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): each frequency divided by a factor of its own.

    The factors are those of rows of at most ``original_positions``. Longer rows have others, which would turn the keys
    of a row anew while it grows: a model has ``original_positions`` positions here.
    """

    short: tuple[float, ...]
    original_positions: int
    attention_factor: float
    explicit: bool = False  # attention_factor is another than the one that follows from the lengths


Scaling: TypeAlias = LinearScaling | DynamicScaling | Llama3Scaling | Yarn | LongRope


@dataclass(frozen=True)
class RopeRules:
    """What a family may say of its rotary embedding."""

    kinds: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
    partial: float | None = None  # partial_rotary_factor where config.json has none; None: whole heads are rotated
    latent: bool = False  # computed by megatron-core's latent attention
    theta: float = 10_000.0  # base of the frequencies where config.json has none
    required: bool = False  # config.json must say something of it


ANY_ROPE = RopeRules()


@dataclass(frozen=True)
class Rope:
    """One rotary embedding."""

    theta: float
    scaling: Scaling | None  # None: plain
    partial: float = 1.0  # share of a head that is rotated, its first entries


def read_rope(said: Said, rules: RopeRules, positions: int, head_dim: int) -> Rope:
    """The rotary embedding of heads of ``head_dim`` in a model of ``positions``.

    transformers takes ``rope_scaling`` before ``rope_parameters`` where both are there, and ignores the other: two that
    do not say the same are refused, because nobody can tell with which the model was trained.
    """
    nothing = Rope(1.0, None)
    given: dict[str, Any] = {
        key: said.config[key] for key in ("rope_scaling", "rope_parameters") if said.config.get(key)
    }
    if rules.required and not given:
        said.refuse("rope_scaling and rope_parameters are absent, and the family has no plain rotary embedding")
        return nothing
    for key, rope in given.items():
        if not isinstance(rope, dict) or any(map(_nested, rope, rope.values())):
            said.refuse(f"{key}={rope!r} is not supported: one set of numbers for all layers is built")
            return nothing
    readings = [_Reader(said, rules, positions, head_dim, rope).read() for rope in list(given.values()) or [{}]]
    if any(reading is None for reading in readings):
        return nothing
    if len(readings) > 1 and readings[0] != readings[1]:
        said.refuse(
            " and ".join(f"{key}={rope!r}" for key, rope in given.items()) + " contradict one another",
            "remove the one with which the model was not trained (transformers and SGLang take rope_scaling)",
        )
    return readings[0] or nothing


_LISTS = ("short_factor", "long_factor")
_SAME_FOR_TEXT = ("mrope_section",)  # which entries turn with which axis of a picture; along all a text counts alike


def _nested(key: str, value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and key not in (*_LISTS, *_SAME_FOR_TEXT))


@dataclass(frozen=True)
class _Reader:
    """One of the two keys while it is read; a method returns ``None`` where it refused something."""

    said: Said
    rules: RopeRules
    positions: int
    head_dim: int
    rope: Mapping[str, Any]

    def read(self) -> Rope | None:
        kind = self.rope.get("rope_type", self.rope.get("type", "default"))
        theta = self.rope.get("rope_theta", self.said.config.get("rope_theta", self.rules.theta))
        if not positive(theta):
            self.said.refuse(f"rope_theta={theta!r} is not a number above 0")
            return None
        if kind not in self.rules.kinds:
            remedy = f"use a model with rope_type {' or '.join(self.rules.kinds)}"
            self.said.refuse(f"rope_type={kind!r} is not supported", remedy)
            return None
        share = self._share()
        if share is None or not self._has_numbers(kind):
            return None
        if kind == "default":
            return Rope(float(theta), None, share)
        scaling = _KINDS[kind](self, int(self.head_dim * share))
        return None if scaling is None else Rope(float(theta), scaling, share)

    def _share(self) -> float | None:
        """Which part of a head is rotated."""
        said = [source.get("partial_rotary_factor") for source in (self.rope, self.said.config)]
        given = sorted({float(share) for share in said if share is not None and positive(share)})
        if len(given) > 1:
            self.said.refuse(f"partial_rotary_factor={given[0]:g} and {given[1]:g} contradict one another")
            return None
        share = given[0] if given else self.rules.partial or 1.0
        if share != 1 and self.rules.partial is None:
            self.said.refuse(
                f"partial_rotary_factor={share!r} is not supported", "use a model that rotates whole heads"
            )
            return None
        dim = int(self.head_dim * share)
        if share != 1 and (not 0 < dim < self.head_dim or dim % 2):
            self.said.refuse(
                f"partial_rotary_factor={share!r} of head_dim={self.head_dim} rotates {dim} entries",
                "use a model in which that is an even number below head_dim",
            )
            return None
        return share

    def _has_numbers(self, kind: str) -> bool:
        """Whether all numbers that transformers insists on are there."""
        needed: dict[str, Any] = {key: self.rope.get(key) for key in _NUMBERS[kind]}
        if kind in ("llama3", "yarn", "longrope"):
            needed["original_max_position_embeddings"] = self.original
        needed |= {key: self.rope[key] for key in ("attention_factor",) if self.rope.get(key) is not None}
        if wrong := [f"{key}={value!r}" for key, value in needed.items() if not positive(value)]:
            self.said.refuse(f"{kind} rope needs numbers above 0, but has {', '.join(wrong)}")
        return not wrong

    @property
    def original(self) -> Any:
        """The top-level key wins in transformers, and a type that needs the length falls back to the model's own."""
        key = "original_max_position_embeddings"
        return self.said.config.get(key, self.rope.get(key, self.positions))

    def linear(self, dim: int) -> Scaling:
        return LinearScaling(float(self.rope["factor"]))

    def dynamic(self, dim: int) -> Scaling:
        return DynamicScaling(float(self.rope["factor"]))

    def llama3(self, dim: int) -> Scaling:
        low, high = float(self.rope["low_freq_factor"]), float(self.rope["high_freq_factor"])
        if high <= low:
            self.said.refuse(f"llama3 rope with high_freq_factor={high:g} at or below low_freq_factor={low:g}")
        return Llama3Scaling(float(self.rope["factor"]), low, high, int(self.original))

    def yarn(self, dim: int) -> Scaling:
        """Of ``mscale`` and ``mscale_all_dim`` transformers takes both or none."""
        rope, factor = self.rope, float(self.rope["factor"])
        truncate, given = bool(rope.get("truncate", True)), rope.get("attention_factor")
        magnitudes = tuple(float(rope.get(key) or 0) for key in ("mscale", "mscale_all_dim"))
        if self.rules.latent and (given is not None or not truncate):
            named = " and ".join(f"{key}={rope[key]!r}" for key in ("attention_factor", "truncate") if key in rope)
            self.said.refuse(f"yarn rope with {named} is not supported", "use a model without them")
        if self.rules.latent and bool(magnitudes[0]) != bool(magnitudes[1]):
            self.said.refuse(
                "yarn rope with only one of mscale and mscale_all_dim is not supported", "use one with both"
            )
        both = _magnitude(factor, magnitudes[0]) / _magnitude(factor, magnitudes[1])
        implied = both if all(magnitudes) else _magnitude(factor, 1.0)
        found = implied if given is None else float(given)
        return Yarn(
            factor=factor,
            original_positions=int(self.original),
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            mscale=magnitudes[0] or 1.0,
            mscale_all_dim=magnitudes[1],
            attention_factor=found,
            truncate=truncate,
            explicit=not math.isclose(found, implied),
        )

    def longrope(self, dim: int) -> Scaling | None:
        """``factor`` is the ratio of lengths where it is absent."""
        for key in _LISTS:
            numbers = self.rope.get(key)
            if not isinstance(numbers, list) or len(numbers) != dim // 2 or not all(map(positive, numbers)):
                self.said.refuse(f"longrope rope needs {dim // 2} numbers above 0 in {key}, but has {numbers!r}")
                return None
        original, given = int(self.original), self.rope.get("attention_factor")
        factor = self.rope.get("factor") or self.positions / original
        if original < 2 or not positive(factor):
            self.said.refuse(f"longrope rope with factor={factor!r} and original_max_position_embeddings={original}")
            return None
        found = _spread(factor, original) if given is None else float(given)
        explicit = not math.isclose(found, _spread(self.positions / original, original))
        return LongRope(tuple(map(float, self.rope["short_factor"])), original, found, explicit)


_NUMBERS: Mapping[str, tuple[str, ...]] = {  # that transformers insists on
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": (),
}
_KINDS: Mapping[str, Callable[[_Reader, int], Scaling | None]] = {
    "linear": _Reader.linear,
    "dynamic": _Reader.dynamic,
    "llama3": _Reader.llama3,
    "yarn": _Reader.yarn,
    "longrope": _Reader.longrope,
}


def _spread(factor: float, original: int) -> float:
    """LongRoPE's magnitude of attention, for a context ``factor`` times as long as ``original`` tokens."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _magnitude(factor: float, mscale: float) -> float:
    """YaRN's magnitude of attention, for a context ``factor`` times as long."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
