"""Tells people of alerts: by webhook, by mail, in the Slurm job's comment.

The log and the terminal have them from the recorder.

Each channel is a sink of its own, so that one which hangs holds up neither the others nor the metrics. "Not now" is an
``OSError``, after which the sidecar comes again with the same alert; "never" is a ``DeliveryError``, which it logs.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from email.message import EmailMessage
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import httpx

from pipeline import http_client
from pipeline.config.errors import Problem
from pipeline.config.schema import RunConfig
from pipeline.monitoring.sinks import Sink

log = logging.getLogger(__name__)

TIMEOUT = 15.0  # seconds that a program gets
STALE = 3600.0  # seconds: alerts that were older when the sink started are no news
COMMENT = 250  # characters
SENDMAIL_FOLDERS = "/usr/sbin:/usr/lib"  # where it is, but on few users' PATH


class DeliveryError(RuntimeError):
    """A channel refused, and would refuse again."""


class Channel(Protocol):
    """One way to reach people."""

    name: str

    def send(self, subject: str, text: str) -> None:
        """Deliver. Raises ``OSError`` if it may work later, ``DeliveryError`` if it will not."""


class Webhook:
    """Posts ``{"text": ...}`` to the URL in a file.

    This is the form of Slack's incoming webhooks, which others take as well.
    """

    name = "webhook"

    def __init__(self, file: Path) -> None:
        self._url = file.read_text().strip()

    def send(self, subject: str, text: str) -> None:
        """See ``Channel``. Errors do not tell the URL, which is a secret.

        A redirect is an error: following it would drop the text.
        """
        body = json.dumps({"text": text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}).encode()
        headers = {"Content-Type": "application/json"}
        try:
            answer = http_client.client(proxies=True).post(self._url, content=body, headers=headers)
        except httpx.InvalidURL:
            raise DeliveryError("not a URL: check the file") from None
        except httpx.ProtocolError as error:
            raise OSError(f"no HTTP answer: {error}") from None
        except httpx.HTTPError as error:
            raise OSError(str(error)) from None
        if answer.status_code in (408, 429) or answer.is_server_error:
            raise OSError(f"HTTP status {answer.status_code}")
        if not answer.is_success:
            raise DeliveryError(f"HTTP status {answer.status_code}: check the URL in the file")


class Mail:
    """Hands a mail to the node's sendmail."""

    name = "mail"

    def __init__(self, address: str) -> None:
        self._address = address

    def send(self, subject: str, text: str) -> None:
        """See ``Channel``."""
        message = EmailMessage()
        message["To"], message["Subject"] = self._address, subject
        message.set_content(text)
        _run([sendmail() or "sendmail", "-i", "-t"], bytes(message))


class SlurmComment:
    """Puts the newest alert into the job's comment, where ``squeue -o %k`` and ``scontrol show job`` show it."""

    name = "slurm_comment"

    def __init__(self, job: str) -> None:
        self._job = job

    def send(self, subject: str, text: str) -> None:
        """See ``Channel``."""
        comment = " ".join(text.split())[:COMMENT]
        _run(["scontrol", "update", f"JobId={self._job}", f"Comment={comment}"])


class AlertDelivery:
    """A ``Sink`` that sends alerts through one channel. ``run``: its name and folder, for people."""

    def __init__(self, channel: Channel, run: str) -> None:
        self._channel, self._run = channel, run
        self._oldest = time.time() - STALE

    def event(self, event: dict[str, Any]) -> None:
        """See ``Sink``. Raises as ``Channel.send``."""
        if event["kind"] != "alert":
            return
        subject, text = describe(event, self._run)
        if event["time"] < self._oldest:
            log.warning("not sent by %s, as it is of long ago: %s", self._channel.name, text)
            return
        try:
            self._channel.send(subject, text)
        except DeliveryError as error:
            raise DeliveryError(f"not sent: {text}: {error}") from None

    def close(self) -> None:
        """See ``Sink``. Nothing is held back, so there is nothing to do."""


def describe(event: Mapping[str, Any], run: str) -> tuple[str, str]:
    """Subject and text of an alert event. ``run``: its name and folder, for people."""
    rule, severity = event["rule"], event["severity"]
    if event["state"] == "end":
        return f"isentrope: {rule} is over", f"[over] {run}, step {event['step']}: {rule} is {event['reason']}"
    return f"isentrope: {severity}: {rule}", f"[{severity}] {run}, step {event['step']}: {rule}: {event['reason']}"


def alert_sinks(config: RunConfig, run_dir: Path) -> dict[str, Callable[[], Sink]]:
    """By name, what makes the sink of each channel that ``monitoring.alerts`` asks for."""
    run = f"{config.name} ({run_dir})"
    return {f"alerts_{name}": partial(_sink, channel, run) for name, channel in channels(config).items()}


def channels(config: RunConfig) -> dict[str, Callable[[], Channel]]:
    """What makes each channel of a configuration that ``delivery_problems`` finds nothing wrong with."""
    alerts, found = config.monitoring.alerts, dict[str, Callable[[], Channel]]()
    if alerts.webhook_file:
        found["webhook"] = partial(Webhook, Path(alerts.webhook_file).expanduser())
    if alerts.mail:
        found["mail"] = partial(Mail, alerts.mail)
    if alerts.slurm_comment:
        found["slurm_comment"] = partial(SlurmComment, os.environ.get("SLURM_JOB_ID", ""))
    return found


def delivery_problems(config: RunConfig) -> list[Problem]:
    """What would keep alerts from being delivered from this machine."""
    return [*webhook_problems(config), *_mail_problems(config), *_comment_problems(config)]


def webhook_problems(config: RunConfig) -> Iterator[Problem]:
    """A file that is missing, that everyone can read, or that holds no URL."""
    key, value = "monitoring.alerts.webhook_file", config.monitoring.alerts.webhook_file
    path = Path(value).expanduser()
    if not value:
        return
    if not path.is_file():
        yield Problem(key, value, "no such file", "write the webhook's URL into it, chmod 600")
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & stat.S_IROTH:
        yield Problem(key, value, f"a secret that everyone can read (mode {mode:o})", f"chmod 600 {value}")
    try:
        lines = path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        yield Problem(key, value, f"cannot be read: {error}", "write the webhook's URL into it, chmod 600")
        return
    if len(lines) != 1 or not lines[0].startswith(("https://", "http://")):
        yield Problem(key, value, "does not hold one URL", "write https://... into it, nothing else")


def sendmail() -> str | None:
    """The node's sendmail; None if it has none."""
    return shutil.which("sendmail") or shutil.which("sendmail", path=SENDMAIL_FOLDERS)


def _mail_problems(config: RunConfig) -> Iterator[Problem]:
    key, address = "monitoring.alerts.mail", config.monitoring.alerts.mail
    if not address:
        return
    name, at, host = address.partition("@")
    if not (name and at and host) or len(address.split()) != 1:
        yield Problem(key, address, "not a mail address", "write e.g. me@example.org")
    if sendmail() is None:
        yield Problem(
            key, address, "this machine has no sendmail", "install one, or use monitoring.alerts.webhook_file"
        )


def _comment_problems(config: RunConfig) -> Iterator[Problem]:
    key = "monitoring.alerts.slurm_comment"
    if not config.monitoring.alerts.slurm_comment:
        return
    if not os.environ.get("SLURM_JOB_ID"):
        yield Problem(key, True, "this is not a Slurm job", "set it to false, or use isentrope launch slurm")
    elif shutil.which("scontrol") is None:
        yield Problem(key, True, "there is no scontrol here", "set it to false, or mount Slurm's commands")


def _sink(channel: Callable[[], Channel], run: str) -> Sink:
    return AlertDelivery(channel(), run)


def _run(command: Sequence[str], text: bytes = b"") -> None:
    """Run a program. Raises ``OSError`` with what it said if it fails."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} did not end within {TIMEOUT:g} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise OSError(f"{command[0]} failed ({done.returncode}): {said}")
