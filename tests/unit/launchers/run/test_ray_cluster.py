"""Which addresses and network interfaces the processes of a run use, and how many of them share a node."""

from launchers import environment
from launchers.run import ray_cluster
from pipeline.ports import own_address


def test_gloo_and_nccl_are_told_the_interface_of_an_address(monkeypatch):
    names = ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"]
    for name in names:
        monkeypatch.setenv(name, "so that it is restored")
        monkeypatch.delenv(name)
    ray_cluster.use_interface_of("127.0.0.1")
    assert environment.values(names) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}


def test_learners_alone_have_expandable_segments_and_the_user_has_the_last_word(monkeypatch):
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_CUMEM_ENABLE", "RAY_worker_niceness"):
        monkeypatch.delenv(name, raising=False)
    assert ray_cluster.variables(learner=False) == {"RAY_worker_niceness": "0"}
    assert ray_cluster.variables(learner=True) == {
        "RAY_worker_niceness": "0",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "NCCL_CUMEM_ENABLE": "0",
    }
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in ray_cluster.variables(learner=True)


def test_the_own_address_is_that_of_the_route_to_the_peer():
    assert own_address("127.0.0.1") == "127.0.0.1"


def test_processes_per_node():
    assert ray_cluster.most_on_one_node(["a", "b", "b", "a", "b"]) == 3
