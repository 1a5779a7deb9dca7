"""The kinds of events in ``events.jsonl``, their fields and types, and the one parser of a line.

Everybody who reads a log gets events through ``parse_event``, so a reader may trust the types that stand here.
docs/events.md says what the fields mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, Required, TypedDict, TypeVar, get_type_hints

import msgspec
from msgspec import Meta

SCHEMA = 1
T = TypeVar("T")
Number = float | None  # null: not finite


@dataclass(frozen=True)
class StepRecord:
    """One training step as the log holds it. Means are over main rows; entropies are nats per token at T=1."""

    step: int  # 0-based: the weights after it have version step + 1
    time: float  # Unix seconds at the end of the step
    entropy_sum: float  # nats, over main response tokens
    entropy_count: float  # main response tokens
    entropy_filtered: float  # what the controller acted on; NaN without a reading
    band_low: float
    band_high: float
    target: float  # ramped set-point; NaN without control
    temperature: float  # T+ used by this step's positives; 1 where the actuator is not a temperature
    command: float  # actuator command used by this step, in the actuator's unit
    actuator: str
    state: str  # of the controller after this step's reading, see ControlDecision
    reason: str
    reward: float  # mean over main rows
    positives: int  # correct rows that the actuator consumed
    all_equal_groups: float  # share of main groups whose rewards are all equal: they carry no advantage (ACR)
    response_length: float  # tokens
    truncated: float  # share of main rows that hit the length limit
    stale_samples: int  # dropped because weights of another version drew them
    verifier_errors: int  # samples that no verifier could judge
    loss: float
    grad_norm: float
    learning_rate: float
    weight_version: int  # version that drew this step's samples
    band_of: str = "step"  # whose entropy the band is of, see ``controlled``
    held: int = 0  # responses that this step's weight update held, to go on with the next weights (rollout.partial)
    unjudged: float = 0.0  # share of all samples, auxiliary ones included, that no verifier could judge
    gain: float = math.nan  # of ln H per unit of the controller's u and step, as the law learnt it; NaN: none
    metrics: Mapping[str, float] = field(default_factory=dict)  # what the learner reported beyond
    # sample, verify, batch, train (of it inside: learner), sync, other, total; beside them: drawing
    seconds: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)  # response tokens drawn: main, auxiliary, repeated
    sync: Mapping[str, float] = field(default_factory=dict)  # of the weight sync: bytes, buckets
    memory: Mapping[str, float] = field(default_factory=dict)  # GiB: driver, learner (largest rank), gpu (largest rank)
    engines: Mapping[str, float] = field(default_factory=dict)  # alive, total
    # tokens before the answers of main and auxiliary samples: read, of them cached; share; empty: nothing is reported
    prefix_cache: Mapping[str, float] = field(default_factory=dict)
    ages: Mapping[str, float] = field(default_factory=dict)  # updates: mean, max; share_<age> of the main tokens
    # means over main episodes: turns, given_tokens, dropped_tokens; share of each stop reason
    episodes: Mapping[str, float] = field(default_factory=dict)
    idle: Mapping[str, float] = field(default_factory=dict)  # share of the step's time: engines, learner
    began: float = math.nan  # Unix seconds
    # learner, sync, engine <number>: when each was at work, begin and end in seconds since the step began
    timeline: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)

    @property
    def entropy(self) -> float:
        """Nats per token; NaN when no token was seen."""
        return self.entropy_sum / self.entropy_count if self.entropy_count > 0 else math.nan

    @property
    def controlled(self) -> float:
        """The reading that the band is of, nats per token; NaN where this step has none."""
        found = _controlled(self.band_of, self.entropy, self.metrics)
        return math.nan if found is None else found

    def to_dict(self) -> dict[str, Any]:
        """JSON form; ``entropy`` is added. Numbers that are not finite become null when the event is written."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return plain | {"entropy": self.entropy}


def controlled(event: Mapping[str, Any]) -> Number:
    """Of a ``step`` event: the reading that the band is of, before the controller filters it. None, NaN: lost.

    The repeated prompts' where ``entropy.band_of=repeated``, else the entropy of the step's own rows. Everything that
    is compared with a band reads this one: tracking figures, alerts, charts, reports.
    """
    return _controlled(event.get("band_of", "step"), event["entropy"], event.get("metrics", {}))


def _controlled(band_of: str, entropy: Number, metrics: Mapping[str, Number]) -> Number:
    return metrics.get("entropy_repeated") if band_of == "repeated" else entropy


class DamagedLineError(ValueError):
    """A line is no event; the message says why."""


# Updates done, or of an update; more are no number of steps but damage, and readers keep a row for each.
Step = Annotated[int, Meta(ge=0, le=1_000_000)]
Figures = dict[str, Number]
# In an event each field of StepRecord has the type of its JSON form.
_JSON: dict[Any, Any] = {
    int: Annotated[int, Meta(ge=-(2**53), le=2**53)],
    float: Number,
    Mapping[str, float]: Figures,
    Mapping[str, int]: Figures,
    Mapping[str, Sequence[tuple[float, float]]]: dict[str, list[tuple[float, float]]],
}
_STEP: dict[str, Any] = {name: _JSON.get(kind, kind) for name, kind in get_type_hints(StepRecord).items()}
_STEP |= {"entropy": Required[Number], "band_low": Required[float], "band_high": Required[float]}
_STEP |= {"state": Required[str], "step": Required[Step], "time": Required[float]}


class _Event(TypedDict, total=False):
    schema: Required[int]
    kind: Required[str]
    time: Required[float]


class _Start(_Event, total=False):
    step: Required[Step]
    steps: Annotated[int, Meta(ge=0)]
    name: str
    seed: int
    config_hash: str
    prompts: dict[str, int]
    versions: dict[str, str]
    attempt: int
    host: str


class _Estimate(TypedDict):
    value: float
    low: float
    high: float


class _Evaluation(_Event, total=False):
    step: Required[Step]
    pass_at_k: Required[dict[Annotated[str, Meta(pattern="^[0-9]{1,9}$")], _Estimate]]
    maj_at_k: Figures
    avg: Number
    distinct_correct: Number
    mean_reward: Number
    mean_length: Number
    questions: int
    samples: int
    verifier_errors: Number
    seconds: float


class _Band(_Event):
    step: Step
    low: float
    high: float
    reason: str


class _Snapshot(_Event):
    step: Step


class _Checkpoint(_Event):
    step: Step
    path: str


class _Alert(_Event):
    step: Step
    rule: str
    severity: Literal["info", "warning", "critical"]
    state: Literal["begin", "end"]
    reason: str


class _Fault(_Event, total=False):
    step: Step
    description: Required[str]


class _Stall(_Event, total=False):
    step: Required[Step]
    seconds: Required[float]
    activity: str
    phase: str
    factor: float
    stacks: list[str]
    silent: list[str]
    action: str


class _RunEnd(_Event, total=False):
    status: Required[Literal["completed", "stopped", "failed"]]
    error: str


_KINDS: dict[str, Any] = {
    "run_start": _Start,
    "resume": _Start,
    "step": TypedDict("_Step", {"schema": int, "kind": str, **_STEP}, total=False),  # type: ignore[operator]
    "evaluation": _Evaluation,
    "band": _Band,
    "snapshot": _Snapshot,
    "checkpoint": _Checkpoint,
    "alert": _Alert,
    "fault": _Fault,
    "stall": _Stall,
    "run_end": _RunEnd,
}


class _Head(msgspec.Struct):
    schema: int
    kind: str


_HEAD = msgspec.json.Decoder(_Head)
_DECODERS: dict[str, msgspec.json.Decoder[dict[str, Any]]] = {
    kind: msgspec.json.Decoder(fields) for kind, fields in _KINDS.items()
}


def parse_event(line: bytes) -> dict[str, Any]:
    """The event of a line, its fields of the types above, fields unknown here left out. Raises ``DamagedLineError``."""
    head = decoded(_HEAD, line)
    if head.schema != SCHEMA:
        raise DamagedLineError(f"event schema {head.schema}, this version reads {SCHEMA}: update isentrope")
    if head.kind not in _DECODERS:
        raise DamagedLineError(f"unknown kind {head.kind!r}")
    return decoded(_DECODERS[head.kind], line)


def decoded(decoder: msgspec.json.Decoder[T], line: bytes) -> T:
    """A line of JSON as the type of ``decoder``. Raises ``DamagedLineError`` where it is none."""
    try:
        return decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedLineError(str(error)) from error
