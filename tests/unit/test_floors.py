"""Imports run downward only and never in a circle: the floors of CONTRIBUTING.md, held by the import statements
themselves.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = {
    "pipeline.types": 1,
    "pipeline.seeds": 1,
    "pipeline.clock": 1,
    "pipeline.packing": 1,
    "pipeline.ports": 1,
    "pipeline.http_client": 1,
    "pipeline.units": 1,
    "pipeline.smoothing": 1,
    "pipeline.student": 1,
    "pipeline.disk": 1,
    "pipeline.fingerprints": 1,
    "pipeline.methods": 1,
    "pipeline.registry": 1,
    "pipeline.batching": 1,
    "pipeline.config": 1,
    "pipeline.model": 1,
    "pipeline.entropy": 2,
    "pipeline.objectives": 2,
    "pipeline.data": 2,
    "pipeline.rewards": 2,
    "pipeline.learner": 2,
    "pipeline.reshard": 2,
    "pipeline.checkpoints": 2,
    "pipeline.monitoring": 3,
    "pipeline.rollout": 3,
    "megatron_ext": 3,
    "pipeline.step": 4,
    "pipeline.evaluation": 4,
    "pipeline.loop": 5,
    "launchers.environment": 6,
    "launchers.doctor": 7,
    "launchers.placement": 7,
    "launchers.remote_run": 7,
    "launchers.supervise": 8,
    "launchers.run": 9,
    "launchers.slurm": 9,
    "launchers.lab": 10,
    "launchers.plan": 10,
    "launchers.api": 11,
    "launchers.cli": 11,
}
# What megatron_ext may use of pipeline beside the first floor's rooms.
MEGATRON_MAY_USE = ("pipeline.learner", "pipeline.objectives", "pipeline.reshard")


def modules() -> dict[str, Path]:
    paths = [path for package in ("pipeline", "megatron_ext", "launchers") for path in (ROOT / package).rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in sorted(paths)}


MODULES = modules()


def imported(node: ast.AST) -> list[str]:
    """What a statement imports; ``from package import module`` is an import of ``package.module``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert node.level == 0, "write the whole name of what is imported"
    joined = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if name in MODULES else str(node.module) for name in joined]


def imports() -> list[tuple[str, str]]:
    """Every import of every module, inside functions too."""
    trees = ((module, ast.parse(path.read_text())) for module, path in MODULES.items())
    return [(module, name) for module, tree in trees for node in ast.walk(tree) for name in imported(node)]


ALL = imports()


def room(module: str) -> str:
    """The name in ``FLOORS`` that a module belongs to; "" if it has none."""
    return next((name for name in FLOORS if module == name or module.startswith(name + ".")), "")


def floor(module: str) -> int | None:
    return FLOORS.get(room(module))


def test_every_module_has_a_floor():
    assert {module for module in MODULES if floor(module) is None} == {"pipeline", "launchers"}


def test_every_floor_has_a_module():
    assert set(FLOORS) <= set(MODULES)


def test_contributing_draws_the_same_house():
    """The map of CONTRIBUTING.md: a number, then the rooms of that floor; those of launchers have an order of their
    own.
    """
    drawn = re.findall(r"^ {4}(\d)  (.*(?:\n {7}.*)*)", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    rooms = {int(number): {word.strip("/").replace("/", ".") for word in text.split()} for number, text in drawn}
    rooms[6] = {f"launchers.{word.strip('(/,)')}" for word in drawn[0][1].split()[1:] if word != "->"}
    for level in range(1, 6):
        assert rooms[level] == {name for name, at in FLOORS.items() if at == level}
    assert rooms[6] == {name for name, at in FLOORS.items() if at > 5}
    mentioned = re.findall(
        r"`((?:pipeline|megatron_ext|launchers|tests|tools)/[\w/.]+)`", (ROOT / "CONTRIBUTING.md").read_text()
    )
    assert [path for path in mentioned if not (ROOT / path).exists()] == []


def test_imports_run_downward():
    assert not [f"{m} imports {i}" for m, i in ALL if floor(m) and floor(i) and floor(i) > floor(m)]


def test_launchers_on_one_floor_do_without_each_other():
    inside = [(m, i) for m, i in ALL if m.startswith("launchers.") and i.startswith("launchers.")]
    assert not [f"{m} imports {i}" for m, i in inside if floor(m) == floor(i) and room(m) != room(i)]


def test_no_import_runs_in_a_circle():
    """Nor an import inside a function, which would hide the circle from Python until the function is called."""
    edges: dict[str, list[str]] = {module: [] for module in MODULES}
    for module, name in ALL:
        if name in MODULES:
            edges[module].append(name)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in edges[module]:
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize(("library", "may"), [("megatron", ()), ("sglang", ("pipeline.rollout.sglang.",))])
def test_pipeline_stays_off_the_hardware(library: str, may: tuple[str, ...]):
    users = [m for m, i in ALL if m.startswith("pipeline") and i.split(".")[0] == library]
    assert not [module for module in users if not module.startswith(may)]


def test_megatron_ext_uses_little_of_pipeline():
    beyond = [
        f"{m} imports {i}"
        for m, i in ALL
        if m.startswith("megatron_ext")
        and i.startswith("pipeline.")
        and floor(i) != 1
        and not i.startswith(MEGATRON_MAY_USE)
        and i != "pipeline.data"  # the type of its errors
    ]
    assert not beyond


def test_nothing_but_megatron_ext_and_the_wiring_imports_megatron_ext():
    users = {m for m, i in ALL if i.split(".")[0] == "megatron_ext" and not m.startswith("megatron_ext")}
    assert {
        module for module in users if not module.startswith(("launchers.run.", "launchers.cli.", "launchers.api"))
    } == set()


# Who may write to a terminal: everything else goes through them, cleaned of control characters.
WRITERS = {
    "echo": {"launchers.cli.terminal"},
    "print": set(),
    "Console": set(),
    "StreamHandler": {"pipeline.monitoring.console"},
    "basicConfig": {"pipeline.monitoring.console"},
}


def test_text_leaves_for_a_terminal_at_one_place():
    """``say``, ``CleanConsole`` (also ``.print`` of one) and ``log_to_terminal``."""
    found = set()
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            plain = node.func.id if isinstance(node.func, ast.Name) else ""
            name = node.func.attr if isinstance(node.func, ast.Attribute) and node.func.attr != "print" else plain
            if name in WRITERS and module not in WRITERS[name]:
                found.add((module, name))
    assert not found
