"""Memory of long tensors, which otherwise comes fresh from the system in every call, a page fault for every 4 KiB of it."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels import opened

LONG = 1 << 20  # bytes from which it matters
KEPT = 1 << 29  # bytes that wait for the next call, at most

waiting: dict[int, list[Tensor]] = {}  # by length; what is here comes and goes in any thread, and whenever something is collected


def empty(size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Like ``torch.empty``; the memory of a long tensor waits for the next one when nothing refers to it any more.

    It is a tensor like any other, but its storage cannot grow (``resize_``).
    """
    length = math.prod(size) * dtype.itemsize
    if length < LONG:
        return torch.empty(size, dtype=dtype, device="cpu")
    memory = _taken(length)
    lease = _kind(length).from_address(memory.data_ptr())
    lease.memory = memory
    return torch.frombuffer(lease, dtype=dtype).view(size)


def another(like: Tensor) -> Tensor:
    """The same of the size and type of ``like``, which lies in memory without gaps or is one number, expanded."""
    return torch.empty_like(like) if like.nbytes < LONG else empty(like.shape, like.dtype)


def _taken(length: int) -> Tensor:
    """Memory that waits and is no more than twice too long, or new memory, on large pages."""
    for size in (length, *sorted(n for n in [*waiting] if length < n <= 2 * length)):
        try:
            return waiting[size].pop()
        except (KeyError, IndexError):
            continue
    memory = torch.empty(length, dtype=torch.uint8, device="cpu")
    opened().fastweights_large_pages(ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(length))
    return memory


def _give_back(lease: Any) -> None:
    waiting.setdefault(len(lease.memory), []).append(lease.memory)
    over = sum(size * len(several) for size, several in [*waiting.items()]) - KEPT
    for size, several in [*waiting.items()]:  # what was first needed long ago goes first
        while over > 0 and several:
            del several[:1]
            over -= size


@functools.lru_cache(maxsize=64)
def _kind(length: int) -> Any:
    """So many bytes at some address, whose memory waits again once the last tensor over them is gone."""
    return type("Lease", (ctypes.c_char * length,), {"__del__": _give_back})
