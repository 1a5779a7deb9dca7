"""Which addresses and network interfaces the processes of a run use, and how many of them share a node."""

from launchers import environment
from launchers.run import ray_cluster


def test_gloo_is_told_the_interface_of_an_address(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "so that it is restored")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    ray_cluster.use_interface_of("127.0.0.1")
    assert environment.values(["GLOO_SOCKET_IFNAME"]) == {"GLOO_SOCKET_IFNAME": "lo"}


def test_the_own_address_is_that_of_the_route_to_the_peer():
    assert environment.own_address("127.0.0.1") == "127.0.0.1"


def test_processes_per_node():
    assert ray_cluster.most_on_one_node(["a", "b", "b", "a", "b"]) == 3
