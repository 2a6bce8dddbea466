"""The memory of a process that has deadlines: had at the start, kept until the end.

Left alone, glibc's heap grows whenever a pause lets more pictures wait than ever before, shrinks when they are gone,
and each of its arenas, one for every thread or two, does that for itself: page faults while the arm moves, and a node
whose memory creeps for as long as someone looks. So there is one arena (`one_arena`, the first thing a process does),
and `reserve` makes it as large as the node will need. Programs of ROS 2 with real-time priority do the same, see
docs.ros.org, "Understanding real-time programming". Without glibc these do nothing.
"""

from __future__ import annotations

import ctypes
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of mallopt, see malloc.h
_MOST_IN_HEAP = 32 << 20  # bytes of one block; glibc takes no larger threshold
_NEVER = (1 << 31) - 1
_BLOCK = 1 << 20


def one_arena() -> None:
    """For all threads that are yet to come."""
    if (libc := _glibc()) is not None:
        libc.mallopt(_ARENA_MAX, 1)


def reserve(size: int) -> None:
    """Give back what the start has left, then have `size` free bytes in the heap, their pages in memory, and never give
    back any. Safe to repeat. Blocks of up to 32 MB come from the heap from now on: each that is mapped by itself costs
    a page fault for every 4 kB of it, at 60 pictures of 640x480 a second 11 % of a core."""
    if (libc := _glibc()) is None:
        return
    libc.malloc_trim(0)
    libc.mallopt(_MMAP_THRESHOLD, _MOST_IN_HEAP)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    blocks = [libc.malloc(_BLOCK) for _ in range(-(-size // _BLOCK))]
    for block in filter(None, blocks):
        ctypes.memset(block, 1, _BLOCK)
    for block in blocks:
        libc.free(block)


def _glibc() -> Any:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    return libc
