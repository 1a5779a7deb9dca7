"""Servers shared by all tests of real SGLang servers: starting one takes 12 s."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.servers import FAMILIES, process_group, server_pid
from tests.tiny_folder import write_folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: write_folder(root / family, family)[0] for family in FAMILIES}


@pytest.fixture(scope="session")
def engines(folders, tmp_path_factory):
    """A Llama and a Qwen3 of one rank, and a Llama of two, started at the same time; nothing of them may remain."""
    from pipeline.config.schema import RolloutConfig, SglangConfig
    from pipeline.rollout.sglang.engine import SglangEngine
    from pipeline.rollout.sglang.guard import shared_memory

    logs = tmp_path_factory.mktemp("logs")

    def engine(index, ranks):
        # SGLang compares the machine's free memory before and after it loads; the other servers load meanwhile.
        settings = SglangConfig(max_total_tokens=16384, mem_fraction_static=0.5)
        config = RolloutConfig(engine="sglang", tensor_parallel_size=ranks, sglang=settings)
        return SglangEngine(config, index=index, log_dir=logs, seed=1)

    started = {"llama": engine(0, 1), "qwen3_moe": engine(1, 1), "llama tp2": engine(2, 2)}
    with ThreadPoolExecutor() as threads:  # the servers must outlive the threads that start them
        list(threads.map(lambda name: started[name].start(folders[name.split()[0]]), started))
    groups = [server_pid(engine) for engine in started.values()]
    leftovers = set.union(*(shared_memory(group) for group in groups))
    yield started
    groups += [server_pid(engine) for engine in started.values()]  # some of them were revived
    for engine in started.values():
        engine.close()
        engine.close()
    assert [process_group(group) for group in groups] == [[]] * len(groups)
    assert [path for path in leftovers if Path(path).exists()] == []
    assert {path.suffix for path in logs.iterdir()} == {".log"}, "no weights remain in scratch folders"
