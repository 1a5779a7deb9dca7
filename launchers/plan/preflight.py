"""Says in words what a run will do and whether it can, before anything starts.

``isentrope plan run`` prints it, and every launch begins with it.

Loading has checked the configuration itself. The checks here relate the configuration to machines: each is a function
from a ``Setting`` to lines and problems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from launchers.plan import check_costs, check_files, check_machines
from launchers.plan.setting import Setting
from pipeline.config.errors import ConfigError, Problem

# In the order in which a reader wants to know.
CHECKS: Sequence[Callable[[Setting], Iterator[str | Problem]]] = (
    check_machines.batch,
    check_machines.machines,
    check_costs.memory,
    check_costs.routes,
    check_costs.speed,
    check_costs.time,
    check_files.files,
    check_files.alerts,
    check_files.versions_there,
)


@dataclass
class Report:
    """What the checks found."""

    lines: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def raise_problems(self) -> None:
        """Raises ``ConfigError`` with every problem, if there are any."""
        if self.problems:
            raise ConfigError.of(self.problems)


def check(setting: Setting) -> Report:
    """Every check."""
    report = Report()
    for found in (each for of in CHECKS for each in of(setting)):
        if isinstance(found, str):
            report.lines.append(found)
        else:
            report.problems.append(found)
    return report
