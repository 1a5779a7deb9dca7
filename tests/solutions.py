"""What solves a countdown problem, as text."""

from pipeline.data.countdown import SYMBOLS


def solutions_of(task, index):
    """All responses that solve the problem of this index."""
    rows = task.solutions[task.first[index] : task.first[index] + task.count[index]]
    return ["".join(SYMBOLS[symbol] for symbol in row) for row in rows]
