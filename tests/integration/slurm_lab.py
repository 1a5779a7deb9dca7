"""A real Slurm cluster on one machine: munge, slurmctld and a slurmd per node, each node in a network namespace of its
own.

Everything lives below one folder and in namespaces made here; hosts and names are private to the processes started
(mount and UTS namespaces), so nothing of the machine changes and nothing outside can connect. Needs root and, on
Debian, the packages ``PACKAGES``.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge", "iproute2")
PROGRAMS = ("slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare")
NETWORK = "10.77.0"
CONF = """
ClusterName=lab
SlurmctldHost=login({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=10
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
{accounting}
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
InactiveLimit=0
KillWait=5
MinJobAge=3600
FirstJobId={first_job}
SlurmdTimeout=30
JobRequeue=1
{nodes}
PartitionName=batch Nodes=n[1-{count}] Default=YES MaxTime=INFINITE DefaultTime=60 State=UP {partition}
{conf}
"""
ACCOUNTING = """AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=16819
AccountingStoragePass={root}/munge.socket"""
SLURMDBD = """
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
DbdHost=login
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=root
LogFile={root}/slurmdbd.file
PidFile={root}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=13306
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
"""
SSHD = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/authorized_keys
PidFile {folder}/pid
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
SetEnv SLURM_CONF={root}/slurm.conf PATH={path}
Subsystem sftp internal-sftp
"""
GRANT = (
    "create database slurm_acct; create user slurm@'127.0.0.1' identified by 'slurm'; "
    "grant all on slurm_acct.* to slurm@'127.0.0.1'"
)


def missing(more: Sequence[str] = ()) -> list[str]:
    """What stands in the way of a lab on this machine, and of programs that a test needs beside it; empty when nothing
    does.
    """
    lacking = [program for program in (*PROGRAMS, *more) if shutil.which(program, path=PATH) is None]
    return lacking + ([] if os.geteuid() == 0 else ["root"])


PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


class SlurmLab:
    """``with SlurmLab(folder) as lab: lab.run(["sinfo"])``; ``run`` is what a user on the login node does."""

    def __init__(
        self, root: Path, nodes: int = 2, *, accounting: bool = False, partition: str = "", conf: str = ""
    ) -> None:
        """``accounting``: with slurmdbd on a MariaDB; ``partition``: options of the partition; ``conf``: further lines
        of slurm.conf.
        """
        self.root, self.count = root.resolve(), nodes
        self.accounting, self.partition, self.conf = accounting, partition, conf
        self.tag = f"is{os.getpid() % 10**6}"  # also part of interface names: 15 letters at most
        self.daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> SlurmLab:
        self.root.mkdir(parents=True)
        try:
            self._write()
            self._network()
            socket = self.root / "munge.socket"
            key, log = self.root / "munge.key", self.root / "munged.log"
            options = [f"--socket={socket}", f"--key-file={key}", f"--log-file={log}", "--num-threads=2"]
            options += [f"--pid-file={self.root}/munged.pid", f"--seed-file={self.root}/munged.seed"]
            self._daemon("munged", "login", ["munged", "--foreground", "--force", *options])
            self._wait(socket.exists, "munged")
            if self.accounting:
                self._start_accounting()
            self.start_controller()
            for node in self.nodes:
                self.start_node(node)
            self._wait(lambda: self.idle() == self.count, "slurmctld and slurmd")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def nodes(self) -> list[str]:
        return [f"n{i}" for i in range(1, self.count + 1)]

    def idle(self) -> int:
        """Nodes that wait for work."""
        return len(set(self.run(["sinfo", "-hN", "-t", "idle", "-o", "%N"], check=False).stdout.split()))

    def start_controller(self, *options: str) -> None:
        """Start slurmctld."""
        self._daemon("slurmctld", "login", ["slurmctld", "-D", *options])

    def forget_jobs(self) -> None:
        """Restart slurmctld without what it knew; accounting remembers."""
        self.daemons.pop("slurmctld").terminate()
        self._wait(lambda: self.run(["sinfo"], check=False).returncode, "the end of slurmctld")
        self.start_controller("-c")
        self._wait(lambda: self.idle() == self.count, "slurmctld")

    def start_daemon(self, name: str, words: Sequence[str], probe: Sequence[str]) -> None:
        """Start any process on the login node, and wait until ``probe`` succeeds there; it ends with the lab."""
        self._daemon(name, "login", words)
        self._wait(lambda: self._succeeds(probe), name)

    def _succeeds(self, words: Sequence[str]) -> bool:
        try:
            return not self.run(words, check=False, timeout=5).returncode
        except subprocess.TimeoutExpired:
            return False

    def start_sshd(self) -> tuple[int, Path]:
        """An sshd on the login node's 127.0.0.1, which lets one key in; its port, and the private key."""
        port, folder = 2222, self.root / "ssh"
        folder.mkdir()
        for name in ("host", "user"):
            _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)])
        (folder / "authorized_keys").write_text((folder / "user.pub").read_text())
        known = (folder / "host.pub").read_text()
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {known}")
        (folder / "sshd_config").write_text(SSHD.format(folder=folder, port=port, root=self.root, path=PATH))
        (self.root / "ssh_config").write_text(f"Host *\n  GlobalKnownHostsFile {folder}/known_hosts\n")
        inside = 'mount -t tmpfs tmpfs /run && mkdir /run/sshd && exec "$@"'  # where sshd separates privileges
        sshd = [shutil.which("sshd", path=PATH) or "", "-D", "-e", "-f", str(folder / "sshd_config")]
        self.start_daemon("sshd", ["sh", "-c", inside, "sh", *sshd], ["bash", "-c", f"</dev/tcp/127.0.0.1/{port}"])
        return port, folder / "user"

    def start_node(self, node: str) -> None:
        """Start the node's slurmd."""
        self._daemon(node, node, ["slurmd", "-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """SIGKILL the node's slurmd and every process in the node's namespace: the power is off."""
        self.daemons.pop(node).kill()
        for pid in self.processes(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, node: str, title: str = "") -> list[int]:
        """Processes in the node's namespace whose command line begins with ``title``."""
        found = []
        for pid in _run(["ip", "netns", "pids", self._namespace(node)]).stdout.split():
            with suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_text().startswith(title):
                    found.append(int(pid))
        return found

    def command(self, words: Sequence[str], host: str = "login") -> list[str]:
        """``words`` as they run on ``host``: in its network, under its name, with its /etc/hosts."""
        inside = f'hostname {host}; mount --bind "{self.root}/hosts" /etc/hosts; exec "$@"'
        if (self.root / "ssh_config").exists():
            inside = f'mount --bind "{self.root}/ssh_config" /etc/ssh/ssh_config; {inside}'
        if host != "login":
            inside = f"mount -t tmpfs -o size=1g,mode=1777 tmpfs /dev/shm; {inside}"
        namespace = f"--net=/var/run/netns/{self._namespace(host)}"
        return ["nsenter", namespace, "unshare", "--uts", "--mount", "sh", "-c", inside, "sh", *words]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf"), "PATH": PATH}

    def run(
        self, words: Sequence[str], check: bool = True, timeout: float = 120, **options
    ) -> subprocess.CompletedProcess:
        """Run a command on the login node; ``options`` as in ``subprocess.run``."""
        options["env"] = self.environment | options.get("env", {})
        command = self.command(words)
        return subprocess.run(command, check=check, capture_output=True, text=True, timeout=timeout, **options)

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by field."""
        words = self.run(["scontrol", "-o", "show", "job", job_id]).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job_id: str, *states: str, timeout: float = 300) -> dict[str, str]:
        """Wait until the job is in one of ``states``."""
        self._wait(lambda: self.job(job_id)["JobState"] in states, f"job {job_id}: {'/'.join(states)}", timeout)
        return self.job(job_id)

    def cancel_all(self) -> None:
        """Cancel every job and wait until nothing of it runs."""
        queued = self.run(["squeue", "-h", "-o", "%A"], check=False).stdout.split()
        if queued:
            self.run(["scancel", "--full", *queued], check=False)
            self._wait(lambda: not self.run(["squeue", "-h"], check=False).stdout, "scancel")

    def stop(self) -> None:
        """Cancel what runs, end the daemons, remove the namespaces."""
        if "slurmctld" in self.daemons:
            with suppress(RuntimeError):
                self.cancel_all()
        for process in reversed(self.daemons.values()):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        self.daemons = {}
        for host in ("login", *self.nodes):
            _run(["ip", "netns", "del", self._namespace(host)], check=False)

    def _write(self) -> None:
        for folder in ("state", *(f"spool.{node}" for node in self.nodes)):
            (self.root / folder).mkdir()
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(256))
        key.chmod(0o400)
        lines = [f"{NETWORK}.{10 + i} {node}" for i, node in enumerate(self.nodes, start=1)]
        (self.root / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"{NETWORK}.1 login", *lines, ""]))
        described = [
            f"NodeName={node} NodeAddr={NETWORK}.{10 + i} CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 "
            "ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN"
            for i, node in enumerate(self.nodes, start=1)
        ]
        # Of its own: what jobs keep in /tmp is named by their ids, and another lab may run beside this one.
        first = os.getpid() % 10**5 * 100 + 1
        conf = CONF.format(
            network=NETWORK,
            root=self.root,
            nodes="\n".join(described),
            count=self.count,
            first_job=first,
            accounting=ACCOUNTING.format(root=self.root)
            if self.accounting
            else "AccountingStorageType=accounting_storage/none",
            partition=self.partition,
            conf=self.conf,
        )
        (self.root / "slurm.conf").write_text(conf)

    def _start_accounting(self) -> None:
        """MariaDB and slurmdbd, both of the login node's own network."""
        data, socket = self.root / "mysql", self.root / "mysql.socket"
        quick = [
            "--innodb-buffer-pool-size=32M",
            "--innodb-log-file-size=16M",
            "--performance-schema=OFF",
            "--skip-log-bin",
        ]
        _run(["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db"])
        options = ["--no-defaults", "--user=root", f"--datadir={data}", f"--socket={socket}", f"--pid-file={data}/pid"]
        listen = ["--bind-address=127.0.0.1", "--port=13306"]
        client = ["mariadb", "--no-defaults", "-uroot", f"-S{socket}", "-e"]
        self.start_daemon("mariadbd", ["mariadbd", *options, *listen, *quick], [*client, "select 1"])
        self.run([*client, GRANT])
        conf = self.root / "slurmdbd.conf"
        conf.write_text(SLURMDBD.format(root=self.root))
        conf.chmod(0o600)
        self.start_daemon("slurmdbd", ["slurmdbd", "-D"], ["sacctmgr", "-n", "show", "cluster"])
        self.run(["sacctmgr", "-i", "add", "cluster", "lab"])

    def _network(self) -> None:
        """A bridge in the login node's namespace, a pair of interfaces from it to each node."""
        login = self._namespace("login")
        for host in ("login", *self.nodes):
            _run(["ip", "netns", "add", self._namespace(host)])
            _run(["ip", "-n", self._namespace(host), "link", "set", "lo", "up"])
        _run(["ip", "-n", login, "link", "add", "br0", "type", "bridge"])
        _run(["ip", "-n", login, "addr", "add", f"{NETWORK}.1/24", "dev", "br0"])
        _run(["ip", "-n", login, "link", "set", "br0", "up"])
        for i, node in enumerate(self.nodes, start=1):
            inside = self._namespace(node)
            _run(["ip", "-n", login, "link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", inside])
            _run(["ip", "-n", login, "link", "set", node, "master", "br0", "up"])
            _run(["ip", "-n", inside, "addr", "add", f"{NETWORK}.{10 + i}/24", "dev", "eth0"])
            _run(["ip", "-n", inside, "link", "set", "eth0", "up"])

    def _namespace(self, host: str) -> str:
        return f"{self.tag}-{host}"

    def _daemon(self, name: str, host: str, words: Sequence[str]) -> None:
        with (self.root / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                self.command(words, host),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait(self, done, what: str, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not done():
            dead = [name for name, process in self.daemons.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "\n".join(
                    f"--- {name}\n{(self.root / f'{name}.log').read_text()[-2000:]}" for name in self.daemons
                )
                raise RuntimeError(f"{what}: {f'{dead} died' if dead else f'not within {timeout:g} s'}\n{logs}")
            time.sleep(0.2)


def _run(words: Sequence[str], check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(words, check=check, capture_output=True, text=True, env={**os.environ, "PATH": PATH})
