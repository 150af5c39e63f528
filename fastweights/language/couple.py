"""Rules whose matrices move together: each new one a sum of the old ones, times numbers, and of one write at one key.

With Z the stack of the m matrices, such a rule is

    e = u + sum_j c_j Z_j k,    Z_i <- sum_j P_ij Z_j + b_i e k^T,    y = Z_1 q with the new Z

with numbers P, b, c and vectors u, k of the signals: affine in all matrices jointly, though not W alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .chain import plus, times
from .expr import Expr
from .lower import constant

Numbers = tuple[Expr | None, ...]  # None is zero


class NotCoupled(Exception):
    """The rule is not of this kind."""


@dataclass(frozen=True, eq=False)
class Coupled:
    """The normal form: ``mix[i][j]`` is P_ij, ``write[i]`` is b_i, ``feedback[j]`` is c_j, ``error`` is u (None: zero)."""

    mix: tuple[Numbers, ...]
    write: Numbers
    feedback: Numbers
    error: Expr | None
    key: Expr
    query: Expr

    def expressions(self) -> list[Expr]:
        found = [*(e for row in self.mix for e in row), *self.write, *self.feedback, self.error, self.key, self.query]
        return [e for e in found if e is not None]


def couple(matrices: Sequence[Expr], new: Sequence[Expr], query: Expr) -> Coupled:
    """The normal form of a rule with those states; raises ``NotCoupled`` if it has none."""
    if len(matrices) < 2 or any(s.meta.shape != matrices[0].meta.shape or s.meta.ndim != 2 for s in matrices):
        raise NotCoupled
    reader = _Reader(list(matrices))
    sums = [reader.matrix(s) for s in new]
    writes = list(dict.fromkeys(w for s in sums for w in s.writes))
    if len(writes) != 1:
        raise NotCoupled
    vector, key = writes[0]
    reader.check_free(key)
    feedback, error = reader.vector(vector, key)
    return Coupled(tuple(tuple(s.of) for s in sums), tuple(s.writes.get(writes[0]) for s in sums), tuple(feedback), error, key, query)


@dataclass
class _Sum:
    """A matrix as a sum: what it has of every old one, and of every write."""

    of: list[Expr | None]
    writes: dict[tuple[Expr, Expr], Expr | None]

    def __add__(self, other: _Sum) -> _Sum:
        writes = dict(self.writes)
        for w, x in other.writes.items():
            writes[w] = plus(writes.get(w), x)
        return _Sum([plus(a, b) for a, b in zip(self.of, other.of, strict=True)], writes)

    def scaled(self, by: Expr) -> _Sum:
        return _Sum(
            [None if x is None else times(x, by) for x in self.of], {w: times(x, by) for w, x in self.writes.items() if x is not None}
        )


class _Reader:
    def __init__(self, matrices: list[Expr]) -> None:
        self.matrices = matrices
        self.moved = set(matrices)
        for node in matrices[0].tape.nodes:
            if any(p in self.moved for p in node.parents):
                self.moved.add(node)

    def check_free(self, e: Expr) -> None:
        if e in self.moved:
            raise NotCoupled

    def number(self, e: object) -> Expr:
        """A number of the signals alone."""
        made = e if isinstance(e, Expr) else constant(self.matrices[0], e)
        if made.meta.ndim or made in self.moved:
            raise NotCoupled
        return made

    def matrix(self, e: object) -> _Sum:
        one = constant(self.matrices[0], 1.0)
        if not isinstance(e, Expr) or e.kwargs:
            raise NotCoupled
        if any(e is m for m in self.matrices):
            return _Sum([one if m is e else None for m in self.matrices], {})
        match e.op, e.args:
            case "add", (a, b):
                return self.matrix(a) + self.matrix(b)
            case "neg", (a,):
                return self.matrix(a).scaled(-one)
            case "mul", (a, b):
                for x, y in ((a, b), (b, a)):
                    if not isinstance(x, Expr) or x.meta.ndim == 0:
                        return self.matrix(y).scaled(self.number(x))
            case "div", (a, b):
                return self.matrix(a).scaled(1 / self.number(b))
            case "outer", (u, k):
                return _Sum([None] * len(self.matrices), {(u, k): one})
        raise NotCoupled

    def vector(self, e: Expr, key: Expr) -> tuple[list[Expr | None], Expr | None]:
        """The numbers c and the rest u of sum_j c_j Z_j k + u."""
        nothing: list[Expr | None] = [None] * len(self.matrices)
        if e not in self.moved:
            return nothing, e
        match e.op, e.args:
            case "add", (Expr() as a, Expr() as b):
                (c, u), (d, w) = self.vector(a, key), self.vector(b, key)
                return [plus(x, y) for x, y in zip(c, d, strict=True)], plus(u, w)
            case "neg", (Expr() as a,):
                return self._scaled(*self.vector(a, key), constant(e, -1.0))
            case "mul", (a, b):
                for x, y in ((a, b), (b, a)):
                    if isinstance(y, Expr) and (not isinstance(x, Expr) or x.meta.ndim == 0):
                        return self._scaled(*self.vector(y, key), self.number(x))
            case "matmul", (Expr() as M, k) if k is key:
                found = self.matrix(M)
                if not found.writes:
                    return list(found.of), None
        raise NotCoupled

    @staticmethod
    def _scaled(c: list[Expr | None], u: Expr | None, by: Expr) -> tuple[list[Expr | None], Expr | None]:
        return [None if x is None else times(x, by) for x in c], None if u is None else u * by
