import itertools

import numpy as np
import pytest

from pipeline.data import DataError
from pipeline.data.countdown import SYMBOLS, countdown_task, evaluate_left_to_right
from tests.solutions import solutions_of


def test_pm4_has_the_documented_split():
    task = countdown_task("pm4")
    held_out = task.held_out(0.1)
    assert (len(task), int((~held_out).sum()), int(held_out.sum())) == (2835, 2527, 308)
    assert np.median(task.count) == 12


@pytest.mark.parametrize("name", ["pm2", "cd2", "pm3", "cd3"])
def test_enumeration_agrees_with_brute_force(name):
    task = countdown_task(name)
    n = int(name[2:])
    expected: dict[str, set[str]] = {}
    for digits in itertools.product(range(1, 10), repeat=n):
        for operators in itertools.product(task.operators, repeat=n - 1):
            value, text = digits[0], str(digits[0])
            for operator, digit in zip(operators, digits[1:], strict=True):
                value = {"+": value + digit, "-": value - digit, "*": value * digit}[operator]
                text += operator + str(digit)
            if 0 <= value <= 99:
                expected.setdefault("".join(map(str, sorted(digits))) + f",{value:02d}", set()).add(text)
    found = {task.problem(i): solutions_of(task, i) for i in range(len(task))}
    assert {problem: set(solutions) for problem, solutions in found.items()} == expected
    assert all(len(set(solutions)) == len(solutions) for solutions in found.values())


def test_evaluation_is_left_to_right():
    expression = np.array([[SYMBOLS.index(c) for c in "2+3*4-5"]], np.int8)
    assert evaluate_left_to_right(expression).tolist() == [15]


@pytest.mark.parametrize("name", ["pm1", "pm9", "cd", "xy4", ""])
def test_unknown_task(name):
    with pytest.raises(DataError, match=r"data\.source\.task=.*pm4"):
        countdown_task(name)
