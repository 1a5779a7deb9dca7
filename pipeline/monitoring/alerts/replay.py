"""Replays a recorded run and tells which alerts a set of rules would have raised."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.config.load import load_config
from pipeline.monitoring.alerts.alert import Alert
from pipeline.monitoring.alerts.engine import AlertEngine
from pipeline.monitoring.alerts.rules import Rule, constants_of, load_rules
from pipeline.monitoring.events import FILE_NAME, EventReader
from pipeline.monitoring.metrics import scalars

TICK = 30.0  # seconds between two looks at the time, where no event came


@dataclass(frozen=True)
class Firing:
    """An alert from its beginning to its end."""

    begin: Alert
    end: Alert | None  # None: still in force at the end of the log

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        begin, end = self.begin, self.end
        return {
            "rule": begin.rule,
            "severity": begin.severity,
            "begin_step": begin.step,
            "begin_time": begin.time,
            "end_step": end.step if end else None,
            "end_time": end.time if end else None,
            "reason": begin.reason,
        }


@dataclass(frozen=True)
class Replay:
    """The alerts in force, in the order in which they began, and the rules that had nothing to look at."""

    firings: list[Firing]
    blind: list[str]  # in words


def replay_run(run_dir: Path, rules: str = "") -> Replay:
    """Replay a run folder through its own rules, or those of the folder ``rules`` beside the shipped ones.

    Raises ``EventLogError`` and ``ConfigError``.
    """
    log = EventReader(run_dir / FILE_NAME)
    begun = log.poll(limit_bytes=1)  # so that a folder that is no run is called that, whatever else it lacks
    config = load_config(run_dir / "config.yaml", check=False)
    alerts = replace(config.monitoring.alerts, rules=rules) if rules else config.monitoring.alerts
    return replay(chain(begun, log), load_rules(alerts), constants_of(config))


def replay(events: Iterable[Mapping[str, Any]], rules: Sequence[Rule], constants: Mapping[str, float]) -> Replay:
    """Replay a log's events, superseded ones included. Alerts that it holds are left out; the disk is not in it."""
    engine, alerts, seen = AlertEngine(rules, constants), list[Alert](), set[str]()
    before: float | None = None
    for event in events:
        kind, time = event["kind"], event["time"]
        if kind == "alert":
            continue
        if kind == "resume":  # the time in between belongs to nobody
            alerts = [alert for alert in alerts if alert.step < event["step"]]
        elif before is not None:
            for tick in range(1, int((time - before) / TICK) + 1):
                alerts += engine.tick(before + tick * TICK)
        alerts += engine.observe(event)
        seen |= scalars(event).keys()
        before = time
    return Replay(_pairs(alerts), list(_blind(rules, seen)))


def _pairs(alerts: Iterable[Alert]) -> list[Firing]:
    """Beginnings with their ends."""
    begun: dict[str, int] = {}
    firings: list[Firing] = []
    for alert in alerts:
        if alert.state == "begin":
            begun[alert.rule] = len(firings)
            firings.append(Firing(alert, None))
        else:
            at = begun[alert.rule]
            firings[at] = Firing(firings[at].begin, alert)
    return firings


def _blind(rules: Sequence[Rule], seen: set[str]) -> Iterator[str]:
    """Rules whose figure never had a value: nothing to say of this run, or misspelt."""
    for rule in rules:
        metric = rule.config.when.metric
        if metric.startswith("disk/"):
            yield f"{rule.name}: no log holds {metric}"
        elif metric and not rule.is_clock and not metric.startswith("checkpoint/") and metric not in seen:
            nearest = difflib.get_close_matches(metric, seen, n=1, cutoff=0.8)
            yield f"{rule.name}: this run has no {metric}" + (f" (nearest: {nearest[0]})" if nearest else "")
