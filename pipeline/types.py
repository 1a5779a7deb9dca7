"""The nouns of one training step: what travels between the loop, the engines, the learner and the controller.

Everything here is a frozen dataclass. Entropies and log-probabilities are natural logarithms (nats). A *target* is a
token that the loss is about: one that the policy drew, which the logits at the token before it predict.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from pipeline.packing import Spec, pack, unpack


class Role(StrEnum):
    """Why a sample was drawn; it decides what the sample may influence."""

    MAIN = "main"  # drawn at T=1; carries the policy loss, the entropy reading and every metric
    AUXILIARY = "auxiliary"  # drawn at T+; only its correct rows are trained on, none enters a metric
    EVALUATION = "evaluation"  # never trained on
    REPEATED = "repeated"  # same prompts, same seeds every step; only its entropy is looked at


@dataclass(frozen=True)
class Prompt:
    """One question. ``id`` is unique within its data source and stable across runs: seeds derive from it."""

    id: str
    token_ids: tuple[int, ...]
    text: str  # exactly what ``token_ids`` encode (after the chat template, if any)
    answer: Any  # JSON value; its meaning belongs to the verifier
    verifier: str  # name in ``pipeline.rewards``
    meta: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, Any], ...] = ()  # the conversation that ``text`` is; (): it is plain text


@dataclass(frozen=True)
class Cuts:
    """CUTS (arXiv 2604.18493): draw a token uniformly among the ``top`` likeliest of probability at least ``floor``.

    So the last ``samples`` responses of a request are drawn, after their first ``warmup_tokens`` tokens. Where no token
    reaches the floor, the token is drawn as usual.
    """

    samples: int
    top: int
    floor: float
    warmup_tokens: int


@dataclass(frozen=True)
class GenerateRequest:
    """Draw ``len(seeds)`` responses to one prompt at one temperature, or go on with those that were begun."""

    prompt: Prompt
    seeds: tuple[int, ...]  # one 63-bit seed per sample, see ``pipeline.seeds``
    temperature: float
    max_new_tokens: int
    role: Role = Role.MAIN
    # only the likeliest tokens that make up this share; below 1 for benchmarks alone: what is trained on is not
    # truncated
    top_p: float = 1.0
    cuts: Cuts | None = None
    # what there is of each response, one per seed: held ones go on, finished ones stay; (): none was begun
    begun: tuple[Sample, ...] = ()
    stop: tuple[str, ...] = ()  # texts that end a response, beside the run's; they stay in it
    pause_at: int | None = None  # tokens at which a response is held; None: when the engine is told to

    @property
    def usual(self) -> int:
        """How many of the responses are not drawn by CUTS; they come first."""
        return len(self.seeds) - (self.cuts.samples if self.cuts else 0)


@dataclass(frozen=True)
class WeightSpan:
    """Tokens ``[start, end)`` of a response were drawn with weights ``version``."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Turn:
    """Tokens ``[start, end)`` of a conversation are one answer of the model."""

    start: int
    end: int
    finish_reason: str  # "stop" | "length" | "tool_calls"


@dataclass(frozen=True)
class Sample:
    """One response, or the whole conversation of an episode after its first prompt.

    ``log_probs`` are those of the behaviour policy at ``temperature`` (the temperature the tokens were drawn with),
    never at another one; of a response drawn by CUTS they are the policy's own. The end-of-sequence token, when drawn,
    is the last entry of ``token_ids``, or of its turn's.

    The tokens of tools, of the environment and of the chat template between turns are context: the policy reads them,
    and no loss, entropy or figure counts them. A single answer has none.
    """

    token_ids: np.ndarray  # int64 [n]
    log_probs: np.ndarray  # float32 [n]; 0 where the model did not draw the token
    temperature: float
    seed: int
    role: Role
    finish_reason: str  # "stop" | "length" | "abort": ended before its time; an episode's: its last turn's
    weight_versions: tuple[WeightSpan, ...]
    text: str = ""  # ``last_answer``, decoded without end and padding tokens; filled by the verifier stage
    reward: float = 0.0  # in [0, 1]; 0 until verified
    correct: bool = False  # reward == 1, the indicator of SCOPE-RL's positive term
    verifier_error: str = ""  # "" or why nobody could judge this sample (then reward is 0)
    drawn: np.ndarray | None = None  # bool [n], True where the model drew the token; None: it drew all of them
    turns: tuple[Turn, ...] = ()  # of an episode, in order; (): one turn that is all of it
    stop_reason: str = ""  # "" (a single answer), or why an episode ended, see ``pipeline.rollout.environments``
    # uint8 or uint16 [prompt + n - 1, expert layers, top_k]: the experts that read each token (pipeline.model.routing);
    # None: not recorded
    routes: np.ndarray | None = None
    dropped_tokens: int = 0  # of an episode: what the model drew on branches that are not trained on
    cached_tokens: int = 0  # tokens before the answers, over all turns, that the engine found in its prefix cache

    @property
    def drawn_tokens(self) -> int:
        """Tokens that the model drew: the length of a sample, wherever one counts."""
        return len(self.token_ids) if self.drawn is None else int(self.drawn.sum())

    def of_drawn(self, values: np.ndarray) -> np.ndarray:
        """The entries of ``values`` ``[n]`` that belong to drawn tokens."""
        return values if self.drawn is None else values[self.drawn]

    @property
    def held(self) -> bool:
        """Whether it ended before its time and can go on. A faulty one cannot: it was emptied, weights and all."""
        return self.finish_reason == "abort" and bool(self.weight_versions)

    @property
    def last_answer(self) -> np.ndarray:
        """Token ids of the last thing that the model said, which is all of a single answer."""
        return self.token_ids[self.turns[-1].start : self.turns[-1].end] if self.turns else self.token_ids

    def drawn_with(self, version: int) -> bool:
        """Whether every token came from weights ``version``."""
        return all(span.version == version for span in self.weight_versions)

    def drawn_since(self, version: int) -> bool:
        """Whether every token came from weights ``version`` or later ones."""
        return all(span.version >= version for span in self.weight_versions)


@dataclass(frozen=True)
class SampleGroup:
    """All responses drawn for one request, in the order of its seeds."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    role: Role

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle all samples' arrays as two: thousands of little ones would cost more than the sampling."""
        lengths = [len(sample.token_ids) for sample in self.samples]
        tokens = np.concatenate([np.empty(0, np.int64), *(sample.token_ids for sample in self.samples)])
        log_probs = np.concatenate([np.empty(0, np.float32), *(sample.log_probs for sample in self.samples)])
        rest = [tuple(vars(sample).values())[2:] for sample in self.samples]
        return _unpickle_group, (self.prompt, self.role, lengths, tokens, log_probs, rest)


@dataclass(frozen=True)
class StepSamples:
    """The verified samples of one step. Rewards, lengths and token counts are measured on all of ``main``."""

    main: Sequence[SampleGroup]
    auxiliary: Sequence[SampleGroup]
    stale: int  # samples dropped for their weight version
    repeated: Sequence[SampleGroup] = ()  # not verified

    def ages(self, step: int) -> dict[str, float]:
        """``mean`` and ``max`` age of the main tokens when ``step`` trains on them, in updates since the weights that
        drew them; ``share_<age>`` of the tokens. 0 where there are no tokens.
        """
        tokens = Counter[int]()
        for group in self.main:
            for sample in group.samples:
                for span in sample.weight_versions:
                    tokens[step - span.version] += _drawn_within(sample, span)
        total = tokens.total()
        if not total:
            return {"mean": 0.0, "max": 0.0}
        mean = sum(age * count for age, count in tokens.items()) / total
        shares = {f"share_{age}": count / total for age, count in sorted(tokens.items()) if count}
        return {"mean": mean, "max": float(max(tokens)), **shares}


@dataclass(frozen=True)
class KeptSample:
    """One rollout that the run writes down and, in the steps that measure it, the policy's exact entropy at each of its
    drawn tokens.
    """

    prompt: Prompt
    sample: Sample
    entropies: np.ndarray | None  # float32 [drawn tokens], nats at T=1, of the policy the step's update starts from


@dataclass(frozen=True)
class Actuation:
    """What the controller's command does to the loss of one step.

    ``kind`` is an actuator name (``none``, ``resample``, ``reweight``, ``fc``, ``dcpo``, ``tok``, ``entropy_bonus``,
    ``high_prob``, ``surprisal``, ``stare``, ``clip_cov``, ``clip_high``); ``command`` is in that actuator's unit: a
    temperature for ``resample``, ``reweight``, ``fc`` and ``dcpo``, a coefficient for ``tok``, ``entropy_bonus``,
    ``high_prob``, ``surprisal`` and ``stare``, a fraction of tokens for ``clip_cov``, a ratio for ``clip_high``.
    ``alpha`` scales the positive term.
    """

    kind: str = "none"
    command: float = 1.0
    alpha: float = 0.0


@dataclass(frozen=True)
class TrainBatch:
    """The rows of one update, ragged: every main row, then the correct auxiliary rows. CPU tensors.

    A row is prompt + response, in which an episode's tool and template tokens are no targets. The rows lie one behind
    the other in flat arrays, without padding: ``[tokens]`` over all tokens, ``[targets]`` over the tokens that the loss
    is about, ``[rows]``. ``weights`` holds the whole normalisation (token mean, sequence mean, the positive term's
    denominator and alpha), so the loss is the plain sum over targets of ``weights[row] * term`` whatever the
    micro-batch size or the number of ranks.
    """

    tokens: torch.Tensor  # int32 [tokens]
    loss_mask: torch.Tensor  # bool [tokens], True where the token is a target: drawn; never a row's first
    lengths: torch.Tensor  # int64 [rows], tokens of each row
    targets: torch.Tensor  # int64 [rows], targets of each row
    weights: torch.Tensor  # float32 [rows]
    advantages: torch.Tensor  # float32 [rows]; unused on auxiliary rows (their advantage is the constant 1)
    auxiliary: torch.Tensor  # bool [rows]
    correct: torch.Tensor  # bool [rows]
    temperatures: torch.Tensor  # float32 [rows], what each row was drawn with
    behavior_log_probs: torch.Tensor  # float32 [targets], at ``temperatures``
    actuation: Actuation = Actuation()
    old_log_probs: torch.Tensor | None = None  # float32 [targets] at T=1; None: on-policy, ratio is exactly 1
    reference_log_probs: torch.Tensor | None = None  # float32 [targets] at T=1, for the KL penalty
    groups: torch.Tensor | None = None  # int64 [rows], equal for all samples of a request; below 0 on auxiliary rows
    token_advantages: torch.Tensor | None = None  # float32 [targets], in place of ``advantages``
    token_weights: torch.Tensor | None = None  # float32 [targets], e.g. 0 on tokens that Clip-Cov detaches
    marks: torch.Tensor | None = None  # uint8 [targets], tokens that the loss treats in a way of their own
    staleness: float = 0  # mean age of the main rows' tokens: updates since the weights that drew them
    # uint8 or uint16 [tokens, expert layers, top_k], 0 at a row's last token: experts to replay; None: routers choose
    routes: torch.Tensor | None = None
    # float32 [rows], ``reweight``: as ``weights``, of a main row's positive term
    positive_weights: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of rows, main and auxiliary."""
        return len(self.lengths)

    @property
    def row_of_target(self) -> torch.Tensor:
        """Int64 ``[targets]``: the row of each target."""
        rows = torch.arange(self.rows, device=self.targets.device)
        return rows.repeat_interleave(self.targets, output_size=len(self.behavior_log_probs))

    def tensors(self) -> dict[str, Any]:
        """The tensors that are there, by field."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def take(self, rows: torch.Tensor) -> TrainBatch:
        """The batch of the ``rows`` (int64), in their order; all of them in turn are this batch itself."""
        if len(rows) == self.rows and torch.equal(rows, torch.arange(self.rows, device=rows.device)):
            return self
        spans = {name: _spans(counts, rows) for name, counts in (("token", self.lengths), ("target", self.targets))}

        def picked(name: str, value: torch.Tensor) -> Any:
            if name in PER_TOKEN or name in PER_TARGET:
                parts = [value[start:end] for start, end in spans["token" if name in PER_TOKEN else "target"]]
                return torch.cat(parts) if parts else value[:0]
            return value[rows]

        return replace(self, **{name: picked(name, value) for name, value in self.tensors().items()})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the tensors as one buffer."""
        return _unpickle_batch, (*pack(self.tensors()), self.actuation, self.staleness)


PER_TOKEN = frozenset({"tokens", "loss_mask", "routes"})
PER_TARGET = frozenset(
    {"behavior_log_probs", "old_log_probs", "reference_log_probs", "token_advantages", "token_weights", "marks"}
)


Dealt = Sequence[Sequence[Sequence[int]]]  # one data-parallel rank's rows: [mini-batch][micro-batch][row]
# Of each row of a share: where its targets begin among those of the whole batch, and how many it has; int64 [rows].
Place = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Share:
    """What one data-parallel rank is given of a batch: the rows of its micro-batches, one micro-batch behind
    the other.
    """

    batch: TrainBatch  # these rows only
    # rows of each micro-batch, by mini-batch (optimizer step); 0 where rows are too few
    micro_batches: Sequence[Sequence[int]]
    starts: torch.Tensor  # int64 [rows], where each row's targets begin among those of the whole batch
    total: int  # targets of the whole batch

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return sum(value.nbytes for value in self.batch.tensors().values())

    @property
    def place(self) -> Place:
        """Where these rows' targets lie."""
        return self.starts, self.batch.targets


def shares(batch: TrainBatch, dealt: Sequence[Dealt]) -> Iterator[Share]:
    """The share of each data-parallel rank, as a learner deals them."""
    starts = batch.targets.cumsum(0) - batch.targets
    for own in dealt:
        rows = torch.tensor([row for mini in own for micro in mini for row in micro], dtype=torch.int64)
        sizes = [[len(micro) for micro in mini] for mini in own]
        yield Share(batch.take(rows), sizes, starts[rows], len(batch.behavior_log_probs))


def positions(place: Place) -> torch.Tensor:
    """Int64 ``[n]``: the number of each target of a share among those of the whole batch."""
    starts, counts = place
    return torch.arange(int(counts.sum())) + (starts - counts.cumsum(0) + counts).repeat_interleave(counts)


def joined(parts: Iterable[torch.Tensor], places: Sequence[Place]) -> torch.Tensor:
    """What was measured of the targets of every share, ``[n]`` each, in the batch's order: ``[targets]``."""
    whole = torch.empty(sum(int(counts.sum()) for _, counts in places))
    for part, place in zip(parts, places, strict=True):
        whole[positions(place)] = part
    return whole


@dataclass(frozen=True)
class EntropyReading:
    """Exact policy entropy at T=1 over the main rows' response tokens, as sum and count so that ranks can be added."""

    sum: float  # nats
    count: float  # tokens
    step: int
    staleness: float = 0  # mean age of the tokens: updates between the weights that drew and those that measured them
    repeated: float | None = None  # nats per token over the repeated rows, see ``pipeline.step.repeated``

    @property
    def mean(self) -> float:
        """Nats per token; NaN when no token was seen."""
        return self.sum / self.count if self.count > 0 else math.nan


@dataclass(frozen=True)
class StepStats:
    """What one ``Learner.update`` reports. Means are over main response tokens unless said otherwise."""

    loss: float
    entropy: EntropyReading
    grad_norm: float
    learning_rate: float
    metrics: Mapping[str, float]  # e.g. policy_loss, positive_term, kl, clip_fraction, mismatch_mean, mismatch_p99
    seconds: float  # time inside the learner: forward, backward, optimizer
    memory: Mapping[str, float] = field(default_factory=dict)  # GiB of the largest rank: learner (resident), gpu (peak)


@dataclass(frozen=True)
class ControlDecision:
    """What the controller asks of the next step."""

    command: float  # in the actuator's unit, see ``Actuation``
    temperature: float  # T+ of the positive samples; 1.0 where the actuator is not a temperature
    auxiliary_prompts: int  # prompts to resample; 0 for actuators that need no second rollout
    state: str  # "tracking" | "saturated" | "holding" | "exploding" | "off"
    reason: str  # for people: "target not reachable: held at H=0.43", "no positives for 2 steps", ...
    target: float = math.nan  # ramped set-point, nats per token
    filtered_entropy: float = math.nan  # the entropy the law acted on, nats per token
    gain: float = math.nan  # of ln H per unit of the controller's u and step, as learnt; NaN: none is


@dataclass(frozen=True)
class StepOutcome:
    """What one step did: all that the recorder is told of it."""

    step: int  # 0-based
    samples: StepSamples
    kept: Sequence[KeptSample]  # the rollouts to write down
    stats: StepStats
    decision: ControlDecision  # in force during the step
    following: ControlDecision  # made from the step's entropy reading
    band: tuple[float, float]  # its edges at this step, nats per token
    positives: int  # correct rows that the actuator consumed
    rollouts: Mapping[str, Mapping[str, float]]  # figures of ``sync`` (bytes, buckets) and ``engines`` (alive, total)
    drawing_s: float  # seconds in which samples, of this step or later ones, were drawn and verified
    held: int  # responses that this step's weight update held
    busy: Sequence[Sequence[tuple[float, float]]]  # of each engine: when it had requests, ``time.perf_counter``


@dataclass(frozen=True)
class EngineHealth:
    """One engine as its supervisor sees it."""

    alive: bool
    weight_version: int | None  # None: no consistent set of weights is loaded
    detail: str = ""


def _drawn_within(sample: Sample, span: WeightSpan) -> int:
    if sample.drawn is None:
        return span.end - span.start
    return int(sample.drawn[span.start : span.end].sum())


def _unpickle_group(
    prompt: Prompt,
    role: Role,
    lengths: list[int],
    tokens: np.ndarray,
    log_probs: np.ndarray,
    rest: list[tuple[Any, ...]],
) -> SampleGroup:
    ends = accumulate(lengths)
    samples = (
        Sample(tokens[end - n : end], log_probs[end - n : end], *others)
        for n, end, others in zip(lengths, ends, rest, strict=True)
    )
    return SampleGroup(prompt, tuple(samples), role)


def _spans(counts: torch.Tensor, rows: torch.Tensor) -> list[tuple[int, int]]:
    """Where each of the ``rows`` begins and ends in a flat array of so many entries a row."""
    ends = counts.cumsum(0)[rows]
    return list(zip((ends - counts[rows]).tolist(), ends.tolist(), strict=True))


def _unpickle_batch(specs: list[Spec], flat: np.ndarray, actuation: Actuation, staleness: float) -> TrainBatch:
    return TrainBatch(**unpack(specs, flat), actuation=actuation, staleness=staleness)
