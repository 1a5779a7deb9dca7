"""Reads the pickles of a distributed checkpoint without running what they ask for: a checkpoint may be anybody's.

PyTorch unpickles ``.metadata`` and the objects of a checkpoint as they are, which executes whatever a file names. Here
a file may name the classes that such files are made of, and nothing else.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection, Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from pipeline.data import DataError

_DCP = "torch.distributed.checkpoint"
_METADATA: Mapping[str, Collection[str]] = {
    "builtins": {"set", "frozenset"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    f"{_DCP}.filesystem": {"_StorageInfo"},
    f"{_DCP}.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
    },
}
# Transformer Engine keeps a pickle in the extra state of a layer (``module/base.py``, get_extra_state): tensors, and
# the FP8 recipe in force.
_EXTRA_STATE: Mapping[str, Collection[str]] = {
    "collections": {"OrderedDict"},
    "torch": {"Size", "device"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "torch.storage": {"_load_from_bytes"},
    "transformer_engine.common.recipe": {
        *("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"),
        *("Format", "_FormatHelper", "QParams", "MMParams"),
    },
}


class UnsafeCheckpointError(DataError):
    """A checkpoint that would execute code, or that holds what no checkpoint holds."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, allowed: Mapping[str, Collection[str]]) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes") and module in self._allowed:
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name in self._allowed.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnsafeCheckpointError(f"it names {module}.{name}, which is no part of a checkpoint")


def _member(enumeration: type[Enum], name: str) -> Enum:
    """Stands in for ``getattr``, by which early releases of Python 3.11 pickle a member of an enumeration."""
    if not (isinstance(enumeration, type) and issubclass(enumeration, Enum) and name in enumeration.__members__):
        raise UnsafeCheckpointError("it names builtins.getattr of what is no enumeration")
    return enumeration[name]


def read_metadata(directory: Path) -> Metadata:
    """``.metadata`` of a distributed checkpoint. Raises ``UnsafeCheckpointError`` naming the file."""
    path = directory / ".metadata"
    metadata = _guarded(path, partial(_unpickled, path.read_bytes(), _METADATA))
    if not isinstance(metadata, Metadata):
        raise UnsafeCheckpointError(f"{path} holds a {type(metadata).__name__}, not the metadata of a checkpoint")
    return metadata


def check(directory: Path) -> None:
    """Raise ``UnsafeCheckpointError`` unless everything in the checkpoint can be loaded without running code.

    To be called before megatron's own loader, which unpickles objects (generators' states, layers' extra states)
    without restriction. Tensors and ``common.pt`` are loaded by ``torch.load`` with ``weights_only``.
    """
    metadata = read_metadata(directory)
    records = {
        (info.relative_path, info.offset, info.length)
        for index, info in metadata.storage_data.items()
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata)
    }
    for name, offset, length in sorted(records):
        path = directory / name
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        for each in _tensors(_guarded(path, partial(torch.load, io.BytesIO(data), "cpu", weights_only=True))):
            if each.dtype == torch.uint8 and each.numel() and bytes(each[:1].tolist()) == pickle.PROTO:
                _guarded(path, partial(_unpickled, each.numpy().tobytes(), _EXTRA_STATE))


def _tensors(value: Any) -> list[torch.Tensor]:
    """Every flat tensor in an object made of lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        return [value.flatten().cpu()]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for each in inner for tensor in _tensors(each)]


def _unpickled(data: bytes, allowed: Mapping[str, Collection[str]]) -> Any:
    return _Unpickler(data, allowed).load()


def _guarded(path: Path, load: Any) -> Any:
    try:
        return load()
    except (pickle.UnpicklingError, UnsafeCheckpointError, EOFError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UnsafeCheckpointError(
            f"{path} was not loaded, since loading it could execute code: {reason}. Use checkpoints that you or "
            "somebody you trust wrote with Isentrope or megatron-core"
        ) from error
