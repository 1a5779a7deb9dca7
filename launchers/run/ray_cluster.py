"""Joins the Ray cluster of a Slurm job, or starts one on this machine, and lists its nodes."""

from __future__ import annotations

import fcntl
import logging
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launchers import environment
from pipeline.ports import own_address

NODES_TIMEOUT_S = 300.0
_SIOCGIFADDR = 0x8915
# Ray's workers give way to every other process (niceness 15) unless told otherwise; these are what the machine is there
# for.
_ALL = {"RAY_worker_niceness": "0"}
_LEARNER = {
    # One queue to the device, so that kernels start in the order that hides communication: megatron-core asks for it.
    # Read as CUDA starts.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Micro-batches differ in size, and fixed segments would fragment. Not for engines: SGLang's memory saver cannot
    # release such segments.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # As SGLang sets it for its own processes (srt/entrypoints/engine.py): both ends of a communicator must agree.
    "NCCL_CUMEM_ENABLE": "0",
}


@dataclass(frozen=True)
class Node:
    """A node of the cluster."""

    id: str
    address: str  # IPv4
    gpus: int

    def affinity(self) -> NodeAffinitySchedulingStrategy:
        """Keeps an actor on this node; it fails, rather than moves, when the node is gone."""
        return NodeAffinitySchedulingStrategy(self.id, soft=False)


def join() -> list[Node]:
    """Connect to the cluster and wait for all of its nodes; this process's comes first, then by address. Idempotent.

    Raises ``RuntimeError`` when nodes are missing after ``NODES_TIMEOUT_S``.
    """
    if not ray.is_initialized():
        _connect()
    expected = environment.nodes() if environment.ray_address() else 1
    deadline = time.monotonic() + NODES_TIMEOUT_S
    while len(found := _alive()) < expected:
        if time.monotonic() > deadline:
            here = ", ".join(node.address for node in found)
            raise RuntimeError(
                f"{len(found)} of {expected} nodes joined Ray within {NODES_TIMEOUT_S:g} s ({here}); "
                "the others' logs are launch/job-*/ray-*.log in the run folder"
            )
        time.sleep(0.2)
    own = ray.get_runtime_context().get_node_id()
    return sorted(found, key=lambda node: (node.id != own, [int(part) for part in node.address.split(".")]))


def _connect() -> None:
    """``ray.init``, with the handler of SIGTERM kept as it was.

    Ray replaces the handler, at the beginning already, by one that ends the process.
    """
    environment.default("RAY_USAGE_STATS_ENABLED", "0")
    environment.guard_ray_token()
    address, handler = environment.ray_address(), signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(address=address, _node_ip_address=own_address(address.partition(":")[0]), **quiet)
        else:
            # "local": never somebody else's cluster, which /tmp/ray/ray_current_cluster may name.
            ray.init(address="local", include_dashboard=False, **quiet)
    except SystemExit as error:
        raise SystemExit("stopped by SIGTERM while Ray was starting; the run had not begun, nothing is lost") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def variables(*, learner: bool) -> dict[str, str]:
    """Environment of an actor, of a learner's rank or of an engine; what the user has set stays."""
    return environment.unset(_ALL | (_LEARNER if learner else {}))


def use_interface_of(address: str) -> None:
    """Make gloo and NCCL, in this process, use the network interface that has ``address``.

    By themselves gloo trusts the host's name, and NCCL takes the first interface that it finds.
    """
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            request = struct.pack("256s", name[:15].encode())
            try:
                own = socket.inet_ntoa(fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, request)[20:24])
            except OSError:  # an interface without an IPv4 address
                continue
        if own == address:
            environment.default("GLOO_SOCKET_IFNAME", name)
            environment.default("NCCL_SOCKET_IFNAME", f"={name}")  # this one, not all that begin so
            return


def most_on_one_node(hosts: Sequence[str]) -> int:
    """The largest number of processes that share a node, from the node of each."""
    return max(Counter(hosts).values())


def _alive() -> list[Node]:
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()
        if node["Alive"]
    ]
