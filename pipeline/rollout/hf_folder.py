"""Read a Hugging Face model folder without transformers: configuration, tensors and their shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pipeline.rollout.engine import EngineError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def read_config(hf_path: Path) -> dict[str, Any]:
    """``config.json`` of the folder. Raises ``EngineError`` when it is not there."""
    path = hf_path / "config.json"
    if not path.is_file():
        raise EngineError(f"{hf_path} has no config.json: model.hf_path must be a Hugging Face model folder")
    return dict(json.loads(path.read_text()))


def tensor_files(hf_path: Path) -> dict[str, list[str]]:
    """Safetensors file -> names of the tensors in it, for a single-file or an indexed checkpoint."""
    if (hf_path / _INDEX).is_file():
        files: dict[str, list[str]] = {}
        for name, file in json.loads((hf_path / _INDEX).read_text())["weight_map"].items():
            files.setdefault(file, []).append(name)
        return files
    if not (hf_path / _SINGLE).is_file():
        raise EngineError(f"{hf_path} has neither {_SINGLE} nor {_INDEX}: convert the checkpoint to safetensors first")
    with _open(hf_path / _SINGLE) as file:
        return {_SINGLE: list(file.keys())}


def tensor_shapes(hf_path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every stored tensor that is a parameter: without the duplicate ``lm_head`` of tied embeddings."""
    tied = bool(read_config(hf_path).get("tie_word_embeddings", False))
    shapes: dict[str, tuple[int, ...]] = {}
    for file_name, names in tensor_files(hf_path).items():
        with _open(hf_path / file_name) as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in names})
    if tied:
        shapes.pop("lm_head.weight", None)
    return shapes


def is_weights(path: Path) -> bool:
    """Whether a file of a model folder holds tensors, or lists the files that do."""
    return path.suffix == ".safetensors" or path.name == _INDEX


def read_tensors(hf_path: Path, names: set[str]) -> dict[str, torch.Tensor]:
    """The named tensors, as stored. A name that the checkpoint lacks is simply absent from the result."""
    tensors: dict[str, torch.Tensor] = {}
    for file_name, stored in tensor_files(hf_path).items():
        with _open(hf_path / file_name) as file:
            tensors.update({name: file.get_tensor(name) for name in stored if name in names})
    return tensors


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    with safe_open(str(path), framework="pt") as file:
        yield file
