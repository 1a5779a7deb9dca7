"""Measures how well a run held its band: one number per question, from the entropies and the band's edges.

All figures but ``settling_step`` and those of T+ and the state speak of the steps from *entry* on: the first step whose
filtered entropy lies in the band (a run that starts outside is not blamed for the way there, and a run that later
leaves the band is). The filter is an EMA with weight 0.8 on the past, the same for every method, whatever its
controller uses. The entropy is the one that the band is of (``event_kinds.controlled``). The target is the band's
geometric middle, the one that the controllers steer to. Errors are relative: H / target - 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from pipeline.monitoring.series import Series
from pipeline.smoothing import EMA, ema

Floats = Sequence[float] | np.ndarray
DRIFT = 20  # steps that the drift towards the band is taken over
STAY = 20  # steps in the band that count as settled


@dataclass(frozen=True)
class Tracking:
    """Band tracking of one run.

    NaN where a figure does not exist, e.g. the RMS error of a run that never entered its band.
    """

    entry_step: int | None  # first step with the filtered entropy in the band; None: not yet
    # first step from which the filtered entropy stays in the band for 20 steps; None: not yet
    settling_step: int | None
    time_in_band: float  # share of the steps from entry on with the filtered entropy in the band; 0 if it never entered
    rms_error: float  # root mean square of the filtered entropy's relative error, from entry on
    rms_error_raw: float  # the same of the unfiltered entropy
    bias: float  # mean relative error of the filtered entropy, from entry on
    overshoot: float  # largest relative error beyond the target, on the side away from the start, from entry on; >= 0
    oscillation: float  # sign changes of the filtered error per 100 steps, from entry on
    # mean |ln T_k - ln T_{k-1}| per step over the whole run; 0 for actuators that are no temperature
    temperature_variation: float
    saturation: float  # share of all steps in the controller state "saturated"


def filtered(values: Floats) -> np.ndarray:
    """Exponential moving average, float64 [n].

    Starts at the first finite value; one that is not finite repeats the last.
    """
    raw = np.asarray(values, dtype=float)
    finite = np.isfinite(raw)
    smooth = accumulate(raw[finite].tolist(), lambda last, value: ema(last, value, EMA))
    known = np.array([math.nan, *smooth])  # a long run has a million of them: no NumPy in the loop
    return known[np.cumsum(finite)]


def track(
    entropies: Floats,
    low: Floats,
    high: Floats,
    temperatures: Floats = (),
    saturated: Sequence[bool] | np.ndarray = (),
) -> Tracking:
    """The figures of one run: entropy, band edges, T+ and whether the command was at its limit, of each step in order.

    A step that the log lacks (NaN edges) counts neither for nor against the run.
    """
    raw, lower, upper = (np.asarray(values, dtype=float) for values in (entropies, low, high))
    smooth = filtered(raw)
    inside = (smooth >= lower) & (smooth <= upper)
    entry = int(np.argmax(inside)) if inside.any() else None
    target = np.sqrt(lower * upper)
    error, raw_error = smooth / target - 1, raw / target - 1
    known = np.isfinite(error)
    later = known & (np.arange(len(error)) >= entry) if entry is not None else np.zeros(len(error), bool)
    after, raw_after, seen = error[later], raw_error[later], error[known]
    side = np.sign(seen[0]) if len(seen) else 0.0
    return Tracking(
        entry_step=entry,
        settling_step=_first_stay(inside, known),
        time_in_band=float(inside[later].mean()) if entry is not None else 0.0,
        rms_error=_rms(after),
        rms_error_raw=_rms(raw_after[np.isfinite(raw_after)]),
        bias=float(after.mean()) if len(after) else math.nan,
        overshoot=max(0.0, float((-side * after).max())) if len(after) else math.nan,
        oscillation=_sign_changes_per_100(after),
        temperature_variation=_mean_step(np.log(np.asarray(temperatures, dtype=float))),
        saturation=float(np.mean(saturated)) if len(saturated) else 0.0,
    )


def waiting(entropies: Floats, low: float, high: float) -> str:
    """What to say of a controller that "tracks" while the entropy has not come to the band yet; "" where it has.

    ``entropies``: of every step so far, the band's edges as they are now. The drift is that of the last ``DRIFT``
    steps, filtered.
    """
    smooth = filtered(entropies)
    smooth = smooth[np.isfinite(smooth)]
    if not len(smooth) or ((smooth >= low) & (smooth <= high)).any():
        return ""
    recent = smooth[-DRIFT:]
    now, drift = float(recent[-1]), float(recent[-1] - recent[0]) / max(1, len(recent) - 1)
    way = (high if now > high else low) - now
    when = f"about {math.ceil(way / drift):,} steps at this drift" if way * drift > 0 else "not coming nearer"
    return f"H {now:.3g}, band {low:.3g} to {high:.3g}, {when}"


def of_series(series: Series) -> Tracking:
    """The figures of all steps in force."""
    names = ("entropy/controlled", "entropy/band_low", "entropy/band_high", "control/temperature")
    entropy, low, high, temperature = (series.column(name) for name in names)
    return track(entropy, low, high, temperature, series.in_state("saturated"))


def _first_stay(inside: np.ndarray, known: np.ndarray) -> int | None:
    """First index that starts ``STAY`` true entries in a row, those not known left out; None if there is none."""
    passed = np.concatenate([[0], np.cumsum(inside[known])])
    stays = passed[STAY:] - passed[:-STAY] == STAY
    return int(np.flatnonzero(known)[np.argmax(stays)]) if stays.any() else None


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean())) if len(values) else math.nan


def _sign_changes_per_100(error: np.ndarray) -> float:
    signs = np.sign(error[error != 0])
    return 100 * float((signs[1:] != signs[:-1]).sum()) / len(error) if len(error) else math.nan


def _mean_step(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(np.abs(np.diff(values)).mean()) if len(values) > 1 else 0.0
