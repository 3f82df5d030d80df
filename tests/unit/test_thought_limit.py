"""When thinking is ended for the model, token by token."""

from __future__ import annotations

import pytest

from qnext.engine.llama.thought import ThoughtBudget, ThoughtLimit

OPEN, CLOSE = (1, 2), (8, 9)


def answer(limit: ThoughtLimit, wishes: list[int], length: int) -> list[int]:
    """What is said by a model that would say `wishes` one by one."""
    said, ready = [], iter(wishes)
    for _ in range(length):
        forced = limit.forced()
        token = next(ready) if forced is None else forced
        limit.note(token)
        said.append(token)
    return said


@pytest.mark.parametrize(
    ("budget", "opening", "wishes", "said"),
    [
        (3, (), [5, 5, 5, 6, 7], [5, 5, 5, 8, 9, 6, 7]),
        (0, (), [6, 7], [8, 9, 6, 7]),
        (3, (), [5, 8, 9, 5, 5, 5, 5], [5, 8, 9, 5, 5, 5, 5]),
        (3, (), [5, 5, 8, 6], [5, 5, 8, 8, 9, 6]),
        (2, OPEN, [5, 1, 5, 1, 2, 5, 5, 6], [5, 1, 5, 1, 2, 5, 5, 8, 9, 6]),
        (2, OPEN, [5, 5, 5, 5], [5, 5, 5, 5]),
        (1, OPEN, [1, 2, 5, 6, 1, 2, 5, 5, 5], [1, 2, 5, 8, 9, 6, 1, 2, 5, 5, 5]),
    ],
)
def test_thinking_ends_when_its_budget_is_spent_and_only_once(
    budget: int, opening: tuple[int, ...], wishes: list[int], said: list[int]
) -> None:
    assert answer(ThoughtLimit(ThoughtBudget(budget, opening, CLOSE)), wishes, len(said)) == said
