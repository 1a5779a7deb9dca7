"""A small program in the place of SGLang, under the real supervision."""

import sys

from pipeline.config.schema import RolloutConfig, SglangConfig
from pipeline.rollout.sglang.server import SglangServer

SERVE = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(os.environ.get("PYTHONPATH", "").encode())
    def do_POST(self):
        self.send_error(400, "no such thing")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

# As SGLang documents them: /health (200 when the scheduler answers), /v1/loads (its figures), /generate (here one token
# a request). {reply_s}: seconds that an answer takes, {healthy_s}: seconds after the start in which /health answers,
# {moves}: whether the figures change
GENERATE = """
import http.server, json, sys, time
began = time.monotonic()
class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        used = time.monotonic() if {moves} else 5
        figures = {{"timestamp": time.time(), "num_running_reqs": 1, "num_waiting_reqs": 0, "num_used_tokens": used}}
        if self.path == "/health" and time.monotonic() - began > {healthy_s}:
            return self.send_error(503)
        self.reply({{"loads": [figures]}} if self.path == "/v1/loads" else {{}})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep({reply_s})
        stop = {{"type": "stop"}}
        meta = {{"finish_reason": stop, "weight_version": "0", "output_token_logprobs": [[-0.5, 7, None]]}}
        self.reply({{"output_ids": [7], "meta_info": meta}})
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Stub(SglangServer):
    """Runs ``program`` with the port as its argument."""

    def __init__(self, program, tmp_path, **settings):
        config = RolloutConfig(sglang=SglangConfig(**settings))
        super().__init__(config, tmp_path, dtype="float32", seed=1, log_path=tmp_path / "logs" / "server.log")
        self.program = program
        self.ports = []

    def command(self, port):
        self.ports.append(port)
        return [sys.executable, "-c", self.program, str(port)]
