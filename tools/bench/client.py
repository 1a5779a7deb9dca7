"""What it costs to keep thousands of samples in flight on one SGLang server, without a model.

    python -m tools.bench.client --requests 16384 --json client.json

A stub server, a process of its own on the loopback, answers only when all requests are in flight: so they are, at once.
CPU seconds are those of the client's process with all its threads, from the requests to the samples as arrays, opening
the connections included; ``rss_gib`` is its peak, of which ``rss_before_gib`` was there before. Every request is one
open socket on either side: the limit of open files must allow for them (``ulimit -Hn``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from pipeline.rollout.sglang import replies
from pipeline.rollout.sglang.client import Client
from pipeline.types import GenerateRequest, Prompt
from pipeline.units import GIB

PROMPT = tuple(range(200))
SOCKETS = 64  # beside one for each request


class Stub(asyncio.Protocol):
    """Answers every request of ``/generate`` with the same reply, once ``count`` are in flight."""

    waiting: list[asyncio.Transport]
    count: int
    answer: bytes

    def connection_made(self, transport: Any) -> None:
        """Begin a connection."""
        self.transport, self.received = transport, b""

    def data_received(self, data: bytes) -> None:
        """Read one request; the last one of a round has all of them answered."""
        self.received += data
        head = self.received.find(b"\r\n\r\n")
        length = self.received.lower().find(b"content-length:")
        if head < 0 or len(self.received) < head + 4 + int(self.received[length + 15 :].split(b"\r\n", 1)[0]):
            return
        self.received = b""
        self.waiting.append(self.transport)
        if len(self.waiting) == self.count:
            for transport in self.waiting:
                transport.write(self.answer)
            self.waiting.clear()


def serve(count: int, tokens: int, told: Connection) -> None:
    """Serve on a free port, which is told."""
    entries = [[-0.5 - i / 7, i, None] for i in range(tokens)]
    meta = {"finish_reason": {"type": "stop"}, "weight_version": "0", "output_token_logprobs": entries}
    body = json.dumps({"output_ids": list(range(tokens)), "meta_info": meta}).encode()
    Stub.answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    Stub.count, Stub.waiting = count, []

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", 0, backlog=4096)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def measure(client: Client, count: int) -> dict[str, float]:
    """Seconds of one round, of the CPU and by the clock."""
    request = GenerateRequest(Prompt("p", PROMPT, "", None, "exact"), tuple(range(count)), 1.0, 1024)
    cpu, begun = time.process_time(), time.monotonic()
    parameters = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 1024, "stop_token_ids": [1]}
    call = client.post(
        "/generate",
        [
            msgspec.json.encode({"input_ids": PROMPT, "sampling_params": parameters | {"sampling_seed": i}})
            for i in range(count)
        ],
    )
    drawn = 0
    while call.waiting:
        for number, reply in call.take():
            if reply.said:
                raise SystemExit(f"request {number} was not answered: {reply.said}")
            drawn += bool(len(replies.sample(reply.body, request, request.seeds[number]).token_ids))
    assert drawn == count
    return {"cpu_s": round(time.process_time() - cpu, 2), "wall_s": round(time.monotonic() - begun, 2)}


def resident_gib() -> float:
    """The peak of this process."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 3)


def main() -> None:
    """Measure, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=100, help="tokens of an answer")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    count, (_, most) = arguments.requests, resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < count + SOCKETS:
        raise SystemExit(
            f"{count} requests need {count + SOCKETS} open files, `ulimit -Hn` allows {most}: ask for fewer"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    before = resident_gib()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("forkserver").Process(
        target=serve, args=(count, arguments.tokens, theirs), daemon=True
    )
    server.start()
    client = Client(f"http://127.0.0.1:{ours.recv()}", count)
    found: dict[str, Any] = {"requests": count, "tokens": arguments.tokens}
    found |= measure(client, count) | {"rss_before_gib": before, "rss_gib": resident_gib()}
    client.close()
    server.terminate()
    server.join()
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
