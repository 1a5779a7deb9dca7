"""Applies the alert rules to a run's events: which alerts begin and end with each event, and as time passes.

Pure and incremental: no clock, no file, memory that does not grow with the run. Fed the events of a log again it comes
to the state it had, so that a resumed run goes on where its checkpoint was made.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipeline.monitoring.alerts.alert import Alert
from pipeline.monitoring.alerts.bounds import parse_bound
from pipeline.monitoring.alerts.conditions import Condition, Finding, Moment, compare
from pipeline.monitoring.alerts.figures import Clock
from pipeline.monitoring.alerts.messages import fill
from pipeline.monitoring.alerts.rules import Rule
from pipeline.monitoring.alerts.schema import ConditionConfig
from pipeline.monitoring.events import EventReader
from pipeline.monitoring.metrics import scalars
from pipeline.smoothing import EMA, ema

SNAPSHOTS = 8  # checkpoints whose state is kept: a run resumes from one of the newest


class Watch:
    """One rule, as far as it has come."""

    def __init__(self, rule: Rule) -> None:
        config = rule.config
        self.rule = rule
        self.begun: Alert | None = None
        self._when = Condition(config.when)
        self._guard = None if config.guard == ConditionConfig() else Condition(config.guard)
        self._clear = (parse_bound(config.clear.above), parse_bound(config.clear.below))
        self._in_a_row = 0
        self._over = 0

    def hears(self, kind: str) -> bool:
        """Whether an event of this kind says something about the rule."""
        when = self.rule.config.when
        if when.event:
            return kind in (when.event, "step")
        if self.rule.is_clock:
            return True
        group = when.metric.partition("/")[0]
        return kind == ("evaluation" if group == "evaluation" else "step") or kind == group == "checkpoint"

    def look(self, moment: Moment, step: int, time: float, silent: bool) -> Alert | None:
        """Judge a moment; the alert that begins or ends with it. While ``silent`` none begins."""
        found = self._find(moment)
        if self.begun is None:
            if found.holds is not None:
                self._in_a_row = self._in_a_row + 1 if found.holds else 0
            if found.holds and self._in_a_row >= self.rule.config.steps and not silent:
                return self._begin(moment, found, step, time)
        elif (over := self._is_over(found, moment)) is not None:
            self._over = self._over + 1 if over else 0
            if self._over >= self.rule.config.clear.steps:
                return self._end(self.begun, max(self.begun.step, moment.steps - 1), time)
        return None

    def forget_from(self, step: int) -> None:
        """Forget an alert that a resume at ``step`` has superseded."""
        if self.begun is not None and self.begun.step >= step:
            self.begun, self._over = None, 0

    def _end(self, begun: Alert, step: int, time: float) -> Alert:
        lasted = timedelta(seconds=max(0, round(time - begun.time)))
        self.begun, self._in_a_row, self._over = None, 0, 0
        reason = f"over after {lasted}, begun at step {begun.step}"
        return Alert(self.rule.name, self.rule.config.severity, "end", step, time, reason)

    def _find(self, moment: Moment) -> Finding:
        found = self._when.look(moment)
        if self._guard is None:
            return found
        guard = self._guard.look(moment).holds
        if found.holds is False or guard is False:
            return Finding(False, found.value, found.bound)
        return Finding(None, found.value, found.bound) if guard is None else found

    def _is_over(self, found: Finding, moment: Moment) -> bool | None:
        if self._clear == (None, None):
            return None if found.holds is None else not found.holds
        return None if math.isnan(found.value) else compare(found.value, *self._clear, moment.figures).holds

    def _begin(self, moment: Moment, found: Finding, step: int, time: float) -> Alert:
        config = self.rule.config
        limit = found.bound.value(moment.figures) if found.bound else None
        fields = {
            **(moment.event or {}),
            **moment.figures,
            "value": found.value,
            "bound": limit,
            "steps": self._in_a_row,
        }
        reason = f"{fill(config.message, fields)}. Remedy: {fill(config.remedy, fields)}"
        self.begun = Alert(self.rule.name, config.severity, "begin", step, time, reason)
        return self.begun


@dataclass
class _Memory:
    """What a resume takes back to a checkpoint."""

    watches: dict[str, Watch]
    step: int = 0  # updates done
    saved: int = 0  # updates in the newest checkpoint
    smooth: float = math.nan  # entropy, as in tracking
    entered: bool = False  # whether it has been in its band
    figures: dict[str, float] = field(default_factory=dict)  # of the last step


class AlertEngine:
    """Every rule over one run. ``constants`` are figures that do not change, see ``rules.constants_of``."""

    def __init__(self, rules: Sequence[Rule], constants: Mapping[str, float] | None = None) -> None:
        self._rules = rules
        self._constants = dict(constants or {})
        self._snapshots: dict[int, _Memory] = {}
        self._told: list[Alert] = []  # what a resume may find in force again, in the order of the log
        self._memory = self._fresh()
        self._clock = Clock()
        self._clock_watches = {rule.name: Watch(rule) for rule in rules if rule.is_clock}

    @property
    def active(self) -> dict[str, Alert]:
        """Alerts that have begun and not ended, by rule."""
        return {watch.rule.name: watch.begun for watch in self._watches() if watch.begun is not None}

    def observe(self, event: Mapping[str, Any]) -> list[Alert]:
        """Take one event as the log holds it; returns the alerts that begin or end with it.

        Alerts that the log holds say nothing.
        """
        kind, time, memory = event["kind"], event["time"], self._memory
        if kind == "alert":
            return []
        if kind == "resume":
            return self._resume(event["step"], time)
        self._clock.observe(event)
        found = scalars(event)
        if kind == "step":
            memory.step = event["step"] + 1
            memory.figures = found
            self._enter(found)
        elif kind == "checkpoint":
            memory.saved = event["step"]
        moment = self._moment(time, event, found if kind == "evaluation" else {})
        step = max(0, memory.step - 1) if kind in ("step", "evaluation", "checkpoint") else memory.step
        alerts = self._look([watch for watch in self._watches() if watch.hears(kind)], moment, step, time)
        if kind == "snapshot" or (kind == "checkpoint" and event["step"] == memory.step):
            self._snapshots[event["step"]] = copy.deepcopy(memory)
            self._snapshots = dict(list(self._snapshots.items())[-SNAPSHOTS:])
        return alerts

    def tick(self, now: float, disk_free: int | None = None) -> list[Alert]:
        """Time has passed.

        ``now``: Unix seconds; ``disk_free``: bytes free below the run folder, None where unknown.
        """
        if disk_free is not None:
            self._clock.disk(now, disk_free)
        moment = self._moment(now, None, {})
        return self._look(list(self._clock_watches.values()), moment, self._memory.step, now)

    def adopt(self, in_force: Mapping[str, Alert]) -> None:
        """Take over what a log says to be raised, by rule, in place of what was found in reading it again.

        They differ where time raised or ended an alert, or where the rules have changed since. One whose rule is gone
        ends with the next resume.
        """
        for watch in self._watches():
            watch.begun = in_force.get(watch.rule.name)
        self._told = list(in_force.values())

    def _watches(self) -> Iterator[Watch]:
        for rule in self._rules:
            yield self._clock_watches[rule.name] if rule.is_clock else self._memory.watches[rule.name]

    def _moment(self, now: float, event: Mapping[str, Any] | None, more: Mapping[str, float]) -> Moment:
        memory = self._memory
        since = {"checkpoint/steps_since": float(memory.step - memory.saved)}
        figures = {**memory.figures, **more, **self._constants, **self._clock.figures(now), **since}
        return Moment(figures, event, memory.step)

    def _look(self, watches: Sequence[Watch], moment: Moment, step: int, time: float) -> list[Alert]:
        active, alerts = set(self.active), []
        for watch in watches:
            alert = watch.look(moment, step, time, self._is_silent(watch.rule, active))
            if alert is not None:
                alerts.append(alert)
                (active.add if alert.begins else active.discard)(alert.rule)
        self._tell(alerts)
        return alerts

    def _tell(self, alerts: Sequence[Alert]) -> None:
        """Remember alerts. Of those before the oldest checkpoint the newest of each rule is enough."""
        told = [*self._told, *alerts]
        oldest = min(self._snapshots, default=self._memory.step)
        newest = {alert.rule: alert for alert in told if alert.step < oldest}
        self._told = [alert for alert in told if alert.step >= oldest or alert is newest[alert.rule]]

    def _is_silent(self, rule: Rule, active: set[str]) -> bool:
        config, step = rule.config, self._memory.step
        if not active.isdisjoint(config.unless):
            return True
        if config.after == "entry":
            return not self._memory.entered and not 0 < config.settle <= step
        return bool(config.settle) and step <= config.settle

    def _enter(self, figures: Mapping[str, float]) -> None:
        memory, entropy = self._memory, figures.get("entropy/controlled")
        if entropy is None:
            return
        memory.smooth = ema(memory.smooth, entropy, EMA)
        memory.entered |= figures["entropy/band_low"] <= memory.smooth <= figures["entropy/band_high"]

    def _resume(self, step: int, time: float) -> list[Alert]:
        """Forget what the resume has superseded.

        Alerts that the log now says to be in force end where no rule holds them.

        An alert that time ended is among them where the resume supersedes its end.
        """
        self._told = [alert for alert in self._told if alert.step < step]
        if self._memory.step != step:
            self._memory = copy.deepcopy(self._snapshots[step]) if step in self._snapshots else self._fresh()
            self._memory.step = self._memory.saved = step
        for watch in self._memory.watches.values():
            watch.forget_from(step)
        self._snapshots = {at: memory for at, memory in self._snapshots.items() if at <= step}
        self._clock_watches = {name: Watch(watch.rule) for name, watch in self._clock_watches.items()}
        self._clock = Clock()
        self._clock.observe({"kind": "resume", "time": time})
        active, newest = self.active, {alert.rule: alert for alert in self._told}
        ended = [
            Alert(name, alert.severity, "end", step - 1, time, f"the run was resumed at step {step}")
            for name, alert in sorted(newest.items())
            if alert.begins and name not in active
        ]
        self._tell(ended)
        return ended

    def _fresh(self) -> _Memory:
        return _Memory({rule.name: Watch(rule) for rule in self._rules if not rule.is_clock})


def replayed(fresh: AlertEngine, path: Path, step: int) -> AlertEngine:
    """``fresh`` as a run finds it that is about to resume at ``step`` of a log."""
    engine, alerts, time = copy.deepcopy(fresh), list[Alert](), 0.0
    for event in EventReader(path):
        engine.observe(event)
        time = event["time"]
        if event["kind"] == "alert":
            alerts.append(Alert.of(event))
        elif event["kind"] == "resume":
            alerts = [alert for alert in alerts if alert.step < event["step"]]
    engine.observe({"kind": "resume", "step": step, "time": time})
    newest = {alert.rule: alert for alert in alerts if alert.step < step}
    engine.adopt({rule: alert for rule, alert in newest.items() if alert.begins})
    return engine
