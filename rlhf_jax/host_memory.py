"""The C library's memory on a host that computes.

XLA's CPU client allocates the buffers of every program run anew. glibc gives freed blocks of that size back
to the kernel, or to one of many arenas, and the next step pays for them with page faults: 80 steps of the
quickstart's reward model took 2.8 million of them and 11.7 s of system time, and take 0.17 million and 1.5 s.
"""

from __future__ import annotations

import ctypes

MIB = 2**20
# Numbers of <malloc.h>: one arena for all threads, and freed memory stays with the process.
_SETTINGS = {
    -8: 1,  # M_ARENA_MAX
    -3: 1024 * MIB,  # M_MMAP_THRESHOLD
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD
    -2: 64 * MIB,  # M_TOP_PAD
}


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next step; does nothing where the C library is another.

    To be called before JAX starts its threads. The price is memory that one stage leaves to the next: a run
    may peak higher than it would otherwise.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _SETTINGS.items():
            mallopt(parameter, value)
