"""RPC workers as processes of ours: a second device without a second card.

llama.cpp's RPC backend shows a worker as a device of type GPU, so a worker on loopback lets placement,
budgets and overrides be run and tested on a machine that has no GPU.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from typing import Self

from qnext.engine.child import child_environment
from qnext.errors import EngineError, UsageError

LOOPBACK = "127.0.0.1"
_START_LIMIT_S = 20.0


def free_port() -> int:
    """A TCP port on loopback that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


class RpcWorker:
    """A running worker. Use as a context manager, or `wait` for it in the foreground.

    Binds loopback unless `allow_network`: whoever reaches the port can run anything the engine can.
    """

    def __init__(
        self, *, host: str = LOOPBACK, port: int = 0, threads: int = 1, allow_network: bool = False
    ) -> None:
        if not allow_network and host not in (LOOPBACK, "localhost"):
            raise UsageError(
                f"a worker on {host} is open to everyone who can reach it: the protocol has no password",
                hint="Bind 127.0.0.1 and tunnel with ssh, or add --allow-network on a network you trust.",
            )
        self.host = LOOPBACK if host == "localhost" else host  # the engine wants digits
        self.port = port or free_port()
        if _is_listening(self.host, self.port):
            raise UsageError(
                f"something else already listens on {self.endpoint}", hint="Choose another --port."
            )
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the worker)
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "qnext.engine.llama.rpc_worker",
                self.host,
                str(self.port),
                str(threads),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=child_environment(),
            start_new_session=True,
        )
        try:
            self._await_listening()
        except BaseException:
            self.kill()
            raise

    @property
    def endpoint(self) -> str:
        """`host:port` as the engine wants it."""
        return f"{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    def wait(self) -> None:
        """Block until the worker ends, which it never does by itself: raises EngineError then."""
        status = self._process.wait()
        raise EngineError(
            f"the RPC worker ended with status {status}{self._last_words()}",
            hint="Start it again; if it ends again, look for lack of memory with `dmesg | tail`.",
        )

    def kill(self) -> None:
        """End the worker at once."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._errors.close()

    def _await_listening(self) -> None:
        deadline = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise EngineError(
                    f"the RPC worker on {self.endpoint} ended at once{self._last_words()}",
                    hint="Use an address of this machine and a free --port; an engine without RPC needs"
                    " QNEXT_REBUILD_ENGINE=1 ./scripts/qnext --version",
                )
            if _is_listening(self.host, self.port):
                return
            time.sleep(0.02)
        raise EngineError("the RPC worker did not start listening", hint="Try another --port.")

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return f": {said[-1]}" if said else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _is_listening(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        try:
            return probe.connect_ex((host, port)) == 0
        except OSError:  # a host name that nothing resolves
            return False
