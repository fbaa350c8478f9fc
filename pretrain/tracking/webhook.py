"""A webhook that hears how a run fares: one POST of JSON for each change of its state.

A thread follows the journal (`pretrain.tracking.follower`) and posts what comes, in order; training waits for none of
it. What comes from the batch script, which outlives the ranks, is posted by `post` itself. Standard library only, but
for the run folder's files.
"""

import json
import os
import re
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from data_pipeline.errors import RunError
from data_pipeline.files.sealed import unseal
from data_pipeline.secret import redact
from pretrain.run.journal import Record, read_from

SECONDS = 5.0
"""What the receiver has for an answer."""
TOKEN = "DUET_WEBHOOK_TOKEN"  # noqa: S105
FROM_ENVIRONMENT = "env:"
MOST_TEXT = 2000
EVENTS = {"start": "started", "hang": "stalled", "spike": "spiked"}
"""By the journal's kind."""
ENDS = {"FINISHED": "done", "FAILED": "failed", "KILLED": "stopped"}


class Webhook:
    """Posts the state changes that the journal tells of from now on."""

    def __init__(self, run_dir: Path, run: str, webhook: str) -> None:
        """`webhook` as `tracking.webhook` has it.

        Raises:
            RunError: the environment does not hold the address.
        """
        self._run_dir, self._run = run_dir.resolve(), run
        self._url = address(webhook)
        self._journal = run_dir / "metrics.jsonl"
        self._offset = self._journal.stat().st_size
        self._step = 0

    @property
    def called(self) -> str:
        """What a message calls it: of an address from the environment, the host alone."""
        parts = urlsplit(self._url)
        return f"the webhook at {parts.scheme}://{parts.hostname}"

    def bring(self, last: bool) -> None:
        """Post what is new. Raises OSError while the receiver does not take it; calling it again goes on there."""
        del last
        for record, behind in read_from(self._journal, self._offset):
            self._step = self._step if record.step is None else record.step
            if event := event_of(record):
                post(self._url, event | about(self._run_dir, self._run, self._step, record.attempt, record.time))
            self._offset = behind

    def wait_longer(self, error: Exception) -> bool:
        """It gets no more time than it has."""
        del error
        return False


def event_of(record: Record) -> dict[str, Any] | None:
    """`event` and `text` of a record that is one of a changed state."""
    fields = record.fields
    if record.kind == "start":
        since = fields.get("resumed_from")
        text = f"attempt {record.attempt} goes on from step {since}" if since else f"attempt {record.attempt} began"
        return {"event": "started", "text": text, "job": fields.get("job"), "host": fields.get("host")}
    if record.kind == "end":
        return {"event": ENDS.get(str(fields["status"]), "stopped"), "text": str(fields.get("reason") or "")}
    if record.kind in EVENTS:
        return {"event": EVENTS[record.kind], "text": str(fields.get("text") or "")}
    return None


def about(run_dir: Path, run: str, step: int, attempt: int, moment: int) -> dict[str, Any]:
    """What every event tells; `moment` in milliseconds since the epoch."""
    time = datetime.fromtimestamp(moment / 1e3, UTC).isoformat(timespec="seconds")
    return {"run": run, "folder": str(run_dir), "step": step, "attempt": attempt, "time": time}


def post(url: str, event: dict[str, Any]) -> None:
    """One POST; the token of the environment goes with it, and to no other address.

    Raises:
        OSError: the receiver did not take it within SECONDS; says neither path nor token.
    """
    told = {"run": event["run"], "event": event["event"], "text": redact(str(event["text"]))[:MOST_TEXT]}
    text = f"{told['run']}: {told['event']}, step {event['step']}" + (f": {told['text']}" if told["text"] else "")
    body = json.dumps(event | told | {"text": text}).encode()  # `text` is what chats show
    headers = {"Content-Type": "application/json", "User-Agent": "duet"}
    if token := os.environ.get(TOKEN):
        headers["Authorization"] = f"Bearer {token}"
    request = Request(url, body, headers, method="POST")  # noqa: S310 - `address` gives no other
    try:
        with build_opener(_StaysHere).open(request, timeout=SECONDS):
            pass
    except (
        HTTPException,
        ValueError,
    ) as error:  # whose words may hold the address or the token
        raise OSError(f"not sent, or no answer of a web server ({type(error).__name__})") from None


class _StaysHere(HTTPRedirectHandler):
    """Followed, a POST would become a GET without the event, and the token would go to whatever host is named."""

    def redirect_request(self, *_: Any) -> None:
        """None: the answer is an error as any other."""


def address(webhook: str) -> str:
    """The URL; `env:NAME` is read from the environment.

    Raises:
        RunError: there it is not, or it is none. The message does not tell it.
    """
    name = webhook.removeprefix(FROM_ENVIRONMENT)
    if name == webhook:
        if not _is_address(webhook):
            raise RunError("tracking.webhook is no https://HOST/… in ASCII, without spaces and a user; mend or null it")
        return webhook
    url = os.environ.get(name, "")
    if not _is_address(url):
        raise RunError(
            f"tracking.webhook={webhook}: the environment has no https://… in {name}, in ASCII, without spaces and a "
            "user; set it, or null the key"
        )
    return url


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # brackets, or a port that is no number
        return False
    return bool(known) and "@" not in parts.netloc and re.fullmatch(r"[!-~]+", url) is not None


def of_run(run_dir: Path) -> tuple[str, str] | None:
    """Name and `tracking.webhook` of a run that has begun; None if it has none, or nothing can be read."""
    try:
        content = unseal((run_dir / "run.json").read_bytes(), formats=())
        webhook = content["config"]["tracking"].get("webhook")
        return (str(content.get("name")), str(webhook)) if webhook else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
