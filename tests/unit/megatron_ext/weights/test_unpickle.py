"""Checkpoints from strangers: nothing in them is executed."""

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from megatron_ext.weights.unpickle import _METADATA, UnsafeCheckpointError, _unpickled, check, read_metadata
from pipeline.data import DataError


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of one process with a tensor and an object."""
    folder = tmp_path / "checkpoint"
    state = {"weight": torch.arange(6.0).reshape(2, 3), "rng": {"torch": torch.get_rng_state(), "count": 3}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def test_an_honest_checkpoint_is_read_as_torch_reads_it(checkpoint):
    assert read_metadata(checkpoint).storage_data == dcp.FileSystemReader(checkpoint).read_metadata().storage_data
    check(checkpoint)


def test_metadata_that_would_run_a_command_is_refused(checkpoint, tmp_path):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for read in (read_metadata, check):
        with pytest.raises(DataError, match=r"\.metadata was not loaded.*names posix\.system.*Use checkpoints that"):
            read(checkpoint)  # a data error: exit code 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["eval", "exec", "vars", "__import__", "open"])
def test_no_builtin_is_reachable(checkpoint, name):
    (checkpoint / ".metadata").write_bytes(f"cbuiltins\n{name}\n.".encode())
    with pytest.raises(UnsafeCheckpointError, match=f"names builtins.{name}"):
        read_metadata(checkpoint)


def pickled_getattr(of: str, name: str) -> bytes:
    """What ``getattr(of, name)`` is pickled as, ``of`` a line ``module`` and one ``class``."""
    return f"cbuiltins\ngetattr\n(c{of}\nV{name}\ntR.".encode()


def test_a_member_of_an_enumeration_is_one_however_python_pickles_it():
    """Python 3.11.2 pickles it by ``getattr``, 3.11.7 by its value."""
    data = pickled_getattr("torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING", "TORCH_CHANNELS_LAST")
    assert _unpickled(data, _METADATA) is _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST


@pytest.mark.parametrize(
    ("of", "name"),
    [
        ("torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING", "__class__"),
        ("torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING", "mro"),
        ("torch.distributed.checkpoint.metadata\nMetadata", "__init__"),
        ("builtins\nset", "__subclasses__"),
    ],
)
def test_nothing_else_is_reached_by_getattr(of, name):
    with pytest.raises(UnsafeCheckpointError, match=r"builtins\.getattr"):
        _unpickled(pickled_getattr(of, name), _METADATA)


def test_an_object_that_would_run_a_command_is_refused(tmp_path):
    folder = tmp_path / "checkpoint"
    dcp.save({"rng": Evil(tmp_path / "ran")}, checkpoint_id=folder, no_dist=True)
    read_metadata(folder)
    with pytest.raises(UnsafeCheckpointError, match=r"distcp was not loaded"):
        check(folder)
    assert not (tmp_path / "ran").exists()


def extra_state(folder: Path, held: object) -> Path:
    """A checkpoint whose one object is a layer's extra state, as megatron-core stores Transformer Engine's."""
    inside = torch.frombuffer(bytearray(pickle.dumps(held)), dtype=torch.uint8)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save({"layer._extra_state": [inside]}, checkpoint_id=folder, planner=planner, no_dist=True)
    return folder


def test_a_pickle_inside_an_extra_state_is_refused(tmp_path):
    with pytest.raises(UnsafeCheckpointError, match=r"names posix\.system"):
        check(extra_state(tmp_path / "checkpoint", {"scale_fwd": Evil(tmp_path / "ran")}))
    assert not (tmp_path / "ran").exists()


def test_an_extra_state_of_tensors_is_loaded(tmp_path):
    check(extra_state(tmp_path / "checkpoint", {"scale_fwd": torch.ones(3), "amax": [torch.zeros(2)], "fp8": True}))


@pytest.mark.parametrize("data", [b"", b"\x80", b"hello", pickle.dumps({"a": 1})])
def test_torn_metadata_is_named(checkpoint, data):
    (checkpoint / ".metadata").write_bytes(data)
    with pytest.raises(UnsafeCheckpointError, match=r"\.metadata"):
        read_metadata(checkpoint)
