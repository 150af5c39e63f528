"""States that the signals alone determine, for all tokens at once: s <- a s + b, or s <- max(a + s, b).

Both are scans over an associative operation. Within a block of tokens the scan doubles its reach at every step; the blocks
are joined one after the other, so that time and memory are linear in T.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_BLOCK = 64


def linear(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """s_t = a_t s_{t-1} + b_t along axis -2, from ``start`` without that axis."""
    return _scan(a, b, start, torch.mul, torch.add, 1.0, 0.0)


def maximum(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """s_t = max(a_t + s_{t-1}, b_t) along axis -2, from ``start`` without that axis."""
    return _scan(a, b, start, torch.add, torch.maximum, 0.0, -torch.inf)


def _scan(a: Tensor, b: Tensor, start: Tensor, times, plus, one: float, zero: float) -> Tensor:
    a, b = torch.broadcast_tensors(a, b)
    steps = b.shape[-2]
    size = min(_BLOCK, steps)
    a, b = (pad(x, (0, 0, 0, -steps % size), value=v).unflatten(-2, (-1, size)) for x, v in ((a, one), (b, zero)))
    reach = 1
    while reach < size:
        before_a, before_b = (pad(x[..., : size - reach, :], (0, 0, reach, 0), value=v) for x, v in ((a, one), (b, zero)))
        a, b = times(a, before_a), plus(times(a, before_b), b)
        reach *= 2
    starts = []
    for last_a, last_b in zip(a[..., -1, :].unbind(-2), b[..., -1, :].unbind(-2), strict=True):
        starts.append(start)
        start = plus(times(last_a, start), last_b)
    entering = torch.stack([s.expand(b.shape[:-3] + b.shape[-1:]) for s in starts], -2).unsqueeze(-2)
    return plus(times(a, entering), b).flatten(-3, -2)[..., :steps, :]
