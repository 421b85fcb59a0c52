"""A Hub on the loopback interface: enough of huggingface.co's API to create, commit, list and fetch repositories."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".onnx", ".bin", ".png", ".parquet")


@dataclass
class Request:
    """What a client asked."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Repository:
    """Files by name for each commit, the last of them under `main`."""

    kind: str
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], revision: str = "main") -> str:
        """Adds files on top of a revision."""
        kept = self.commits.get(self.refs.get(revision, ""), {})
        sha = hashlib.sha1(f"{self.id}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.refs[revision] = kept | files, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class LoopbackHub:
    """The server; use `running()`.

    Attributes:
        requests: Everything that was asked, in order.
        repositories: By kind (`model`, `dataset`) and id.
        token: What a writer must send; None lets everybody write.
        refusals: Path patterns that are answered with a status instead.
        faults: Path patterns that are answered by a fault of `FAULTS` instead.
        elsewhere: Where the fault `redirect` sends a client.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.token: str | None = None
        self.refusals: dict[str, int] = {}
        self.faults: dict[str, str] = {}
        self.elsewhere = ""
        self.closed = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def asked(self, pattern: str = "") -> list[str]:
        """`METHOD /path` of the requests that match."""
        return [str(request) for request in self.requests if re.search(pattern, str(request))]

    def fetched(self) -> list[str]:
        """Names of the files whose content was sent."""
        return sorted(re.split(r"/resolve/[^/]+/", request.path)[1] for request in self.requests
                      if request.method == "GET" and "/resolve/" in request.path)  # fmt: skip

    def add(self, id_: str, folder: Path | dict[str, bytes], kind: str = "model", **flags: Any) -> Repository:
        """A repository with the files of a folder."""
        files = folder if isinstance(folder, dict) else {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }  # fmt: skip
        made = self.repositories[kind, id_] = Repository(kind, id_, **flags)
        made.commit(files)
        return made


@contextmanager
def running() -> Iterator[LoopbackHub]:
    """A Hub for the length of a `with` block."""
    hub = LoopbackHub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closed.set()
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def _silent(hub: LoopbackHub, handler: Any) -> None:
    hub.closed.wait()


def _drip(hub: LoopbackHub, handler: Any, start: bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n") -> None:
    handler.wfile.write(start)
    while not hub.closed.wait(0.05):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def _drip_headers(hub: LoopbackHub, handler: Any) -> None:
    _drip(hub, handler, b"HTTP/1.1 200 OK\r\nX-Long: ")


def _cut(hub: LoopbackHub, handler: Any) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def _half(hub: LoopbackHub, handler: Any) -> None:
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{"url": "x"')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


def _answer(status: int, content: bytes, kind: str = "application/json", **headers: str) -> Fault:
    def fault(hub: LoopbackHub, handler: Any) -> None:
        handler._send(status, content, {"Content-Type": kind} | headers)

    return fault


def _redirect(hub: LoopbackHub, handler: Any) -> None:
    handler._send(307, b"", {"Location": hub.elsewhere})


def _redirect_found(hub: LoopbackHub, handler: Any) -> None:
    handler._send(302, b"", {"Location": hub.elsewhere})


def _reflect(hub: LoopbackHub, handler: Any) -> None:
    sent = handler.headers.get("Authorization", "nothing")
    handler._send(400, json.dumps({"error": f"you sent {sent}"}).encode(), {"X-Error-Message": f"you sent {sent}"})


Fault = Callable[[LoopbackHub, Any], None]
_CONTROLS = "\x1b[2J\x1b[31mowned\x1b]0;title\x07\r\nerror: all is well\u202e"
FAULTS: dict[str, Fault] = {
    "silent": _silent,
    "drip": _drip,
    "drip of headers": _drip_headers,
    "cut": _cut,
    "half": _half,
    "html": _answer(200, b"<html>log in</html>", "text/html"),
    "an empty object": _answer(200, b"{}"),
    "a list": _answer(200, b"[]"),
    "a number": _answer(200, b"7"),
    "bytes": _answer(200, b"\xff\xfe\x00"),
    "conflict without a word": _answer(409, b""),
    "conflict for ever": _answer(409, b"Cannot create repo: another conflicting operation is in progress"),
    "huge": _answer(500, b"x" * 5_000_000, "text/plain"),
    "controls": _answer(403, json.dumps({"error": _CONTROLS}).encode()),
    "wait for a day": _answer(429, b"{}", **{"Retry-After": "86400", "RateLimit": '"api";r=0;t=86400'}),
    "reflect": _reflect,
    "redirect": _redirect,
    "redirect (302)": _redirect_found,
    "bad card": _answer(400, json.dumps({"errors": [{"message": "license \x1b[2J"}], "warnings": []}).encode()),
    **{str(status): _answer(status, b"{}") for status in (400, 401, 403, 404, 413, 422, 429, 500, 503)},
}
"""What a server can do instead of answering, by name."""


class _AnswerError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str = "", **headers: str) -> None:
        self.status, self.headers = status, ({"X-Error-Code": code} if code else {}) | headers


def _is_lfs(name: str) -> bool:
    return name.endswith(LFS_SUFFIXES)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _oid(name: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if _is_lfs(name) else _git_oid(content)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": _git_oid(content)}
    if _is_lfs(name):
        found["lfs"] = {"oid": _oid(name, content), "size": len(content), "pointerSize": 134}
    return found


def _entries(files: dict[str, bytes], under: str, recursive: bool) -> list[dict[str, Any]]:
    inside = {name: content for name, content in files.items() if not under or name.startswith(under + "/")}
    depth = under.count("/") + 2 if under else 1
    folders = {"/".join(name.split("/")[:n]) for name in inside for n in range(depth, name.count("/") + 1)}
    found = [{"type": "directory", "path": name, "size": 0, "oid": _git_oid(name.encode())} for name in sorted(folders)]
    found += [_entry(name, content) for name, content in inside.items()]
    return [entry for entry in found if recursive or entry["path"].count("/") == depth - 1]


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Tests read `requests` instead."""

        def _serve(self) -> None:
            body = self._body()
            parts = urlsplit(self.path)
            path = unquote(parts.path)
            hub.requests.append(Request(self.command, path, {k.lower(): v for k, v in self.headers.items()}, body))
            for pattern, name in hub.faults.items():
                if re.search(pattern, f"{self.command} {path}"):
                    self.close_connection = True
                    with suppress(OSError):
                        FAULTS[name](hub, self)
                    return
            try:
                for pattern, status in hub.refusals.items():
                    if re.search(pattern, path):
                        raise _AnswerError(status)
                self._route(path, parse_qs(parts.query), body)
            except _AnswerError as answer:
                self._send(answer.status, b"{}", answer.headers)

        do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815  http.server's names

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline().strip(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _json(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
            if self.command in ("POST", "PUT") and "/paths-info/" not in path and not path.startswith("/lfs/"):
                self._require_writer()
            if path == "/api/repos/create":
                return self._create(json.loads(body))
            if path == "/api/validate-yaml":
                return self._json({"errors": [], "warnings": []})
            if path.endswith("/info/lfs/objects/batch"):
                return self._batch(json.loads(body))
            if found := re.fullmatch(r"/lfs/(\w+)", path):
                return self._store(found[1], body)
            if found := re.fullmatch(r"/(datasets/)?(.+?)/resolve/(refs/\w+/\w+|[^/]+)/(.+)", path):
                return self._resolve("dataset" if found[1] else "model", found[2], found[3], found[4])
            if found := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(\w[\w-]*)/(.+))?", path):
                repo = self._repository(found[1], found[2])
                return self._api(repo, found[3] or "revision", found[4] or "main", query, body)
            raise _AnswerError(404)

        def _require_writer(self) -> None:
            if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                raise _AnswerError(401)

        def _repository(self, kind: str, id_: str) -> Repository:
            if (kind, id_) not in hub.repositories:
                raise _AnswerError(404, "RepoNotFound")
            return hub.repositories[kind, id_]

        def _files(self, repo: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
            sha = repo.resolve(revision)
            if sha is None:
                raise _AnswerError(404, "RevisionNotFound")
            return sha, repo.commits[sha]

        def _create(self, asked: dict[str, Any]) -> None:
            key = (asked.get("type", "model"), f"{asked['organization']}/{asked['name']}")
            answer = json.dumps({"url": f"{hub.url}/{key[1]}"}).encode()
            if key in hub.repositories:
                return self._send(409, answer, {})
            hub.repositories[key] = Repository(*key, private=asked.get("visibility") == "private")
            return self._send(200, answer, {})

        def _batch(self, asked: dict[str, Any]) -> None:
            objects = []
            for wanted in asked["objects"]:
                place = {"href": f"{hub.url}/lfs/{wanted['oid']}"}
                new = wanted["oid"] not in hub.objects
                objects.append(wanted | ({"actions": {"upload": place, "verify": place}} if new else {}))
            self._json({"transfer": "basic", "objects": objects})

        def _store(self, oid: str, body: bytes) -> None:
            if self.command == "PUT":
                if hashlib.sha256(body).hexdigest() != oid:
                    raise _AnswerError(400)
                hub.objects[oid] = body
            elif oid not in hub.objects:
                raise _AnswerError(404)
            self._send(200, b"{}", {})

        def _resolve(self, kind: str, id_: str, revision: str, name: str) -> None:
            repo = self._repository(kind, id_)
            if repo.gated:
                raise _AnswerError(403, "GatedRepo")
            sha, files = self._files(repo, revision)
            if name not in files:
                raise _AnswerError(404, "EntryNotFound", **{"X-Repo-Commit": sha})
            headers = {"ETag": f'"{_oid(name, files[name])}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
            content, status = files[name], 200
            if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(found[1]), int(found[2] or len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content, status = content[first : last + 1], 206
            self._send(status, content, headers)

        def _api(self, repo: Repository, action: str, rest: str, query: dict[str, list[str]], body: bytes) -> None:
            if action == "preupload":
                return self._preupload(repo, json.loads(body)["files"])
            if action == "commit":
                return self._commit(repo, rest, body)
            revision, under = rest, ""
            if repo.resolve(revision) is None:
                revision, _, under = rest.partition("/")
            sha, files = self._files(repo, revision)
            if action == "revision":
                names = [{"rfilename": name} for name in files]
                return self._json({"id": repo.id, "sha": sha, "private": repo.private, "siblings": names, "tags": []})
            if action == "tree":
                found = _entries(files, under, query.get("recursive", ["false"])[0].lower() in ("true", "1"))
                if under and not found:
                    raise _AnswerError(404, "EntryNotFound")
                return self._json(found)
            if action == "paths-info":
                form = parse_qs(body.decode())
                wanted = json.loads(body)["paths"] if body[:1] == b"{" else form.get("paths", [])
                everything = _entries(files, "", recursive=True)
                return self._json([entry for entry in everything if entry["path"] in wanted])
            raise _AnswerError(404)

        def _preupload(self, repo: Repository, asked: list[dict[str, Any]]) -> None:
            held = repo.commits.get(repo.refs.get("main", ""), {})
            self._json({"files": [
                {"path": file["path"], "uploadMode": "lfs" if _is_lfs(file["path"]) else "regular",
                 "shouldIgnore": False,
                 "oid": _oid(file["path"], held[file["path"]]) if file["path"] in held else None}
                for file in asked
            ]})  # fmt: skip

        def _commit(self, repo: Repository, revision: str, body: bytes) -> None:
            files = {}
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    if value["oid"] not in hub.objects:
                        raise _AnswerError(400)
                    files[value["path"]] = hub.objects[value["oid"]]
            sha = repo.commit(files, revision)
            self._json({"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{repo.id}/commit/{sha}"})

    return Handler
