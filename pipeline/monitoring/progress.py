"""Shows a run's live progress on stderr: a small panel in a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.entropy.actuator import temperatures
from pipeline.monitoring.console import CleanConsole
from pipeline.monitoring.event_kinds import StepRecord
from pipeline.monitoring.start_note import start_note
from pipeline.monitoring.tracking import waiting

PERIOD = 0.25  # seconds between two refreshes of the panel
LINES = 20  # plain lines over a whole run
STATE_STYLES = {
    "tracking": "green",
    "waiting": "cyan",
    "saturated": "yellow",
    "holding": "yellow",
    "exploding": "bold red",
}


class Progress:
    """Shows each step as it ends. Drawing is throttled, so a step costs well under a millisecond."""

    def __init__(
        self, name: str, steps: int, schedule: str = "constant", *, first: int = 0, console: Console | None = None
    ) -> None:
        """``schedule``: of the band; ``first``: steps done before."""
        self._name, self._steps, self._schedule, self._first = name, steps, schedule, first
        self._console = console or CleanConsole(stderr=True)
        self._entropies: list[float] = []  # of a run that began here and, as far as was shown, has not come to its band
        self._waits = first == 0
        self._every = max(1, steps // LINES)
        self._started = self._drawn = time.monotonic()
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()

    def say(self, text: str) -> None:
        """Print above the panel."""
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def step(self, record: StepRecord) -> None:
        """Show a step, if it is time to."""
        if record.step == 0 and record.entropy_count:
            self.say(start_note(record, self._schedule))
        self._entropies += [record.controlled] if self._waits else []
        last = record.step + 1 == self._steps
        if self._live is not None:
            now = time.monotonic()
            if last or now - self._drawn >= PERIOD:
                self._drawn = now
                self._live.update(self._panel(record), refresh=True)
        elif last or (record.step + 1) % self._every == 0:
            self._console.print(self._line(record), soft_wrap=True, highlight=False, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was found, the last panel on it. Idempotent."""
        if self._live is not None:
            self._live.stop()

    def _standing(self, record: StepRecord) -> tuple[str, str]:
        """State and reason of the controller, as the monitor says them."""
        said = waiting(self._entropies, record.band_low, record.band_high) if self._waits else ""
        self._waits = bool(said)
        return ("waiting", said) if said and record.state == "tracking" else (record.state, record.reason)

    def _remaining(self, record: StepRecord) -> str:
        done = record.step + 1 - self._first
        seconds = (time.monotonic() - self._started) / done * (self._steps - record.step - 1)
        return str(timedelta(seconds=round(seconds)))

    def _line(self, record: StepRecord) -> str:
        name, reason = self._standing(record)
        state = f"{name}: {reason}" if name in ("waiting", "holding") else name
        return (
            f"{self._name} step {record.step + 1}/{self._steps}: entropy {record.controlled:.3f} "
            f"(band {record.band_low:.3f}-{record.band_high:.3f}), {_command(record)}, {state}, "
            f"reward {record.reward:.3f}, {record.seconds.get('total', 0.0):.2f} s, {self._remaining(record)} left"
        )

    def _panel(self, record: StepRecord) -> Group:
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self._steps, completed=record.step + 1, width=30)
        total = record.seconds.get("total", 0.0)
        head.add_row(
            Text(self._name, "bold"),
            f"step {record.step + 1}/{self._steps}",
            bar,
            f"{total:.2f} s/step, {self._remaining(record)} left",
        )
        state, reason = self._standing(record)
        inside = record.band_low <= record.controlled <= record.band_high
        entropy = Text.assemble(
            "entropy ",
            (f"{record.controlled:.3f}", "green" if inside else "yellow"),
            f"  band {record.band_low:.3f}-{record.band_high:.3f}  {_command(record)}  ",
            (state, STATE_STYLES.get(state, "dim")),
            (f"  {reason}", "dim"),
        )
        split = "  ".join(f"{name} {value:.3f}" for name, value in record.seconds.items() if name != "total")
        reward = Text.assemble(
            f"reward {record.reward:.3f}  length {record.response_length:.1f}  ", (f"seconds: {split}", "dim")
        )
        return Group(head, entropy, reward)


def _command(record: StepRecord) -> str:
    """The command in words: T+ where it is a temperature."""
    if record.actuator in ("none", ""):
        return "no control"
    if record.actuator in temperatures():
        return f"T+ {record.temperature:.2f} ({record.actuator})"
    return f"{record.actuator} {record.command:.4g}"
