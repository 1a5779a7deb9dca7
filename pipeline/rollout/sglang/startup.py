"""How long an SGLang server may take to come up."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.schema import RolloutConfig

READ_BYTES_PER_S = 1e8  # of weights that no cache holds, from a file system that other nodes read as well


def startup_limit_s(config: RolloutConfig, hf_path: Path) -> float:
    """Seconds until ``/health`` answers first: ``rollout.sglang.startup_timeout_s`` and the time to read the weights.

    A server that gets FP8 weights reads none. The read is counted at 0.1 GB/s: 65 GB add 650 s.
    """
    return config.sglang.startup_timeout_s + weight_bytes(config, hf_path) / READ_BYTES_PER_S


def weight_bytes(config: RolloutConfig, hf_path: Path) -> int:
    """Bytes of weights that a server reads from the folder before it answers."""
    if config.weight_dtype == "fp8":
        return 0
    return sum(path.stat().st_size for path in hf_path.glob("*.safetensors"))
