"""What the sequences of a context hold, and how a new prompt gets to use what of it is the same.

An attention cache can be cut at any token. The state of a hybrid model cannot: it knows only the present. So
its state is copied to host memory now and then while a prompt is evaluated (75 MiB for Qwen3-Next-80B,
whatever the length), at ends of messages and at intervals: a later prompt that shares the beginning goes back
to the last copy before the difference. A sequence that has to make room is copied whole. All copies share
one budget, and the least recently used goes first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnext.engine.llama.batch import Tokens
from qnext.engine.llama.binding import llama

INTERVAL = 2048
"""Tokens between copies in a long prompt; a very long one gets about `MOST_INTERVALS` of them."""
MOST_INTERVALS = 8
CHECKPOINT_FROM = 256
"""A shorter beginning is evaluated again sooner than copied."""
CHECKPOINT_GAP = 64
"""Copies are at least this far apart."""
CHECKPOINT_TAIL = 4
"""Where no message ends are known: a template's `assistant\\n<think>\\n` may change."""
WORTH_KEEPING = 256
"""A sequence with fewer tokens is not copied when it has to make room."""
WORTH_SHARING = 32
"""A shorter beginning in common is no reason to overwrite a sequence's rest."""
WORTH_FETCHING = 64
"""Tokens that a copy must save more than what a free sequence still holds."""

WORTH_WAITING = 64
"""Tokens that another prompt must be about to evaluate for a prompt to wait for them."""

Bytes = NDArray[np.uint8]


@dataclass(slots=True, eq=False)
class Checkpoint:
    """The part of a sequence that cannot be cut, as it was after `position` tokens."""

    position: int
    data: Bytes
    used: int = 0


@dataclass(slots=True, eq=False)
class Held:
    """What sequence `index` of the context holds: the first `count` of `tokens`."""

    index: int
    tokens: Tokens
    count: int = 0
    checkpoints: list[Checkpoint] = field(default_factory=list)
    used: int = 0
    busy: bool = False

    def append(self, tokens: Tokens) -> None:
        """`tokens` have been evaluated."""
        self.tokens[self.count : self.count + len(tokens)] = tokens
        self.count += len(tokens)

    def append_one(self, token: int) -> None:
        """`token` has been evaluated."""
        self.tokens[self.count] = token
        self.count += 1


@dataclass(slots=True, eq=False)
class _Saved:
    """A whole sequence that had to make room."""

    tokens: Tokens
    data: Bytes
    checkpoints: list[Checkpoint]
    used: int

    @property
    def count(self) -> int:
        return len(self.tokens)


class PromptCache:
    """The sequences of `context`. `budget_bytes` is what copies may take of the host's memory together."""

    def __init__(
        self,
        model: Any,
        context: Any,
        *,
        sequences: int,
        limit: int,
        unified: bool,
        swa_full: bool,
        budget_bytes: int,
    ) -> None:
        lib = llama()
        self._context = context
        self._unified = unified
        self._memory = lib.llama_get_memory(context)
        self.uncuttable = bool(
            lib.llama_model_is_hybrid(model)
            or lib.llama_model_is_recurrent(model)
            or (lib.llama_model_n_swa(model) > 0 and not swa_full)
        )
        self.budget_bytes = budget_bytes
        self.sequences = [Held(index, np.zeros(limit + 1, np.int32)) for index in range(sequences)]
        self._saved: list[_Saved] = []
        self._clock = 0

    @property
    def nbytes(self) -> int:
        """What the copies take."""
        return sum(item.data.nbytes for item in self._copies())

    @property
    def entries(self) -> int:
        """How many copies there are."""
        return sum(1 for _ in self._copies())

    def _copies(self) -> Iterable[Checkpoint | _Saved]:
        yield from {id(copy): copy for owner in self._owners() for copy in owner.checkpoints}.values()
        yield from self._saved

    def _owners(self) -> Iterable[Held | _Saved]:
        yield from self.sequences
        yield from self._saved

    # --- a prompt comes -------------------------------------------------------------------------------

    def take(self, prompt: Tokens, *, reuse: bool) -> Held:
        """A free sequence for `prompt`, holding as much of its beginning as can be had, but not all of it:
        sampling needs the logits of one token at least. Its `count` says how much. There must be a free one.
        """
        self._clock += 1
        free = [held for held in self.sequences if not held.busy]
        reached = {held.index: self._reach(held, prompt) if reuse else 0 for held in free}
        best = max(free, key=lambda held: reached[held.index])
        worth = reached[best.index]
        others: list[Held | _Saved] = [*self._saved] if reuse else []
        others += [held for held in self.sequences if held.busy and reuse]
        other = max(others, key=lambda item: self._reach(item, prompt), default=None)
        if other is not None and self._reach(other, prompt) > worth + WORTH_FETCHING:
            best = self._make_room(free)
            self._fetch(other, best)
        elif worth < WORTH_SHARING and worth < max(1, best.count):
            best = self._make_room(free)
        elif best.count - worth >= WORTH_KEEPING and not self._save(best) and 2 * worth < best.count:
            best = next((held for held in free if held.count == 0), best)
        self._go_back(best, self._reach(best, prompt) if reuse else 0)
        best.busy, best.used = True, self._clock
        return best

    def best_reach(self, prompt: Tokens) -> int:
        """Tokens of `prompt` that `take` would find evaluated now."""
        return max((self._reach(source, prompt) for source in self._owners()), default=0)

    def coming_reach(self, evaluating: Tokens, pauses: Sequence[int], prompt: Tokens) -> int:
        """Tokens of `prompt` that another one under evaluation, with `pauses` to come, will have to offer."""
        common = _common(evaluating, prompt)
        if not self.uncuttable:
            return common
        return max((position for position in pauses if position <= common), default=0)

    def release(self, held: Held) -> None:
        """The sequence is free again; what it holds may still be of use."""
        self._clock += 1
        held.busy, held.used = False, self._clock
        for copy in held.checkpoints:
            copy.used = self._clock

    def clear(self, held: Held) -> None:
        """Forget what a sequence holds."""
        llama().llama_memory_seq_rm(self._memory, held.index, -1, -1)
        held.count = 0
        held.checkpoints.clear()

    def clear_free(self) -> bool:
        """Forget what free sequences hold; False if that is nothing."""
        free = [held for held in self.sequences if not held.busy and held.count]
        for held in free:
            self.clear(held)
        return bool(free)

    def _reach(self, source: Held | _Saved, prompt: Tokens) -> int:
        """Tokens at the beginning of `prompt` that need no evaluation if it follows on `source`."""
        common = _common(source.tokens[: source.count], prompt)
        if common == source.count or not self.uncuttable:
            return common
        return max((copy.position for copy in source.checkpoints if copy.position <= common), default=0)

    def _make_room(self, free: Sequence[Held]) -> Held:
        """The free sequence to be overwritten: next to a busy one, blank, or unused for the longest time.

        llama.cpp evaluates sequences together only where their numbers are consecutive (`split_equal`),
        unless the cache is unified.
        """
        busy = [held.index for held in self.sequences if held.busy]
        chosen = min(
            free,
            key=lambda held: (
                min((abs(held.index - other) for other in busy), default=0),
                held.count > 0,
                held.used,
                held.index,
            ),
        )
        self._save(chosen)
        self.clear(chosen)
        return chosen

    def _go_back(self, held: Held, count: int) -> None:
        """Cut `held` to `count` tokens, one of those `_reach` gives."""
        lib = llama()
        if count == held.count:
            return
        held.checkpoints = [copy for copy in held.checkpoints if copy.position <= count]
        if count and self.uncuttable:
            copy = held.checkpoints[-1]
            copy.used = self._clock
            if not lib.llama_state_seq_set_data_ext(
                self._context,
                _pointer(copy.data),
                copy.data.nbytes,
                held.index,
                lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY,
            ):
                count = 0
        if count == 0 or not lib.llama_memory_seq_rm(self._memory, held.index, count, -1):
            self.clear(held)
            return
        held.count = count

    # --- copies ---------------------------------------------------------------------------------------

    def pauses(self, held: Held, length: int, boundaries: Sequence[int]) -> list[int]:
        """Where the evaluation of a prompt of `length` should stop for `checkpoint`, rising.

        The end of the last message, where the next turn goes on if the template changes what the model said;
        the end of the first one, which other conversations may share; others at intervals.
        """
        if not self.uncuttable or not self.budget_bytes:
            return []
        inside = [position for position in boundaries if held.count < position < length]
        if boundaries and not inside:
            return []
        last = inside[-1] if inside else length - CHECKPOINT_TAIL
        wanted, before = [], self._last_checkpoint(held)
        for position in (*inside[:-1], last):
            gap = CHECKPOINT_GAP if position == last or (inside and position == inside[0]) else INTERVAL
            if position >= CHECKPOINT_FROM and position - before >= gap and position > held.count:
                wanted.append(position)
                before = position
        return wanted

    def checkpoint_is_due(self, held: Held, length: int) -> bool:
        """Whether, amid a prompt of `length`, it is time for a copy."""
        step = max(INTERVAL, length // MOST_INTERVALS)
        return self.uncuttable and held.count - self._last_checkpoint(held) >= step

    @staticmethod
    def _last_checkpoint(held: Held) -> int:
        return held.checkpoints[-1].position if held.checkpoints else 0

    def checkpoint(self, held: Held) -> None:
        """Copy the part that cannot be cut, as it is now, if the budget allows."""
        data = self._copy(held.index, llama().LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY)
        if data is not None:
            held.checkpoints.append(Checkpoint(held.count, data, self._clock))

    def _save(self, held: Held) -> bool:
        """Copy a whole sequence with its checkpoints, if it is worth it; whether there is such a copy now."""
        if held.count < WORTH_KEEPING:
            return False
        for item in self._saved:
            if _begins(held, item) and (item.count == held.count or not self.uncuttable):
                item.used = self._clock
                return True
        data = self._copy(held.index, 0)
        if data is None:
            return False
        self._saved = [item for item in self._saved if not _begins(item, held)]
        tokens = held.tokens[: held.count].copy()
        self._saved.append(_Saved(tokens, data, list(held.checkpoints), self._clock))
        return True

    def _fetch(self, source: Held | _Saved, held: Held) -> None:
        """Make an empty sequence hold what `source` does; it stays empty if that cannot be done.

        Between sequences of one cache, llama_memory_seq_cp only notes that cells are shared. Between caches
        it would put the copy off to the next decode, when the source may be another already; so it goes
        through the host's memory.
        """
        source.used = self._clock
        lib = llama()
        if isinstance(source, _Saved):
            fetched = self._put(source.data, held)
        elif self._unified:
            lib.llama_memory_seq_cp(self._memory, source.index, held.index, -1, -1)
            fetched = True
        else:
            data = self._read(source.index, 0)
            fetched = data is not None and self._put(data, held)
        if not fetched:
            self.clear(held)
            return
        held.append(source.tokens[: source.count])
        held.checkpoints = list(source.checkpoints)

    def _put(self, data: Bytes, held: Held) -> bool:
        """Write the copy of a whole sequence into an empty one."""
        return bool(
            llama().llama_state_seq_set_data_ext(self._context, _pointer(data), data.nbytes, held.index, 0)
        )

    def _copy(self, sequence: int, flags: int) -> Bytes | None:
        """A copy of a sequence's state to be kept; None if the budget or the memory has no room for it."""
        size = llama().llama_state_seq_get_size_ext(self._context, sequence, flags)
        return self._read(sequence, flags) if self._free_bytes(size) else None

    def _read(self, sequence: int, flags: int) -> Bytes | None:
        """A copy of a sequence's state; None if there is no memory for it."""
        lib = llama()
        size = lib.llama_state_seq_get_size_ext(self._context, sequence, flags)
        try:
            data = np.empty(size, np.uint8)
        except MemoryError:
            return None
        written = lib.llama_state_seq_get_data_ext(self._context, _pointer(data), size, sequence, flags)
        return data if written else None

    def _free_bytes(self, size: int) -> bool:
        """Drop copies, the least recently used first, until `size` more fit; False if they never do."""
        if size > self.budget_bytes:
            return False
        excess = self.nbytes + size - self.budget_bytes
        for copy in sorted(self._copies(), key=lambda item: item.used) if excess > 0 else ():
            if excess <= 0:
                break
            excess -= copy.data.nbytes
            if isinstance(copy, _Saved):
                self._saved.remove(copy)
            for owner in self._owners():
                owner.checkpoints = [other for other in owner.checkpoints if other is not copy]
        return True


def _common(tokens: Tokens, prompt: Tokens) -> int:
    """How many tokens both begin with, all of `prompt` but one at most."""
    most = min(len(tokens), len(prompt) - 1)
    differing = np.flatnonzero(tokens[:most] != prompt[:most])
    return int(differing[0]) if len(differing) else most


def _begins(part: Held | _Saved, whole: Held | _Saved) -> bool:
    """Whether `whole` begins with what `part` holds."""
    count = part.count
    return count <= whole.count and bool((whole.tokens[:count] == part.tokens[:count]).all())


def _pointer(data: Bytes) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
