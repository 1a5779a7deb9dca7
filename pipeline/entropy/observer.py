"""What the readings say of ln H, of its drift, and of how strongly and how late the command moves it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from pipeline.entropy.gains import MOMENTUM_STEPS
from pipeline.entropy.state import Count, Stateful

RATIOS = tuple(float(ratio) for ratio in np.geomspace(1 / 8, 8, 13))  # gains considered, of the one assumed
SPREAD = 0.6  # standard deviation of ln(gain / assumed) before any reading
MISSED = 0.065  # root mean square of what a prediction misses, in ln H, before any reading
WIDE_RATIOS = tuple(float(ratio) for ratio in np.geomspace(1 / 32, 8, 17))
LAG = 1.0 + MOMENTUM_STEPS  # steps; assumed
# Lag and delay considered, steps: an answer takes 2, 4, 8 or 16 on average, of which 8 and 16 may be mostly delay.
RESPONSES = (LAG / 2, 0.0), (LAG, 0.0), (2 * LAG, 0.0), (4 * LAG, 0.0), (LAG / 2, 1.5 * LAG), (LAG, 3 * LAG)
DELAYS = tuple(sorted({delay for _, delay in RESPONSES}))
_LATE_SPREAD = 1.0  # standard deviation of ln((lag + delay) / assumed) before any reading
_UNDELAYED = 2.0  # logarithm of the odds against a delay, the same
_EVIDENCE = 0.5  # of a miss: readings are exponential means, so one miss is much like the one before
_MEMORY = 0.99  # of a score per step: the gain may change over some hundred steps
# Of the mean square miss: readings that the first guess counts for, and readings looked back on.
_MISSED_WEIGHT, _MISSED_WINDOW = 20, 60
_SLOPE_AFTER = 20  # readings before a slope of their noise is no longer taken for drift
_FALL_BY = 12  # readings by which a line has told of a collapse
_SURE = 4.0  # standard errors that make the slope of fewer readings a drift
_DRIFT_POWER = 0.5  # of H: how the drift fades as the entropy falls
_LEVELS = -7.0, 3.0  # of ln H, that any policy may have: 0.001 to 20 nats
_OUTLIER = 4.0  # root mean squares beyond which a miss counts as that many


class PlantObserver(Stateful):
    """ln H integrates b m plus a drift d = c sqrt(H), which fades as H falls: GRPO's does, with powers of H of 0 to 1.
    m is the command as the policy feels it, D steps late and behind the optimizer's momentum, L - 1 more on average.

    For each gain b_i, lag L_i and delay D_i that it may have, an observer of its own corrects level and drift,

        m_i <- m_i + (u'(D_i) - m_i) / L_i,    r_i = ln H - (y_i + b_i m_i + d_i),
        y_i <- y_i + b_i m_i + d_i + l1 r_i,    d_i <- d_i + l2 r_i,

    and how well it predicted is its score, the logarithm of its posterior probability but for a constant:

        s_i <- f s_i + (1 - f) p_i - r_i^2 / (4 v),    v = the mean square of r,
        p_i = -(ln(b_i / b) / spread)^2 / 2 - ln((L_i + D_i) / L)^2 / 2 - (2 if D_i > 0).

    (Multiple-model estimation: Magill 1965, IEEE Trans. Automatic Control 10(4); the forgetting f = 0.99, and counting
    half of a miss, are ours.) The first readings correct y by a least-squares line's l1 = 2 (2 k - 1) / (k (k + 1)),
    and from the 20th on d by its l2 = 6 / (k (k + 1)), k readings in all, until these fall below the lasting gains
    (growing memory: Morrison 1969): the drift is known when the band is reached. A collapse reaches it sooner. So while
    the command rests a line is laid through the readings, and once its slope is more than four of its standard errors,
    sqrt(12 v / (k (k^2 - 1))), it is the drift. While the command rests, all predict the same and the scores go back to
    the prior; a command that moves tells them apart. Without lags and delays, a response that comes late was read as
    a weak one: the command rose too far, and the entropy with it.

    Args:
        gain: b assumed, of ln H per unit of u and step.
        level, trend: l1 and l2, lasting.
        rest: least and largest u that may hold the entropy: d_i stays between -b_i times them.
        ratios: b_i / b; ``(1.0,)``: gain and lag are known, and there is no delay.
        spread: of ln(b_i / b), the standard deviation before any reading.
        missed: root mean square of r, the same.
    """

    STATE: ClassVar = {
        "levels": list[float],
        "drifts": list[float],
        "felt": list[float],
        "scores": list[float],
        "line": list[float],
        "variance": float,
        "readings": Count,
        "sure": bool,
    }

    def __init__(
        self,
        gain: float,
        level: float,
        trend: float,
        rest: tuple[float, float],
        ratios: Sequence[float] = RATIOS,
        spread: float = SPREAD,
        missed: float = MISSED,
    ) -> None:
        responses = RESPONSES if len(ratios) > 1 else ((LAG, 0.0),)
        each, self._lags, self._delays = np.array([(ratio, *response) for ratio in ratios for response in responses]).T
        self._gains = gain * each
        self._delay_of = np.searchsorted(DELAYS, self._delays)  # its place in DELAYS
        late = np.log((self._lags + self._delays) / LAG)
        self._prior = -0.5 * ((np.log(each) / spread) ** 2 + (late / _LATE_SPREAD) ** 2)
        self._prior -= np.where(self._delays > 0, _UNDELAYED, 0.0)
        self._level, self._trend = level, trend
        self._least, self._most = -self._gains * rest[1], -self._gains * rest[0]
        self.levels: list[float] = []  # y_i; empty: no reading yet
        self.drifts = [0.0] * len(self._gains)  # c_i
        self.felt = [0.0] * len(self._gains)  # m_i
        self.scores: list[float] = self._prior.tolist()  # s_i
        self.line: list[float] = []  # level and slope of the line through the first readings; empty: none
        self.variance = missed**2
        self.readings = 0
        self.sure = False  # the line's slope is the drift

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Stateful``."""
        super().load_state_dict(state)
        models = len(self._gains)
        if len(self.levels) not in (0, models) or {len(self.drifts), len(self.felt), len(self.scores)} != {models}:
            raise ValueError(f"controller state levels, drifts, felt, scores: expected {models} numbers each")

    def ahead(self, sent: Sequence[float] = (0.0,) * len(DELAYS), updates: float = 0.0, slope: float = 0.0) -> float:
        """Ln H once the policy has felt all that was sent, where later commands only hold it: the mean of
        y + (L - 1) (b m + d) + b ``sent`` + d (``updates`` + D).

        Args:
            sent: the sum of the commands after u'(D), for each of ``DELAYS``.
            updates: how many there are after u'(0).
            slope: of ln H per step that is wanted; what it would make in the meantime is taken off.
        """
        levels = np.array(self.levels)
        falls = np.array(self.drifts) * _faded(levels) - slope
        moves = (self._lags - 1) * (self._gains * np.array(self.felt) + falls)
        moves += self._gains * np.array(sent)[self._delay_of] + falls * (updates + self._delays)
        return float(self._weights() @ (levels + moves))

    def drift_at(self, level: float) -> float:
        """Of ln H per step at u = 0, where ln H is ``level``."""
        return float(self._weights() @ np.array(self.drifts) * _faded(level))

    @property
    def gain(self) -> float:
        """Of ln H per unit of u and step, the mean: where little is known, rather too much than too little, so that the
        command is careful.
        """
        return float(self._weights() @ self._gains)

    def expected(self, u: float) -> float:
        """Of ln H per step under the command ``u``, the mean."""
        return float(
            self._weights() @ (self._gains * u + np.array(self.drifts) * _faded(np.array(self.levels or [0.0])))
        )

    @property
    def may_fall(self) -> bool:
        """Whether the first readings may still turn out to be those of a collapse."""
        return bool(self._trend and self.line) and self.readings < _FALL_BY

    def observe(self, reading: float, acted: Sequence[float]) -> None:
        """Take in ln H, and u'(D) for each of ``DELAYS``: the command of the update before it, and earlier ones."""
        self.readings += 1
        if not self.levels:
            self.levels = [reading] * len(self._gains)
            self.line = [reading, 0.0]
            return
        faded = _faded(np.array(self.levels))
        felt = np.array(self.felt)
        felt += (np.array(acted)[self._delay_of] - felt) / self._lags
        self.felt = felt.tolist()
        predicted = np.array(self.levels) + self._gains * felt + np.array(self.drifts) * faded
        missed = reading - predicted
        squares = np.minimum(missed**2, _OUTLIER**2 * self.variance)
        counted = min(_MISSED_WEIGHT + self.readings - 1, _MISSED_WINDOW)
        self.variance += (float(self._weights() @ squares) - self.variance) / counted
        scores = (
            _MEMORY * np.array(self.scores) + (1 - _MEMORY) * self._prior - _EVIDENCE * squares / (2 * self.variance)
        )
        self.scores = (scores - scores.max()).tolist()
        level, trend = self._corrections()
        self.levels = (predicted + level * missed).tolist()
        drifts = np.clip(np.array(self.drifts) * faded + trend * missed, self._least, self._most)
        self.drifts = (drifts / faded).tolist()
        if self.line:
            self._follow(reading, acted[0])

    def forget_fall(self) -> None:
        """Drop the belief that entropy falls by itself."""
        self.drifts = [max(drift, 0.0) for drift in self.drifts]

    def _corrections(self) -> tuple[float, float]:
        """Of level and drift per unit of what was missed; a trend of 0 means that there is no drift to learn."""
        k = self.readings
        level, trend = _line_gains(k)
        known = self._trend and (self.sure or k > _SLOPE_AFTER)
        return max(self._level, min(1.0, level)), max(self._trend, trend if known else 0.0)

    def _follow(self, reading: float, acted: float) -> None:
        """Lay the line through this reading, too; end it with its slope as the drift, or where it tells nothing."""
        k = self.readings
        level, trend = _line_gains(k)
        missed = reading - sum(self.line)
        self.line = [sum(self.line) + level * missed, self.line[1] + trend * missed]
        error = math.sqrt(12 * self.variance / (k * (k * k - 1)))
        self.sure = bool(self._trend) and k > 2 and abs(self.line[1]) > _SURE * error
        if self.sure:
            drifts = np.clip(self.line[1], self._least, self._most)
            self.levels, self.drifts = [self.line[0]] * len(drifts), (drifts / _faded(self.line[0])).tolist()
        if self.sure or acted or k >= _SLOPE_AFTER:
            self.line = []

    def _weights(self) -> np.ndarray:
        weights = np.exp(np.array(self.scores) - max(self.scores))
        return np.asarray(weights / weights.sum())


def _line_gains(k: int) -> tuple[float, float]:
    """With which the k-th reading corrects the level and the slope of a least-squares line."""
    return 2 * (2 * k - 1) / (k * (k + 1)), 6 / (k * (k + 1))


def _faded(level: np.ndarray | float) -> np.ndarray:
    """The drift at ln H = ``level``, of that at 1 nat."""
    return np.asarray(np.exp(_DRIFT_POWER * np.clip(level, *_LEVELS)))
