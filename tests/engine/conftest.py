"""Shared by the tests of serving: one engine for a file of tests, one loop for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qnext.engine.session import EngineSession
from tests.serving_client import CPU, Client


@pytest.fixture(scope="module")
def session(demo_model: Path) -> Iterator[EngineSession]:
    """A session with the demo open in eight slots."""
    with EngineSession() as session:
        session.open(str(demo_model), CPU)
        yield session


@pytest.fixture
def client(session: EngineSession) -> Iterator[Client]:
    """A loop of its own for every test, so that no test finds another's prompts."""
    client = Client(session)
    yield client
    assert client.engine.stop()
