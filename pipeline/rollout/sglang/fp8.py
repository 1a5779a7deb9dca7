"""Starts SGLang with linear weights as FP8 codes in blocks: makes its model folder and checks where it can run.

The server starts with random weights (``--load-format dummy``) on a folder whose ``config.json`` says FP8; what it
serves comes with the first update. So nothing is quantised twice, and no second copy of the model lies on the disk.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from pipeline.model.architecture import read_config
from pipeline.model.folder import is_weights
from pipeline.model.fp8 import quantization_config
from pipeline.rollout.engine import EngineError

_OLDEST, _TOO_NEW = (8, 9), (10, 0)


def require_device() -> None:
    """Raise ``EngineError`` unless SGLang can compute FP8 in blocks here, and take updates of it.

    GPUs before Ada repack the codes (Marlin), Blackwell rounds their scales in place (DeepGEMM's UE8M0), and CPUs need
    AMX and SGLang's CPU kernels (sglang/srt/layers/quantization/fp8.py, 0.5.21).
    """
    found = "no GPU is here"
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if _OLDEST <= capability < _TOO_NEW:
            return
        found = f"this GPU has compute capability {capability[0]}.{capability[1]}"
    raise EngineError(
        "rollout.weight_dtype=fp8: with rollout.engine=sglang it needs a GPU of compute capability 8.9 or 9.0 (Ada, "
        f"Hopper), but {found}; set rollout.weight_dtype=auto, or rollout.engine=native to see FP8's effect"
    )


def make_folder(hf_path: Path, folder: Path) -> Path:
    """Make a ``folder`` that links everything of a model folder but its weights.

    Its ``config.json`` says FP8 in blocks.
    """
    shutil.rmtree(folder, ignore_errors=True)  # an engine that is started again
    folder.mkdir(parents=True)
    for path in hf_path.iterdir():
        if path.is_file() and path.name != "config.json" and not is_weights(path):
            (folder / path.name).symlink_to(path.resolve())
    config = read_config(hf_path) | {"quantization_config": quantization_config()}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
