"""The normal form of a rule that is affine in its weights, as plain data.

A token is ``n`` micro-steps, each

    W <- W (diag(a) + x y^T) + u w^T

with ``a, x, y, w`` in key space and ``u`` in value space, and reads ``W^(i) q`` of the weights after ``i`` of them. Every
letter is an expression over the signals. A rule that acts on rows is the program of its transpose: then S = W^T takes
the place of W, and a read of W is a backward read of S.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from .expr import Expr

Decay = Literal["none", "scalar", "key"]
Erase = Literal["none", "tied", "free"]


@dataclass(frozen=True, eq=False)
class MicroStep:
    """One W <- W (diag(a) + x y^T) + u w^T; ``None`` is one for ``a`` and nothing for a pair.

    ``a = exp(log_decay) * factor``: what the rule writes as an exponential stays in log space, any other multiplier is
    ``factor``. ``x`` reads the weights before this micro-step, or ``lag`` micro-steps earlier still.
    """

    log_decay: Expr | None = None
    factor: Expr | None = None
    x: Expr | None = None
    y: Expr | None = None
    u: Expr | None = None
    w: Expr | None = None
    lag: int = 0

    @property
    def only_decays(self) -> bool:
        return self.x is None and self.u is None

    @property
    def decay(self) -> Decays:
        return Decays(self.log_decay, self.factor)

    def with_decay(self, decay: Decays) -> MicroStep:
        return replace(self, log_decay=decay.log, factor=decay.factor)


@dataclass(frozen=True, eq=False)
class Decays:
    """A multiplier exp(log) * factor of the weights: a scalar or one number per key; ``None`` is one."""

    log: Expr | None = None
    factor: Expr | None = None

    def __mul__(self, other: Decays) -> Decays:
        return Decays(_join(self.log, other.log, operator.add), _join(self.factor, other.factor, operator.mul))

    def of(self, vector: Expr) -> Expr:
        """The vector in key space, decayed."""
        vector = vector if self.log is None else self.log.exp() * vector
        return vector if self.factor is None else self.factor * vector

    @property
    def linear(self) -> Expr | None:
        return _join(None if self.log is None else self.log.exp(), self.factor, operator.mul)


def _join(a: Expr | None, b: Expr | None, how: Callable[[Expr, Expr], Expr]) -> Expr | None:
    return b if a is None else a if b is None else how(a, b)


@dataclass(frozen=True, eq=False)
class Read:
    """``W q`` of the weights after ``version`` micro-steps of the token, or ``W^T q`` if ``backward``."""

    q: Expr
    version: int
    backward: bool = False


@dataclass(frozen=True, eq=False)
class Carry:
    """A vector or scalar state that the signals alone determine, so that it is computed before the scan.

    ``kind`` linear: s <- decay * s + input (elementwise). ``kind`` max: s <- max(decay + s, input).
    """

    name: str
    kind: Literal["linear", "max"]
    decay: Expr | None
    input: Expr | None


@dataclass(frozen=True, eq=False)
class Program:
    """A rule lowered to its normal form; its class, decay x erase, follows from the expressions."""

    leaves: dict[str, Expr]
    steps: tuple[MicroStep, ...]
    reads: tuple[Read, ...]
    read_leaves: tuple[Expr, ...]
    output: Expr
    carries: tuple[Carry, ...] = ()
    transposed: bool = False

    @property
    def n(self) -> int:
        """Micro-steps a token."""
        return len(self.steps)

    @property
    def decay(self) -> Decay:
        found = [e.meta.ndim for s in self.steps for e in (s.log_decay, s.factor) if e is not None]
        return "none" if not found else "key" if max(found) else "scalar"

    @property
    def erase(self) -> Erase:
        if all(s.x is None for s in self.steps):
            return "none"
        return "tied" if all(s.x is None or s.u is None or s.y is s.w for s in self.steps) else "free"

    @property
    def kind(self) -> str:
        """The class in words, such as ``decay scalar, erase tied, rows``."""
        words = [f"decay {self.decay}", f"erase {self.erase}"]
        words += [f"{self.n} micro-steps"] if self.n > 1 else []
        words += ["acts on rows"] if self.transposed else []
        return ", ".join(words)

    def expressions(self) -> Iterator[Expr]:
        """Every expression that is needed before the scan, the carries' excepted."""
        for step in self.steps:
            yield from (e for e in (step.log_decay, step.factor, step.x, step.y, step.u, step.w) if e is not None)
        yield from (r.q for r in self.reads)

    def __str__(self) -> str:
        from .show import normal_form

        return normal_form(self)
