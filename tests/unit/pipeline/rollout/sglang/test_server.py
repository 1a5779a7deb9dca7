"""Supervision, with a small program in the place of SGLang; tests/integration has the real one."""

import json
import os
import re
import signal
import threading
import time
from dataclasses import replace

import pytest

from pipeline import http_client
from pipeline.config.schema import RolloutConfig, SglangConfig
from pipeline.rollout.engine import EngineError, EngineTimeoutError
from pipeline.rollout.sglang import cpu as sglang_cpu
from pipeline.rollout.sglang import server as sglang_server
from pipeline.rollout.sglang.engine import SglangEngine
from pipeline.rollout.sglang.server import SglangServer
from pipeline.rollout.sglang.startup import startup_limit_s
from pipeline.types import GenerateRequest, Prompt
from tests.stub_server import SERVE, Stub


def test_a_server_comes_up_answers_and_ends(tmp_path):
    server = Stub(SERVE, tmp_path)
    server.start()
    assert server.alive
    assert server.answers("/health", 5)
    # Only the server's process has the shims, and only where there is no CUDA.
    assert (str(sglang_cpu.SHIM_FOLDER) in server.get("/")) == (not _has_cuda())
    assert str(sglang_cpu.SHIM_FOLDER) not in os.environ.get("PYTHONPATH", "")
    with pytest.raises(EngineError, match=r"(?s)/generate answered 400.*no such thing.*server\.log"):
        server.post("/generate", input_ids=[1])
    server.close()
    server.close()
    assert not server.alive
    with pytest.raises(EngineError, match=r"the server has ended; end of .*server\.log"):
        server.post("/generate")


def _has_cuda():
    import torch

    return torch.cuda.is_available()


def test_a_server_outlives_the_thread_that_started_it(tmp_path):
    server = Stub(SERVE, tmp_path)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    assert server.answers("/health", 5)
    server.close()


def test_a_failing_start_shows_the_end_of_the_log(tmp_path):
    server = Stub("print(*range(100), 'CUDA error: out of luck', sep='\\n'); raise SystemExit(3)", tmp_path)
    ended = r"ended while it started, after \d+ s; end of .*server\.log:\n(\d+\n)+CUDA error: out of luck"
    with pytest.raises(EngineError, match=ended) as error:
        server.start()
    assert "\n10\n" not in str(error.value)  # the end, not all
    assert len(server.ports) == 1
    assert not server.alive


def test_a_taken_port_is_tried_again_elsewhere(tmp_path):
    marker = tmp_path / "second"
    program = f"""
import pathlib
if not pathlib.Path({str(marker)!r}).exists():
    pathlib.Path({str(marker)!r}).touch()
    raise OSError(98, "Address already in use")
{SERVE}"""
    server = Stub(program, tmp_path)
    server.start()
    assert len(server.ports) == 2
    assert server.answers("/health", 5)
    server.close()


def test_a_server_that_never_answers_is_ended(tmp_path):
    server = Stub("import time; time.sleep(60)", tmp_path, startup_timeout_s=0.6)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(30_000_000)
    waited = r"did not answer /health within 0\.9 s: 0\.6 s \(rollout\.sglang\.startup_timeout_s.*0\.03 GB .* 0\.1 GB/s"
    with pytest.raises(EngineError, match=waited):
        server.start()
    assert not server.alive


def test_the_start_has_time_to_read_the_weights(tmp_path):
    with (tmp_path / "model-00001-of-00001.safetensors").open("wb") as file:
        file.truncate(65_000_000_000)  # sparse
    assert startup_limit_s(RolloutConfig(), tmp_path) == 300 + 650
    assert startup_limit_s(RolloutConfig(weight_dtype="fp8"), tmp_path) == 300  # comes up without weights


def test_a_stuck_guard_is_killed_and_its_server_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sglang_server, "_CLOSE_TIMEOUT_S", 0.3)
    server = Stub(SERVE, tmp_path)
    server.start()
    guard = server._process
    os.kill(guard.pid, signal.SIGSTOP)  # SIGTERM does not reach it now
    server.close()
    assert guard.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while server.answers("/health", 1) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not server.answers("/health", 1)


def test_a_slow_reply_names_the_setting(tmp_path):
    program = SERVE.replace("self.send_error", "import time; time.sleep(2); self.send_error")
    server = Stub(program, tmp_path, liveness_timeout_s=0.2)
    server.start()
    with pytest.raises(EngineTimeoutError, match=r"within 0\.2 s; .*raise rollout\.sglang\.liveness_timeout_s"):
        server.post("/generate")
    with pytest.raises(EngineTimeoutError, match=r"within 0\.1 s; log"):  # the caller's deadline, and its remedy
        server.post("/generate", timeout_s=0.1)
    server.close()


def test_a_second_start_keeps_the_log_of_the_first(tmp_path):
    first = Stub("print('CUDA error: address already in use by tensors'); raise SystemExit(3)", tmp_path)
    with pytest.raises(EngineError, match="by tensors"):
        first.start()
    starts = len(first.ports)
    second = Stub("print('another cause'); raise SystemExit(3)", tmp_path)
    with pytest.raises(EngineError, match="another cause") as error:
        second.start()
    assert "by tensors" not in str(error.value)  # neither as the reason nor, below, as a clash of ports
    assert len(second.ports) == 1
    lines = second.log_path.read_text().splitlines()
    assert [line.startswith("--- server starts at http://127.0.0.1:") for line in lines] == [True, False] * (starts + 1)
    assert lines[-1] == "another cause"


def test_a_server_that_dies_is_seen_on_a_kept_connection(tmp_path):
    program = (
        SERVE.replace("def do_GET", "protocol_version = 'HTTP/1.1'\n    def do_GET")
        .replace("self.end_headers()", "self.send_header('Content-Length', '0'); self.end_headers()")
        .replace("self.wfile.write", "len")
        .replace("self.send_error", "os._exit(3) or ")
    )
    server = Stub(program, tmp_path)
    server.start()
    assert server.answers("/health", 5)
    with pytest.raises(EngineError, match=r"the server (has ended|runs but does not answer)"):
        server.post("/generate")
    deadline = time.monotonic() + 60
    while server.alive and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(EngineError, match="the server has ended"):
        server.post("/generate")
    server.close()


def test_proxies_of_the_environment_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # the discard port: nobody answers
    http_client.client.cache_clear()  # the environment is read when the pool is made
    server = Stub(SERVE, tmp_path)
    server.start()
    assert server.answers("/health", 5)
    server.close()


def test_a_server_looks_for_stop_texts_in_all_tokens_that_may_spell_them(tmp_path):
    """SGLang sizes the window by its own spelling, and by the width of patterns; this one never matches."""
    config = RolloutConfig(engine="sglang", stop=["</answer>"])
    engine = SglangEngine(config, index=0, log_dir=tmp_path, seed=0)
    asked = GenerateRequest(Prompt("q", (1, 2), "", 1, "exact"), (7,), 1.0, 10, stop=("\nObservation:",))
    parameters = json.loads(engine._body(asked, 0))["sampling_params"]
    assert parameters["stop"] == ["</answer>", "\nObservation:"]
    assert parameters["stop_regex"] == [r"[^\s\S]{53}"]  # 13 characters of four bytes at most, and one more
    assert re.search(r"[^\s\S]", "\nObservation: </answer> \U0001f600") is None
    asked, engine = replace(asked, stop=()), SglangEngine(RolloutConfig(), index=0, log_dir=tmp_path, seed=0)
    assert json.loads(engine._body(asked, 0))["sampling_params"]["stop_regex"] == []


def test_the_command_line(tmp_path):
    config = RolloutConfig(
        tensor_parallel_size=2, sglang=SglangConfig(max_total_tokens=0, extra_args=["--log-level", "info"])
    )
    command = SglangServer(config, tmp_path, dtype="bfloat16", seed=2**31 + 5, log_path=tmp_path / "log").command(1234)
    words = " ".join(command)
    for part in (
        "--port 1234",
        "--dtype bfloat16",
        "--tensor-parallel-size 2",
        "--random-seed 5",
        "--skip-tokenizer-init",
    ):
        assert part in words
    assert "--max-total-tokens" not in words
    assert command[-2:] == ["--log-level", "info"]
    reading = SglangServer(config, tmp_path, dtype="bfloat16", seed=1, log_path=tmp_path, reads_text=True).command(1)
    assert {"--skip-server-warmup", "--skip-tokenizer-init"} & {*reading} == {"--skip-server-warmup"}
    assert ("--device cpu" in words) == (not _has_cuda())
    assert words.count("--sleep-on-idle") == (not _has_cuda())
