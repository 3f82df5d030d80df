"""The child lives exactly as long as it is wanted: it ends with its parent, and so does an RPC worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.engine

_PARENT = """
import sys
from qnext.engine.rpc import RpcWorker
from qnext.engine.session import EngineSession
from qnext.plan.values import Placement
worker = RpcWorker()
session = EngineSession()
placement = Placement(threads=1, threads_batch=1, context=32768)
session.open(sys.argv[1], placement)
answer = session.generate("why?", max_tokens=30000, sampling={}, ignore_eos=True)
next(answer)
print(session.pid, worker.pid, flush=True)
if sys.argv[2] == "generating":
    for _ in answer:
        pass
sys.stdin.read()
"""


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("state", ["generating", "idle"])
def test_engine_and_rpc_worker_end_with_a_parent_that_is_killed(state: str, demo_model: Path) -> None:
    command = [sys.executable, "-c", _PARENT, str(demo_model), state]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(children) == 2 and all(is_running(pid) for pid in children)
        os.kill(parent.pid, signal.SIGKILL)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and any(is_running(pid) for pid in children):
            time.sleep(0.02)
        alive = [pid for pid in children if is_running(pid)]
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
    assert not alive
