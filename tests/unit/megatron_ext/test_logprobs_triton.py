"""What can be known of the Triton kernels without a GPU: their arithmetic, and that they compile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu itself runs here")
def test_arithmetic_in_the_interpreter():
    """tests/gpu in a process of its own: Triton decides at import whether it interprets."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu/test_logprobs_triton.py", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert "19 passed" in run.stdout, run.stdout[-400:]  # none skipped but those for a GPU


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("logits", ["*fp32", "*bf16"])
@pytest.mark.parametrize(("kernel", "options"), [("_accumulate", ("TEMPERED", "MOMENT")), ("_gradient", ("ENTROPY",))])
def test_compiles_for_hopper(kernel, options, logits, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_ext import logprobs_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(logprobs_triton, kernel)
    types = {"logits": logits, "column": "*i64", "sum_stride": "i32", "width": "i32", "stride": "i32"}
    constants = {**dict.fromkeys(options, True), "BLOCK": logprobs_triton._MOST_COLUMNS}
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in function.arg_names}
    source = ASTSource(function, signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": logprobs_triton._WARPS})
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared < 48 << 10


def test_a_cpu_tensor_is_refused():
    from megatron_ext.logprobs import log_probs_and_entropy

    with pytest.raises(ValueError, match="kernel='triton' needs a CUDA device, the logits are on cpu: choose torch"):
        log_probs_and_entropy(torch.zeros(1, 4), torch.tensor([0]), vocab_size=4, group=None, kernel="triton")
