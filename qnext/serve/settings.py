"""What a server is told when it starts: who may call it, and how much it takes on at a time."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """`queue_limit` counts answers that wait beside those in the slots. `deadline_s` is for one answer,
    waiting included; None for no end. No `api_keys`: everybody who reaches the port may ask.
    `instance` is told in a header of `/health`, so that one server can be told from another.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    queue_limit: int = 64
    body_limit_bytes: int = 16 * 1024 * 1024
    deadline_s: float | None = None
    cors_origins: tuple[str, ...] = ()
    instance: str = ""
