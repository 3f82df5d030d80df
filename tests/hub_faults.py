"""Faults of a server, a network and a disk, injected into real downloads by the real client.

A `Fault` alters answers of a `HubServer`; `run_fault` downloads through it, looks at what lies in the cache,
mends the server and downloads again. Whatever happens, no file may have its final name without the right
digest, and the second download has to end well: that is the rule for every fault, and `ends` adds whether the
first one is expected to. The default tests take a few; `scripts/bench_pull_faults.py` runs all of them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pytest

from qnext.errors import QnextError
from qnext.models.download import download
from qnext.models.fetch import Patience
from qnext.models.held import Place, find_places
from qnext.models.published import QuantFile, RepoFile
from tests.hub_server import Asked, HubServer, Reply, hub_environment

REPO = "user/repo-GGUF"
QUICK = Patience(attempts=4, first_wait_s=0.01, longest_wait_s=0.05, asked_s=30, idle_s=0.4)
DEAD = "http://127.0.0.1:9/nobody"

Alter = Callable[[Asked, Reply, HubServer], None]


@dataclass(frozen=True)
class Fault:
    """`alter` changes the answer to the request of `number` (counted per address) as long as it is below
    `times`. `at` is whose answers: of the Hub's `resolve` or of the CDN. `prepare` leaves something in the
    cache before."""

    name: str
    ends: Literal["verified", "error"]
    alter: Alter | None = None
    at: Literal["hub", "cdn"] = "cdn"
    times: int = 1 << 30
    prepare: Callable[[Place, bytes], None] | None = None
    says: str = ""


@dataclass
class Outcome:
    """`first` and `second` are "verified" or an error's message. `corrupt` names files with a final name and
    other contents, after either. `sent` are bytes of bodies in the first and second download."""

    fault: str
    ends: str
    first: str
    second: str
    corrupt: list[str]
    seconds: float
    sent: tuple[int, int] = (0, 0)

    @property
    def holds(self) -> bool:
        """Whether the rule was kept."""
        as_expected = (self.first == "verified") == (self.ends == "verified")
        return as_expected and self.second == "verified" and not self.corrupt


class FaultyHub(HubServer):
    """Applies `fault` to GETs of model files; None serves well."""

    fault: Fault | None = None
    _seen: dict[tuple[str, str], int]

    def reply(self, asked: Asked) -> Reply:
        reply = super().reply(asked)
        fault = self.fault
        if fault is None or fault.alter is None or asked.method != "GET" or asked.at != fault.at:
            return reply
        if (asked.at == "hub" and "/resolve/" not in asked.path) or asked.number >= fault.times:
            return reply
        fault.alter(asked, reply, self)
        return reply


def serve_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyHub]:
    """The body of a fixture: a server that this process and its children use as the Hub, without a token."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with FaultyHub(tmp_path / "hub") as server:
        for name, value in hub_environment(server.endpoint, tmp_path / "hf").items():
            monkeypatch.setenv(name, value)
        yield server


def random_bytes(size: int, seed: int) -> bytes:
    """Contents of a made-up model file."""
    return b"GGUF" + random.Random(seed).randbytes(size - 4)


def make_quant(hub: HubServer, sizes: list[int]) -> tuple[QuantFile, dict[str, bytes]]:
    """A repository of so many shards, as the listing names it, and the contents."""
    shards = len(sizes)
    names = [f"Q4/model-Q4-{i + 1:05}-of-{shards:05}.gguf" for i in range(shards)]
    contents = {
        name: random_bytes(size, seed) for seed, (name, size) in enumerate(zip(names, sizes, strict=True))
    }
    repo = hub.add_repo(REPO, contents)
    files = tuple(RepoFile(n, len(b), hashlib.sha256(b).hexdigest()) for n, b in contents.items())
    return QuantFile(REPO, repo.head, "Q4", files), contents


def run_fault(fault: Fault, folder: Path, sizes: list[int], patience: Patience = QUICK) -> Outcome:
    """Download through the fault, then without it. HF_ENDPOINT is changed for the time of the call."""
    with FaultyHub(folder / "server") as hub:
        before = os.environ.get("HF_ENDPOINT")
        os.environ["HF_ENDPOINT"] = hub.endpoint
        try:
            quant, contents = make_quant(hub, sizes)
            cache = folder / "cache"
            places = find_places(quant, cache)
            if fault.prepare is not None:
                places[0].part.parent.mkdir(parents=True, exist_ok=True)
                fault.prepare(places[0], contents[places[0].file.path])
            hub.fault = fault
            began = time.monotonic()
            first = try_download(quant, cache, patience)
            sent = hub.sent()
            corrupt = corrupt_files(cache)
            hub.fault = None
            second = try_download(quant, cache, patience)
            seconds = time.monotonic() - began
            corrupt += corrupt_files(cache)
            for place in places:
                if second == "verified" and place.path.read_bytes() != contents[place.file.path]:
                    corrupt.append(place.file.path)
        finally:
            if before is None:
                del os.environ["HF_ENDPOINT"]
            else:
                os.environ["HF_ENDPOINT"] = before
        return Outcome(fault.name, fault.ends, first, second, corrupt, seconds, (sent, hub.sent() - sent))


def try_download(quant: QuantFile, cache: Path, patience: Patience = QUICK) -> str:
    """ "verified", or the message of the error that qnext would show."""
    try:
        download(quant, cache, patience=patience)
    except QnextError as error:
        assert error.message and error.hint
        return f"{error.message} / {error.hint}"
    return "verified"


_DOWNLOAD = """
import json, sys
from pathlib import Path
from qnext.models.download import download
from qnext.models.published import QuantFile, RepoFile
quant = json.loads(sys.argv[1])
files = tuple(RepoFile(**file) for file in quant.pop("files"))
download(QuantFile(**quant, files=files), Path(sys.argv[2]))
"""


def start_download(quant: QuantFile, cache: Path) -> subprocess.Popen[bytes]:
    """A download in a process of its own, which follows the environment."""
    return subprocess.Popen([sys.executable, "-c", _DOWNLOAD, json.dumps(asdict(quant)), str(cache)])


def kill_at(child: subprocess.Popen[bytes], place: Place, bytes_here: int) -> int:
    """SIGKILL once so many bytes are on the disk; returns how many are."""
    deadline = time.monotonic() + 30
    while place.bytes_here() < bytes_here and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.kill()
    child.wait()
    return place.bytes_here()


def mount_small_disk(place: Path, megabytes: int) -> bool:
    """A filesystem of that size on `place`; False where that is not allowed. `unmount` takes it away."""
    place.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    return sys.platform == "linux" and subprocess.run(mount, capture_output=True).returncode == 0


def unmount(place: Path) -> None:
    subprocess.run(["umount", "-l", str(place)], check=True)


def corrupt_files(cache: Path) -> list[str]:
    """Blobs under a final name, and files of snapshots, whose contents are not what their digest says."""
    bad = []
    for blob in cache.glob("models--*/blobs/*"):
        if len(blob.name) == 64 and hashlib.sha256(blob.read_bytes()).hexdigest() != blob.name:
            bad.append(str(blob))
    for link in cache.glob("models--*/snapshots/*/**/*.gguf"):
        if hashlib.sha256(link.read_bytes()).hexdigest() != link.resolve().name:
            bad.append(str(link))
    return bad


def all_faults(size: int) -> Iterator[Fault]:
    """Every fault of the server that a file of `size` bytes may meet."""
    yield Fault("none", "verified")
    for tenth in range(1, 10):
        yield Fault(f"cut at {tenth}/10", "verified", cut(size * tenth // 10), times=1)
    yield Fault("cut after every tenth", "verified", cut(size // 10), times=9)
    yield Fault("cut at once, always", "error", cut(0))
    yield Fault("cut before the headers, twice", "verified", _hang_up, at="hub", times=2)
    yield Fault("cut before the headers, always", "error", _hang_up, at="hub")
    yield Fault("truncated body, once", "verified", _shorter_body, times=1)
    yield Fault("truncated body, always", "error", cut(1000))
    yield Fault("truncated, no length stated, once", "verified", _chunked_half, times=1)
    yield Fault("wrong bytes, always", "error", _wrong_bytes, says="SHA-256")
    yield Fault("wrong bytes, once", "error", _wrong_bytes, times=1, says="SHA-256")
    yield Fault("one bit wrong", "error", _one_bit, times=1, says="SHA-256")
    yield Fault("other bytes after a cut", "error", _cut_then_wrong, says="SHA-256")
    yield Fault("longer than listed", "error", _other_length(+1000), says="lists")
    yield Fault("shorter than listed", "error", _other_length(-1000), says="lists")
    yield Fault("longer than listed, says the Hub", "error", _linked_size, at="hub", says="lists")
    yield Fault("a login page", "error", _page, says="login page")
    yield Fault("compressed", "error", _gzip, says="compressed")
    yield Fault("another range, once", "verified", _other_range, times=1)
    yield Fault("another range, always", "error", _other_range)
    yield Fault("ranges ignored", "verified", _whole)
    yield Fault("ranges ignored and cut on the way", "verified", _whole_cut, times=3)
    yield Fault("digest changed on the server", "error", _linked_etag, at="hub", says="changed")
    for status in (401, 403, 404, 410):
        yield Fault(f"{status} of the Hub", "error", answer(status), at="hub")
    yield Fault("gated", "error", answer(403, "GatedRepo"), at="hub", says="gated")
    yield Fault("404 of the CDN", "error", answer(404))
    yield Fault("link expired, once", "verified", answer(403), times=1)
    yield Fault("link expired, always", "error", answer(403))
    yield Fault("416, once", "verified", answer(416), times=1)
    yield Fault("416, always", "error", answer(416))
    yield Fault("429 with Retry-After, twice", "verified", answer(429, retry="1"), at="hub", times=2)
    yield Fault("429 with a rate limit, once", "verified", _rate_limit, at="hub", times=1)
    yield Fault("429, always", "error", answer(429, retry="0"), at="hub")
    yield Fault("429 for an hour", "error", answer(429, retry="3600"), at="hub", says="60 minutes")
    for status in (500, 502, 503, 504):
        yield Fault(f"{status}, three times", "verified", answer(status), times=3)
        yield Fault(f"{status} of the Hub, always", "error", answer(status), at="hub")
    yield Fault("redirect loop", "error", _loop, at="hub", says="circles")
    yield Fault("redirect to nowhere", "error", _no_location, at="hub")
    yield Fault("redirect to a dead host, once", "verified", redirect(DEAD), at="hub", times=1)
    yield Fault("redirect to a dead host, always", "error", redirect(DEAD), at="hub")
    yield Fault("redirect to another scheme", "error", redirect("ftp://127.0.0.1/file"), at="hub")
    yield Fault("a byte at a time, once", "verified", _drip, times=1)
    yield Fault("a byte at a time, always", "error", _drip)
    yield Fault("silent, once", "verified", _silent, times=1)
    yield Fault("silent after a third, always", "verified", _stall(size // 3))
    yield Fault("204", "error", answer(204))
    yield Fault("part of an earlier run, good", "verified", prepare=_leave(lambda b: b[: len(b) // 2]))
    yield Fault("part of an earlier run, wrong", "verified", prepare=_leave(lambda b: bytes(len(b) // 2)))
    yield Fault("part as long as the file, wrong", "verified", prepare=_leave(lambda b: bytes(len(b))))
    yield Fault("part as long as the file, good", "verified", prepare=_leave(lambda b: b))
    yield Fault("part longer than the file", "verified", prepare=_leave(lambda b: b + b"more"))
    yield Fault(
        "part with a bit wrong, connection cut, ranges ignored",
        "verified",
        _whole_cut,
        times=2,
        prepare=_leave(lambda b: b[:100] + bytes([b[100] ^ 1]) + b[101 : len(b) // 2]),
    )


def cut(after: int) -> Alter:
    """Close the connection after so many bytes of the body."""

    def alter(asked: Asked, reply: Reply, hub: HubServer) -> None:
        reply.cut_after = after

    return alter


def slow(bytes_per_s: float) -> Alter:
    """No faster than this."""

    def alter(asked: Asked, reply: Reply, hub: HubServer) -> None:
        reply.bytes_per_s = bytes_per_s

    return alter


def fill_disk(disk: Path, left: int) -> Alter:
    """Another program fills the disk but for so many bytes, into `disk/filler`, while the body is sent."""

    def alter(asked: Asked, reply: Reply, hub: HubServer) -> None:
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - left))

    return alter


def answer(status: int, code: str = "", retry: str = "") -> Alter:
    """Only this status, with the Hub's error code or a Retry-After."""

    def alter(asked: Asked, reply: Reply, hub: HubServer) -> None:
        reply.status, reply.body, reply.file, reply.length = status, b"", None, None
        reply.headers = {"X-Error-Code": code} if code else {}
        if retry:
            reply.headers["Retry-After"] = retry

    return alter


def redirect(target: str) -> Alter:
    """To another address."""

    def alter(asked: Asked, reply: Reply, hub: HubServer) -> None:
        reply.status, reply.headers = 302, {**reply.headers, "Location": target}

    return alter


def _body(reply: Reply) -> bytes:
    assert reply.file is not None and reply.length is not None
    return reply.file.read_bytes()[reply.start : reply.start + reply.length]


def _become(reply: Reply, body: bytes, **headers: str) -> None:
    """Send `body`; its length is what is stated."""
    reply.body, reply.file, reply.length = body, None, None
    reply.headers = {**reply.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}


def _shorter_body(asked: Asked, reply: Reply, hub: HubServer) -> None:
    assert reply.length is not None
    length = reply.length
    _become(reply, _body(reply)[: length // 2])
    reply.headers["Content-Length"] = str(length)
    reply.cut_after = length


def _chunked_half(asked: Asked, reply: Reply, hub: HubServer) -> None:
    half = _body(reply)[: (reply.length or 0) // 2]
    _become(reply, b"%x\r\n%s\r\n0\r\n\r\n" % (len(half), half), Transfer_Encoding="chunked")


def _wrong_bytes(asked: Asked, reply: Reply, hub: HubServer) -> None:
    _become(reply, _body(reply).translate(bytes(range(255, -1, -1))))


def _one_bit(asked: Asked, reply: Reply, hub: HubServer) -> None:
    body = bytearray(_body(reply))
    body[len(body) // 2] ^= 1
    _become(reply, bytes(body))


def _cut_then_wrong(asked: Asked, reply: Reply, hub: HubServer) -> None:
    """The file is replaced on the server between two attempts."""
    if asked.number == 0:
        reply.cut_after = (reply.length or 0) // 2
    else:
        _wrong_bytes(asked, reply, hub)


def _other_length(by: int) -> Alter:
    def alter(asked: Asked, reply: Reply, hub: HubServer) -> None:
        start, total = reply.start, reply.start + (reply.length or 0) + by
        body = (_body(reply) + bytes(1000))[: total - start]
        _become(reply, body, Content_Range=f"bytes {start}-{total - 1}/{total}")

    return alter


def _linked_size(asked: Asked, reply: Reply, hub: HubServer) -> None:
    reply.headers["X-Linked-Size"] = str(int(reply.headers["X-Linked-Size"]) + 1)


def _linked_etag(asked: Asked, reply: Reply, hub: HubServer) -> None:
    reply.headers["X-Linked-Etag"] = f'"{"0" * 64}"'


def _page(asked: Asked, reply: Reply, hub: HubServer) -> None:
    reply.status = 200
    _become(reply, b"<html>Please sign in</html>", Content_Type="text/html")


def _gzip(asked: Asked, reply: Reply, hub: HubServer) -> None:
    _become(reply, gzip.compress(_body(reply), 1), Content_Encoding="gzip")


def _other_range(asked: Asked, reply: Reply, hub: HubServer) -> None:
    end = reply.start + (reply.length or 0)
    reply.start += 1
    reply.length = end - reply.start
    reply.headers["Content-Range"] = f"bytes {reply.start}-{end - 1}/{end}"


def _whole(asked: Asked, reply: Reply, hub: HubServer) -> None:
    assert reply.file is not None
    size = reply.file.stat().st_size
    if asked.number == 0:
        reply.cut_after = size // 2
    reply.status, reply.start, reply.length = 200, 0, size
    reply.headers.pop("Content-Range", None)


def _whole_cut(asked: Asked, reply: Reply, hub: HubServer) -> None:
    _whole(asked, reply, hub)
    reply.cut_after = (reply.length or 0) * (asked.number + 1) // 5


def _rate_limit(asked: Asked, reply: Reply, hub: HubServer) -> None:
    answer(429)(asked, reply, hub)
    reply.headers = {"ratelimit": '"resolvers";r=0;t=1'}


def _loop(asked: Asked, reply: Reply, hub: HubServer) -> None:
    reply.headers["Location"] = hub.endpoint + asked.path


def _no_location(asked: Asked, reply: Reply, hub: HubServer) -> None:
    reply.headers.pop("Location", None)


def _hang_up(asked: Asked, reply: Reply, hub: HubServer) -> None:
    raise ConnectionResetError("the server hangs up instead of answering")


def _drip(asked: Asked, reply: Reply, hub: HubServer) -> None:
    reply.bytes_per_s = 20.0


def _silent(asked: Asked, reply: Reply, hub: HubServer) -> None:
    time.sleep(3 * (QUICK.idle_s or 0))


def _stall(after: int) -> Alter:
    """The body stops after so many bytes and the connection stays open: a slow rest."""

    def alter(asked: Asked, reply: Reply, hub: HubServer) -> None:
        body = _body(reply)
        if len(body) > after:
            # The rest is announced and never comes: a body shorter than its length, on an open connection.
            reply.headers["Content-Length"] = str(len(body))
            reply.body, reply.file, reply.length = body[:after], None, None

    return alter


def _leave(make: Callable[[bytes], bytes]) -> Callable[[Place, bytes], None]:
    def prepare(place: Place, contents: bytes) -> None:
        place.part.write_bytes(make(contents))

    return prepare
