"""The parallel form: all tokens as one block, as softmax attention would compute them. Quadratic in T."""

from __future__ import annotations

from torch import Tensor

from .block import Block, Micro


def parallel(micro: Micro, weights: Tensor) -> tuple[list[Tensor], Tensor]:
    """What the readers read, and the final W, of micro-steps (..., S, .) from W_0 (..., V, K)."""
    block = Block(micro)
    final, values = block.transition().of(weights)
    return block.reads(weights, values), final
