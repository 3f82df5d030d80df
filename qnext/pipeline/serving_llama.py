"""A llama-server as a child that serves in our place: started with the planned flags, and again when it dies.

It reads no pipe of ours that would tell it of our end, so on Linux the kernel is asked to end it with us.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import psutil

from qnext.engine.child import child_environment, dying_with
from qnext.engine.child_log import ChildLog
from qnext.engine.crash import EngineCrashError, explain_exit
from qnext.errors import EngineError, UsageError
from qnext.pipeline.serving_restarts import GIVEN_UP, Restarts
from qnext.pipeline.surroundings import Notice
from qnext.plan.plan import Plan

_LOOK_S = 0.1
_ASK_LIMIT_S = 2.0
_KEY_VARIABLE = "LLAMA_API_KEY"


class LlamaServer:
    """One llama-server on `host` and `port`, which calls its model `name`. `close` ends the child.

    `keys` reach it through its environment. Raises UsageError for a key that it cannot take.
    """

    def __init__(
        self,
        program: str,
        plan: Plan,
        *,
        name: str,
        host: str,
        port: int,
        keys: Sequence[str],
        notice: Notice,
    ) -> None:
        if any(mark in key for key in keys for mark in ',"'):
            raise UsageError(
                "llama-server takes no key with a comma or a quotation mark", hint="Use another key."
            )
        self._argv = [
            program,
            *plan.argv[1:],
            "--alias",
            name.replace(",", "-"),
            "--host",
            host,
            "--port",
            str(port),
        ]
        self._environment = child_environment()
        self._environment.pop(_KEY_VARIABLE, None)
        if keys:
            self._environment[_KEY_VARIABLE] = ",".join(keys)
        self._host, self._port, self._notice = host, port, notice
        self._process: subprocess.Popen[bytes] | None = None
        self._log = ChildLog()
        self._reader: threading.Thread | None = None
        self._stopping = threading.Event()

    def keep_running(self, on_ready: Callable[[], None]) -> None:
        """Serve until `stop`; `on_ready` is called when it answers for the first time.

        Raises EngineCrashError when it ends before that, EngineError when it has died too often.
        """
        restarts, ready = Restarts(), False
        while not self._stopping.is_set():
            self._start()
            try:
                if self._await_ready():
                    (self._notice_back if ready else on_ready)()
                    ready = True
                self._await_end()
            except EngineCrashError as error:
                wait_s = restarts.after_death() if ready else None
                if wait_s is None:
                    why = f"{error.message}; {GIVEN_UP}" if ready else error.message
                    raise EngineError(why, hint=error.hint) from error
                self._notice(f"{error.message}; starting it again in {wait_s:g} s")
                self._stopping.wait(wait_s)

    @property
    def pid(self) -> int | None:
        """Process id of the child that runs now."""
        return None if self._process is None else self._process.pid

    def stop(self) -> None:
        """Ask the child to end, and have no other. May be called by a signal handler."""
        self._stopping.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def close(self, grace_s: float) -> None:
        """End the child, at once when `grace_s` have passed."""
        self.stop()
        if self._process is not None:
            try:
                self._process.wait(timeout=grace_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._finish_log()

    def _start(self) -> None:
        self._finish_log()
        self._log = ChildLog()
        try:
            self._process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
                preexec_fn=dying_with(os.getpid()),
            )
        except OSError as error:
            raise EngineError(
                f"{Path(self._argv[0]).name} cannot be started: {error.strerror}",
                hint="Look at its path, or serve with --engine python.",
            ) from error
        stream = cast(BinaryIO, self._process.stdout)
        self._reader = threading.Thread(target=self._log.read, args=(stream,), daemon=True)
        self._reader.start()

    def _await_ready(self) -> bool:
        """Whether it answers before it ends. An answer counts when the port is the child's own."""
        assert self._process is not None
        while self._process.poll() is None:
            if self._answers() and self._owns_port(self._process.pid):
                return True
            self._stopping.wait(_LOOK_S)
        return False

    def _await_end(self) -> None:
        """Wait for the child's end. Raises EngineCrashError when nobody has asked for it."""
        assert self._process is not None
        status = self._process.wait()
        self._finish_log()
        if not self._stopping.is_set():
            raise explain_exit(status, self._log.lines, doing="serving", amx_in_use=self._log.amx_in_use)

    def _answers(self) -> bool:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        connection = http.client.HTTPConnection(host, self._port, timeout=_ASK_LIMIT_S)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _owns_port(self, pid: int) -> bool:
        with contextlib.suppress(psutil.Error):
            return any(
                one.status == psutil.CONN_LISTEN and one.laddr.port == self._port
                for one in psutil.Process(pid).net_connections("inet")
            )
        return False

    def _notice_back(self) -> None:
        self._notice("llama-server is back")

    def _finish_log(self) -> None:
        if self._reader is not None:
            self._reader.join(timeout=2)
            if not self._reader.is_alive() and self._process is not None and self._process.stdout is not None:
                self._process.stdout.close()
            self._reader = None
