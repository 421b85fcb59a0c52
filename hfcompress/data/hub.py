"""Calls to the Hub: limits how long they take, and explains its errors.

A server can be silent, send one byte a minute, answer in HTML, or redirect a client. The clients have no time limit of
their own, so every call is made inside `hub_calls`: it ends after a minute in which less than `BYTES_PER_SECOND` moved,
with an error that says what to do.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

from hfcompress.utils.errors import HfcompressError, disk_problem
from hfcompress.utils.escape import one_line, without_tokens

WAIT_SECONDS = 60.0
"""The longest wait for the Hub while no bytes move; a normal answer takes a second or two."""
BYTES_PER_SECOND = 20_000
"""The bytes that must move, in or out, to give a call another second: the speed of a slow connection."""
VARIABLE = "HFCOMPRESS_HUB_TIMEOUT"
"""The environment variable that sets another number of seconds than `WAIT_SECONDS`."""
SHOWN = 300
"""The most characters of a server's message that are shown."""


def wait_seconds() -> float:
    """Returns `WAIT_SECONDS`, or the value of the environment variable.

    Raises:
        HfcompressError: if the value is not a positive number.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text or WAIT_SECONDS)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise HfcompressError(f"{VARIABLE} is '{text}', not a number of seconds", f"set for example {VARIABLE}=120")
    return seconds


class HubTimeoutError(Exception):
    """A call reached its time limit. Clients do not take this error for a network failure, so they do not retry."""


class HubRedirectError(Exception):
    """The Hub redirects an upload to another host."""


@dataclass
class _Meter:
    """The time that the calls inside one `hub_calls` may still wait for the network.

    It is a token bucket: it starts with `seconds`, waiting takes time from it, moving bytes give time back, and it
    never holds more than `seconds`. So a transfer that goes on is never cut off. A server that stops, or sends a byte
    now and then, is given up after `seconds`.
    """

    seconds: float
    balance: float = 0.0
    active: int = 0
    settled: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.balance = self.seconds

    def _settle(self) -> None:
        now = time.monotonic()
        if self.active:
            self.balance -= now - self.settled
        self.settled = now

    def seconds_left(self) -> float:
        """Returns the seconds that a call may still wait.

        Raises:
            HubTimeoutError: if no time is left.
        """
        with self.lock:
            self._settle()
            # Clocks differ a little: after a wait for all the time that was left, a millisecond may still be left.
            if self.balance <= self.seconds / 100:
                raise HubTimeoutError(f"waited {self.seconds:g} s")
            return self.balance

    @contextmanager
    def count_waiting(self) -> Iterator[None]:
        """Takes the time of the `with` block; if several threads wait at once, it is taken once."""
        with self.lock:
            self._settle()
            self.active += 1
        try:
            yield
        finally:
            with self.lock:
                self._settle()
                self.active -= 1

    def earn(self, size: int) -> None:
        """Gives back time for bytes that moved."""
        with self.lock:
            self.balance = min(self.balance + size / BYTES_PER_SECOND, self.seconds)

    def guard(self, stream: Any) -> None:
        """Makes a network stream (of httpcore) wait no longer than the time that is left."""
        read, write = stream.read, stream.write

        def guarded_read(max_bytes: int, timeout: float | None = None) -> bytes:
            left = self.seconds_left()
            with self.count_waiting():
                content: bytes = read(max_bytes, timeout=left if timeout is None else min(timeout, left))
            self.earn(len(content))
            return content

        def guarded_write(buffer: bytes, timeout: float | None = None) -> None:
            left = self.seconds_left()
            with self.count_waiting():
                write(buffer, timeout=left if timeout is None else min(timeout, left))
            self.earn(len(buffer))

        stream.read, stream.write = guarded_read, guarded_write

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Guards each new connection; httpcore calls it as its `trace` extension."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self.guard(info["return_value"])

    def limit_request(self, request: Any) -> None:
        """Sets the limits that a request lacks, as an event hook of httpx."""
        left = self.seconds_left()
        limits = request.extensions.get("timeout") or {}
        # The stream itself limits reading and writing: it knows how much time is left by then.
        kept = {**limits, **{key: left for key in ("connect", "pool") if limits.get(key) is None}}
        request.extensions = {**request.extensions, "timeout": kept, "trace": self.trace}

    def check_response(self, response: Any) -> None:
        """Refuses a redirected upload, and removes the waiting times of a server, as an event hook of httpx."""
        here, there = str(response.request.url), response.headers.get("Location")
        moved = there is not None and 300 <= response.status_code < 400
        if moved and response.request.method not in ("GET", "HEAD") and _origin(urljoin(here, there)) != _origin(here):
            raise HubRedirectError(urlsplit(urljoin(here, there)).netloc)
        if response.status_code in (429, 503):
            # The client would sleep for as long as these say, outside of our limit.
            for name in ("Retry-After", "RateLimit"):
                response.headers.pop(name, None)


def _origin(address: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(address)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


@contextmanager
def _limit_client(meter: _Meter) -> Iterator[None]:
    """Makes the client of huggingface_hub keep to a meter inside the `with` block."""
    import huggingface_hub
    from huggingface_hub.utils import _http

    if not hasattr(huggingface_hub, "set_client_factory"):
        with _limit_requests(meter):
            yield
        return
    factory: Callable[[], Any] = _http._GLOBAL_CLIENT_FACTORY

    def guarded() -> Any:
        client = factory()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks.get("request", []), meter.limit_request],
            "response": [*hooks.get("response", []), meter.check_response],
        }
        return client

    huggingface_hub.set_client_factory(guarded)
    try:
        yield
    finally:
        huggingface_hub.set_client_factory(factory)


@contextmanager
def _limit_requests(meter: _Meter) -> Iterator[None]:
    """Does the same for huggingface_hub before 1, which uses requests: limits silence, but not a slow drip of bytes."""
    from huggingface_hub.utils import _http

    factory: Any = _http._GLOBAL_BACKEND_FACTORY  # type: ignore[attr-defined]

    def guarded() -> Any:
        session = factory()
        send = session.send

        def limited_send(request: Any, **options: Any) -> Any:
            left = meter.seconds_left()
            with meter.count_waiting():
                return send(request, **{**options, "timeout": options.get("timeout") or left})

        session.send = limited_send
        return session

    _http.configure_http_backend(guarded)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _http.configure_http_backend(factory)  # type: ignore[attr-defined]


@contextmanager
def hub_calls(what: str) -> Iterator[None]:
    """Limits the wait for the Hub, and turns the errors of its clients into one that says what to do.

    All other errors pass.

    Args:
        what: The thing that the calls ask for, such as `model 'user/name'`.
    """
    try:
        with _limit_client(_Meter(wait_seconds())):
            yield
    except HfcompressError:
        raise
    except Exception as error:
        problem = _hub_problem(error)
        if problem is None:
            raise
        _redact(error)
        raise HfcompressError(f"{what}: {problem[0]}", problem[1]) from error


def _redact(error: BaseException) -> None:
    """Removes tokens from an error and its causes: a server may send back what it got."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        found = todo.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        found.args = tuple(without_tokens(arg) if isinstance(arg, str) else arg for arg in found.args)
        for name, value in vars(found).items():
            if isinstance(value, str):
                setattr(found, name, without_tokens(value))
        todo += [found.__cause__, found.__context__]


_LOG_IN = "check the spelling; for a private one, log in with `hf auth login`"
OFFLINE = "unset HF_HUB_OFFLINE once to fetch it, or give a local directory"
_REASONS = {
    "OfflineModeIsEnabled": ("HF_HUB_OFFLINE is set, so the Hub is not used", OFFLINE),
    "IncompleteSnapshotError": ("the cache holds only a part of it, and the Hub cannot be reached", OFFLINE),
    "GatedRepoError": ("it is gated", "accept its terms on its page on the Hub, then log in with `hf auth login`"),
    "RepositoryNotFoundError": ("it is neither a local directory nor a repository that you can read", _LOG_IN),
    "RevisionNotFoundError": ("it has no such revision", "name a branch, a tag or a commit after the @"),
    "RemoteEntryNotFoundError": ("the repository lacks a file that is needed", "name another one"),
    "HFValidationError": ("that is not a Hub id", "a Hub id looks like `user/name`"),
}  # fmt: skip
_UNREACHABLE = ("the Hub cannot be reached", "check the connection and HF_ENDPOINT, or give a local directory")
_FIXES = {
    401: "log in with `hf auth login`, with a token that may do this",
    403: "log in with `hf auth login`, with a token that may do this",
    409: "another change was made there at the same time: try again",
    413: "it is too large for one request to the Hub",
    429: "there were too many requests to the Hub: wait a few minutes, then try again",
}
_CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


def _hub_problem(error: BaseException) -> tuple[str, str] | None:
    """Explains an error of the Hub and its fix; None for any other error."""
    # By name, since the clients' errors sit elsewhere in each of their versions.
    names = [kind.__name__ for kind in type(error).__mro__]
    if isinstance(error, HubTimeoutError) or {"ReadTimeout", "WriteTimeout"} & set(names):
        why = "the Hub did not answer in time" + (f" ({error})" if isinstance(error, HubTimeoutError) else "")
        return why, f"try again; for a very slow connection, set {VARIABLE} to more seconds"
    if isinstance(error, HubRedirectError):
        return f"the Hub redirects the upload to {error}, which is refused", "check HF_ENDPOINT and the network"
    known = next((name for name in names if name in _REASONS), None)
    if known:
        return _REASONS[known]
    if "DatasetNotFoundError" in names:
        return first_line(error), _LOG_IN
    wraps = "LocalEntryNotFoundError" in names or isinstance(error, (RuntimeError, FileNotFoundError))
    inner = error.__cause__ if wraps else None
    if inner is not None and (problem := _hub_problem(inner)) is not None:
        return problem
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        message = _server_message(error)
        refused = f"the Hub refuses access ({status})" if status in (401, 403) else f"the Hub answered {status}"
        return refused + (f": {message}" if message else ""), _FIXES.get(status, "try again later")
    if isinstance(error, json.JSONDecodeError) or _is_malformed(error):
        return "the Hub's answer is not valid", "check HF_ENDPOINT; a proxy may ask for a login"
    if "LocalEntryNotFoundError" in names or isinstance(error, (ConnectionError, TimeoutError)):
        return _UNREACHABLE
    own = type(error).__module__.partition(".")[0] in _CLIENTS
    return _UNREACHABLE if own and disk_problem(error) is None else None


def _is_malformed(error: BaseException) -> bool:
    """True if the client of the Hub failed because an answer has an unknown form."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__")) if trace is not None else ""
    shaped = isinstance(error, (KeyError, TypeError, AttributeError, IndexError, ValueError))
    return shaped and module.partition(".")[0] in ("huggingface_hub", "json")


def _server_message(error: BaseException) -> str:
    """Returns the server's own message, cut; empty if it sent none."""
    text = without_tokens(str(getattr(error, "server_message", None) or ""))
    text = " ".join(one_line(line) for line in text[: 10 * SHOWN].split("\n") if line.strip())
    return text if len(text) <= SHOWN else text[:SHOWN] + " …"


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message."""
    return str(error).strip().partition("\n")[0]
