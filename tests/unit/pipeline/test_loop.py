"""The loop reads like the algorithm: a step fits a screen, and everything in it has a name."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCREEN = 40  # lines


def starred(node: ast.AST) -> bool:
    """Whether a call is handed an unpacked sequence or mapping."""
    return isinstance(node, ast.Call) and (
        any(isinstance(argument, ast.Starred) for argument in node.args)
        or any(keyword.arg is None for keyword in node.keywords)
    )


def test_train_step_fits_a_screen():
    tree = ast.parse((ROOT / "pipeline/loop.py").read_text())
    (step,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "train_step"]
    assert step.end_lineno - step.lineno + 1 <= SCREEN


@pytest.mark.parametrize("module", ["loop", "step/queue", "step/draw"])
def test_arguments_are_named_not_unpacked(module):
    tree = ast.parse((ROOT / f"pipeline/{module}.py").read_text())
    assert [node.lineno for node in ast.walk(tree) if starred(node)] == []
