"""A checkpoint is complete or absent, and damage is named."""

import json

import pytest

from pipeline.checkpoints import CheckpointError, CheckpointStore


def write(folder):
    (folder / "shard").write_bytes(b"weights")


def test_round_trip_and_keep_last(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    for step in (10, 20, 30):
        store.save(step, {"step": step}, {}, write)
    assert [c.step for c in store.complete()] == [20, 30]
    assert store.latest().state() == {"step": 30}
    assert (store.latest().learner / "shard").read_bytes() == b"weights"


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(1, {"step": 1}, {}, write)

    def disk_full(folder):
        write(folder)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        store.save(2, {"step": 2}, {}, disk_full)
    assert store.latest().state() == {"step": 1}
    store.save(2, {"step": 2}, {}, write)  # and the leftover folder does not stand in the way
    assert store.latest().step == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damage_is_named(tmp_path, damage):
    store = CheckpointStore(tmp_path, keep_last=1)
    checkpoint = store.save(5, {"x": 1}, {}, write)
    shard = checkpoint.learner / "shard"
    if damage == "flip":
        shard.write_bytes(b"weighty")
    elif damage == "truncate":
        shard.write_bytes(b"weigh")
    elif damage == "remove":
        shard.unlink()
    else:
        (checkpoint.path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="manifest.json" if damage == "manifest" else "shard"):
        store.latest()


def test_newer_schema_is_refused(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    manifest = store.save(1, {}, {}, write).path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema": 99}))
    with pytest.raises(CheckpointError, match="schema 99"):
        store.latest()


def test_nothing_to_resume(tmp_path):
    assert CheckpointStore(tmp_path / "none", keep_last=1).latest() is None


def test_a_published_step_is_never_rewritten(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(3, {"attempt": 1}, {}, write)

    def must_not_run(folder):
        raise AssertionError("the published checkpoint was about to be replaced")

    assert store.save(3, {"attempt": 2}, {}, must_not_run).state() == {"attempt": 1}
