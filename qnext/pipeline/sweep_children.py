"""The engine children of a sweep: whose weights are in memory, and which context is active on them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from qnext.engine.protocol import Message
from qnext.engine.session import EngineSession
from qnext.pipeline.sweep_values import Cell


@dataclass(slots=True)
class _Loaded:
    """A child with weights in memory, and the cell whose context is active there."""

    session: EngineSession
    cell: Cell | None = None


class SweepChildren:
    """A child for each group of cells that is in memory. `close` ends them all."""

    def __init__(self, model: str, silence_limit_s: float, on_load: Callable[[float], None] | None) -> None:
        self._model, self._silence_limit_s, self._on_load = model, silence_limit_s, on_load
        self._loaded: dict[str, _Loaded] = {}

    def ready(self, cell: Cell) -> bool:
        """Whether the cell's weights are loaded."""
        loaded = self._loaded.get(cell.group)
        return loaded is not None and loaded.session.alive

    def session(self, cell: Cell) -> EngineSession:
        """The child with the cell's weights. Raises KeyError where there is none."""
        return self._loaded[cell.group].session

    def others(self, cell: Cell) -> bool:
        """Whether weights of other groups are loaded."""
        return any(group != cell.group for group in self._loaded)

    def forget_context(self, cell: Cell) -> None:
        """Take it that no context is active on the cell's weights."""
        if cell.group in self._loaded:
            self._loaded[cell.group].cell = None

    def activate(self, cell: Cell, keep: Collection[str], also: Cell | None) -> Message | None:
        """Load the weights, or make a new context on them; what is active then, None if nothing changed.

        A load leaves only the groups in `keep` in memory beside, and loads those of `also` at the same time.
        """
        if not self.ready(cell):
            self._keep([group for group in keep if group != cell.group])
            absent = [also] if also is not None and not self.ready(also) else []
            active = self._open([cell, *absent])
            loaded = self._loaded[cell.group]
        else:
            loaded = self._loaded[cell.group]
            if loaded.cell is not None and loaded.cell.name == cell.name:
                return None
            active = loaded.session.renew(cell.placement)
        loaded.session.warm_up()
        loaded.cell = cell
        return active

    def close(self) -> None:
        """End the children."""
        self._keep(())

    def _keep(self, groups: Collection[str]) -> None:
        """End the children of all other groups."""
        for group in [*self._loaded]:
            if group not in groups:
                self._loaded.pop(group).session.close()

    def _open(self, cells: Sequence[Cell]) -> Message:
        """Load the weights of each, all at the same time: one load keeps one core busy. What is active in the
        first one's context."""
        sessions: list[EngineSession] = []
        shares = [0.0] * len(cells)

        def load(place: int) -> Message:
            def show(share: float) -> None:
                shares[place] = share
                if self._on_load is not None:
                    self._on_load(statistics.fmean(shares))

            return sessions[place].open(self._model, cells[place].placement, on_progress=show)

        with ThreadPoolExecutor(len(cells)) as pool:
            try:
                for cell in cells:
                    sessions.append(
                        EngineSession(
                            environment=dict(cell.environment),
                            silence_limit_s=self._silence_limit_s,
                            bound=True,
                        )
                    )
                asked = [pool.submit(load, place) for place in range(len(cells))]
                active = [future.result() for future in asked]
            except BaseException:
                for session in sessions:
                    session.close()
                raise
        for cell, session in zip(cells, sessions, strict=True):
            self._loaded[cell.group] = _Loaded(session)
        return active[0]
