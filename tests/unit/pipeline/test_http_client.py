"""The pool against a real server that counts its connections."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.http_client import client

CALLERS = 4
closed = threading.Semaphore(0)  # connections that a server has closed


@contextmanager
def server(hang_up=False):
    """Its URL, and the connections it took; with ``hang_up`` it closes each after one answer, without a word."""
    taken = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self):
            taken.append(self.client_address)
            super().setup()

        def do_GET(self):
            if self.path == "/together":
                meeting.wait(10)
            self.send_response(302 if self.path == "/moved" else 200)
            self.send_header("Content-Length", "0")
            self.send_header("Location", "/")
            self.end_headers()
            self.close_connection = hang_up

        def log_message(self, *_):
            pass

    meeting = threading.Barrier(CALLERS)

    class Server(ThreadingHTTPServer):
        def shutdown_request(self, request):
            super().shutdown_request(request)
            closed.release()

    httpd = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", taken
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def test_a_connection_serves_many_requests():
    with server() as (url, taken):
        assert [client(proxies=False).get(url).status_code for _ in range(5)] == [200] * 5
    assert len(taken) == 1


def test_requests_of_several_threads_do_not_wait_for_one_another():
    with server() as (url, taken), ThreadPoolExecutor(CALLERS) as threads:
        answers = threads.map(lambda _: client(proxies=False).get(f"{url}/together").status_code, range(CALLERS))
        assert list(answers) == [200] * CALLERS  # the server answers none before all are there
    assert len(taken) == CALLERS


def test_a_connection_that_the_server_closed_is_not_used_again():
    while closed.acquire(blocking=False):
        pass
    with server(hang_up=True) as (url, taken):
        for _ in range(5):
            assert client(proxies=False).get(url).status_code == 200
            assert closed.acquire(timeout=10)
    assert len(taken) == 5


@pytest.mark.parametrize("proxies", [False, True])
def test_a_redirect_is_not_followed(proxies):
    with server() as (url, _):
        assert client(proxies=proxies).get(f"{url}/moved").status_code == 302
