"""What `/metrics` tells: llama-server's names (tools/server/server-task.cpp, `to_metrics`), and a few of our
own.

Counts are made here of what answers say at their end, so that they outlive a restart of the engine.
Throughputs are means over the time since the last look, as llama-server's are.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from qnext.pipeline.serve_values import Ended, Status

_NS = 1e9


class Meters:
    """Sums over all answers since the start. `waiting` and `running` count those under way."""

    def __init__(self) -> None:
        self.started_s = int(time.time())
        self.prompt_tokens = self.cached_tokens = self.prompt_ns = 0
        self.generated = self.decode_ns = self.longest = 0
        self.waiting = self.running = 0
        self.answers = self.left = self.failed = 0
        self._seen = (0, 0, 0, 0)

    def count(self, ended: Ended) -> None:
        """Add an answer that has ended."""
        self.answers += 1
        self.prompt_tokens += ended.prompt_tokens - ended.cached_tokens
        self.cached_tokens += ended.cached_tokens
        self.prompt_ns += ended.prefill_ns
        self.generated += ended.generated
        self.decode_ns += ended.decode_ns
        self.longest = max(self.longest, ended.prompt_tokens + ended.generated)

    def text(self, status: Status, engine: Mapping[str, Any] | None, turned_away: int) -> str:
        """Prometheus' text format. `engine` is its own state, None while there is none."""
        totals = (engine or {}).get("totals") or {}
        steps = totals.get("steps", 0)
        prompts, prompt_ns, generated, decode_ns = self._since_last()
        counters = (
            ("prompt_tokens_total", "Prompt tokens processed, without cached ones", self.prompt_tokens),
            ("prompt_tokens_cached_total", "Prompt tokens reused from the cache", self.cached_tokens),
            ("prompt_seconds_total", "Time spent on prompts", self.prompt_ns / _NS),
            ("tokens_predicted_total", "Tokens generated", self.generated),
            ("tokens_predicted_seconds_total", "Time spent generating", self.decode_ns / _NS),
            ("n_decode_total", "Calls of llama_decode", steps),
            ("n_tokens_max", "Longest sequence so far, prompt and answer", self.longest),
        )
        gauges = (
            ("prompt_tokens_seconds", "Prompt throughput in tokens/s", _rate(prompts, prompt_ns)),
            ("predicted_tokens_seconds", "Generation throughput in tokens/s", _rate(generated, decode_ns)),
            ("requests_processing", "Answers in a slot", self.running),
            ("requests_deferred", "Answers that wait for a slot", self.waiting),
            (
                "n_busy_slots_per_decode",
                "Busy slots per call of llama_decode",
                totals.get("busy_slots_sum", 0) / max(steps, 1),
            ),
        )
        cache = (engine or {}).get("cache") or {}
        own_counters = (
            ("answers_total", "Answers that came to their end", self.answers),
            ("answers_left_total", "Answers whose client went away", self.left),
            ("answers_failed_total", "Answers that ended in an error", self.failed),
            ("llama_decode_seconds_total", "Time inside llama_decode", totals.get("native_ns", 0) / _NS),
            ("requests_turned_away_total", "Requests answered with 429", turned_away),
        )
        own_gauges = (
            ("up", "1 when the model answers", int(status.state == "ok")),
            ("loading_progress", "Share of the model that is loaded", status.progress),
            ("prompt_cache_bytes", "Memory that kept prompts take", cache.get("bytes", 0)),
            ("prompt_cache_budget_bytes", "Memory that kept prompts may take", cache.get("budget_bytes", 0)),
        )
        return (
            _lines("llamacpp", "counter", counters)
            + _lines("llamacpp", "gauge", gauges)
            + _lines("qnext", "counter", own_counters)
            + _lines("qnext", "gauge", own_gauges)
        )

    def _since_last(self) -> tuple[int, int, int, int]:
        now = (self.prompt_tokens, self.prompt_ns, self.generated, self.decode_ns)
        a, b, c, d = (new - old for new, old in zip(now, self._seen, strict=True))
        self._seen = now
        return a, b, c, d


def _rate(tokens: int, spent_ns: int) -> float:
    return tokens / (spent_ns / _NS) if spent_ns else 0.0


def _lines(prefix: str, kind: str, items: tuple[tuple[str, str, float], ...]) -> str:
    return "".join(
        f"# HELP {prefix}:{name} {what}\n# TYPE {prefix}:{name} {kind}\n{prefix}:{name} {value:.10g}\n"
        for name, what, value in items
    )
