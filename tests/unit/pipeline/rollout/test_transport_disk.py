"""The disk transport, against a small server process; tests/integration has SGLang's."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from pipeline.model import architecture
from pipeline.model.folder import Folder
from pipeline.model.grid import Grid
from pipeline.rollout.engine import EngineError, EngineTimeoutError
from pipeline.rollout.transport import Deadline
from pipeline.rollout.transport_disk import DiskTransport
from tests.plan_source import Source
from tests.stub_server import Stub
from tests.tiny_folder import hf_config, random_tensors, write_folder

LOADER = """
import http.server, json, pathlib, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        folder = pathlib.Path(body["model_path"])
        body["files"] = sorted(path.name for path in folder.iterdir())
        pathlib.Path("SEEN").write_text(json.dumps(body))
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def folder(tmp_path):
    path, _ = write_folder(tmp_path / "model", "llama")
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def server(tmp_path):
    server = Stub(LOADER.replace("SEEN", str(tmp_path / "seen.json")), tmp_path)
    server.start()
    yield server
    server.close()


@pytest.fixture
def transport(server, folder, tmp_path):
    return DiskTransport(server, folder, tmp_path / "scratch")


@pytest.fixture
def given(folder):
    """A learner of two ranks."""
    return Source(folder, lambda version: random_tensors(hf_config("llama"), version), learner=Grid(tp=2))


def receive(transport, given, version):
    """All of an update but its end; the order."""
    order = given.sync(transport)._order(version)
    order = replace(order, number=version, generation=version)
    transport.begin(Deadline(30))
    with ThreadPoolExecutor() as threads:
        sent = threads.submit(given.send, order)
        transport.receive(order, 0, Deadline(30))
        sent.result()
    return order


def test_the_folder_is_complete_when_it_gets_its_name_and_gone_after_the_commit(
    transport, given, tmp_path, monkeypatch
):
    monkeypatch.setattr("pipeline.rollout.transport_disk._FILE_BYTES", 1 << 18)
    scratch = tmp_path / "scratch"
    order = receive(transport, given, 7)
    assert [path.name for path in scratch.iterdir()] == ["version-7.partial"]
    transport.verify(order, Deadline(30))
    (written,) = scratch.iterdir()
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert (seen["model_path"], seen["weight_version"]) == (str(scratch / "version-7"), "7")
    assert seen["load_format"] == "auto"  # a server that began with random weights would make new ones
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert seen["files"] == sorted(["config.json", "model.safetensors.index.json", "tokenizer.json", *shards])
    expected = random_tensors(hf_config("llama"), 7)
    stored = Folder(written, architecture.read(written))
    found = {name: stored.tensor(name) for name in stored.names()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert architecture.read_config(written) == hf_config("llama")
    index = json.loads((written / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    transport.commit()
    assert not scratch.exists()


@pytest.mark.parametrize("leave", ["abort", "close", "again"])
def test_an_unfinished_update_leaves_nothing(transport, given, server, folder, tmp_path, leave):
    receive(transport, given, 7)
    if leave == "again":  # the run was killed; this is the next one's
        DiskTransport(server, folder, tmp_path / "scratch")
    else:
        getattr(transport, leave)()
        getattr(transport, leave)()
    assert not (tmp_path / "scratch").exists()


def test_a_second_update_begins_from_nothing(transport, given, tmp_path):
    receive(transport, given, 7)
    transport.verify(receive(transport, given, 8), Deadline(30))
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["version-8"]


def test_a_disk_that_takes_nothing_is_named_and_the_learner_hears_of_it(transport, given, monkeypatch):
    def full(descriptor, start, length):
        raise OSError(28, "No space left on device", "version-7.partial")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(EngineError, match=r"No space left on device: 'version-7\.partial'"):
        receive(transport, given, 7)


def server_pid(server):
    guard = server._process.pid
    with open(f"/proc/{guard}/task/{guard}/children") as children:
        return int(children.read().split()[0])


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (signal.SIGKILL, EngineError, "server"),
        (signal.SIGSTOP, EngineTimeoutError, r"update_weights_from_disk: no answer within 0\.[0-9]+ s"),
    ],
    ids=["killed", "stopped"],
)
def test_a_server_lost_before_it_loads(transport, given, server, number, error, message):
    order = receive(transport, given, 7)
    os.kill(server_pid(server), number)
    with pytest.raises(error, match=message):
        transport.verify(order, Deadline(0.7))
    transport.abort()


def test_a_deadline_passes():
    deadline = Deadline(0.05)
    assert 0 < deadline.remaining_s() <= 0.05
    time.sleep(0.06)
    with pytest.raises(EngineTimeoutError, match=r"0\.05 s have passed"):
        deadline.remaining_s()
