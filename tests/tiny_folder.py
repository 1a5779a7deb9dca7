"""Small Hugging Face folders, written without transformers; norms and biases are random so that a swapped one shows."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.rollout.decoder import DecoderConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def hf_config(family, **changes):
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_size": 64,
        "intermediate_size": 84,  # SGLang pads it on a CPU
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 48,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": 3,
        "torch_dtype": "float32",
    } | changes


def random_tensors(config, seed):
    """Every parameter of the model, large enough that its next-token distributions are far from uniform."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(name, shape):
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            return 1.0 + 0.3 * noise
        return 0.3 * noise if name.endswith("bias") else 1.5 * noise * shape[-1] ** -0.5

    return {name: tensor(name, shape) for name, shape in DecoderConfig.from_hf(config).tensor_shapes().items()}


def write_folder(path: Path, family, seed=0, **changes):
    """A model folder; returns its path and its tensors."""
    config = hf_config(family, **changes)
    tensors = random_tensors(config, seed)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, str(path / "model.safetensors"), metadata={"format": "pt"})
    return path, tensors
