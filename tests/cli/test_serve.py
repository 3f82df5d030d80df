"""`qnext serve` as a process: it answers while it loads, survives its engine, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from qnext.config import find_paths
from qnext.engine.fit import find_fit_program
from qnext.engine.rpc import free_port
from qnext.errors import EngineError, UsageError
from qnext.models.synth import DEMO_SENTENCE
from qnext.serve.port import bind
from tests.conftest import Qnext
from tests.unit.test_export import read_systemd

pytestmark = pytest.mark.engine

WAIT_S = 30.0
CHAT = {"messages": [{"role": "user", "content": "What can you do?"}], "temperature": 0}
COMPLETION = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "temperature": 0, "stream": True}

Answer = tuple[int, dict[str, str], str]


class Served:
    """One running command and what it says; `port` answers as soon as it listens."""

    def __init__(self, *words: str, port: int, env: dict[str, str] | None = None) -> None:
        self.port = port
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (a pipe that nobody reads fills up)
        self.process = subprocess.Popen(
            [*words, "--port", str(port)],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **(env or {})},
        )

    def ask(self, path: str, body: object = None, key: str | None = None) -> Answer:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        if key is not None:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as reply:
                return reply.status, dict(reply.headers), reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers), error.read().decode()

    def stream(self, body: object) -> Any:
        """A completion under way, as a file."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/completions")
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
        return urllib.request.urlopen(request, timeout=WAIT_S)

    def until_ok(self) -> list[dict[str, Any]]:
        """Every answer of /health until it is ok."""
        told: list[dict[str, Any]] = []
        deadline = time.monotonic() + WAIT_S
        while not told or told[-1]["status"] != "ok":
            assert time.monotonic() < deadline and self.process.poll() is None, (told[-1:], self.end())
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                status, headers, text = self.ask("/health")
                told.append(json.loads(text))
                assert (status == 200) is (told[-1]["status"] == "ok")
                assert headers["server"] == "qnext"
            time.sleep(0.01)
        return told

    def ready(self) -> dict[str, Any]:
        """The line of JSON that says it is ready."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.end()
        found: dict[str, Any] = json.loads(line)
        return found

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal, wait; the exit status and standard error."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.communicate(timeout=WAIT_S)
        self._errors.seek(0)
        return self.process.returncode, self._errors.read()


Serve = Callable[..., Served]


@pytest.fixture
def serve(demo_model: object) -> Iterator[Serve]:
    """Starts servers: `serve("-np", "2", env={…})`, or `serve(words=[…])` for a whole command."""
    started: list[Served] = []

    def start(*flags: str, words: list[str] | None = None, env: dict[str, str] | None = None) -> Served:
        command = words or [
            sys.executable,
            "-m",
            "qnext",
            "serve",
            "demo",
            "-c",
            "2048",
            "-np",
            "2",
            "--json",
        ]
        started.append(Served(*command, *flags, port=free_port(), env=env))
        return started[-1]

    yield start
    for one in started:
        one.end(signal.SIGKILL)


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_a_unit_starts_it_and_it_answers_health_while_loading_then_chats_and_ends_on_sigterm(
    qnext: Qnext, serve: Serve
) -> None:
    unit = qnext("plan", "demo", "-c", "2048", "-np", "2", "--format", "systemd").stdout
    assert "KillMode=mixed" in unit and "llama-server" not in unit
    words = read_systemd(unit)
    server = serve("--json", words=words)
    told = server.until_ok()
    assert told[0]["status"] == "loading" and told[0]["error"]["message"]
    ready = server.ready()
    assert ready["url"] == f"http://127.0.0.1:{server.port}" and ready["pid"] == server.process.pid
    assert (ready["slots"], ready["context"]) == (2, 1024)
    status, _, text = server.ask("/v1/chat/completions", CHAT)
    assert status == 200 and json.loads(text)["choices"][0]["message"]["content"] == DEMO_SENTENCE

    taken = qnext("serve", "demo", "--port", str(server.port))
    assert taken.returncode == 2 and "another qnext serve" in taken.stderr

    children = server.children()
    assert children
    status, err = server.end(signal.SIGTERM)
    assert status == 0, err
    assert gone(children)
    assert f"serving {ready['model']} on {ready['url']}/v1" in err and "Ctrl-C" in err


def test_a_killed_engine_is_explained_with_503_and_comes_back_and_ctrl_c_lets_answers_end(
    serve: Serve,
) -> None:
    server = serve("-v", "--grace", "60")
    server.ready()
    (engine,) = server.children()
    engine.kill()
    while (answer := server.ask("/health"))[0] == 200:  # until the death is known
        time.sleep(0.005)
    lost = json.loads(answer[2])
    assert (answer[0], lost["status"]) == (503, "restarting") and "SIGKILL" in lost["why"]
    status, headers, text = server.ask("/v1/completions", COMPLETION)
    assert status == 503 and "SIGKILL" in text and int(headers["retry-after"]) >= 1
    server.until_ok()

    with server.stream(COMPLETION) as long, server.stream({**COMPLETION, "max_tokens": 60}) as short:
        assert long.readline() and short.readline()
        children = server.children()
        server.process.send_signal(signal.SIGINT)
        assert short.read().decode().rstrip().endswith("data: [DONE]")
        server.process.send_signal(signal.SIGINT)
        assert "the server was stopped" in long.read().decode()
    status, err = server.end()
    assert status == 130 and gone(children), err
    assert "starting it again" in err
    assert "length, prompt" in err and "What can you do" not in err, "-v tells counts and no text"


def test_a_killed_server_takes_its_engine_along(serve: Serve) -> None:
    """The server of this test is public, with a key."""
    server = serve(
        "--host", "0.0.0.0", "--api-key-env", "OTHER_KEY", env={"QNEXT_API_KEY": "a", "OTHER_KEY": "b"}
    )
    server.ready()
    assert server.ask("/v1/models")[0] == 401 and server.ask("/v1/models", key="c")[0] == 401
    assert server.ask("/v1/models", key="a")[0] == server.ask("/v1/models", key="b")[0] == 200
    children = server.children()
    server.process.kill()
    server.process.wait()
    assert children and gone(children)


def test_nobody_without_a_key_is_let_in_from_outside(qnext: Qnext) -> None:
    ran = qnext("serve", "demo", "--host", "0.0.0.0", "--port", "0")
    assert ran.returncode == 2 and "no key" in ran.stderr and "QNEXT_API_KEY" in ran.stderr
    empty = qnext("serve", "demo", "--port", "0", env={"QNEXT_API_KEY": " "})
    assert empty.returncode == 2 and "QNEXT_API_KEY" in empty.stderr


def test_a_foreign_server_on_the_port_is_told_from_a_qnext() -> None:
    class Foreign(http.server.BaseHTTPRequestHandler):
        server_version, sys_version = "Fancy/1", ""

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Foreign) as foreign:
        threading.Thread(target=foreign.serve_forever, daemon=True).start()
        with pytest.raises(UsageError, match="another program, which calls itself Fancy/1"):
            bind("127.0.0.1", foreign.server_port, has_key=False)
        foreign.shutdown()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        threading.Thread(target=lambda: silent.accept()[0].close(), daemon=True).start()
        with pytest.raises(UsageError, match="another program and that is not qnext"):
            bind("127.0.0.1", silent.getsockname()[1], has_key=False)


@pytest.mark.parametrize("host", ["nowhere.invalid", "192.0.2.1", ""])
def test_an_address_that_cannot_be_listened_on_is_a_usage_error(host: str) -> None:
    with pytest.raises(UsageError):
        bind(host, 0, has_key=host != "").close()


def test_a_model_that_does_not_fit_ends_it_as_it_ends_a_run(qnext: Qnext) -> None:
    ran = qnext("serve", "demo", "--ram", "1M", "--port", "0")
    assert ran.returncode == 4 and "does not fit" in ran.stderr


def test_llama_server_serves_behind_the_same_command_and_goes_with_it(serve: Serve) -> None:
    try:
        found = find_fit_program(find_paths({}).cache_dir).with_name("llama-server")
    except EngineError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    if not found.is_file():
        pytest.skip(f"there is no {found}: run scripts/peers")
    flags = ("--engine", "llama-server", "--llama-server", str(found))
    server = serve(*flags, env={"QNEXT_API_KEY": "sesame", "LLAMA_ARG_PORT": "1"})
    ready = server.ready()
    assert (ready["engine"], ready["slots"], ready["context"]) == ("llama-server", 2, 1024)
    (child,) = server.children()
    assert "sesame" not in " ".join(child.cmdline())
    assert server.ask("/v1/chat/completions", CHAT)[0] == 401
    status, _, text = server.ask("/v1/chat/completions", CHAT, key="sesame")
    said = json.loads(text)
    assert status == 200 and said["choices"][0]["message"]["content"] == DEMO_SENTENCE
    assert said["model"] == ready["model"]
    server.process.kill()
    server.process.wait()
    assert gone([child])


def test_there_is_no_engine_of_another_name(qnext: Qnext) -> None:
    ran = qnext("serve", "demo", "--engine", "vllm", "--port", "0")
    assert ran.returncode == 2 and "llama-server" in ran.stderr
    ran = qnext("serve", "demo", "--engine", "llama-server", "--port", "0", env={"PATH": ""})
    assert ran.returncode == 7 and "--llama-server PATH" in ran.stderr
