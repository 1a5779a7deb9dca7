"""A checkpoint is complete or absent, and damage is named."""

import errno
import json
import os
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launchers.cli.main import run
from launchers.run import assemble
from pipeline import checkpoints, fingerprints
from pipeline.checkpoints import CheckpointError, CheckpointStore
from pipeline.config.load import load_config
from pipeline.data import DataError
from pipeline.data.cursor import DataCursor
from pipeline.entropy.band import build_band
from pipeline.entropy.factory import build_controller
from pipeline.loop import LoopState
from pipeline.step.queue import RolloutQueue
from pipeline.types import ControlDecision, EntropyReading, Prompt
from tests.saving import checked, saved


def write(folder):
    """A learner's state, at once; its fingerprints."""
    (folder / "shard").write_bytes(b"weights")
    return lambda: {"shard": fingerprints.read_back(folder / "shard")}


def test_round_trip_and_keep_last(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    for step in (10, 20, 30):
        saved(store, step, {"step": step}, {}, write)
    assert [c.step for c in store.complete()] == [20, 30]
    assert store.latest().state() == {"step": 30}
    assert (store.latest().path / "learner/shard").read_bytes() == b"weights"


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    saved(store, 1, {"step": 1}, {}, write)

    def disk_full(folder):
        write(folder)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        saved(store, 2, {"step": 2}, {}, disk_full)
    assert store.latest().state() == {"step": 1}
    saved(store, 2, {"step": 2}, {}, write)  # and the leftover folder does not stand in the way
    assert store.latest().step == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damage_is_named(tmp_path, damage):
    """What can be seen without reading a learner's files, before anything starts; a flipped bit when ranks read."""
    store = CheckpointStore(tmp_path, keep_last=1)
    checkpoint = saved(store, 5, {"x": 1}, {}, write)
    shard = checkpoint.path / "learner/shard"
    if damage == "flip":
        shard.write_bytes(b"weighty")
    elif damage == "truncate":
        shard.write_bytes(b"weigh")
    elif damage == "remove":
        shard.unlink()
    else:
        (checkpoint.path / "manifest.json").write_text("{")
    if damage == "flip":
        checkpoint = store.latest()
    what = {
        "flip": r"shard differs.*checksum",
        "truncate": r"shard differs.*5 bytes, not 7",
        "remove": r"shard is miss",
    }
    with pytest.raises(CheckpointError, match=what.get(damage, r"manifest\.json") + r".*; delete .*step-00000005"):
        checkpoint.restore(checked) if damage == "flip" else store.latest()


def test_newer_schema_is_refused(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    manifest = saved(store, 1, {}, {}, write).path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema": 99}))
    with pytest.raises(CheckpointError, match="schema 99"):
        store.latest()


def test_nothing_to_resume(tmp_path):
    assert CheckpointStore(tmp_path / "none", keep_last=1).latest() is None


def test_a_published_step_is_never_rewritten(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    saved(store, 3, {"attempt": 1}, {}, write)

    def must_not_run(folder):
        raise AssertionError("the published checkpoint was about to be replaced")

    assert saved(store, 3, {"attempt": 2}, {}, must_not_run).state() == {"attempt": 1}


def written_when(allowed, error=None):
    """A learner whose files are written when ``allowed`` is set, or not at all."""

    def save(folder):
        (folder / "begun").touch()

        def files():
            allowed.wait()
            if error is not None:
                raise error
            return write(folder)()

        return files

    return save


def test_a_checkpoint_is_written_while_training_goes_on(tmp_path):
    """What is saved is what was there when it was begun; until it is complete, the one before is the newest."""
    store, allowed = CheckpointStore(tmp_path, keep_last=1), threading.Event()
    saved(store, 1, {"step": 1}, {}, write)
    state, arrays = {"step": 2}, {"a": np.zeros(3)}
    store.save(2, state, arrays, written_when(allowed))
    state["step"], arrays["a"][:] = 3, 1
    assert store.finished(wait=False) is None
    assert names(tmp_path) == [".writing-step-00000002", "step-00000001"]
    assert CheckpointStore(tmp_path, keep_last=1).latest().step == 1, "as a resume would find it after a kill"
    allowed.set()
    made = store.finished(wait=True)
    assert (made.step, made.state(), made.arrays()["a"].tolist()) == (2, {"step": 2}, [0, 0, 0])
    assert store.finished(wait=True) is None, "told once"
    assert names(tmp_path) == ["step-00000002"]


def test_one_checkpoint_is_in_the_making_at_most(tmp_path):
    store, allowed = CheckpointStore(tmp_path, keep_last=1), threading.Event()
    store.save(1, {}, {}, written_when(allowed))
    with pytest.raises(RuntimeError, match="one checkpoint before the next"):
        store.save(2, {}, {}, write)
    allowed.set()
    assert store.finished(wait=True).step == 1


def test_what_fails_in_the_background_is_raised_when_asked_and_leaves_nothing(tmp_path, caplog):
    store, allowed = CheckpointStore(tmp_path, keep_last=1), threading.Event()
    saved(store, 1, {}, {}, write)
    store.save(2, {}, {}, written_when(allowed, OSError(errno.EIO, "Input/output error")))
    allowed.set()
    store.wait()
    assert "the checkpoint in the making failed too" in caplog.text
    with pytest.raises(OSError, match=r"Input/output error: .*/\.writing-step-00000002/learner"):
        store.finished(wait=False)
    assert names(tmp_path) == ["step-00000001"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_arrays_come_back_and_are_under_the_manifest(tmp_path):
    arrays = {"flat": np.arange(5, dtype=np.int32), "none": np.empty((0, 3), np.int64)}
    made = saved(CheckpointStore(tmp_path, keep_last=1), 1, {}, arrays, write)
    back = made.arrays()
    assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in back.items()} == {
        name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()
    }
    assert (made.path / "state.safetensors").stat().st_mode == (made.path / "state.json").stat().st_mode
    assert "state.safetensors" in json.loads((made.path / "manifest.json").read_text())["files"]


def test_an_old_checkpoint_that_cannot_be_deleted_ends_no_run_and_goes_later(tmp_path, monkeypatch, caplog):
    """As NFS refuses it while someone reads a file: ENOTEMPTY, for the .nfsXXXX that stays."""
    store = CheckpointStore(tmp_path, keep_last=1)
    saved(store, 1, {}, {}, write)

    def busy(path):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints.shutil, "rmtree", busy)
        assert saved(store, 2, {"step": 2}, {}, write).state() == {"step": 2}
    assert "step-00000001: cannot be deleted" in caplog.text
    assert [checkpoint.step for checkpoint in store.complete()] == [2], "half deleted, it would pass for complete"
    assert names(tmp_path) == [".removing-step-00000001", "step-00000002"]
    saved(store, 3, {}, {}, write)
    assert names(tmp_path) == ["step-00000003"]


def test_an_old_checkpoint_that_cannot_even_be_renamed_ends_no_run(tmp_path, monkeypatch, caplog):
    store = CheckpointStore(tmp_path, keep_last=1)
    saved(store, 1, {}, {}, write)

    def refused(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(checkpoints, "_hidden", refused)
    saved(store, 2, {}, {}, write)
    assert [checkpoint.step for checkpoint in store.complete()] == [1, 2]
    assert f"{tmp_path / 'step-00000001'}: cannot be deleted" in caplog.text


def test_what_is_left_of_the_same_step_stands_in_nobodys_way(tmp_path):
    (tmp_path / ".removing-step-00000001").mkdir()
    (tmp_path / ".removing-writing-step-00000002").mkdir()
    (tmp_path / ".writing-step-00000002/learner").mkdir(parents=True)
    store = CheckpointStore(tmp_path, keep_last=1)
    saved(store, 1, {}, {}, write)
    saved(store, 2, {}, {}, write)
    assert names(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize("when", ["next save", "same save", "resume"])
def test_a_kill_before_the_last_removal_leaves_nothing_for_good(tmp_path, when):
    published = CheckpointStore(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        saved(published, step, {}, {}, write)
    store = CheckpointStore(tmp_path, keep_last=2)  # as it would have pruned after step 3
    if when == "resume":
        store.prune()
    else:
        saved(store, 4 if when == "next save" else 3, {}, {}, write)
    assert [checkpoint.step for checkpoint in store.complete()] == ([3, 4] if when == "next save" else [2, 3])


def test_a_failing_disk_names_the_file(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep_last=1)

    def failing(descriptor):
        raise OSError(errno.EIO, "Input/output error")  # as the system call says it: of which file, it does not say

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match=r"Input/output error: .*/\.writing-step-00000001/learner/shard"):
            saved(store, 1, {}, {}, write)
    assert names(tmp_path) == []


def test_a_learner_that_meets_a_failing_disk_names_its_folder(tmp_path):
    def failing(folder):
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match=r"Input/output error: .*/\.writing-step-00000001/learner"):
        saved(CheckpointStore(tmp_path, keep_last=1), 1, {}, {}, failing)


def test_arrays_that_meet_a_full_disk_name_their_file(tmp_path):
    def full(folder):
        (folder.parent / "state.safetensors").symlink_to("/dev/full")
        return dict

    with pytest.raises(OSError, match=r"No space left on device: .*/state\.safetensors"):
        saved(CheckpointStore(tmp_path, keep_last=1), 1, {}, {"big": np.zeros(10**6)}, full)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
TEXTS = JSON.map(json.dumps).map(str.encode) | st.binary(max_size=40)
HOSTILE = [b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}", b"", b"null", b"[]", b'{"\xff": 1}']


@st.composite
def changed(draw, document):
    """``document`` with one value, anywhere in it, replaced or removed."""
    document = msgspec.to_builtins(document)
    place = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
            place = place[key]
            continue
        if draw(st.booleans()):
            place[key] = draw(JSON)
        else:
            del place[key]
        return json.dumps(document).encode()


def vouched(checkpoint, text):
    """Put ``text`` into state.json, and its checksum into the manifest."""
    (checkpoint.path / "state.json").write_bytes(text)
    manifest = json.loads((checkpoint.path / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(text), "crc32": zlib.crc32(text)}
    (checkpoint.path / "manifest.json").write_text(json.dumps(manifest))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_manifest_holds_it_is_read_or_named(tmp_path_factory, data):
    store = CheckpointStore(tmp_path_factory.mktemp("checkpoints"), keep_last=1)
    file = saved(store, 7, {"step": 7}, {}, write).path / "manifest.json"
    good = json.loads(file.read_text())
    file.write_bytes(data.draw(TEXTS | st.sampled_from(HOSTILE) | changed(good)))
    said = ""
    try:
        assert store.latest().step == 7
    except CheckpointError as error:
        said = str(error)
    assert not said or str(file.parent) in said


def parts(config):
    """Of a training loop all that a checkpoint restores, without a learner."""
    prompts = [Prompt(str(i), (1, i), "", "", "exact") for i in range(9)]
    cursor = DataCursor(prompts, 0)
    controller = build_controller(config.entropy, build_band(config.entropy.band, 100), 4)
    loop = SimpleNamespace(
        cursor=cursor,
        controller=controller,
        queue=RolloutQueue(config, cursor, None, None),
        learner=SimpleNamespace(restore=lambda folder, files: None),
        decision=controller.initial(),
        step=0,
    )
    for step in range(5):
        cursor.take(4)
        loop.decision = controller.update(EntropyReading(3.0 + step, 10.0, step), 1)
    return loop


CONFIG = load_config("configs/quickstart.yaml")


def state_of(loop):
    waiting, arrays = loop.queue.state_dict()
    state = {"step": 5, "cursor": loop.cursor.state_dict(), "controller": loop.controller.state_dict()}
    return {**state, "decision": vars(loop.decision), "queue": waiting, "evaluation_due": True}, arrays


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_state_holds_the_run_goes_on_or_the_file_is_named(tmp_path_factory, data):
    loop = parts(CONFIG)
    state, arrays = state_of(loop)
    store = CheckpointStore(tmp_path_factory.mktemp("checkpoints"), keep_last=1)
    made = saved(store, 5, state, arrays, write)
    vouched(made, data.draw(TEXTS | st.sampled_from(HOSTILE) | changed(state)))
    said = ""
    try:
        assemble.restore(loop, store.latest())
    except (CheckpointError, DataError) as error:
        said = str(error)
    expected = (
        f"{made.path / 'state.json'} is damaged: ",
        "the checkpoint was trained on",
        "the checkpoint's data order",
        f"{made.path}: the controller's state was saved under another",
    )
    assert not said or said.startswith(expected)
    if not said:
        assert loop.step == 5
        assert isinstance(loop.decision, ControlDecision)
        loop.cursor.take(4)
        assert isinstance(loop.controller.update(EntropyReading(4.0, 10.0, 5), 1), ControlDecision)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"step": -5}, "step is -5"),
        ({"step": 10**400}, "step"),
        ({"decision": [1]}, r"Expected `object`, got `array` - at `\$.decision`"),
        ({"queue": [{}]}, r"missing required field `version`"),
    ],
)
def test_a_state_that_no_run_wrote_is_named(tmp_path, state, message):
    loop = parts(CONFIG)
    good, arrays = state_of(loop)
    store = CheckpointStore(tmp_path, keep_last=1)
    vouched(saved(store, 5, good, arrays, write), json.dumps({**good, **state}).encode())
    with pytest.raises(CheckpointError, match=rf"state\.json is damaged: .*{message}.*; delete .*step-00000005"):
        assemble.restore(loop, store.latest())


def test_a_good_state_is_restored_exactly(tmp_path):
    loop = parts(CONFIG)
    state, arrays = state_of(loop)
    store = CheckpointStore(tmp_path, keep_last=1)
    saved(store, 5, state, arrays, write)
    fresh = parts(CONFIG)
    fresh.cursor.take(3)
    assemble.restore(fresh, store.latest())
    assert repr(state_of(fresh)) == repr(state_of(loop))
    assert fresh.evaluation_due
    assert LoopState.__struct_fields__ == tuple(state)


def test_another_controller_begins_anew_only_where_that_is_allowed(tmp_path):
    loop = parts(CONFIG)
    loop.decision = loop.controller.update(EntropyReading(0.2, 10.0, 5), 1)
    state, arrays = state_of(loop)
    store = CheckpointStore(tmp_path, keep_last=1)
    saved(store, 5, state, arrays, write)
    other = parts(load_config("configs/quickstart.yaml", ["entropy.band.low=0.2"]))
    with pytest.raises(DataError, match=r"step-00000005: the controller's state .*: the run was resumed .* since"):
        assemble.restore(other, store.latest())
    begins = repr(other.decision)
    assemble.restore(other, store.latest(), allow_change=True)
    assert other.step == 5
    assert repr(other.decision) == begins != repr(loop.decision)
    kept = parts(CONFIG)  # the values of then, given back, as the refusal says
    assemble.restore(kept, store.latest(), allow_change=True)
    assert repr(kept.decision) == repr(loop.decision)


def test_a_damaged_checkpoint_exits_with_2(tmp_path, capsys):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1)
    file = saved(store, 1, {}, {}, write).path / "manifest.json"
    file.write_text("[]")
    (tmp_path / "config.yaml").write_text(f"defaults: [{Path('configs/quickstart.yaml').resolve()}]")
    with pytest.raises(SystemExit) as ended:
        run(["evaluate", "--run", str(tmp_path)])
    assert ended.value.code == 2
    assert f"{file} is damaged: Expected `object`, got `array`; delete {file.parent}" in capsys.readouterr().err
