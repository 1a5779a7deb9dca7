"""Makes one attempt at a run: ``isentrope train`` as a child process, watched to its end, and a verdict on that end.

The verdict is one word:

- ``completed``, ``cancelled``: nothing is left to do;
- ``saved``: the run stopped in time, with a checkpoint from which it can go on;
- ``again``: the run broke off; another attempt may do better;
- ``failed``: another attempt would break off just the same.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launchers import environment
from launchers.supervise.attempts import Progress, begun, progress
from launchers.supervise.signals import hand_on
from launchers.supervise.watchdog import Supervision
from pipeline.config.load import load_config, override
from pipeline.disk import DiskFullError

DRIVER = "driver.pid"
CANCEL = "cancel"  # a file of this name in the attempt's folder: whoever started the attempt was asked to stop
USAGE_ERROR = 2


def train(
    run_dir: Path,
    attempt_dir: Path,
    config: Path,
    head: subprocess.Popen[bytes] | None = None,
    address: str = "",
    signals: Sequence[int] = (),
) -> tuple[str, str]:
    """Run ``isentrope train`` to its end, until it hangs or Ray's ``head`` dies; verdict and reason.

    ``config`` is used for a run that has not begun, and says how many steps it has. ``attempt_dir`` gets
    ``driver.pid``. ``signals`` may grow: they are handed on to the training process.
    """
    if (attempt_dir / CANCEL).exists():
        return "cancelled", "before the run was started"
    wanted = load_config(config, check=False)
    steps = wanted.steps
    going_on = begun(run_dir)
    source = ["--resume", str(run_dir), f"steps={steps}"] if going_on else ["--config", str(config)]
    where = [] if going_on else [override("run_dir", run_dir)]
    command = [sys.executable, "-m", "launchers.cli.main", "train", *source, *where]
    driver = subprocess.Popen(command, env=environment.child(**({"RAY_ADDRESS": address} if address else {})))
    (attempt_dir / DRIVER).write_text(str(driver.pid))
    try:
        reason = _watch(driver, Supervision(run_dir, driver.pid, wanted), head, signals)
    finally:  # ended here itself, it takes Ray along: the driver could save nothing, and would keep the run from others
        if driver.poll() is None:
            driver.kill()
            driver.wait()
    if reason:
        return "again", reason
    return _verdict(driver.returncode, progress(run_dir), steps, (attempt_dir / CANCEL).exists())


def _watch(
    driver: subprocess.Popen[bytes],
    supervision: Supervision,
    head: subprocess.Popen[bytes] | None,
    signals: Sequence[int],
) -> str:
    """Wait for the driver's end, or for a reason to end it, handing ``signals`` on to it; the reason, "" without."""
    handed_on = 0
    while driver.poll() is None:
        reason = supervision.complaint()
        if head is not None and head.poll() is not None:
            reason = f"Ray's head ended by itself (exit code {head.returncode}); see ray-0.log"
        if reason:
            return reason
        handed_on = hand_on(driver, signals, handed_on)
        time.sleep(0.2)
    return ""


def _verdict(code: int, after: Progress, steps: int, cancelled: bool) -> tuple[str, str]:
    """What the exit code of `isentrope train` and its last event mean."""
    if code == USAGE_ERROR:
        return "failed", "configuration, data or checkpoint were refused; the message is in the log"
    if code != 0:
        ending = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if cancelled:
            return "cancelled", f"before it could save: the training process ended with {ending}"
        verdict = "failed" if after.error.startswith(DiskFullError.__name__) else "again"
        return verdict, after.error or f"the training process ended with {ending}"
    if after.status == "completed":
        return "completed", f"{after.step} steps"
    return "cancelled" if cancelled else "saved", f"checkpoint after {after.step} of {steps} steps"
