"""A planned model, running: opened with a safer retry, its allocation compared with the plan.

A crash of the engine costs the child process and nothing else. When the weight layout may be the cause, the
model is opened again with the next safer one; once that one has decoded tokens, it becomes the machine's
remembered layout, so that the next run starts there. A few tokens are decoded right after loading, as
llama.cpp's own programs do, so that such a crash comes before anything is recorded or said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

from qnext.config import Paths
from qnext.engine.crash import EngineCrashError
from qnext.engine.log_reader import PRINT_RESOLUTION_BYTES, allocated_devices, read_buffer_sizes
from qnext.engine.probe import LAYOUT_CRASHES, ORDER, known_policy, remember_policy
from qnext.engine.protocol import Message
from qnext.engine.session import EngineSession
from qnext.errors import QnextError
from qnext.pipeline.planning import PlannedModel, plan_model, require_fit
from qnext.pipeline.request import Request
from qnext.pipeline.surroundings import Notice, layout_entry, require_this_machine
from qnext.pipeline.tuned import plan_tuned
from qnext.plan.values import DeviceMemory
from qnext.units import MIB, format_bytes

Planner = Callable[[Request, Paths, Notice], PlannedModel]

_TOLERANCE_SHARE = 100
_TOLERANCE_BYTES = 32 * MIB


@dataclass(frozen=True, slots=True)
class Opened:
    """What opening a model showed: sizes that are active, bytes per device, time to load."""

    facts: Message
    allocated: tuple[DeviceMemory, ...]
    load_ns: int


class RunningModel:
    """A model in an engine child. Use as a context manager; `planned` is the plan in force after retries.

    `on_progress` gets the share of the weights loaded. `planner` makes the plan, and again each time a safer
    layout is wanted; by default the request says whether a sweep's answer is taken. Raises DoesNotFitError
    before anything is loaded.
    """

    def __init__(
        self,
        request: Request,
        paths: Paths,
        notice: Notice,
        on_progress: Callable[[float], None] | None = None,
        *,
        planner: Planner | None = None,
    ) -> None:
        self._request = request
        self._paths = paths
        self._notice = notice
        self._on_progress = on_progress
        self._planner = planner = planner or (plan_tuned if request.tuned else plan_model)
        self._session: EngineSession | None = None
        self._crashed_layouts: dict[str, str] = {}
        self.last_crash: str | None = None
        self.warnings: list[str] = []
        self.planned = planner(request, paths, notice)
        self.build = require_this_machine(self.planned.surroundings)
        require_fit(self.planned.plan)
        self.opened = self._open_safely()

    @property
    def session(self) -> EngineSession:
        """The live engine session."""
        assert self._session is not None
        return self._session

    def generate(
        self, text: str, *, max_tokens: int, sampling: dict[str, float], **options: Any
    ) -> Iterator[Message]:
        """Continue `text`. If the engine dies before the first token, try once more with a safer layout."""
        answering = False
        try:
            for event in self.session.generate(text, max_tokens=max_tokens, sampling=sampling, **options):
                answering = answering or event["event"] == "token"
                yield event
        except EngineCrashError as error:
            if answering or not self._retreat(error):
                raise
            yield from self.generate(text, max_tokens=max_tokens, sampling=sampling, **options)

    def bench(self, *, prompt: int, generate: int, depth: int, repetitions: int) -> Iterator[Message]:
        """Time one test, with the same retry before its first sample."""
        measured = False
        try:
            for event in self.session.bench(
                prompt=prompt, generate=generate, depth=depth, repetitions=repetitions
            ):
                measured = measured or event["event"] == "sample"
                yield event
        except EngineCrashError as error:
            if measured or not self._retreat(error):
                raise
            yield from self.bench(prompt=prompt, generate=generate, depth=depth, repetitions=repetitions)

    def reopen(self) -> None:
        """Start the engine again after it died."""
        self.opened = self._open_safely()

    def recover(self, error: QnextError) -> None:
        """Start the engine again after `error`, with the next safer layout where that may be the cause."""
        if not (isinstance(error, EngineCrashError) and self._retreat(error)):
            self.reopen()

    def close(self) -> None:
        """End the engine child."""
        if self._session is not None:
            self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_safely(self) -> Opened:
        try:
            while True:
                try:
                    opened = self._open()
                except EngineCrashError as error:
                    if not self._next_layout(error):
                        raise
                else:
                    self._remember_layout()
                    return opened
        except BaseException:
            self.close()
            raise

    def _open(self) -> Opened:
        self.close()
        self._session = EngineSession(environment=dict(self.planned.environment))
        plan = self.planned.plan
        facts = self._session.open(self.planned.model.path, plan.placement, on_progress=self._on_progress)
        sizes = read_buffer_sizes(self._session.size_lines)
        self._session.warm_up()
        budgets = {budget.name: budget for budget in self.planned.problem.budgets}
        wanted = {device.name: budgets[device.name] for device in plan.devices}
        allocated = allocated_devices(sizes, wanted)
        self.warnings = [
            *plan.warnings,
            *(f"--repack {layout} was given up: {why}" for layout, why in self._crashed_layouts.items()),
            *differences(plan.devices, allocated),
        ]
        return Opened(facts, allocated, int(str(facts["load_ns"])))

    def _retreat(self, error: EngineCrashError) -> bool:
        """After a crash while running: open again with a safer layout; False when there is none."""
        if not self._next_layout(error):
            return False
        self.opened = self._open_safely()
        return True

    def _next_layout(self, error: EngineCrashError) -> bool:
        """Plan again with the next safer layout, if the layout may be at fault and one is left."""
        if self._request.overrides or error.kind not in LAYOUT_CRASHES:
            return False
        current = self.planned.surroundings.repack
        for safer in ORDER[ORDER.index(current) + 1 :]:
            planned = self._planner(replace(self._request, repack=safer), self._paths, self._notice)
            if planned.plan.placement == self.planned.plan.placement:
                continue  # nothing is repacked here anyway
            require_fit(planned.plan)
            for line in error.log_tail:
                self._notice(f"  | {line}")
            self._notice(f"{error.message}; trying again with --repack {safer}")
            self._crashed_layouts[current] = self.last_crash = error.message
            self.planned = planned
            return True
        return False

    def _remember_layout(self) -> None:
        """After a retry that works: start there next time. What the user asked for is tried every time."""
        if not self._crashed_layouts or self._request.repack is not None:
            return
        surroundings = self.planned.surroundings
        entry = layout_entry(self._paths, surroundings.machine, self.build)
        known = known_policy(entry, self.build)
        failures = {**(known.failures if known else {}), **self._crashed_layouts}
        remember_policy(entry, self.build, surroundings.repack, failures)


def differences(planned: tuple[DeviceMemory, ...], allocated: tuple[DeviceMemory, ...]) -> list[str]:
    """A warning per device whose allocation is off by more than 1 % or 32 MiB, whichever is less.

    Sizes under llama.cpp's print resolution (0.01 MiB for each buffer) do not count.
    """
    found = []
    for plan, real in zip(planned, allocated, strict=True):
        off = real.total_bytes - plan.total_bytes
        tolerance = min(plan.total_bytes // _TOLERANCE_SHARE, _TOLERANCE_BYTES)
        if abs(off) > max(tolerance, 10 * PRINT_RESOLUTION_BYTES):
            more = "more" if off > 0 else "less"
            found.append(
                f"{plan.name} holds {format_bytes(abs(off))} {more} than planned "
                f"({format_bytes(real.total_bytes)} instead of {format_bytes(plan.total_bytes)})"
            )
    return found
