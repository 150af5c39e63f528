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

waiting: dict[int, list[Tensor]] = {}  # by length, the last used at the end; what is here comes and goes at any time, in any thread


def empty(size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Like ``torch.empty``; the memory of a long tensor waits for the next one when nothing refers to it any more.

    It is a tensor like any other, but its storage cannot grow.
    """
    length = math.prod(size) * dtype.itemsize
    if length < LONG:
        return torch.empty(size, dtype=dtype, device="cpu")
    memory = _taken(length)
    if memory is None:
        memory = _new(length)
    lease = _lease(length).from_address(memory.data_ptr())
    lease.memory = memory
    return torch.frombuffer(lease, dtype=dtype).resize_(size)  # a view could not be changed in place where gradients are


def empty_as(like: Tensor) -> Tensor:
    """The same of the size and type of ``like``, which lies in memory without gaps or is one number, expanded."""
    return torch.empty_like(like) if like.nbytes < LONG else empty(like.shape, like.dtype)


def _taken(length: int) -> Tensor | None:
    """Memory that waits and is no more than twice too long, if there is some."""
    for size in (length, *sorted(n for n in [*waiting] if length < n <= 2 * length)):
        try:
            return waiting[size].pop()
        except (KeyError, IndexError):
            continue
    return None


def _new(length: int) -> Tensor:
    """New memory, on large pages, in the place of as much that waits: lengths that never return do not pile up."""
    _let_go(length)
    try:
        memory = torch.empty(length, dtype=torch.uint8, device="cpu")
    except RuntimeError:
        waiting.clear()
        memory = torch.empty(length, dtype=torch.uint8, device="cpu")
    opened().fastweights_large_pages(ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(length))
    return memory


def _let_go(length: int) -> None:
    """As many bytes as that, if so many wait, those first that were used longest ago."""
    for size in [*waiting]:
        several = waiting.get(size, [])
        while length > 0 and several:
            del several[:1]
            length -= size
        if not several:
            waiting.pop(size, None)


def _give_back(lease: Any) -> None:
    size = len(lease.memory)
    waiting[size] = [*waiting.pop(size, []), lease.memory]
    _let_go(sum(n * len(waiting.get(n, [])) for n in [*waiting]) - KEPT)


@functools.lru_cache(maxsize=64)
def _lease(length: int) -> Any:
    """So many bytes at some address, whose memory waits again once the last tensor over them is gone."""
    return type("Lease", (ctypes.c_char * length,), {"__del__": _give_back})
