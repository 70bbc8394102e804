"""A small imitation of the Hugging Face hub on 127.0.0.1, served from local folders, with faults to switch on.

It answers what huggingface_hub asks when it downloads: `GET /api/models/{id}[/revision/{revision}]`, and HEAD and GET
of `/{id}/resolve/{revision}/{file}` with ETag, X-Repo-Commit, Content-Length and Range, as the hub does.
"""

import contextlib
import hashlib
import json
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Faults:
    """What goes wrong, until it is switched off again."""

    status: int | None = None  # every request is answered so
    error_code: str | None = None  # with this X-Error-Code ("GatedRepo", ...)
    breaks: dict[str, int] = field(default_factory=dict)  # file -> how many transfers break off after half of the bytes
    reset: bool = False  # a break is a connection reset, not an orderly close
    delay: float = 0.0  # seconds before every answer


class HubServer:
    """`with HubServer({"owner/name": folder}) as hub:` serves at `hub.url`; `hub.requests` lists "METHOD path".

    A folder's commit follows from its contents, so changing a file makes a new commit on main. With `token`, requests
    without it are answered as for a private repository.
    """

    def __init__(self, repositories: dict[str, Path], token: str | None = None) -> None:
        self.repositories, self.token = repositories, token
        self.faults, self.requests = Faults(), list[str]()
        self.ranges: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def commit(self, model_id: str) -> str:
        digest = hashlib.sha1()
        for name, path in sorted(self.files(model_id).items()):
            digest.update(name.encode() + path.read_bytes())
        return digest.hexdigest()

    def files(self, model_id: str) -> dict[str, Path]:
        folder = self.repositories[model_id]
        return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}

    def fetched(self) -> list[str]:
        """The files that were sent, in order."""
        sent = [request for request in self.requests if request.startswith("GET /") and "/resolve/" in request]
        return [request.rpartition("/")[2] for request in sent]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        faults = self.hub.faults
        time.sleep(faults.delay)
        if faults.status is not None:
            return self._refuse(faults.status, faults.error_code)
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._refuse(401, "RepoNotFound")
        if path.startswith("/api/models/"):
            return self._info(*path.removeprefix("/api/models/").partition("/revision/")[::2])
        model_id, _, rest = path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        self._resolve(model_id, revision, name)

    def _commit(self, model_id: str, revision: str) -> str | None:
        """The commit asked for; None when a refusal has been sent."""
        if model_id not in self.hub.repositories:
            self._refuse(404, "RepoNotFound")
            return None
        commit = self.hub.commit(model_id)
        if revision not in ("", "main", commit):
            self._refuse(404, "RevisionNotFound")
            return None
        return commit

    def _info(self, model_id: str, revision: str) -> None:
        commit = self._commit(model_id, revision)
        if commit is not None:
            siblings = [{"rfilename": name} for name in sorted(self.hub.files(model_id))]
            self._answer(200, json.dumps({"id": model_id, "sha": commit, "siblings": siblings}).encode(), {})

    def _resolve(self, model_id: str, revision: str, name: str) -> None:
        commit = self._commit(model_id, revision)
        if commit is None:
            return
        path = self.hub.files(model_id).get(name)
        if path is None:
            return self._refuse(404, "EntryNotFound")
        content = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        begin = 0
        if wanted := self.headers.get("Range"):
            self.hub.ranges.append(wanted)
            begin = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self._answer(206 if wanted else 200, content[begin:], headers, name)

    def _refuse(self, status: int, code: str | None) -> None:
        self._answer(status, b"", {"X-Error-Code": code, "X-Error-Message": "refused"} if code else {})

    def _answer(self, status: int, body: bytes, headers: dict[str, str], name: str = "") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        breaks = self.hub.faults.breaks
        if breaks.get(name, 0):
            breaks[name] -= 1
            self._break_off(body[: len(body) // 2])
        else:
            with contextlib.suppress(ConnectionError):  # a client that has given up
                self.wfile.write(body)

    def _break_off(self, part: bytes) -> None:
        self.wfile.write(part)
        self.wfile.flush()
        if self.hub.faults.reset:
            # Lingering for zero seconds turns the close into a reset; the pause lets the part arrive before it.
            time.sleep(0.05)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True
