"""The trip of `qnext run`: a running model, a conversation with it, and the record of how fast it went."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Self

from qnext.bench.names import Scenario
from qnext.config import Paths
from qnext.errors import QnextError, StoreError
from qnext.models.chat import chat_template, sampling_defaults
from qnext.pipeline.conversation import Conversation, Piece, Turn
from qnext.pipeline.recording import new_record, test_result
from qnext.pipeline.request import Request
from qnext.pipeline.running import RunningModel
from qnext.pipeline.speed_memory import remember_speeds
from qnext.pipeline.surroundings import Notice
from qnext.store.record import Record, Status, TestResult
from qnext.store.results import ResultStore

logger = logging.getLogger(__name__)


class ChatRun:
    """One `qnext run`. Use as a context manager: leaving it ends the engine and closes the record.

    What is said stays in memory; only counts, times and memory go into the results database.
    """

    def __init__(
        self,
        request: Request,
        paths: Paths,
        notice: Notice,
        on_progress: Callable[[float], None],
        *,
        command: Sequence[str],
        prompt: str | None,
        system: str | None,
        raw: bool,
        max_tokens: int,
        sampling: dict[str, float],
    ) -> None:
        self.max_tokens = max_tokens
        self._texts = (prompt, system)
        self._command = command
        self._paths = paths
        self._store = ResultStore(paths.results_db)
        self._finished = False
        self.model = RunningModel(request, paths, notice, on_progress)
        try:
            self.conversation = self._converse(notice, system, raw, sampling)
            self._record = self._begin_record()
        except BaseException:
            self.model.close()
            raise

    def _converse(
        self, notice: Notice, system: str | None, raw: bool, sampling: dict[str, float]
    ) -> Conversation:
        """A conversation with the file's own template and sampling, the caller's `sampling` first."""
        facts, header = self.model.opened.facts, self.model.planned.model.header
        template = None if raw else chat_template(header, bos=str(facts["bos"]), eos=str(facts["eos"]))
        if template is None and not raw:
            notice("the file has no chat template; sending prompts as they are")
        return Conversation(
            self.model,
            template,
            {**sampling_defaults(header), **sampling},
            system=system,
            max_tokens=self.max_tokens,
        )

    def _begin_record(self) -> Record:
        model = self.model
        command = without_text(self._command, *self._texts)
        opened = model.opened
        record = new_record(model.planned, model.build, "run", opened.allocated, command, {}, opened.facts)
        self._store.start(record)
        self._recorded = model.planned
        return record

    def say(self, text: str) -> Generator[Piece, None, None]:
        """Send one message; yields the answer as it streams and stores its speeds when it ends."""
        yield from self.conversation.say(text)
        if self.model.planned is not self._recorded:
            # The engine crashed and runs on with a safer layout: other speeds, hence another record.
            self._store.finish(self._record.id, "failed", error=self.model.last_crash)
            self._record = self._begin_record()
        for test in self._tests(self.conversation.turns[-1]):
            self._store.add_test(self._record.id, test)

    @property
    def record_id(self) -> str:
        """Id under which this run is stored."""
        return self._record.id

    def record(self) -> Record:
        """The record as stored so far."""
        return self._store.get(self._record.id)

    def finish(self, status: Status, error: str | None = None) -> Record:
        """Close the record with what was allocated and warned about."""
        self._finished = True
        self._store.finish(
            self._record.id,
            status,
            allocated=self.model.opened.allocated,
            warnings=self.model.warnings,
            error=error,
        )
        record = self.record()
        remember_speeds(record, self.model.planned, self.model.build, self._paths)
        return record

    def _tests(self, turn: Turn) -> Iterator[TestResult]:
        """Prefill and decode of one turn as tests with one sample each."""
        planned = self.model.planned
        fresh = turn.prompt_tokens - turn.cached_tokens
        if fresh and turn.prefill_ns:
            yield test_result(Scenario(fresh, 0, turn.cached_tokens), [turn.prefill_ns], planned)
        if turn.decodes and turn.decode_ns:
            decode = Scenario(0, turn.decodes, turn.prompt_tokens)
            yield test_result(decode, [turn.decode_ns], planned)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        # A reader that left (`| head`) ends a run as Ctrl-C does: nothing about it went wrong.
        stopped = error is None or isinstance(error, KeyboardInterrupt | GeneratorExit | BrokenPipeError)
        try:
            if not self._finished:
                self.finish(
                    "interrupted" if stopped else "failed", None if stopped else _what_happened(error)
                )
        except StoreError:
            if error is None:
                raise
            logger.exception("the record could not be closed")  # what ended the run matters more
        finally:
            self.model.close()


def _what_happened(error: BaseException | None) -> str:
    """The message of our own errors; of a bug only its type, since its message may quote what was said."""
    return error.message if isinstance(error, QnextError) else type(error).__name__


_TEXT_OPTIONS = ("--prompt=", "-p", "--system=", "-sys", "-s")
"""How an option with what is said attached to it may begin."""


def without_text(command: Sequence[str], *texts: str | None) -> list[str]:
    """The command line without what was said: prompts are nobody's business but the user's.

    Hides every argument that is one of `texts`, or an option with one attached (`--prompt=…`, `-p…`).
    """
    hidden = [text for text in texts if text]

    def clean(word: str) -> str:
        for text in hidden:
            if word == text:
                return "(text)"
            if word.startswith(_TEXT_OPTIONS) and word.endswith(text):
                return word[: -len(text)] + "(text)"
        return word

    return [clean(word) for word in command]
