"""How an engine ended, told from its exit status and its last log lines."""

from __future__ import annotations

import signal

import pytest

from qnext.engine.crash import TAIL_LINES, explain_exit, interesting_tail

LOST = "ggml-rpc.cpp:569: Remote RPC server crashed or returned malformed response"
UNREACHABLE = "ggml-rpc.cpp:547: Failed to connect to 10.0.0.7:50052"


@pytest.mark.parametrize(
    ("status", "log", "amx", "kind", "words", "hint"),
    [
        (-signal.SIGSEGV, [], True, "amx", "AMX buffers (SIGSEGV)", "--repack experts"),
        (-signal.SIGSEGV, [], False, "crash", "crashed (SIGSEGV)", "--repack off"),
        (-signal.SIGFPE, [], False, "crash", "crashed (SIGFPE)", "--repack off"),
        (-signal.SIGBUS, [], False, "crash", "SIGBUS", "--load-mode none"),
        (-signal.SIGABRT, ["GGML_ASSERT(x) failed"], False, "abort", "failed check", "-ot"),
        (-signal.SIGABRT, [LOST], False, "rpc_lost", "RPC worker went away", "qnext worker"),
        (-signal.SIGABRT, [UNREACHABLE], False, "rpc_lost", "cannot be reached", "qnext worker"),
        (-signal.SIGILL, [], True, "illegal", "does not have (SIGILL)", "QNEXT_REBUILD_ENGINE"),
        (-signal.SIGKILL, [LOST], False, "killed", "killed from outside", "--ctx-size"),
        (-signal.SIGTERM, [], True, "killed", "from outside (SIGTERM)", "Repeat"),
        (3, ["ImportError: no module"], False, "exit", "by itself with status 3", "-v"),
    ],
)
def test_each_way_of_ending_has_its_words(
    status: int, log: list[str], amx: bool, kind: str, words: str, hint: str
) -> None:
    error = explain_exit(status, log, doing="generating", amx_in_use=amx)
    assert error.kind == kind
    assert words in error.message and error.message.endswith(" while generating")
    assert hint in error.hint
    assert error.exit_code == 7


def test_a_signal_without_a_name_is_a_crash_with_its_number() -> None:
    assert "signal 99" in explain_exit(-99, [], doing="loading the model").message


def test_a_hang_is_told_from_a_kill() -> None:
    error = explain_exit(-signal.SIGKILL, [], doing="generating", killed_for_hang=1.5)
    assert error.kind == "hang" and "no sign of life for 1.5 s while generating" in error.message
    assert "QNEXT_ENGINE_TIMEOUT" in error.hint


def test_an_old_rpc_message_does_not_explain_a_later_abort() -> None:
    log = [LOST, *(f"line {number}" for number in range(100)), "GGML_ASSERT(ok) failed"]
    assert explain_exit(-signal.SIGABRT, log, doing="generating").kind == "abort"


def test_the_tail_is_the_last_lines_after_what_spoke_of_a_failure() -> None:
    plain = [f"line {number}" for number in range(20)]
    assert interesting_tail([]) == []
    assert interesting_tail(plain) == plain[-TAIL_LINES:]
    tail = interesting_tail(["error: cannot open x", *plain, "", "  "])
    assert tail == ["error: cannot open x", *plain[-TAIL_LINES:]]
    assert interesting_tail(["error: long ago", *plain * 10]) == plain[-TAIL_LINES:]
