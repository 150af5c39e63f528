"""Decays inside a block, and sums that are weighted by them; nothing is ever divided by a decay.

What is left at micro-step i of something written at j is a_{j+1} ... a_i. It is formed from the decays in between, as a sum
of logs or a product of factors, so that decays of zero (a log of -inf) and of 1e-300 are as safe as any other.
Axes: ``...`` for batch, heads and blocks, then S micro-steps, then D = 1 (a scalar decay) or K (one per key channel).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

_LEAF = 4


@dataclass(frozen=True)
class Decay:
    """a_i = exp(log_i) * factor_i, each (..., S, D) or missing."""

    log: Tensor | None
    factor: Tensor | None

    @property
    def none(self) -> bool:
        return self.log is None and self.factor is None

    @property
    def per_key(self) -> bool:
        return any(x is not None and x.shape[-1] > 1 for x in (self.log, self.factor))

    def map(self, change: Callable[[Tensor, float], Tensor]) -> Decay:
        """``change(tensor, what stands for no decay)`` of each part."""
        log = None if self.log is None else change(self.log, 0.0)
        return Decay(log, None if self.factor is None else change(self.factor, 1.0))

    def accumulated(self, axis: int = -2) -> Tensor:
        # a sum of logs of -40 in float32 would be wrong in its sixth digit after exp
        parts = [] if self.log is None else [self.log.cumsum(axis, dtype=torch.float64).exp().to(self.log.dtype)]
        parts += [] if self.factor is None else [self.factor.cumprod(axis)]
        return parts[0] if len(parts) == 1 else parts[0] * parts[1]

    def since_start(self) -> Tensor:
        """a_0 ... a_i: what is left of the incoming W after micro-step i."""
        return self.accumulated()

    def until_end(self) -> Tensor:
        """a_{i+1} ... a_{S-1}: what is left at the end of what micro-step i wrote."""
        later = self.map(lambda x, one: pad(x[..., 1:, :], (0, 0, 0, 1), value=one).flip(-2))
        return later.accumulated().flip(-2)

    def between(self) -> Tensor:
        """a_{j+1} ... a_i at [i, j] for j <= i, else 0: shape (..., S, S, D)."""
        some = self.log if self.log is not None else self.factor
        assert some is not None
        i = torch.arange(some.shape[-2], device=some.device)
        later = (i[:, None] > i[None, :]).unsqueeze(-1)
        rows = self.map(lambda x, one: torch.where(later, x.unsqueeze(-2), _number(x, one)))
        return only(lower_triangle(i, i).unsqueeze(-1), rows.accumulated(-3))


def _number(like: Tensor, value: float) -> Tensor:
    return torch.full((), value, dtype=like.dtype, device=like.device)


def only(mask: Tensor, x: Tensor) -> Tensor:
    """``x`` where ``mask``, else zero, also where x is not finite."""
    return torch.where(mask, x, _number(x, 0.0))


def lower_triangle(rows: Tensor, columns: Tensor) -> Tensor:
    return rows[:, None] >= columns[None, :]


def _below_diagonal(scores: Tensor) -> Tensor:
    i = torch.arange(scores.shape[-1], device=scores.device)
    return only(lower_triangle(i, i), scores)


def visible(q: Tensor, k: Tensor, decay: Decay) -> Tensor:
    """q_i . (a_{j+1} ... a_i * k_j) for j <= i, else 0: shape (..., S, S)."""
    if decay.per_key:
        return _visible_per_key(q, k, decay)
    scores = _below_diagonal(q @ k.mT)
    return scores if decay.none else scores * decay.between().squeeze(-1)


def _visible_per_key(q: Tensor, k: Tensor, decay: Decay) -> Tensor:
    """By halving: between the halves of a tile, decays are taken from their border; tiles of four are done pair by pair."""
    size = q.shape[-2]
    extra = 2 ** max(size - 1, 0).bit_length() - size
    q, k, decay = pad(q, (0, 0, 0, extra)), pad(k, (0, 0, 0, extra)), decay.map(lambda x, one: pad(x, (0, 0, 0, extra), value=one))

    half = min(_LEAF, size + extra)
    groups = decay.map(lambda x, _: x.unflatten(-2, (-1, half)))
    rows, keys = q.unflatten(-2, (-1, half)), k.unflatten(-2, (-1, half))
    tiles = (rows.unsqueeze(-2) * groups.between() * keys.unsqueeze(-3)).sum(-1)
    while half < size + extra:
        left, right = (decay.map(lambda x, _, s=side, h=half: _half(x, h, s)) for side in (0, 1))
        earlier = _half(k, half, 0) * left.until_end()
        later = _half(q, half, 1) * right.since_start()
        corner = later @ earlier.mT
        pairs = tiles.unflatten(-3, (-1, 2))
        corner = corner.expand(*torch.broadcast_shapes(pairs.shape[:-4], corner.shape[:-3]), *corner.shape[-3:])
        pairs = pairs.expand(*corner.shape[:-3], *pairs.shape[-4:])
        top = torch.cat([pairs.select(-3, 0), torch.zeros_like(corner)], -1)
        tiles = torch.cat([top, torch.cat([corner, pairs.select(-3, 1)], -1)], -2)
        half *= 2
    return tiles.squeeze(-3)[..., :size, :size]


def _half(x: Tensor, half: int, side: int) -> Tensor:
    """The left (0) or right (1) halves of consecutive groups of 2 * half rows."""
    return x.unflatten(-2, (-1, 2, half)).select(-3, side)


def mixed(scores: Tensor, k: Tensor, decay: Decay) -> Tensor:
    """The sum over j <= i of scores_ij (a_{j+1} ... a_i * k_j): shape (..., S, K)."""
    scores = _below_diagonal(scores)
    if decay.per_key:
        return torch.einsum("...ij,...ijk,...jk->...ik", scores, decay.between(), k)
    return (scores if decay.none else scores * decay.between().squeeze(-1)) @ k
