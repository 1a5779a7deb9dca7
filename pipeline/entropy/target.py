"""Recommends a band of entropy from one run without control: the lowest entropy that still kept its pass@k.

The rule is that of one standard error (Breiman et al. 1984, *CART*; Hastie et al., *The Elements of Statistical
Learning*, 7.10): from the best evaluation on, the last one before pass@k falls more than a standard error below the
best. What is better by less than that is noise, and a lower entropy costs less pass@1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from pipeline.config.schema import EVALUATIONS_FOR_A_BAND

BAR = 30  # characters of the longest bar
WIDTH = 0.1  # of the target, to either side: readings vary by 5 to 9 %, docs/band.md
SLOWLY = 0.7, 0.2  # of the start's entropy, at the begin and the end of a band that is lowered over a whole run
_Z95 = 1.96


@dataclass(frozen=True)
class Measured:
    """One evaluation: pass@k with its 95 % interval, and the policy's entropy at that time in nats per token."""

    step: int
    entropy: float
    value: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Standard error."""
        return (self.high - self.low) / (2 * _Z95)


@dataclass(frozen=True)
class Recommendation:
    """A band for a budget of ``k`` answers, and what speaks for it. ``smooth`` has an entry per point of ``known``."""

    k: int
    entropy: float  # of the target, nats per token
    low: float
    high: float
    step: int  # of the run, the last one that kept pass@k
    value: float  # pass@k there, smoothed
    best: float
    error: float  # standard error of pass@k there
    lost: float  # pass@k that the run lost from its best to its end, smoothed
    kept_to_the_end: bool  # a longer run might name a lower entropy
    highest: float  # entropy of the first evaluation whose pass@k is within that error of the best
    never_grew: bool  # pass@k was within that error of its best at the start already
    smooth: tuple[float, ...]
    rose: bool  # the entropy had grown by then: no fall of it is what pass@k was kept through

    def evidence(self, points: Sequence[Measured]) -> list[str]:
        """A table with a bar for each evaluation, and a mark at the one chosen. ``points``: those recommended from."""
        floor, top = min(point.low for point in points), max(point.high for point in points)
        span = top - floor or 1.0
        lines = [f"  step  H (nats)  pass@{self.k:<4} 95 % interval    bars from {floor:.2f} to {top:.2f}"]
        for point in points:
            bar = "#" * round(BAR * (point.value - floor) / span)
            mark = f"  <- keeps pass@{self.k}" if point.step == self.step else ""
            interval = f"[{point.low:.3f}, {point.high:.3f}]"
            lines.append(f"{point.step:6d}  {point.entropy:8.3g}  {point.value:.3f}     {interval}  {bar}{mark}")
        return lines

    def verdict(self) -> str:
        """What the evidence says, in a few sentences."""
        text = (
            f"pass@{self.k} is kept {'up' if self.rose else 'down'} to H={self.entropy:.3g}, at step {self.step}: "
            f"{self.value:.3f} there, {self.best:.3f} at best (each averaged with the evaluations before and after "
            f"it); one evaluation's standard error is {self.error:.3f}."
        )
        if self.kept_to_the_end:
            text += " That is the end of this run, which lost nothing that a band would have kept."
        elif self.loss_is_seen:
            text += f" Without control the run then lost {self.lost:.3f}."
        else:
            text += (
                f" What it lost after that ({self.lost:.3f}) is within noise: control is not shown to pay "
                f"for pass@{self.k} over a run of this length."
            )
        if self.rose:
            text += " The entropy of this run rose: it does not show what a lower one costs."
        if self.highest > (1 + WIDTH) * self.entropy:
            text += (
                f" Within that error pass@{self.k} was as high from H={self.highest:.3g} on. The lowest band costs "
                f"the least pass@1; held at a higher one, pass@{self.k} may go on growing, which this run cannot show."
            )
        if self.never_grew and not self.kept_to_the_end:
            text += (
                f" pass@{self.k} was that good at the start already: whether a policy held here goes on learning, "
                "this run cannot show. Try a lower band, too."
            )
        return text

    @property
    def pays(self) -> bool:
        """Whether the run shows that holding the band would keep what it lost."""
        return self.loss_is_seen and not self.kept_to_the_end

    @property
    def loss_is_seen(self) -> bool:
        """Whether what was lost is more than noise."""
        return self.lost > _noise(self.error)


def recommend(points: Sequence[Measured], k: int) -> Recommendation:
    """The band for pass@``k``. ``points`` of one run without entropy control, in order of steps.

    Raises:
        ValueError: fewer than five evaluations whose pass@k and entropy are known.
    """
    points = known(points)
    if len(points) < EVALUATIONS_FOR_A_BAND:
        raise ValueError(
            f"evaluations with pass@{k} and an entropy: {len(points)}, at least {EVALUATIONS_FOR_A_BAND} are needed"
        )
    smooth = smoothed([point.value for point in points])
    best = smooth.index(max(smooth))
    error = _typical_error(points)
    kept = [value >= smooth[best] - error for value in smooth]
    chosen = next((i for i in range(best, len(points)) if not kept[i]), len(points)) - 1
    entropy = float(points[chosen].entropy)
    return Recommendation(
        k=k,
        entropy=entropy,
        low=(1 - WIDTH) * entropy,
        high=(1 + WIDTH) * entropy,
        step=points[chosen].step,
        value=smooth[chosen],
        best=smooth[best],
        error=error,
        lost=smooth[best] - smooth[-1],
        kept_to_the_end=chosen == len(points) - 1,
        highest=float(points[kept.index(True)].entropy),
        never_grew=kept[0],
        smooth=tuple(smooth),
        rose=bool(entropy > (1 + WIDTH) * points[0].entropy),
    )


@dataclass(frozen=True)
class Annealed:
    """The schedule that holds the band for half of a run and then lowers it to where the run without control ended."""

    entropy: float  # of the end, nats per token
    gain: float  # of pass@1 from the chosen step to the end, smoothed
    overrides: tuple[str, ...]


def annealed(chosen: Recommendation, singles: Sequence[Measured], steps: int) -> Annealed | None:
    """That schedule where pass@1 (``singles``) went on growing after the chosen step by more than noise, else None.

    None, too, where the run ended with no entropy: there is no band at 0.

    ``steps``: of the run to come.
    """
    singles = known(singles)
    smooth = smoothed([point.value for point in singles])
    at = next((i for i, point in enumerate(singles) if point.step == chosen.step), None)
    if at is None or chosen.k == 1 or chosen.kept_to_the_end:
        return None
    gain, last = smooth[-1] - smooth[at], singles[-1].entropy
    if gain <= _noise(_typical_error(singles)) or not 0 < last < chosen.low:
        return None
    band = {"low": chosen.low, "high": chosen.high, "end_low": (1 - WIDTH) * last, "end_high": (1 + WIDTH) * last}
    edges = [f"entropy.band.{edge}={value:.3g}" for edge, value in band.items()]
    return Annealed(last, gain, (*edges, "entropy.band.schedule=cosine", f"entropy.band.hold_steps={steps // 2}"))


@dataclass(frozen=True)
class Slower:
    """The schedule that spends over a whole run the entropy that a run without control spent early."""

    since: int  # step from which pass@1 stood still
    gain: float  # of pass@1 from then to the end, smoothed
    left: float  # of the start's entropy at the end
    overrides: tuple[str, ...]


def slower(singles: Sequence[Measured]) -> Slower | None:
    """That schedule where pass@1 (``singles``) stood still for a third of a run that had spent its entropy, else None.

    Entropy is spent where the run ended below the end of the schedule. On tasks that stand still with entropy left, a
    band changed nothing (docs/lab.md, cd4).
    """
    singles = known(singles)
    if len(singles) < EVALUATIONS_FOR_A_BAND:
        return None
    smooth = smoothed([point.value for point in singles])
    at = next(i for i, point in enumerate(singles) if point.step >= singles[-1].step * 2 / 3)
    gain, start, last = smooth[-1] - smooth[at], singles[0].entropy, singles[-1].entropy
    if gain > _noise(_typical_error(singles)) or last >= SLOWLY[1] * start:
        return None
    edges = {"": SLOWLY[0] * start, "end_": SLOWLY[1] * start}
    band = [
        f"entropy.band.{name}{edge}={factor * middle:.3g}"
        for name, middle in edges.items()
        for edge, factor in (("low", 1 - WIDTH), ("high", 1 + WIDTH))
    ]
    return Slower(
        singles[at].step, gain, last / start, ("entropy.actuator=clip_cov", *band, "entropy.band.schedule=linear")
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """Each value's mean with its neighbours; the first and the last have one neighbour."""
    return [fmean(values[max(0, i - 1) : i + 2]) for i in range(len(values))]


def known(points: Sequence[Measured]) -> list[Measured]:
    """Those whose pass@k and entropy are both known."""
    return [point for point in points if math.isfinite(point.value) and math.isfinite(point.entropy)]


def _typical_error(points: Sequence[Measured]) -> float:
    return median(point.error for point in points)


def _noise(error: float) -> float:
    """What the difference of two evaluations with this standard error may be by chance: two of its own."""
    return 2 * math.sqrt(2) * error
