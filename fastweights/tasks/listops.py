"""ListOps: nested MIN, MAX and FIRST of digits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
from torch import Tensor

from .source import IGNORED, Task, generator, padded, tokens

WORDS = (*"0123456789", "[MIN", "[MAX", "[FIRST", "]")
_DIGITS, _OPERATORS, _CLOSE = 10, 3, 13
_OPERATOR_SHARE = 0.25
_EXACTLY, _AT_MOST = 100, 200  # plus h: a tree that is still to be drawn, of that height


@dataclass(frozen=True)
class ListOps(Task):
    """A tree of MIN, MAX and FIRST, exactly ``depth`` operators deep; its value is to be told at the last bracket.

    An operator has 2 to ``arguments`` arguments, each an operator with probability 1/4 and a digit otherwise; trees are drawn from that
    distribution, given their depth. ``extended`` is the same at depth ``deeper``. Chance is that of a constant, about 0.25, as MIN makes
    small digits likely and MAX large ones. Source: Nangia and Bowman 2018; this choice of operators, and depths 10 and 15, Irie et al.
    2021, whose method, drawing until the depth is right, has the same outcome.

    >>> source = ListOps(depth=2)
    >>> inputs, targets = source.batch(seed=0, step=0, size=1)
    >>> source.text(inputs[0]), targets[0].max().item()
    ('[MAX [MAX 5 0 ] 3 ]', 5)
    """

    name: ClassVar[str] = "listops"
    vocabulary: ClassVar[int] = len(WORDS)
    depth: int = 5
    deeper: int = 8
    arguments: int = 5

    def __post_init__(self) -> None:
        self.expect(depth=1, deeper=1, arguments=2)

    def extended(self) -> Task | None:
        return None if self.deeper == self.depth else ListOps(self.deeper, self.deeper, self.arguments)

    def text(self, row: Tensor) -> str:
        """A row of inputs as it is read, up to the bracket that closes it."""
        said, opened = [], 0
        for i in row.tolist():
            said.append(WORDS[i])
            opened += (_DIGITS <= i < _CLOSE) - (i == _CLOSE)
            if not opened:
                break
        return " ".join(said)

    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]:
        draw = generator(seed, step)
        flat, row = np.full(size, _EXACTLY + self.depth), np.arange(size)
        for _ in range(self.depth + 1):
            flat, row = self._grow(draw, flat, row)
        counts = np.bincount(row, minlength=size)
        inputs = padded(flat, counts)
        targets = np.full(inputs.shape, IGNORED)
        targets[np.arange(size), counts - 1] = self._values(inputs, counts)
        return tokens(inputs), tokens(targets)

    def _grow(self, draw: np.random.Generator, flat: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One level: every tree that is still to be drawn becomes a digit, or an operator with trees for arguments."""
        heights, numbers = _chances(self.depth, self.arguments)
        open_ = flat >= _EXACTLY
        exact = open_ & (flat < _AT_MOST)
        h = np.where(open_, flat % 100, 0)
        count = (draw.random(len(flat))[:, None] > numbers[exact.astype(int), h]).sum(1)  # 0: a digit, else the number of arguments
        count[~open_] = 0
        kept = count == 0
        width = np.where(kept, 1, count + 2)
        start = width.cumsum() - width
        of = np.repeat(np.arange(len(flat)), width)
        at = np.arange(len(of)) - start[of] - 1  # which argument
        # given that some argument is as high as it can be: which is the first, with the geometric distribution cut off at their number
        child = np.maximum(h - 1, 0)
        top = (heights[child] - heights[child - 1]) / heights[child]
        reached = 1 - (1 - top) ** np.maximum(count, 1)
        first = np.floor(np.log1p(-draw.random(len(flat)) * reached) / np.log(np.maximum(1 - top, 1e-300))).astype(int)
        again = draw.random(len(of)) < top[of]
        below = np.where((at == first[of]) | ((at > first[of]) & again), _EXACTLY + child[of], _AT_MOST + child[of] - 1)
        out = np.where(exact[of], below, _AT_MOST + child[of])
        out = np.where(at < 0, draw.integers(_DIGITS, _CLOSE, size=len(of)), out)
        out = np.where(at == count[of], _CLOSE, out)
        digits = np.where(open_, draw.integers(_DIGITS, size=len(flat)), flat)
        return np.where(kept[of], digits[of], out), row[of]

    def _values(self, inputs: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """A machine with a stack of operators, each with the result of the arguments so far."""
        size = len(inputs)
        rows, depth = np.arange(size), np.zeros(size, np.int64)
        operator, result = np.zeros((2, size, self.depth + 1), np.int64)
        fresh = np.ones((size, self.depth + 1), bool)
        for t in range(inputs.shape[1]):
            token, now = inputs[:, t], t < counts
            opens, closes = now & (token >= _DIGITS) & (token < _CLOSE), now & (token == _CLOSE)
            depth = depth + opens
            operator[rows[opens], depth[opens]], fresh[rows[opens], depth[opens]] = token[opens] - _DIGITS, True
            x = np.where(closes, result[rows, depth], token)
            depth = depth - closes
            told = closes | (now & (token < _DIGITS))
            r, d, x = rows[told], depth[told], x[told]
            old = result[r, d]
            result[r, d] = np.where(fresh[r, d], x, np.choose(operator[r, d], [np.minimum(old, x), np.maximum(old, x), old]))
            fresh[r, d] = False
        return result[:, 0]


@lru_cache(maxsize=32)
def _chances(depth: int, arguments: int) -> tuple[np.ndarray, np.ndarray]:
    """P(height <= h) of an argument for h = 0 ... depth, and 0 for h = -1, at the end; cumulative chances of the number of arguments.

    The latter are (2, depth + 1, arguments) for 0, 1, ... arguments, the last left out: for trees of height at most h, then exactly h.
    """
    heights = np.zeros(depth + 2)
    weights = np.zeros((2, depth + 1, arguments + 1))
    n = np.arange(2, arguments + 1)
    share = _OPERATOR_SHARE / len(n)
    for h in range(depth + 1):
        below, lower = (heights[h - 1], heights[h - 2] if h > 1 else 0.0) if h else (0.0, 0.0)
        weights[0, h, 0] = 1 - _OPERATOR_SHARE
        weights[0, h, 2:] = share * below**n
        weights[1, h, 0] = h == 0
        weights[1, h, 2:] = share * (below**n - lower**n)
        heights[h] = weights[0, h].sum()
    return heights, (weights / weights.sum(-1, keepdims=True)).cumsum(-1)[..., :-1]
