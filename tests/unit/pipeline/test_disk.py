"""A full disk, as /dev/full and limits of the process imitate it; tests/integration/test_slurm_site.py fills a real
one.
"""

import errno
import resource
from pathlib import Path

import pytest

from pipeline import disk, fingerprints
from pipeline.checkpoints import CheckpointStore
from pipeline.disk import RESERVE, RESERVE_BYTES, DiskFullError, is_full, naming, replacing, require, reserved, telling
from pipeline.monitoring.events import EventLog, read_events
from tests.saving import saved


def fill(_: object) -> None:
    Path("/dev/full").write_text("more than fits")


def test_the_reserve_is_there_during_the_block_only(tmp_path):
    with reserved(tmp_path):
        file = (tmp_path / RESERVE).stat()
        assert file.st_size == RESERVE_BYTES
        assert file.st_blocks * 512 >= RESERVE_BYTES, "it takes space, not only a length"
    assert not (tmp_path / RESERVE).exists()


def test_a_limit_on_the_size_of_files_names_the_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (RESERVE_BYTES // 2, hard))
    try:
        with pytest.raises(OSError, match=f"File too large: .*{RESERVE}"), reserved(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lack_of_space_leaves_the_block_with_folder_bytes_and_remedy(tmp_path):
    with pytest.raises(DiskFullError, match="make room, then resume") as error, reserved(tmp_path):
        fill(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: no space left: a write failed")
    assert "bytes are free" in str(error.value)
    assert not (tmp_path / RESERVE).exists()


def test_a_folder_that_could_not_be_made_is_told_too(tmp_path):
    with pytest.raises(DiskFullError) as error, telling(tmp_path / "new/folder", "start again"):
        fill(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/new/folder: no space left: a write failed")
    assert str(error.value).endswith("bytes are free; make room, then start again")


def test_a_file_that_could_not_be_written_whole_leaves_the_one_before(tmp_path):
    (tmp_path / "x").write_text("before")
    with pytest.raises(OSError, match="No space left"), replacing(tmp_path / "x") as partial:
        fill(partial.write_text("half"))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "before")]


def test_two_writers_at_once_leave_one_whole_file(tmp_path):
    with replacing(tmp_path / "x") as first:
        first.write_text("the first, ")
        with replacing(tmp_path / "x") as second:
            second.write_text("the second")
        with first.open("a") as file:
            file.write("whole")
        assert (tmp_path / "x").read_text() == "the second"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "the first, whole")]


def test_other_failures_leave_it_as_they_are(tmp_path):
    with pytest.raises(ValueError, match="something else"), reserved(tmp_path):
        raise ValueError("something else")


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (RuntimeError("rank 1: [Errno 28] No space left on device: 'a'"), True),  # as another process reports it
        (OSError(errno.EACCES, "x"), False),
        (RuntimeError("x"), False),
    ],
)
def test_what_a_full_disk_looks_like(error, full):
    assert is_full(error) == full
    outer = ValueError("y")
    outer.__cause__ = error
    assert is_full(outer) == full


def test_room_is_required(tmp_path, monkeypatch):
    require(tmp_path, 1, "nothing much")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: Usage)
    with pytest.raises(DiskFullError, match=r"a checkpoint needs about 1,001 bytes, 1,000 bytes are free"):
        require(tmp_path, 1001, "a checkpoint")


class Usage:
    free = 1000


def test_a_checkpoint_that_does_not_fit_leaves_nothing_behind(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep_last=2)
    with pytest.raises(OSError, match="No space left"):
        saved(store, 1, {}, {}, fill)
    assert list(tmp_path.iterdir()) == []
    saved(store, 2, {}, {}, lambda folder: lambda: {"w": fingerprints.write(folder / "w", bytes(2000))})
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: Usage)
    with pytest.raises(DiskFullError, match="a checkpoint after step 3 needs about 2,"):
        store.save(3, {}, {}, lambda folder: pytest.fail("it must not be tried"))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    assert store.latest().step == 2


def test_what_a_killed_save_left_goes_with_the_next(tmp_path):
    (tmp_path / ".writing-step-00000007/learner").mkdir(parents=True)
    saved(CheckpointStore(tmp_path, keep_last=2), 8, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


def test_an_event_that_fits_in_part_is_taken_back(tmp_path):
    path = tmp_path / "events.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with EventLog(path) as log:
        log.append("run_start", {"time": 0, "step": 0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
        try:
            with pytest.raises(OSError, match="written in part") as error:
                log.append("fault", {"description": "x" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert is_full(error.value)
        log.append("run_end", {"time": 0, "status": "failed"})
    assert [event["kind"] for event in read_events(path)] == ["run_start", "run_end"]


def test_a_log_that_meets_a_failing_disk_is_named(tmp_path, monkeypatch):
    def failing(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    with EventLog(tmp_path / "events.jsonl") as log, monkeypatch.context() as patched:
        patched.setattr("os.write", failing)
        with pytest.raises(OSError, match=r"Input/output error: .*events\.jsonl"):
            log.append("fault", {})
        patched.setattr("os.fsync", failing)
        with pytest.raises(OSError, match=r"Input/output error: .*events\.jsonl"):
            log.sync()


def test_only_failures_of_the_system_are_given_a_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), naming(tmp_path):
        (tmp_path / "other").read_text()
    with pytest.raises(DiskFullError, match=r"^no room$"), naming(tmp_path):
        raise DiskFullError("no room")
