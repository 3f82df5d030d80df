"""One text that is being continued: what was asked, how far it is, and what it has cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from qnext.engine.llama.prompt_cache import Held
from qnext.engine.llama.sampler import Logits, Sampler
from qnext.engine.llama.submission import Submission
from qnext.engine.llama.text import TextStream
from qnext.engine.llama.thought import ThoughtLimit


@dataclass(slots=True, eq=False)
class Job:
    """From its arrival to its end; times are `time.perf_counter_ns`.

    `held` is the sequence it has got, None while it is in the queue. `pending` is the token that was chosen
    last and not evaluated yet, None while the prompt is.
    """

    asked: Submission
    sampler: Sampler
    text: TextStream
    thought: ThoughtLimit | None = None
    arrived_ns: int = field(default_factory=time.perf_counter_ns)
    held: Held | None = None
    cached: int = 0
    pauses: list[int] = field(default_factory=list)
    pending: int | None = None
    generated: int = 0
    room: int = 0
    began_ns: int = 0
    first_ns: int = 0
    last_ns: int = 0

    def choose(self, row: Logits) -> int:
        """The next token, of these logits. Raises DeadEnd."""
        token = self.thought.forced() if self.thought else None
        if token is None:
            token = self.sampler.choose(row)
        else:
            self.sampler.accept(token)
        if self.thought:
            self.thought.note(token)
        return token

    @property
    def must_go_on(self) -> bool:
        """Whether the next token must not be one that ends the answer."""
        return self.asked.ignore_eos or self.generated < self.asked.min_tokens

    @property
    def overdue(self) -> bool:
        """Whether its deadline has passed."""
        limit = self.asked.deadline_s
        return limit is not None and time.perf_counter_ns() - self.arrived_ns > limit * 1e9

    @property
    def queued_ns(self) -> int:
        """Time it waited for a sequence."""
        return (self.began_ns or time.perf_counter_ns()) - self.arrived_ns

    @property
    def prefill_ns(self) -> int:
        """Time from its start to its first token, or so far."""
        return ((self.first_ns or time.perf_counter_ns()) - self.began_ns) if self.began_ns else 0

    @property
    def decode_ns(self) -> int:
        """Time from its first token to its latest."""
        return self.last_ns - self.first_ns
