"""Everything that makes the upstream SGLang wheel serve on a machine without CUDA. Nothing installed is edited.

The folder ``shim`` beside this file, which only the server process gets on its PYTHONPATH, holds ``sgl_kernel/``, a
placeholder whose every name can be imported and none called. Mends ``sglang/srt/layers/*.py``, which import from
``sgl_kernel`` without a guard; its wheels need CUDA libraries.
Versions: sglang 0.5.17 to 0.5.21. Can go when SGLang guards those imports or PyPI has a CPU wheel of sgl-kernel.
What lets SGLang import torchvision is the environment's: requirements/torchvision_without_cuda.py.
"""

from __future__ import annotations

import os
from pathlib import Path

SHIM_FOLDER = Path(__file__).parent / "shim"

# The attention and sampling of SGLang that are written in plain torch; CUDA graphs and the overlap scheduler need
# streams. Without --sleep-on-idle a server that waits spins a core, which the learner needs here.
ARGUMENTS = (
    *("--device", "cpu", "--sampling-backend", "pytorch"),
    *("--disable-cuda-graph", "--disable-overlap-schedule", "--sleep-on-idle"),
)
ATTENTION_BACKEND = "torch_native"


def environment(ranks: int, python_path: str) -> dict[str, str]:
    """Environment variables that a server of so many tensor-parallel ranks needs on CPU, beside those it inherits."""
    # SGLang wants a NUMA node for each rank unless told which cores each may use: here all that we may.
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    binding = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join([cores] * ranks)} if ranks > 1 else {}
    return binding | {
        "PYTHONPATH": os.pathsep.join((str(SHIM_FOLDER), python_path)),
        "SGLANG_USE_CPU_ENGINE": "1",
        # One thread per server: with more, each small operator of a decode step pays for waking them.
        "OMP_NUM_THREADS": "1",
    }
