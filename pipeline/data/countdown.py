"""The countdown tasks: reach a two-digit target with every given digit once, evaluated left to right.

``pm<n>`` allows + and -, ``cd<n>`` also *. A problem is ``n`` sorted digits 1-9 and a target 00-99, written
``1234,24``; the prompt is ``1234,24=``, a response ``4*3*2*1``. A task holds every problem that has at least one
solution (pm4: 2,835 problems, median 12 solutions), so a policy can be right in several ways: what diversity costs and
gains is visible.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.data import DataError

SYMBOLS = "0123456789+-*=,$"  # the vocabulary in token order; "$" ends a response
_MAX_DIGITS = 5  # cd5 has 10 million solutions; one digit more would not fit in memory


@dataclass(frozen=True)
class Countdown:
    """Every solvable problem of one task, ordered by digits, then target; ``S`` counts solutions of all problems."""

    name: str
    operators: str
    digits: np.ndarray  # int8 [problems, n], ascending
    targets: np.ndarray  # int64 [problems], 0-99
    solutions: np.ndarray  # int8 [S, 2n - 1], indices into SYMBOLS, grouped by problem
    first: np.ndarray  # int64 [problems], row of each problem's first solution
    count: np.ndarray  # int64 [problems], number of its solutions

    def __len__(self) -> int:
        return len(self.targets)

    def problem(self, index: int) -> str:
        """``1234,24``: the digits and the target; with "=" after it, the prompt."""
        return "".join(map(str, self.digits[index])) + f",{self.targets[index]:02d}"

    def held_out(self, share: float) -> np.ndarray:
        """bool [problems]: which are kept for evaluation, the same for every run (pm4 at 0.1: 308 of 2,835)."""
        return np.random.default_rng(0).random(len(self)) < share


@lru_cache(maxsize=4)
def countdown_task(name: str) -> Countdown:
    """Enumerate a task by name: ``pm2`` ... ``pm5``, ``cd2`` ... ``cd5``. Raises ``DataError`` for any other name."""
    match = re.fullmatch(rf"(pm|cd)([2-{_MAX_DIGITS}])", name)
    if match is None:
        raise DataError(
            f"data.source.task={name!r} is no countdown task: use pm<n> (operators + and -) or cd<n> (+, - and *) "
            f"with 2 to {_MAX_DIGITS} digits, e.g. pm4"
        )
    operators = "+-" if match[1] == "pm" else "+-*"
    n = int(match[2])
    multisets = np.array(list(itertools.combinations_with_replacement(range(1, 10), n)), np.int8)
    permutations = np.array(list(itertools.permutations(range(n))))
    choices = np.array(list(itertools.product(map(SYMBOLS.index, operators), repeat=n - 1)), np.int8)
    rows, keys = [], []
    for index, digits in enumerate(multisets):
        expressions = _expressions(np.unique(digits[permutations], axis=0), choices)
        values = evaluate_left_to_right(expressions)
        valid = (values >= 0) & (values <= 99)
        rows.append(expressions[valid])
        keys.append(index * 100 + values[valid])
    key = np.concatenate(keys)
    order = np.argsort(key, kind="stable")
    problems, first, count = np.unique(key[order], return_index=True, return_counts=True)
    return Countdown(
        name, operators, multisets[problems // 100], problems % 100, np.concatenate(rows)[order], first, count
    )


def evaluate_left_to_right(expressions: np.ndarray) -> np.ndarray:
    """int64 [rows]: value of each expression of symbols [rows, 2n - 1], without operator precedence."""
    values = expressions[:, 0].astype(np.int64)
    for column in range(1, expressions.shape[1], 2):
        operator, digit = expressions[:, column], expressions[:, column + 1].astype(np.int64)
        values = np.where(
            operator == SYMBOLS.index("+"),
            values + digit,
            np.where(operator == SYMBOLS.index("-"), values - digit, values * digit),
        )
    return values


def _expressions(digit_orders: np.ndarray, operator_choices: np.ndarray) -> np.ndarray:
    """int8 [orders * choices, 2n - 1]: every digit order with every choice of operators."""
    orders, n = digit_orders.shape
    expressions = np.empty((orders * len(operator_choices), 2 * n - 1), np.int8)
    expressions[:, 0::2] = np.repeat(digit_orders, len(operator_choices), axis=0)
    expressions[:, 1::2] = np.tile(operator_choices, (orders, 1))
    return expressions
