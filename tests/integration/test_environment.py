"""The environment that `make` builds, as its user finds it."""

import subprocess
import sys

import pytest

pytest.importorskip("sglang")


def test_a_users_own_import_of_a_model_works_beside_sglang(tmp_path):
    code = "from transformers import Qwen3ForCausalLM; import torchvision; print(Qwen3ForCausalLM.__name__)"
    done = subprocess.run([sys.executable, "-E", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "Qwen3ForCausalLM\n", done.stderr


def test_an_ordinary_start_of_python_does_not_pay_for_it(tmp_path):
    code = "import sys; print('torch' in sys.modules, 'torchvision_without_cuda' in sys.modules)"
    done = subprocess.run([sys.executable, "-E", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "False True\n", done.stderr
