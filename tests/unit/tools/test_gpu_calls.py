"""What only a GPU runs calls the project's functions as they are defined.

A CPU holds names and arguments, not results.
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILES = [*sorted((ROOT / "tests/gpu").glob("*.py")), ROOT / "tools/gpu_check.py"]
OURS = ("pipeline", "megatron_ext", "launchers")
NOT_HERE = ("logprobs_triton",)  # needs triton to be imported


def imported(tree):
    """What the file imports of the project, by the name that it has there, in whatever function."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            module = importlib.import_module(node.module)
            for alias in node.names:
                if alias.name in NOT_HERE or node.module.endswith(NOT_HERE):
                    continue
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                found[alias.asname or alias.name] = getattr(module, alias.name)
    return found


def called(node, names):
    """The project's function or class that a call names; None where it is another's."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and inspect.ismodule(module := called(node.value, names)):
        return getattr(module, node.attr)  # one that is gone is an error of the file
    return None


def wrong_calls(source):
    tree = ast.parse(source)
    names = imported(tree)
    for node in ast.walk(tree):
        target = called(node.func, names) if isinstance(node, ast.Call) else None
        if not callable(target) or (inspect.isclass(target) and issubclass(target, BaseException)):
            continue
        unpacked = any(isinstance(part, ast.Starred) for part in node.args) or any(not k.arg for k in node.keywords)
        given = [part for part in node.args if not isinstance(part, ast.Starred)]
        signature = inspect.signature(target)
        bind = signature.bind_partial if unpacked else signature.bind
        try:
            bind(*given, **{k.arg: k.value for k in node.keywords if k.arg})
        except TypeError as error:
            yield f"line {node.lineno}: {ast.unparse(node.func)}{signature}: {error}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_calls_fit_what_they_call(path):
    assert list(wrong_calls(path.read_text())) == []


@pytest.mark.parametrize("words", ['0, 1, ("127.0.0.1", 1), 1, 1, seed=0', '0, ("127.0.0.1", 1), seed=0'])
def test_a_call_of_an_older_signature_is_seen(words):
    (found,) = wrong_calls(f"def test():\n    from megatron_ext import topology\n    topology.initialize({words})")
    assert found.startswith("line 3: topology.initialize(")
