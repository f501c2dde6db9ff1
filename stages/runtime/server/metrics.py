"""Counts requests, tokens and latencies of a server, in the text format of Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stages.runtime.server.engine import Engine

KIND = "text/plain; version=0.0.4; charset=utf-8"
_EDGES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# name -> (kind, what it is), of what an engine tells
_OF_ENGINES = {
    "running": ("gauge", "answers that are being made"),
    "waiting": ("gauge", "answers that wait for a place"),
    "kv_pages": ("gauge", "pages of the KV cache"),
    "kv_pages_free": ("gauge", "pages of the KV cache that nothing holds"),
    "steps_total": ("counter", "steps of the scheduler"),
    "prompt_tokens_total": ("counter", "tokens of prompts that were begun"),
    "cached_tokens_total": ("counter", "of these, tokens that were held already"),
    "generated_tokens_total": ("counter", "tokens made"),
    "drafted_tokens_total": ("counter", "tokens that were guessed"),
    "accepted_tokens_total": ("counter", "of these, tokens that were right"),
    "preemptions_total": ("counter", "answers that gave their pages back and read again"),
}


class Histogram:
    """How many values were at most each edge, and their sum."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_EDGES) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(_EDGES, value)] += 1
        self._sum += value

    def lines(self, name: str, model: str) -> Iterator[str]:
        """Yield its lines."""
        total = 0
        for edge, count in zip((*_EDGES, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{model="{model}",le="{edge}"}} {total}'
        yield f'{name}_sum{{model="{model}"}} {self._sum:.6f}'
        yield f'{name}_count{{model="{model}"}} {total}'


class Metrics:
    """What the requests of each model came to; ``models`` are their names."""

    def __init__(self, models: Mapping[str, Engine]) -> None:
        self._engines = models
        self.first_token = {name: Histogram() for name in models}
        self.duration = {name: Histogram() for name in models}
        self.requests: dict[str, Counter[str]] = {name: Counter() for name in models}  # by outcome

    def text(self) -> str:
        """Return all of it."""
        lines = []
        for name, (kind, what) in _OF_ENGINES.items():
            lines += _head(name, kind, what)
            lines += [f'{_full(name)}{{model="{_escaped(m)}"}} {_gauges(e)[name]}' for m, e in self._engines.items()]
        lines += _head("requests_total", "counter", "requests by how they ended")
        for model, counts in self.requests.items():
            lines += [
                f'{_full("requests_total")}{{model="{_escaped(model)}",outcome="{outcome}"}} {count}'
                for outcome, count in sorted(counts.items())
            ]
        for name, what, histograms in (
            ("time_to_first_token_seconds", "from a request to its first token", self.first_token),
            ("request_seconds", "from a request to its end", self.duration),
        ):
            lines += _head(name, "histogram", what)
            for model, histogram in histograms.items():
                lines += histogram.lines(_full(name), _escaped(model))
        return "\n".join(lines) + "\n"


def _gauges(engine: Engine) -> dict[str, int]:
    scheduler = engine.scheduler
    return {
        "running": len(scheduler.active),
        "waiting": engine.waiting,
        "kv_pages": engine.pages,
        "kv_pages_free": engine.free_pages,
        "steps_total": scheduler.steps,
        "prompt_tokens_total": scheduler.prompt_tokens,
        "cached_tokens_total": scheduler.cached_tokens,
        "generated_tokens_total": scheduler.generated_tokens,
        "drafted_tokens_total": scheduler.drafted_tokens,
        "accepted_tokens_total": scheduler.accepted_tokens,
        "preemptions_total": scheduler.preemptions,
    }


def _full(name: str) -> str:
    return f"stagegraph_{name}"


def _head(name: str, kind: str, what: str) -> list[str]:
    return [f"# HELP {_full(name)} {what}", f"# TYPE {_full(name)} {kind}"]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
