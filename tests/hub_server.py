"""A small server that speaks the Hub's API, so that the real huggingface_hub is tested against real HTTP.

Two addresses, as on the Hub: `endpoint` answers the API and redirects a GGUF's `resolve` address to a signed
address of `cdn`, which is another origin (a token must not go there) and stops being valid after
`expire_links()`. Other files are answered directly.

    with HubServer(tmp_path) as hub:
        hub.add_repo("user/repo", {"model-Q4_K_M.gguf": b"GGUF…", "README.md": b"…"})
        # HF_ENDPOINT=hub.endpoint; afterwards hub.log says what was asked and sent

Faults: override `reply`, which turns one request into a `Reply` before anything is sent.

    class Cutting(HubServer):
        def reply(self, asked: Asked) -> Reply:
            reply = super().reply(asked)
            if asked.at == "cdn" and asked.method == "GET" and asked.number < 3:
                reply.cut_after = 1000  # close the connection after so many bytes of the body
            return reply

A program too: `python -m tests.hub_server FOLDER [LATENCY_S]` serves FOLDER/USER/REPO/…, prints the endpoint
and then, on each line it reads from standard input, the log so far as a line of JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

TOKEN = "hf_token_that_is_accepted"
Access = Literal["open", "gated", "private"]


@dataclass(frozen=True)
class Stored:
    """A file of a repository. `digest` is the SHA-256 that the Hub states."""

    path: Path
    size: int
    digest: str

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(f"{self.digest} {self.size}".encode()).hexdigest()


@dataclass
class Repo:
    """`commits` maps each commit's hash to its files; the last one is `main`."""

    name: str
    access: Access = "open"
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]


@dataclass(frozen=True)
class Asked:
    """A request. `number` counts those of the same method and path from 0; `path` is unquoted."""

    at: Literal["hub", "cdn"]
    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    number: int


@dataclass
class Reply:
    """What is sent. The body is `body`, or `length` bytes of `file` from `start`."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    file: Path | None = None
    start: int = 0
    length: int | None = None
    """Also what Content-Length says; None: the length of `body`."""
    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""
    bytes_per_s: float | None = None

    @property
    def size(self) -> int:
        return len(self.body) if self.length is None else self.length


@dataclass
class Logged:
    """One answered request: `authorised` whether it carried a token, `sent` the bytes of its body."""

    at: str
    method: str
    path: str
    range: str | None
    authorised: bool
    status: int
    sent: int = 0


class HubServer:
    """Both servers, as a context manager. `latency_s` is waited before each reply, `page` is the tree's."""

    def __init__(self, folder: Path, *, latency_s: float = 0.0) -> None:
        self.folder = folder
        self.latency_s = latency_s
        self.page = 1000
        self.log: list[Logged] = []
        self.repos: dict[str, Repo] = {}
        self._moved: dict[str, str] = {}
        self._by_digest: dict[str, Stored] = {}
        self._signature = 0
        self._counts: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()
        self._servers = {at: _Listener(self, at) for at in ("hub", "cdn")}
        self.endpoint, self.cdn = (f"http://127.0.0.1:{s.server_port}" for s in self._servers.values())

    def add_repo(
        self,
        name: str,
        files: Mapping[str, bytes | Path],
        *,
        access: Access = "open",
        digests: Mapping[str, str] | None = None,
    ) -> Repo:
        """A repository, or a new commit of it. Bytes are written below `folder`, a Path is served from where
        it is. `digests` replaces the SHA-256 of the contents (of a large sparse file, or as a lie)."""
        repo = self.repos.setdefault(name, Repo(name))
        repo.access = access
        stored = {}
        for path, contents in files.items():
            if isinstance(contents, bytes):
                place = self.folder / name / f"{len(repo.commits)}" / path
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(contents)
            else:
                place = contents
            digest = (digests or {}).get(path) or _digest(place)
            stored[path] = Stored(place, place.stat().st_size, digest)
            self._by_digest[digest] = stored[path]
        listing = json.dumps([[path, file.digest] for path, file in stored.items()])
        repo.commits[hashlib.sha1(f"{len(repo.commits)}{listing}".encode()).hexdigest()] = stored
        return repo

    def rename(self, old: str, new: str) -> None:
        """Requests for `old` are redirected to `new` from now on."""
        self.repos[new] = self.repos.pop(old)
        self.repos[new].name = new
        self._moved[old] = new

    def expire_links(self) -> None:
        """Signed addresses given out so far answer 403."""
        self._signature += 1

    def sent(self, path_part: str = "", method: str = "GET") -> int:
        """Bytes of bodies sent for requests whose path holds `path_part`."""
        return sum(one.sent for one in self.log if path_part in one.path and one.method == method)

    def reply(self, asked: Asked) -> Reply:
        """The answer to a request; what tests override."""
        if asked.at == "cdn":
            return self._cdn(asked)
        parts = asked.path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if is_api else parts[:2])
        rest = parts[4:] if is_api else parts[2:]
        if name in self._moved:
            moved = asked.path.replace(name, self._moved[name], 1)
            return Reply(307, {"Location": quote(moved) + _query(asked)})
        token = asked.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token != TOKEN:
            return _error(401, "", "Invalid credentials in Authorization header")
        repo = self.repos.get(name)
        if repo is None or (repo.access == "private" and not token):
            return _error(404 if token else 401, "RepoNotFound", "Repository not found")
        if is_api and (not rest or rest[0] == "revision"):
            return self._info(repo, asked, unquote("/".join(rest[1:])) or "main")
        if is_api and rest[0] == "tree" and len(rest) > 1:
            return self._tree(repo, asked, unquote(rest[1]), "/".join(rest[2:]))
        if not is_api and rest[:1] == ["resolve"] and len(rest) > 2:
            return self._resolve(repo, asked, unquote(rest[1]), "/".join(rest[2:]), gate=not token)
        return _error(404, "", f"No such address: {asked.path}")

    def _info(self, repo: Repo, asked: Asked, revision: str) -> Reply:
        commit = _commit(repo, revision)
        if commit is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = []
        for path, file in sorted(repo.commits[commit].items()):
            one: dict[str, Any] = {"rfilename": path}
            if "blobs" in asked.query:
                one |= {"size": file.size, "blobId": file.blob_id}
                if _is_lfs(path):
                    one["lfs"] = {"size": file.size, "sha256": file.digest, "pointerSize": 135}
            siblings.append(one)
        gated = "manual" if repo.access == "gated" else False
        private = repo.access == "private"
        about = {"id": repo.name, "sha": commit, "gated": gated, "private": private, "siblings": siblings}
        return _json({**about, "modelId": repo.name, "tags": ["gguf"], "downloads": 1, "likes": 1})

    def _tree(self, repo: Repo, asked: Asked, revision: str, below: str) -> Reply:
        commit = _commit(repo, revision)
        if commit is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        recursive = asked.query.get("recursive", [""])[0].lower() in ("true", "1")
        rows: dict[str, dict[str, Any]] = {}
        prefix = f"{below}/" if below else ""
        for path, file in sorted(repo.commits[commit].items()):
            if not path.startswith(prefix):
                continue
            folders = path[len(prefix) :].split("/")[:-1]
            for depth in range(1, len(folders) + 1):
                folder = prefix + "/".join(folders[:depth])
                if recursive or depth == 1:
                    oid = hashlib.sha1(folder.encode()).hexdigest()
                    rows[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
            if recursive or not folders:
                row = {"type": "file", "path": path, "oid": file.blob_id, "size": file.size}
                if _is_lfs(path):
                    row["lfs"] = {"oid": file.digest, "size": file.size, "pointerSize": 135}
                rows[path] = row
        at = int(asked.query.get("cursor", ["0"])[0])
        reply = _json(list(rows.values())[at : at + self.page])
        if at + self.page < len(rows):
            flag = f"recursive={recursive}&cursor={at + self.page}"
            reply.headers["Link"] = f'<{self.endpoint}{quote(asked.path)}?{flag}>; rel="next"'
        return reply

    def _resolve(self, repo: Repo, asked: Asked, revision: str, path: str, *, gate: bool) -> Reply:
        if repo.access == "gated" and gate:
            return _error(403, "GatedRepo", f"Access to model {repo.name} is restricted.")
        commit = _commit(repo, revision)
        if commit is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        file = repo.commits[commit].get(path)
        if file is None:
            missing = _error(404, "EntryNotFound", "Entry not found")
            missing.headers["X-Repo-Commit"] = commit
            return missing
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not _is_lfs(path):
            return _contents(file, asked, {**headers, "ETag": f'"{file.blob_id}"'})
        linked = {"X-Linked-Etag": f'"{file.digest}"', "X-Linked-Size": str(file.size)}
        signed = f"{self.cdn}/{file.digest}?signature={self._signature}"
        return Reply(302, {**headers, **linked, "Location": signed})

    def _cdn(self, asked: Asked) -> Reply:
        file = self._by_digest.get(asked.path.strip("/"))
        if file is None:
            return _error(404, "", "no such object")
        if asked.query.get("signature") != [str(self._signature)]:
            return _error(403, "", "Request has expired")
        return _contents(file, asked, {"ETag": f'"{file.digest[:32]}"', "Accept-Ranges": "bytes"})

    def take(self, at: Literal["hub", "cdn"], method: str, target: str, headers: Mapping[str, str]) -> Asked:
        """A request as it came in, numbered."""
        split = urlsplit(target)
        path = unquote(split.path)
        with self._lock:
            number = self._counts.get((method, path), 0)
            self._counts[method, path] = number + 1
        return Asked(at, method, path, parse_qs(split.query, keep_blank_values=True), headers, number)

    def __enter__(self) -> Self:
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()
            for connection in list(server.connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    block_on_close = False

    def __init__(self, hub: HubServer, at: str) -> None:
        self.hub, self.at = hub, at
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of many tests."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def do_GET(self) -> None:
        hub, at = self.server.hub, self.server.at
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = hub.take(at, self.command, self.path, headers)  # type: ignore[arg-type]
        if hub.latency_s:
            time.sleep(hub.latency_s)
        reply = hub.reply(asked)
        noted = Logged(
            at, self.command, asked.path, headers.get("range"), "authorization" in headers, reply.status
        )
        hub.log.append(noted)
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(reply.size), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(reply, noted)
        if reply.cut_after is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_HEAD = do_GET

    def _send_body(self, reply: Reply, noted: Logged) -> None:
        whole = reply.size if reply.file is not None else len(reply.body)
        length = whole if reply.cut_after is None else min(reply.cut_after, whole)
        for part in _parts(reply, length):
            self.connection.sendall(part)
            noted.sent += len(part)
            if reply.bytes_per_s:
                time.sleep(len(part) / reply.bytes_per_s)

    def log_message(self, format: str, *args: object) -> None:
        """Silent: `HubServer.log` has it all."""


def _parts(reply: Reply, length: int) -> Iterator[bytes]:
    step = 1 << 20 if reply.bytes_per_s is None else max(1, int(reply.bytes_per_s / 20))
    if reply.file is None:
        for at in range(0, length, step):
            yield reply.body[at : min(at + step, length)]
        return
    with reply.file.open("rb") as file:
        file.seek(reply.start)
        while length > 0 and (part := file.read(min(step, length))):
            yield part
            length -= len(part)


def _contents(file: Stored, asked: Asked, headers: dict[str, str]) -> Reply:
    """The file or the range of it that was asked for."""
    wanted = asked.headers.get("range", "")
    if not wanted.startswith("bytes="):
        return Reply(200, headers, file=file.path, length=file.size)
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start = int(first) if first else max(0, file.size - int(last))
    end = min(int(last), file.size - 1) if first and last else file.size - 1
    if start >= file.size:
        return Reply(416, {**headers, "Content-Range": f"bytes */{file.size}"})
    headers = {**headers, "Content-Range": f"bytes {start}-{end}/{file.size}"}
    return Reply(206, headers, file=file.path, start=start, length=end - start + 1)


def _commit(repo: Repo, revision: str) -> str | None:
    return repo.head if revision == "main" else revision if revision in repo.commits else None


def _is_lfs(path: str) -> bool:
    return path.endswith(".gguf")


def _json(value: object) -> Reply:
    return Reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


def _error(status: int, code: str, message: str) -> Reply:
    headers = {"X-Error-Message": message, "Content-Type": "application/json"}
    if code:
        headers["X-Error-Code"] = code
    return Reply(status, headers, json.dumps({"error": message}).encode())


def _query(asked: Asked) -> str:
    pairs = [f"{quote(key)}={quote(value)}" for key, values in asked.query.items() for value in values]
    return "?" + "&".join(pairs) if pairs else ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hub_environment(endpoint: str, home: Path) -> dict[str, str]:
    """Settings for a process that is to use the server and nothing of the user's."""
    return {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server without repositories, that this process and its children use as the Hub, without a token.

    Import it into a test module by name. huggingface_hub reads HF_HOME when it is imported, so code in this
    process has to be given folders and endpoint as arguments; a child process follows the environment.
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    from huggingface_hub import constants

    # Read from HF_HOME when the library was imported: a developer's own token must not reach the tests.
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf-home" / "token"))
    with HubServer(tmp_path / "hub") as server:
        for name, value in hub_environment(server.endpoint, tmp_path / "hf-home").items():
            monkeypatch.setenv(name, value)
        yield server


def _serve(folder: Path, latency_s: float) -> None:
    with HubServer(folder, latency_s=latency_s) as server:
        for place in sorted(folder.glob("*/*")):
            files = {p.relative_to(place).as_posix(): p for p in sorted(place.rglob("*")) if p.is_file()}
            # Sparse files of 100 GB are not hashed: their name stands for the contents.
            digests = {
                name: hashlib.sha256(str(path).encode()).hexdigest()
                for name, path in files.items()
                if path.stat().st_size > 64 << 20
            }
            server.add_repo(f"{place.parent.name}/{place.name}", dict(files), digests=digests)
        print(server.endpoint, flush=True)
        for _ in sys.stdin:
            print(json.dumps([asdict(one) for one in server.log]), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
