"""The chunk form: blocks of tokens, the state walking from block to block. Linear in T, any device, any derivative.

Within a span of blocks everything that does not need W is computed for all blocks at once; the walk itself is two small
matrix products a block. Spans bound the memory of a forward pass without gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .block import Block, Micro

_NUMBERS_A_SPAN = 2**22


def chunked(micro: Micro, weights: Tensor, size: int) -> tuple[list[Tensor], Tensor]:
    """What the readers read, and the final W, of micro-steps (..., S, .) from W_0 (..., V, K), ``size`` micro-steps a block."""
    rows = max(weights.shape[:-2].numel(), 1)
    span = max(_NUMBERS_A_SPAN // (rows * size * size), 1) * size
    outputs: list[list[Tensor]] = []
    for part in micro.split(span):
        reads, weights = _walk(part, weights, size)
        outputs.append(reads)
    return [torch.cat(parts, -2) for parts in zip(*outputs, strict=True)], weights


def _walk(micro: Micro, weights: Tensor, size: int) -> tuple[list[Tensor], Tensor]:
    steps = micro.steps
    missing = -steps % size
    block = Block(micro.map(lambda t, nothing: pad(t, (0, 0, 0, missing), value=nothing).unflatten(-2, (-1, size))))
    before, made = [], []
    for change in block.transition().unbind(-3):
        before.append(weights)
        weights, values = change.of(weights)
        made.append(values)
    if not before:  # nothing changes W
        before = [weights] * ((steps + missing) // size)
    written = torch.stack(made, -3) if made and made[0] is not None else None
    return [r.flatten(-3, -2)[..., :steps, :] for r in block.reads(torch.stack(before, -3), written)], weights
