"""The HTTP connections of this process: one pool for servers on this machine, one for the world outside."""

from __future__ import annotations

import logging
import ssl
from functools import cache

import httpx

TIMEOUT_S = 15.0  # of connecting, and of each wait for bytes, unless a call says otherwise
# Below the 5 s after which uvicorn, which serves SGLang, closes an idle connection: a request never meets that closing.
KEEP_ALIVE_S = 2.0


@cache
def client(*, proxies: bool) -> httpx.Client:
    """The pool; threads share it. It follows no redirect.

    ``proxies``: use those of the environment. A cluster's HTTP_PROXY has no business with servers on this machine.
    """
    for library in ("httpx", "httpcore"):  # at INFO they log every URL, and a webhook's is a secret
        logging.getLogger(library).setLevel(logging.WARNING)
    return httpx.Client(
        trust_env=proxies,
        verify=ssl.create_default_context(),  # the machine's certificates, to which an institution adds its own
        timeout=TIMEOUT_S,
        limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_S),
    )
