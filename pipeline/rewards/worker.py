"""Begins a worker process for a user's code so that nothing which that code starts in it outlives it."""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress

from pipeline.rewards.verifier import UnknownVerifierError, make_verifier

_PR_SET_PDEATHSIG = 1  # linux/prctl.h: the signal that a process gets when its parent dies


def begin(verifier: str, folder: str) -> None:
    """Lead a guarded group, and load the verifier outside any time limit.

    What the import raises, the first call raises again and reports.
    """
    lead_guarded_group()
    with suppress(UnknownVerifierError):
        make_verifier(verifier, folder)


def lead_guarded_group() -> None:
    """Lead a process group of its own, which ends with this process, and which the driver's end ends."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler waits for C code that does not return
    _signal_at_parents_death(signal.SIGKILL)  # the fork server, which goes with the driver
    _guard(os.getpid())


def _guard(worker: int) -> None:
    """Fork a process that kills the worker's process group, itself included, when the worker is dead.

    Nobody else could: a worker that is killed cannot tidy up, and the pool does not know its verifier's children.
    """
    if os.fork():
        return
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        _signal_at_parents_death(signal.SIGUSR1)
        os.closerange(0, os.sysconf("SC_OPEN_MAX"))  # else the driver would wait for this copy of the worker's pipe
        if os.getppid() == worker:
            signal.sigwait({signal.SIGUSR1})
        os.killpg(worker, signal.SIGKILL)
    finally:
        os._exit(1)


def _signal_at_parents_death(number: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
