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
