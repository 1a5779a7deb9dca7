"""Hand-made events for the alert rules: a run on track, one step every 10 s, that a test changes where it wants."""

START = 1_000_000.0
STEP = 10.0
GIB = 2**30


def step(at, time=None, **changes):
    return {
        "kind": "step",
        "step": at,
        "time": START + STEP * (at + 1) if time is None else time,
        "entropy": 0.3,
        "entropy_filtered": 0.3,
        "band_low": 0.27,
        "band_high": 0.33,
        "target": 0.3,
        "temperature": 1.1,
        "command": 1.1,
        "state": "tracking",
        "reason": "H=0.3 in band",
        "reward": 0.5,
        "positives": 8,
        "all_equal_groups": 0.3,
        "unjudged": 0.0,
        "loss": -0.1,
        "grad_norm": 1.0,
        "metrics": {"mismatch_kl": 5e-4},
        "seconds": {"total": STEP},
        "engines": {"alive": 2, "total": 2},
        **changes,
    }


def event(kind, at, **values):
    return {"kind": kind, "step": at, "time": START + STEP * at + 1, **values}


def run(engine, events):
    """What each event brings: (step, rule, state)."""
    return [(a.step, a.rule, a.state) for e in events for a in engine.observe(e)]
