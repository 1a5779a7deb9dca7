"""Imports run downward only: the floors of CONTRIBUTING.md, held by the import statements themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = {
    "pipeline.types": 1,
    "pipeline.seeds": 1,
    "pipeline.checksum": 1,
    "pipeline.packing": 1,
    "pipeline.blocks": 1,
    "pipeline.fp8": 1,
    "pipeline.ports": 1,
    "pipeline.student": 1,
    "pipeline.disk": 1,
    "pipeline.config": 1,
    "pipeline.methods": 1,
    "pipeline.entropy": 2,
    "pipeline.objectives": 2,
    "pipeline.data": 2,
    "pipeline.rewards": 2,
    "pipeline.learner": 2,
    "pipeline.checkpoints": 2,
    "pipeline.monitoring": 3,
    "megatron_ext": 3,
    "pipeline.rollout": 3,
    "pipeline.evaluation": 4,
    "pipeline.loop": 5,
    "launchers": 6,
}
MEGATRON_MAY_USE = (
    "pipeline.types",
    "pipeline.config.schema",
    "pipeline.checksum",
    "pipeline.blocks",
    "pipeline.fp8",
    "pipeline.learner",
    "pipeline.objectives",
)


def floor(module: str) -> int | None:
    found = [level for name, level in FLOORS.items() if module == name or module.startswith(name + ".")]
    return found[0] if found else None


def imports():
    for package in ("pipeline", "megatron_ext", "launchers"):
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                yield from ((module, name) for name in names)


ALL = list(imports())


def test_every_module_has_a_floor():
    assert {m for m, _ in ALL if floor(m) is None} <= {"pipeline"}


def test_imports_run_downward():
    upward = [f"{m} imports {i}" for m, i in ALL if floor(m) and floor(i) and floor(i) > floor(m)]
    assert not upward


@pytest.mark.parametrize("library", ["megatron", "sglang"])
def test_pipeline_stays_off_the_hardware(library):
    users = {m for m, i in ALL if m.startswith("pipeline") and i.split(".")[0] == library}
    assert users <= ({"pipeline.rollout.sglang"} if library == "sglang" else set())


def test_megatron_ext_uses_little_of_pipeline():
    beyond = [
        f"{m} imports {i}"
        for m, i in ALL
        if m.startswith("megatron_ext") and i.startswith("pipeline") and not i.startswith(MEGATRON_MAY_USE)
    ]
    assert not beyond


def test_the_loop_fits_under_a_hundred_lines():
    assert len((ROOT / "pipeline" / "loop.py").read_text().splitlines()) < 100
