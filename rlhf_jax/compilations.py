"""Counts the programs that this process compiles, or reads from a cache of compiled ones.

All that a stage computes is compiled at its beginning. What compiles later, because a shape or a type has
changed, costs time in every step that it happens in, and nothing else would tell.
"""

from __future__ import annotations

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0


def count() -> int:
    """Returns how many programs were compiled since this module was imported, by all threads."""
    return _count


def _count_up(event: str, duration_secs: float, **kwargs: str | int) -> None:
    global _count
    _count += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_count_up)
