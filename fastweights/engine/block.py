"""A block of consecutive micro-steps as one map: what the parallel and the chunk form have in common.

Inside a block, W after micro-step i is the incoming W_0, decayed, plus a decayed outer product val_j key_j^T for every
micro-step j so far. Where micro-steps erase, val_j = u_j + W x_j depends on the earlier ones: with L_ij = x_i . key_j
(decayed from j to i) the values solve (I - L) val = u + x W_0^T, a triangular system, once for W_0 = 0 (``solved``) and
once for every key channel of W_0 (``response``). The block takes W_0 to W_0 diag(a) + val^T keys.
Axes: ``...`` for batch, heads and blocks, then S micro-steps, then K or V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .decay import Decay, mixed, only, visible


@dataclass(frozen=True)
class Micro:
    """Micro-steps over time, each tensor (..., S, its own size): W <- W (diag(a) + x y^T) + u w^T, and what reads W.

    ``back[i]`` is how many micro-steps before the end of micro-step i reader i reads; ``lags`` likewise for x, one number
    for each micro-step of a token. ``segments`` counts the resets so far in the block.
    """

    decay: Decay
    x: Tensor | None
    y: Tensor | None
    u: Tensor | None
    w: Tensor | None
    tied: bool
    lags: tuple[int, ...]
    readers: tuple[Tensor, ...]
    back: tuple[int, ...]
    backward: tuple[bool, ...]
    reset: Tensor | None = None

    def map(self, change: Callable[[Tensor, float], Tensor]) -> Micro:
        """``change(tensor, what stands for nothing)`` of every tensor."""
        parts = {n: change(t, 0.0) for n in ("x", "y", "u", "w", "reset") if (t := getattr(self, n)) is not None}
        if self.tied and self.y is not None:
            parts["w"] = parts["y"]
        return replace(self, decay=self.decay.map(change), readers=tuple(change(r, 0.0) for r in self.readers), **parts)

    @property
    def steps(self) -> int:
        return self._tensors()[0].shape[-2]

    def split(self, size: int) -> Iterator[Micro]:
        """Consecutive parts of ``size`` micro-steps."""
        whole = {id(t): t for t in self._tensors()}
        cut = {i: t.split(size, -2) for i, t in whole.items()}
        for part in range(max(map(len, cut.values()))):
            yield self.map(lambda t, _, n=part: cut[id(t)][n])

    def _tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        self.map(lambda t, _: found.append(t) or t)
        return found


class Transition(NamedTuple):
    """W <- W diag(total) + values^T ends + added with values = solved + response W^T; where not ``kept``, W is forgotten.

    What is missing changes nothing.
    """

    kept: Tensor | None
    total: Tensor | None
    added: Tensor | None
    solved: Tensor | None
    response: Tensor | None
    ends: Tensor | None

    def of(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """The next W, and the values that the erase made."""
        values, new = None, weights if self.kept is None else only(self.kept, weights)
        new = new if self.total is None else new * self.total
        if self.response is not None and self.ends is not None:
            values = self.response @ weights.mT
            values = values if self.solved is None else values + self.solved
            new = new + values.mT @ self.ends
        return (new if self.added is None else new + self.added), values

    def unbind(self, axis: int) -> Iterator[Transition]:
        """One transition for each index of an axis."""
        parts = [None if t is None else t.unbind(axis) for t in self]
        for n in range(max((len(p) for p in parts if p is not None), default=0)):
            yield Transition(*(None if p is None else p[n] for p in parts))


class Block:
    """The micro-steps as one map of W_0 (..., V, K)."""

    def __init__(self, micro: Micro) -> None:
        self.micro = micro
        self.segments = None if micro.reset is None else micro.reset.cumsum(-2)
        self.plain = None if micro.w is None or micro.u is None or micro.tied else (micro.w, micro.u)
        self.solved: Tensor | None = None
        self.response: Tensor | None = None
        if micro.x is not None and micro.y is not None:
            self.solved, self.response = self._solve(micro.x, micro.y)

    def _solve(self, x: Tensor, y: Tensor) -> tuple[Tensor | None, Tensor]:
        """``solved, response``: the values that an erase makes for W_0 = 0, and for each key channel of W_0."""
        micro = self.micro
        lower, incoming, constant = torch.zeros(()), torch.zeros(()), torch.zeros(())
        for lag in sorted(set(micro.lags)):
            mine = x
            if len(set(micro.lags)) > 1:
                mask = torch.tensor([at == lag for at in micro.lags], device=x.device).repeat(x.shape[-2] // len(micro.lags))
                mine = only(mask.unsqueeze(-1), x)
            lower = self._seen(mine, y, 1 + lag) + lower
            incoming = self._incoming(mine, 1 + lag) + incoming
            if micro.w is not None and micro.u is not None:
                constant = micro.u if micro.tied else self._seen(mine, micro.w, 1 + lag) @ micro.u + constant
        system = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device) - lower
        right = [incoming] if constant.ndim == 0 else [constant, incoming]
        lead = torch.broadcast_shapes(system.shape[:-2], *(r.shape[:-2] for r in right))
        both = torch.cat([r.expand(*lead, *r.shape[-2:]) for r in right], -1)
        both = torch.linalg.solve_triangular(system.expand(*lead, *system.shape[-2:]), both, upper=False, unitriangular=True)
        solved, response = both.split([both.shape[-1] - incoming.shape[-1], incoming.shape[-1]], -1)
        return (solved if solved.shape[-1] else None), response

    def _seen(self, x: Tensor, keys: Tensor, back: int) -> Tensor:
        """How much reader i sees of what was written at micro-step j: (..., S, S)."""
        return self._within(_later(visible(_earlier(x, back), keys, self.micro.decay), back, 0.0))

    def _within(self, scores: Tensor) -> Tensor:
        s = self.segments
        return scores if s is None else only(s == s.mT, scores)

    def _incoming(self, x: Tensor, back: int) -> Tensor:
        """Reader i, decayed as W_0 is when it reads."""
        if not self.micro.decay.none:
            x = x * _later(self.micro.decay.since_start(), back, 1.0)
        return x if self.segments is None else only(self.segments == 0, x)

    def transition(self) -> Transition:
        """How the block changes W."""
        kept = None if self.segments is None else self.segments[..., -1:, :] == 0
        total = None if self.micro.decay.none else self.micro.decay.since_start()[..., -1:, :]
        added = None if self.plain is None else self.plain[1].mT @ self._at_end(self.plain[0])
        ends = None if self.response is None or self.micro.y is None else self._at_end(self.micro.y)
        return Transition(kept, total, added, self.solved, self.response, ends)

    def _at_end(self, keys: Tensor) -> Tensor:
        """Keys, decayed as what is written there is at the end of the block."""
        if not self.micro.decay.none:
            keys = keys * self.micro.decay.until_end()
        return keys if self.segments is None else only(self.segments == self.segments[..., -1:, :], keys)

    def reads(self, weights: Tensor, values: Tensor | None) -> list[Tensor]:
        """What each reader reads, given W_0 and the values that the erase made: (..., S, V), or (..., S, K) if it reads W^T."""
        events = [] if self.plain is None else [self.plain]
        if values is not None and self.micro.y is not None:
            events.append((self.micro.y, values))
        return [
            self._read_back(q, back, weights, events) if backward else self._read(q, back, weights, events)
            for q, back, backward in zip(self.micro.readers, self.micro.back, self.micro.backward, strict=True)
        ]

    def _read(self, q: Tensor, back: int, weights: Tensor, events: list[tuple[Tensor, Tensor]]) -> Tensor:
        out = self._incoming(q, back) @ weights.mT
        for keys, values in events:
            out = out + self._seen(q, keys, back) @ values
        return out

    def _read_back(self, q: Tensor, back: int, weights: Tensor, events: list[tuple[Tensor, Tensor]]) -> Tensor:
        out = self._incoming(q @ weights, back)
        for keys, values in events:
            scores = self._within(q @ values.mT)
            out = out + _later(mixed(_earlier(scores, back), keys, self.micro.decay), back, 0.0)
        return out


def _earlier(x: Tensor, by: int) -> Tensor:
    """Row i + by moves to row i; the last rows are zero."""
    by = min(by, x.shape[-2])
    return torch.cat([x[..., by:, :], torch.zeros_like(x[..., :by, :])], -2) if by else x


def _later(x: Tensor, by: int, fill: float) -> Tensor:
    """Row i moves to row i + by; the first rows are ``fill``."""
    by = min(by, x.shape[-2])
    return torch.cat([torch.full_like(x[..., :by, :], fill), x[..., : x.shape[-2] - by, :]], -2) if by else x
