"""What training asks of data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

IGNORED = -100  # a target that does not count


class Source(Protocol):
    """Batches as a function of (seed, step), so that training can be cut and continued anywhere.

    Inputs and targets are int64 (B, T); a target of -100 does not count. ``identity`` names the data exactly.
    """

    vocabulary: int
    identity: str

    def batch(self, seed: int, step: int, size: int, length: int) -> tuple[Tensor, Tensor]: ...

    def validation(self, size: int, length: int) -> Iterator[tuple[Tensor, Tensor]]: ...
