"""Step events of two runs, compared."""


def essence(step: dict) -> dict:
    """What must repeat bit for bit: all but clocks, memory, and how many engines answered at that moment."""
    clocks = ("time", "began", "timeline", "seconds", "idle")
    return {key: value for key, value in step.items() if key not in (*clocks, "memory", "engines")}
