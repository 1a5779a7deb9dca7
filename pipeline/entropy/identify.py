"""Plant identification: gain, drift, noise and delay from entropies and the commands that were in force.

The model of ``plant`` without its bends: with x = ln H of the policy,

    x_{k+1} = x_k + b u_{k-s} + d + process noise,      reading_k = x_k + sensor noise

so a reading is a level plus b times the commands summed so far plus d k, plus noise that is white in one part and a
random walk in the other. For each delay s and ratio of the two noises the readings are whitened (the innovations of a
Kalman filter, Harvey 1989) and b, d follow by least squares; delays and ratios are then averaged by likelihood, so that
intervals count what is not known of them. Differences of ln H alone would drown b in sensor noise; and because the
likelihood is one of predictions, data taken while a controller was in the loop are as good as any, provided that the
command varied (Ljung 1999, section 13.4). Momentum shows up as delay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959964
MAX_DELAY = 12
LEAST_STEPS = 20
_RATIOS = np.geomspace(0.01, 3.0, 18)  # process noise / sensor noise


class IdentificationError(ValueError):
    """The data cannot tell; the message says what to do."""


@dataclass(frozen=True)
class Record:
    """One stretch of a run, an entry per step."""

    entropy: np.ndarray  # float64 [n], nats, before the step's update
    command: np.ndarray  # float64 [n], u in force at the update; 0 where no positive was found


@dataclass(frozen=True)
class Identified:
    """The plant, with 95 % intervals."""

    gain: float  # of ln H per unit of u and step
    gain_interval: tuple[float, float]
    drift: float  # of ln H per step at u = 0
    drift_interval: tuple[float, float]
    delay: int  # steps between a command's step and its effect, momentum included
    delay_interval: tuple[int, int]
    sensor_noise: float  # standard deviation of ln of a reading
    process_noise: float  # standard deviation per step of ln H
    steps: int

    @property
    def rest(self) -> float:
        """The command that holds ln H against the drift; NaN where the gain's sign is not known."""
        return -self.drift / self.gain if self.gain_interval[0] > 0 else math.nan


def identify(records: Sequence[Record]) -> Identified:
    """Fit all records together (each has a level of its own).

    Raises ``IdentificationError`` on too few steps, or a command at rest or moved only now.
    """
    stretches = [stretch for record in records for stretch in _finite(record)]
    steps = sum(len(stretch.entropy) for stretch in stretches)
    if steps < LEAST_STEPS:
        raise IdentificationError(f"{steps} steps with a finite entropy: identification needs at least {LEAST_STEPS}")
    if max((float(np.ptp(stretch.command)) for stretch in stretches), default=0.0) < 1e-6:
        raise IdentificationError(
            "the command never varied, so its gain cannot be told from the drift: use a run with a controller, or "
            "--excite"
        )
    fits = [_fit(stretches, ratio) for ratio in _RATIOS]
    likelihood = np.stack([fit.likelihood for fit in fits])  # [ratios, delays]
    if not np.isfinite(likelihood).any():
        raise IdentificationError("the command moved in the last steps only, so what it does is not seen yet: train on")
    weights = np.exp(likelihood - likelihood.max())
    weights /= weights.sum()
    estimates, errors = np.stack([fit.estimates for fit in fits]), np.stack([fit.errors for fit in fits])
    means = np.einsum("rs,rsc->c", weights, estimates)
    spread = np.sqrt(np.einsum("rs,rsc->c", weights, errors**2 + (estimates - means) ** 2))
    (gain, gain_low, gain_high), (drift, drift_low, drift_high) = (
        (float(mean), float(mean - Z95 * error), float(mean + Z95 * error))
        for mean, error in zip(means, spread, strict=True)
    )
    sensor = np.stack([fit.noise for fit in fits])
    by_delay = weights.sum(axis=0).cumsum()
    return Identified(
        gain=gain,
        gain_interval=(gain_low, gain_high),
        drift=drift,
        drift_interval=(drift_low, drift_high),
        delay=int(np.searchsorted(by_delay, 0.5)),
        delay_interval=(int(np.searchsorted(by_delay, 0.025)), int(np.searchsorted(by_delay, 0.975))),
        sensor_noise=float((weights * sensor).sum()),
        process_noise=float((weights * sensor * _RATIOS[:, None]).sum()),
        steps=steps,
    )


@dataclass(frozen=True)
class _Fit:
    """Least squares at one noise ratio, an entry per delay."""

    likelihood: np.ndarray  # [delays], logarithms
    estimates: np.ndarray  # [delays, 2]: gain, drift
    errors: np.ndarray  # [delays, 2], standard errors
    noise: np.ndarray  # [delays], standard deviation of the sensor noise


def _fit(stretches: Sequence[Record], ratio: float) -> _Fit:
    blocks = [_whiten(_columns(stretch), ratio) for stretch in stretches]
    white = np.concatenate([block for block, _ in blocks])
    log_scales = sum(total for _, total in blocks)
    readings, ramp, pushes = white[:, 0], white[:, 1], white[:, 2:]
    n = len(readings)
    rows = []
    for push in pushes.T:
        design = np.stack([push, ramp], axis=1)
        if np.linalg.matrix_rank(design) < 2:  # the command moved so late that it has not acted yet at this delay
            rows.append((-math.inf, np.zeros(2), np.zeros(2), 0.0))
            continue
        solution, *_ = np.linalg.lstsq(design, readings, rcond=None)
        residual = readings - design @ solution
        variance = float(residual @ residual) / (n - 2)
        information = design.T @ design
        errors = np.sqrt(variance * np.diag(np.linalg.pinv(information)))
        # Restricted likelihood (Patterson and Thompson 1971): the plain one takes too much of a random walk for drift.
        log_det = float(np.linalg.slogdet(information)[1])
        likelihood = -0.5 * ((n - 2) * math.log(variance) + log_det) - log_scales
        rows.append((likelihood, solution, errors, math.sqrt(variance)))
    return _Fit(*(np.array(column) for column in zip(*rows, strict=True)))


def _columns(stretch: Record) -> np.ndarray:
    """[n, 2 + delays]: ln H, the step, and the commands summed up to each step at every delay."""
    n = len(stretch.entropy)
    summed = np.concatenate([[0.0], np.cumsum(stretch.command)])  # before step k
    # Before the first step the command is taken to have been at rest.
    pushed = [np.concatenate([np.zeros(min(s, n)), summed[: max(0, n - s)]]) for s in range(MAX_DELAY + 1)]
    return np.stack([np.log(stretch.entropy), np.arange(n, dtype=float), *pushed], axis=1)


def _whiten(columns: np.ndarray, ratio: float) -> tuple[np.ndarray, float]:
    """Innovations of every column, in units of the sensor noise, and the sum of the logarithms of their scales.

    The filter is that of a random walk seen through white noise; it starts at the first row, which is used up: the
    level is free.
    """
    level, variance = columns[0].copy(), 1.0
    white, logs = np.empty((len(columns) - 1, columns.shape[1])), 0.0
    for k, row in enumerate(columns[1:]):
        variance += ratio**2
        scale = math.sqrt(variance + 1)
        white[k] = (row - level) / scale
        logs += math.log(scale)
        weight = variance / (variance + 1)
        level += weight * (row - level)
        variance *= 1 - weight
    return white, logs


def _finite(record: Record) -> list[Record]:
    """The record cut where an entropy is missing or not positive."""
    good = np.isfinite(record.entropy) & (np.nan_to_num(record.entropy) > 0)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], good, [False]]).astype(int)))
    spans = zip(edges[::2], edges[1::2], strict=True)
    return [Record(record.entropy[a:b], record.command[a:b]) for a, b in spans if b - a > 1]
