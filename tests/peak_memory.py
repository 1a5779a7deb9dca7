"""How much memory a function takes at its worst, counted in torch's own allocator: temporaries inside operators too."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], Any]) -> tuple[int, Any]:
    """Most bytes on the CPU that the call held at once beyond those held before it, and what it returned."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        result = function()
    changes = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak, result
