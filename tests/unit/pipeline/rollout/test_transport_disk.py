"""The disk transport, against a small server process; tests/integration has SGLang's."""

import json
import os
import signal
import time

import pytest
import torch

from pipeline.model.architecture import read_config
from pipeline.model.checksum import checksum
from pipeline.model.folder import Folder
from pipeline.rollout.engine import EngineError, EngineTimeoutError
from pipeline.rollout.transport import Deadline
from pipeline.rollout.transport_disk import DiskTransport
from pipeline.types import WeightBucket
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
    transport = DiskTransport(server, folder, tmp_path / "scratch")
    transport.connect(Deadline(30))
    return transport


def buckets(version):
    """As they come over Ray: views of one buffer."""
    tensors = random_tensors(hf_config("llama"), version)
    names = sorted(tensors)
    for i in range(2):
        chosen = names[i::2]
        flat, start, part = torch.cat([tensors[n].reshape(-1) for n in chosen]), 0, {}
        for name in chosen:
            part[name] = flat[start : start + tensors[name].numel()].view(tensors[name].shape)
            start += tensors[name].numel()
        yield WeightBucket(version, i, 2, part, checksum(part))


def send_all(transport, version):
    transport.begin(version, Deadline(30))
    for bucket in buckets(version):
        transport.send(bucket, Deadline(30))


def test_the_folder_is_complete_when_it_gets_its_name_and_gone_after_the_commit(transport, tmp_path):
    scratch = tmp_path / "scratch"
    send_all(transport, 7)
    assert [path.name for path in scratch.iterdir()] == ["version-7.partial"]
    transport.verify(Deadline(30))
    (written,) = scratch.iterdir()
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert (seen["model_path"], seen["weight_version"]) == (str(scratch / "version-7"), "7")
    assert seen["load_format"] == "auto"  # a server that began with random weights would make new ones
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert seen["files"] == sorted(["config.json", "model.safetensors.index.json", "tokenizer.json", *shards])
    expected = random_tensors(hf_config("llama"), 7)
    stored = Folder(written)
    found = {name: stored.tensor(name) for name in stored.names()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read_config(written) == hf_config("llama")
    index = json.loads((written / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    transport.commit()
    assert not scratch.exists()


@pytest.mark.parametrize("leave", ["abort", "close", "connect"])
def test_an_unfinished_update_leaves_nothing(transport, server, folder, tmp_path, leave):
    send_all(transport, 7)
    if leave == "connect":  # the run was killed; this is the next one's
        DiskTransport(server, folder, tmp_path / "scratch").connect(Deadline(30))
    else:
        getattr(transport, leave)()
        getattr(transport, leave)()
    assert not (tmp_path / "scratch").exists()


def test_a_second_update_begins_from_nothing(transport, tmp_path):
    transport.begin(7, Deadline(30))
    transport.send(next(buckets(7)), Deadline(30))
    send_all(transport, 8)
    transport.verify(Deadline(30))
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["version-8"]


def test_a_disk_that_takes_nothing_is_named(transport, tmp_path):
    transport.begin(7, Deadline(30))
    (tmp_path / "scratch" / "version-7.partial").rmdir()
    with pytest.raises(EngineError, match=r"version-7\.partial/model-00001-of-00002\.safetensors cannot be written"):
        transport.send(next(buckets(7)), Deadline(30))


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
def test_a_server_lost_before_it_loads(transport, server, number, error, message):
    send_all(transport, 7)
    os.kill(server_pid(server), number)
    with pytest.raises(error, match=message):
        transport.verify(Deadline(0.7))
    transport.abort()


def test_a_deadline_passes():
    deadline = Deadline(0.05)
    assert 0 < deadline.remaining_s() <= 0.05
    time.sleep(0.06)
    with pytest.raises(EngineTimeoutError, match=r"0\.05 s have passed"):
        deadline.remaining_s()
