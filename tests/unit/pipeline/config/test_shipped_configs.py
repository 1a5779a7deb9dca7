"""The YAML under configs/ and the page made from the schema."""

import runpy
from pathlib import Path

import pytest

from pipeline.config.load import PACKAGED, load_config

# Their own tests: tests/unit/launchers, tests/unit/pipeline/monitoring/alerts/test_rules.py,
# tests/integration/test_prometheus.py
OTHER_SCHEMAS = ("cluster", "alerts", "monitoring", "lab", "benchmark")
SHARED = "recipe/papers/scope_rl.yaml"  # what the recipes beside it include: no model of its own
FILES = sorted(
    str(path.relative_to(PACKAGED))
    for path in PACKAGED.rglob("*.yaml")
    if path.parent.name not in OTHER_SCHEMAS and path != PACKAGED / SHARED
)
NEEDS_A_CONVERTED_MODEL = "recipe/smollm2_135m_cpu.yaml"


@pytest.mark.parametrize("name", FILES)
def test_shipped_files_are_valid(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = (
        ["model.hf_path=model/pm4-100k", "rollout.max_prompt_tokens=8"] if name == NEEDS_A_CONVERTED_MODEL else []
    )
    if "papers" in name:
        (tmp_path / "dapo-math-17k.jsonl").write_text('{"id": 1, "prompt": "1+1?", "answer": "2"}\n')
    load_config(Path(name), overrides)


def test_the_quickstart_differs_from_its_rivals_only_in_control():
    control, baseline, paper = (
        load_config(Path(name)) for name in ("quickstart.yaml", "recipe/pm4_grpo.yaml", "recipe/pm4_scope.yaml")
    )
    for rival in (baseline, paper):
        for section in ("model", "learner", "rollout", "data", "objective", "evaluation", "steps", "seed"):
            assert getattr(rival, section) == getattr(control, section)
        assert rival.entropy.band == control.entropy.band


def test_the_configuration_page_is_up_to_date():
    tool = runpy.run_path(str(PACKAGED.parent / "tools" / "make_config_docs.py"))
    assert tool["PAGE"].read_text() == tool["page"](), "run: python tools/make_config_docs.py"
