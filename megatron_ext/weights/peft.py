"""Writes a checkpoint's adapters as the PEFT library reads them: ``adapter_config.json`` and one safetensors file.

Names and keys are those of PEFT (huggingface/peft, ``utils/save_and_load.py``, ``tuners/lora/config.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file

from megatron_ext.weights.torch_dist import Checkpoint
from pipeline.config.schema import LORA_MODULES
from pipeline.model.lora import Adapter

FOLDER = "adapter"  # of the Hugging Face folder that a checkpoint is written to


def write(folder: Path, checkpoint: Checkpoint, hf: Path) -> None:
    """Make ``folder``. ``hf``: the base model's Hugging Face folder."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for adapter in checkpoint.adapters.values():
        for index, source in enumerate(adapter.sources):
            tensors[adapter.a.sources[index].name] = checkpoint.stored(adapter.a, index).contiguous()
            tensors[adapter.b.sources[source].name] = checkpoint.stored(adapter.b, source).contiguous()
    adapted = {name.split(".")[-3] for name in tensors}
    beside = _beside_experts(checkpoint.adapters.values())
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    lora = checkpoint.lora
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(hf.resolve()),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [name for name in LORA_MODULES if name in adapted],
        **({"target_parameters": beside} if beside else {}),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _beside_experts(adapters: Iterable[Adapter]) -> list[str]:
    """Adapted weights of dense layers and shared experts, where the linear layers of routed experts have such names.

    transformers 5 has no linear layers of experts but a parameter for all. So PEFT (0.21, its
    ``transformers_weight_conversion.py``) looks for such names among those alone, unless they are parameters' too.
    """
    weights = [(each.base.sources[index].name, each.base.expert) for each in adapters for index in each.sources]
    routed = {name.split(".")[-2] for name, expert in weights if expert is not None}
    dense = {tuple(name.split(".")[-3:]) for name, expert in weights if expert is None}
    return sorted(".".join(parts) for parts in dense if parts[1] in routed)
