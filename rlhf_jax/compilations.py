"""Counts the programs that this process compiles, or reads from a cache of compiled ones, and their seconds.

All that a stage computes is compiled at its beginning. What compiles later, because a shape or a type has
changed, costs time in every step that it happens in, and nothing else would tell.
"""

from __future__ import annotations

import time

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"
_TIMED = (
    _EVENT,
    "/jax/core/compile/jaxpr_trace_duration",  # of inner functions within that of the whole
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)
_count = 0
_seconds = 0.0
_spans: list[tuple[float, float]] = []  # begin and end, apart from each other, in order


def count() -> int:
    """Returns how many programs were compiled since this module was imported, by all threads."""
    return _count


def seconds() -> float:
    """Returns for how long since then some thread was tracing, lowering or compiling."""
    return _seconds


def _count_up(event: str, duration_secs: float, **kwargs: str | int) -> None:
    global _count
    _count += event == _EVENT
    if event in _TIMED:
        now = time.perf_counter()
        _add(now - duration_secs, now)


def _add(begin: float, end: float) -> None:
    """Adds what ends now, and holds or overlaps some of what ended before."""
    global _seconds
    while _spans and _spans[-1][1] > begin:
        first, last = _spans.pop()
        _seconds -= last - first
        begin = min(begin, first)
    _spans.append((begin, end))
    _seconds += end - begin


jax.monitoring.register_event_duration_secs_listener(_count_up)
