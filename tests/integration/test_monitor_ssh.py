"""``isentrope monitor host:/path`` over a real SSH server on this machine, with keys and configuration of its own."""

import getpass
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers import remote_run
from launchers.remote_run import local_folders
from pipeline.monitoring.events import FILE_NAME, EventLog, EventLogError
from pipeline.monitoring.series import Series
from pipeline.ports import free_port

SSHD = "/usr/sbin/sshd"
pytestmark = pytest.mark.skipif(
    not (Path(SSHD).exists() and shutil.which("ssh")), reason="needs openssh-server and openssh-client"
)


def wait(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A name under which the system's ssh, found first on PATH with its configuration, reaches a server of ours."""
    root = tmp_path_factory.mktemp("ssh")
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", root / key], check=True)
    shutil.copy(root / "user_key.pub", root / "authorized_keys")
    port = free_port()
    (root / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {root}/host_key\nAuthorizedKeysFile {root}/authorized_keys\n"
        f"PidFile {root}/pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    (root / "ssh_config").write_text(
        f"Host cluster\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  IdentityFile "
        f"{root}/user_key\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n  UserKnownHostsFile {root}/known_hosts\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd separates privileges
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", root / "sshd_config"], stderr=(root / "log").open("w"))
    with pytest.MonkeyPatch.context() as patch:
        # ssh reads the user's configuration from the password database's home, whatever HOME says: name ours instead.
        patch.setattr(remote_run, "SSH", ("ssh", "-F", str(root / "ssh_config"), *remote_run.SSH[1:]))
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        wait(lambda: subprocess.run([*remote_run.SSH, "cluster", "true"], capture_output=True).returncode == 0)
        yield root
    server.terminate()
    server.wait()


def write(log, first, last):
    for step in range(first, last):
        log.append(
            "step", {"time": 1.0, "step": step, "entropy": 0.3, "band_low": 0.2, "band_high": 0.4, "state": "off"}
        )


def senders(run):
    """Processes on the other side that send this run's log."""
    return subprocess.run(["pgrep", "-f", f"f=.{run}"], capture_output=True, text=True).stdout.split()


@pytest.fixture
def run(tmp_path):
    """A run folder with a blank in its path, three steps long."""
    folder = tmp_path / "my run"
    folder.mkdir()
    with EventLog(folder / FILE_NAME) as log:
        log.append("run_start", {"time": 1.0, "step": 0, "steps": 100, "name": "far"})
        write(log, 0, 3)
    return folder


def test_the_figures_of_a_run_on_another_machine(host, run):
    with local_folders([f"cluster:{run}"], follow=False) as (copy,):
        assert copy.resolve() != run.resolve()
        assert (copy / FILE_NAME).read_bytes() == (run / FILE_NAME).read_bytes()
    # What is there by now, and a line not yet whole: only the whole ones come, behind those that were copied.
    with EventLog(run / FILE_NAME) as log:
        write(log, 3, 5)
    whole = (run / FILE_NAME).read_bytes()
    with (run / FILE_NAME).open("ab") as file:
        file.write(b'{"schema":1,"ki')
    with local_folders([f"cluster:{run}"], follow=False) as (copy,):
        assert (copy / FILE_NAME).read_bytes() == whole
        assert Series(copy).steps == 5


def test_it_follows_through_a_torn_line_a_resume_and_a_lost_connection(host, run, monkeypatch):
    monkeypatch.setattr(remote_run, "RETRY_S", 0.1)
    with local_folders([f"cluster:{run}"], follow=True) as (copy,):
        series = Series(copy)

        def sees(steps):
            series.update()
            return series.steps == steps

        with (run / FILE_NAME).open("ab") as file:
            file.write(b'{"schema":1,"kind":"step","torn')
        with EventLog(run / FILE_NAME) as log:  # cuts it off
            log.append("resume", {"time": 1.0, "step": 2, "steps": 100, "name": "far"})
            write(log, 2, 8)
            wait(lambda: sees(8))
            children = subprocess.run(
                ["pgrep", "-x", "-P", str(os.getpid()), "ssh"], capture_output=True, text=True
            ).stdout
            for pid in children.split():
                os.kill(int(pid), 9)
            write(log, 8, 12)
            wait(lambda: sees(12))
        assert (copy / FILE_NAME).read_bytes() == (run / FILE_NAME).read_bytes()
        assert senders(run)
    wait(lambda: not senders(run))  # nothing is left running there


def test_a_log_that_was_replaced_is_copied_anew_and_two_may_look_at_once(host, run):
    address = f"cluster:{run}"
    with local_folders([address], follow=False) as (first,), local_folders([address], follow=False) as (second,):
        assert first != second
        assert (first / FILE_NAME).read_bytes() == (second / FILE_NAME).read_bytes()
    (run / FILE_NAME).unlink()
    with EventLog(run / FILE_NAME) as log:
        log.append("run_start", {"time": 2.0, "step": 0, "steps": 7, "name": "another"})
    with local_folders([address], follow=False) as (copy,):
        assert (copy / FILE_NAME).read_bytes() == (run / FILE_NAME).read_bytes()


@pytest.mark.parametrize(
    ("address", "words"),
    [("cluster:/nowhere", "give the folder of a run"), ("elsewhere.invalid:/x", "without a password")],
)
def test_what_is_not_there_is_said_in_one_line(host, address, words):
    with pytest.raises(EventLogError, match=words) as error, local_folders([address], follow=False):
        pass
    assert len(str(error.value).splitlines()) == 1


def test_the_command(host, run):
    script = "from launchers import remote_run; from launchers.cli.main import run; import sys\n"
    script += f"remote_run.SSH = {remote_run.SSH!r}; run(sys.argv[1:])"
    words = [sys.executable, "-c", script, "monitor", f"cluster:{run}", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ}, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert (found["run"], found["step"], found["name"]) == (f"cluster:{run}", 2, "far")
