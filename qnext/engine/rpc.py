"""RPC workers as processes of ours: a second device without a second card.

llama.cpp's RPC backend shows a worker as a device of type GPU, so a worker on loopback lets placement,
budgets and overrides be run and tested on a machine that has no GPU.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from typing import Self

from qnext.engine.session import child_environment
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
        self.host, self.port = host, port or free_port()
        if _is_listening(host, self.port):
            raise UsageError(
                f"something else already listens on {host}:{self.port}", hint="Choose another --port."
            )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qnext.engine.llama.rpc_worker", host, str(self.port), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=child_environment(),
            start_new_session=True,
        )
        self._await_listening()

    @property
    def endpoint(self) -> str:
        """`host:port` as the engine wants it."""
        return f"{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    def wait(self) -> int:
        """Block until the worker ends; returns its exit status."""
        return self._process.wait()

    def kill(self) -> None:
        """End the worker at once."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _await_listening(self) -> None:
        deadline = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise EngineError(
                    f"the RPC worker ended at once with status {self._process.returncode}",
                    hint="The engine may lack RPC: QNEXT_REBUILD_ENGINE=1 ./scripts/qnext --version",
                )
            if _is_listening(self.host, self.port):
                return
            time.sleep(0.02)
        self.kill()
        raise EngineError("the RPC worker did not start listening", hint="Try another --port.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _is_listening(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host, port)) == 0
