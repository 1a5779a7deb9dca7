"""Writes a checkpoint's adapters as the PEFT library reads them: ``adapter_config.json`` and one safetensors file.

Names and keys are those of PEFT (huggingface/peft, ``utils/save_and_load.py``, ``tuners/lora/config.py``).
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from megatron_ext.weights.torch_dist import Checkpoint
from pipeline.model.lora import modules

FOLDER = "adapter"  # of the Hugging Face folder that a checkpoint is written to


def write(folder: Path, checkpoint: Checkpoint, hf: Path) -> None:
    """Make ``folder``. ``hf``: the base model's Hugging Face folder."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for adapter in checkpoint.adapters.values():
        for index, source in enumerate(adapter.sources):
            tensors[adapter.a.sources[index].name] = checkpoint.stored(adapter.a, index).contiguous()
            tensors[adapter.b.sources[source].name] = checkpoint.stored(adapter.b, source).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    lora = checkpoint.lora
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(hf.resolve()),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(modules(lora)),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
