"""The web page's server and documents, asked as a browser or a script would; the page itself is in
tests/integration/test_web.py.
"""

import gzip
import http.client
import json
import socket
import threading
from contextlib import ExitStack, contextmanager

import pytest

from pipeline.config.errors import ConfigError
from pipeline.monitoring.report import build_report
from pipeline.monitoring.web.samples import Query, list_samples, read_sample
from pipeline.monitoring.web.server import PageServer, _Request
from pipeline.monitoring.web.view import RunView
from tests.command_line import call
from tests.unit.pipeline.monitoring.run_writer import group, open_run, record_step, sample, write_run


@contextmanager
def serving(*run_dirs, host="127.0.0.1", with_token=False):
    with PageServer([RunView(run_dir) for run_dir in run_dirs], host, 0, with_token=with_token) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("web") / "run"
    write_run(run_dir, entropy=lambda step: 0.6 - 0.01 * step, finish=False)
    return run_dir


@pytest.fixture(scope="module")
def server(run_dir):
    with serving(run_dir) as server:
        yield server


def ask(server, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, gzip.decompress(body) if answer.headers["Content-Encoding"] == "gzip" else body


def document(server, path):
    answer, body = ask(server, path)
    return answer.status, json.loads(body)


def test_runs_tell_how_they_stand(server, run_dir):
    status, answer = document(server, "/api/runs")
    (run,) = answer["runs"]
    assert status == 200
    assert (run["name"], run["run"], run["actuator"], run["step"]) == ("pm4", str(run_dir), "reweight", 29)
    assert run["entropy"] == pytest.approx(0.31)


def test_series_of_a_range_with_and_without_spread(server):
    status, answer = document(
        server, "/api/series?run=0&names=band_low,entropy/band_low&spread=entropy/mean&first=10&last=12"
    )
    assert status == 200
    assert answer["step"] == [10, 11, 12]
    assert answer["entropy/mean"]["mean"] == [0.5, 0.49, 0.48]
    assert answer["entropy/mean"]["low"] == answer["entropy/mean"]["high"] == [0.5, 0.49, 0.48]
    assert answer["entropy/band_low"] == {"mean": [0.27] * 3}
    assert answer["band_low"] == {"mean": [None] * 3}, "a name that no step has"


def test_the_timeline_is_of_the_last_steps_of_a_range(server):
    status, answer = document(server, "/api/timeline?run=0&last=20")
    steps = answer["steps"]
    assert (status, [step["step"] for step in steps]) == (200, list(range(9, 21)))
    assert all(step["lanes"].keys() == {"learner", "sync", "engine 0"} for step in steps)
    assert all(0 <= step["idle"]["engines"] < 1 for step in steps)
    assert [step["began"] for step in steps] == sorted(step["began"] for step in steps)
    assert [step["step"] for step in document(server, "/api/timeline?run=0&first=28")[1]["steps"]] == [28, 29]


def test_a_series_is_cut_to_the_points_asked_for(server):
    _, answer = document(server, "/api/series?run=0&spread=entropy/mean&points=5")
    spread = answer["entropy/mean"]
    assert 1 < len(answer["step"]) <= 6
    assert min(spread["low"]) == pytest.approx(0.31)
    assert max(spread["high"]) == pytest.approx(0.6)
    assert all(
        low <= mean <= high for low, mean, high in zip(spread["low"], spread["mean"], spread["high"], strict=True)
    )


def test_law_of_the_run(server):
    _, answer = document(server, "/api/law?run=0")
    assert answer["entropy"][0] == pytest.approx(0.6)
    assert len(answer["entropy"]) == len(answer["reward"])
    assert answer["fit"]["entropies"] == pytest.approx([0.31, 0.6])
    assert answer["fit"]["a"] == pytest.approx(0, abs=1e-9), "the reward does not depend on the entropy"
    assert document(server, "/api/law?run=0&first=10&last=12")[1]["fit"] is None, "three steps are too few"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/api/series?run=0", "give names="),
        ("/api/series?run=0&names=a&points=9999", "between 1 and 5000"),
        ("/api/series?run=7&names=a", "runs 0 to 0"),
        ("/api/marks", "run=None: give a whole number"),
        ("/api/sample?run=0&step=3&index=99", "no sample 99 of step 3"),
    ],
)
def test_a_bad_query_is_told(server, path, words):
    status, answer = document(server, path)
    assert status == 400
    assert words in answer["error"]


@pytest.mark.parametrize(
    "path", ["/nothing", "/static/../server.py", "/static/%2e%2e/server.py", "/static", "/page.css"]
)
def test_nothing_beside_the_page_is_served(server, path):
    assert ask(server, path)[0].status == 404


def test_the_page_allows_nothing_from_elsewhere(server):
    answer, body = ask(server, "/", **{"Accept-Encoding": "gzip"})
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Content-Encoding"] == "gzip"
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'self';")
    assert b"http" not in body


def test_without_a_token_only_this_machine_is_served(server):
    """Else a page of any site could read the runs, through a name of its own that leads to 127.0.0.1."""
    assert ask(server, "/api/runs", Host="evil.example:80")[0].status == 403
    assert ask(server, "/api/runs", Host=f"localhost:{server.server_port}")[0].status == 200


@pytest.mark.parametrize("options", [{"host": "0.0.0.0"}, {"with_token": True}])
def test_a_token_is_asked_for(run_dir, options):
    with serving(run_dir, **options) as server:
        token = server.url.partition("?token=")[2]
        assert len(token) >= 32
        assert ask(server, "/")[0].status == 401
        assert ask(server, "/api/events")[0].status == 401
        assert ask(server, "/?token=guess")[0].status == 403
        assert ask(server, "/?token=gu%C3%A9ss")[0].status == 403
        assert ask(server, "/", Cookie=f"isentrope-{server.server_port}=guess")[0].status == 403
        first, _ = ask(server, f"/?token={token}")
        assert (first.status, first.headers["Location"]) == (303, ".")
        cookie = first.headers["Set-Cookie"]
        assert "HttpOnly; SameSite=Strict" in cookie
        kept = cookie.partition(";")[0]
        assert ask(server, "/", Cookie=kept)[0].status == 200
        assert ask(server, "/api/runs", Cookie=kept, Host="login1.cluster:80")[0].status == 200


@pytest.mark.parametrize("other", ['a="x\\', "a=b; =; @@", "{json: [1,2]}", "a=\xe9\x80", "x" * 5000, ";;;="])
def test_a_malformed_cookie_of_another_application_locks_nobody_out(run_dir, other):
    with serving(run_dir, with_token=True) as server:
        own = f"isentrope-{server.server_port}={server.token}"
        assert ask(server, "/", Cookie=f"{other}; {own}")[0].status == 200
        assert ask(server, "/", Cookie=f"{own}; {other}")[0].status == 200
        assert ask(server, "/", Cookie=other)[0].status == 401


def test_silent_connections_shut_nobody_out(run_dir, monkeypatch):
    """Of few at a time: with many more than listen() keeps for a busy server, connecting takes seconds."""
    monkeypatch.setattr("pipeline.monitoring.web.server.CONNECTIONS", 8)
    with serving(run_dir) as server, ExitStack() as stack:
        for _ in range(12):
            silent = stack.enter_context(socket.create_connection(("127.0.0.1", server.server_port)))
            silent.sendall(b"GET / HT")
        assert ask(server, "/")[0].status == 200
        assert len(server._connections) <= 8


def test_a_connection_that_keeps_still_is_hung_up(run_dir, monkeypatch):
    monkeypatch.setattr(_Request, "timeout", 0.05)
    with serving(run_dir) as server, socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as silent:
        silent.sendall(b"GET / HTTP/1.1\r\nHost: ")
        assert silent.recv(1) == b""


@pytest.mark.parametrize(
    "request_line",
    [
        b"GET //[ HTTP/1.1",
        b"GET /\x00 HTTP/1.1",
        b"GET /static/\x00 HTTP/1.1",
        b"GET /api/series?run=0&names=a&first=" + b"9" * 5000 + b" HTTP/1.1",
        b"GET /api/series?run=0&names=a&first=9999999999999999999&last=9999999999999999999 HTTP/1.1",
        b"GET /api/series?run=-1&names=a HTTP/1.1",
        b"GET /api/series?run=0&names=%ED%A0%80%ff HTTP/1.1",
        b"GET /api/sample?run=0&step=" + b"9" * 19 + b"&index=0 HTTP/1.1",
        b"GET /api/law?run=0&first=9999999999999999999 HTTP/1.1",
        b"GET /api/runs HTTP/77.7",
        b"\xff\xfe\x00",
        b"POST / HTTP/1.1",
        b"GET",
    ],
)
def test_a_bad_request_gets_an_answer_and_no_traceback(server, caplog, capfd, request_line):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as asking:
        host = f"\r\nHost: localhost:{server.server_port}\r\nConnection: close\r\n\r\n"
        asking.sendall(request_line + host.encode())
        answer = asking.makefile("rb").read()
    assert answer
    assert not caplog.records
    assert "Traceback" not in capfd.readouterr().err
    assert ask(server, "/api/runs")[0].status == 200


def test_the_stream_tells_each_run_then_what_changed(tmp_path):
    recorder = open_run(tmp_path / "run")
    record_step(recorder, 0)
    with serving(tmp_path / "run") as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        connection.request("GET", "/api/events")
        answer = connection.getresponse()
        assert answer.headers["Content-Type"] == "text/event-stream"
        messages = (json.loads(line[6:]) for line in iter(answer.readline, b"") if line.startswith(b"data: "))
        assert next(messages)["status"]["step"] == 0
        record_step(recorder, 1, entropy=0.42)
        changed = next(messages)
        assert (changed["run"], changed["status"]["step"]) == (0, 1)
        assert changed["status"]["entropy"] == pytest.approx(0.42)
    recorder._lock.close()


def test_a_port_in_use_is_one_clear_block(capsys, run_dir):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, out, err = call(capsys, "monitor", str(run_dir), "--web", "--port", str(port))
    assert (code, out) == (2, "")
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in err
    assert "give another --port" in err


def test_an_address_of_another_machine_is_refused(run_dir):
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        PageServer([RunView(run_dir)], "192.0.2.1", 0)


@pytest.fixture
def samples(tmp_path):
    recorder = open_run(tmp_path / "run", "monitoring.samples_per_step=2")
    for step in range(5):
        record_step(recorder, step, main=[group(sample()), group(sample(reward=0.0))])
    recorder._lock.close()
    return tmp_path / "run"


def listed(run_dir, **query):
    answer = list_samples(run_dir, Query(**{"before": 10**9, **query}))
    return [(entry["step"], entry["index"]) for entry in answer["samples"]], answer["next"]


def test_samples_come_newest_first_and_in_pages(samples):
    assert listed(samples, limit=4) == ([(4, 0), (4, 1), (3, 0), (3, 1)], 3)
    assert listed(samples, limit=4, before=3) == ([(2, 0), (2, 1), (1, 0), (1, 1)], 1)
    assert listed(samples, limit=4, before=1) == ([(0, 0), (0, 1)], None)


def test_samples_are_searched_in_any_case_and_by_role(samples):
    path = samples / "samples" / "step-000002.jsonl"
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    changed = [first | {"response": "So the Answer is 10"}, second | {"role": "auxiliary"}]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in changed))
    assert listed(samples, text="answer IS") == ([(2, 0)], None)
    assert listed(samples, role="auxiliary") == ([(2, 1)], None)
    assert listed(samples, text="not there") == ([], None)


def test_a_search_rests_and_goes_on(samples, monkeypatch):
    monkeypatch.setattr("pipeline.monitoring.web.samples.FILES_PER_SEARCH", 2)
    assert listed(samples, text="nowhere") == ([], 3)
    assert listed(samples, text="nowhere", before=3) == ([], 1)
    assert listed(samples, text="nowhere", before=1) == ([], None)


def test_a_line_still_being_written_is_left_out(samples):
    path = samples / "samples" / "step-000004.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert listed(samples, before=5, limit=1) == ([(4, 0)], 4)
    assert read_sample(samples, 4, 1) is None


def test_lines_that_are_no_samples_are_left_out(samples):
    path = samples / "samples" / "step-000004.jsonl"
    lines = ["5", "[]", "{}", '{"step": 4, "prompt": null}', "[" * 100_000, '"\\ud800"']
    path.write_text("\n".join(lines) + "\n" + path.read_text())
    assert listed(samples, limit=2) == ([(4, 6), (4, 7)], 4)
    build_report([samples], samples / "report.html")


def test_one_sample_has_its_tokens_and_an_exact_seed(samples):
    path = samples / "samples" / "step-000004.jsonl"
    line = json.loads(path.read_text().splitlines()[0]) | {"seed": 2**62 + 1, "pieces": ["1", "+"]}
    path.write_text(json.dumps(line) + "\n")
    found = read_sample(samples, 4, 0)
    assert (found["seed"], found["pieces"], found["log_probs"]) == ("4611686018427387905", ["1", "+"], [0.0] * 4)
