"""From what a rule's body computed to its normal form, or to the line that prevents one.

The graph is read once with values of two new kinds: a ``Mat`` is a matrix that depends on W, held as the chain of
micro-steps that led to it plus outer products not yet added; a ``Lin`` is a vector that is affine in W, held as a
constant plus reads of W. Whatever cannot be expressed with these is not affine, or mixes rows with columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from .chain import Chain, Lin, Reading, decays, fold, is_one, plus, shared_version, times, writes
from .expr import Expr, Where, added_axis, ordered, rank
from .program import Decays, MicroStep


class NotAffine(Exception):
    """A rule has no normal form: why, and the line; ``side``: it has none here because it acts on the other side of W."""

    def __init__(self, why: str, where: Where, side: bool = False) -> None:
        super().__init__(why)
        self.why, self.where, self.side = why, where, side


@dataclass(frozen=True, eq=False)
class Mat:
    """A matrix: S after ``chain`` (its transpose, if ``flip``; nothing, if None) + diag(``diag``) + sum of l r^T."""

    chain: Chain | None
    terms: tuple[tuple[Lin, Lin], ...] = ()
    diag: Expr | None = None
    flip: bool = False


class Lowering:
    """Reads a graph with S = W (or its transpose, ``rows``) as the weights."""

    def __init__(self, weights: Expr, rows: bool) -> None:
        self.weights, self.rows = weights, rows
        self.known: dict[Expr, Any] = {weights: Mat((), flip=rows)}

    def chain(self, node: Expr) -> Chain:
        """The micro-steps that make ``node`` out of W."""
        mat = self.matrix(node)
        if mat is None:
            raise NotAffine("the new W is a matrix that is not a sum of outer products", node.where)
        if mat.chain is None:
            mat = self._committed(replace(mat, chain=decays((), Decays(factor=constant(node, 0.0))), flip=self.rows), node)
        if mat.diag is not None or mat.flip != self.rows:
            raise NotAffine("the new W is a transpose of the old one, or adds a diagonal matrix", node.where)
        return mat.chain or (MicroStep(),)

    def _committed(self, mat: Mat, node: Expr) -> Mat:
        """The outer products beside W become micro-steps."""
        if mat.chain is None:
            return mat
        grouped: dict[Expr, Lin] = {}
        for left, right in mat.terms:
            left, right = (right, left) if mat.flip else (left, right)
            if right.reads or any(r.backward for r in left.reads):
                raise self._other_side(node)
            assert right.const is not None
            grouped[right.const] = grouped[right.const] + left if right.const in grouped else left
        chain = mat.chain
        for key, left in grouped.items():
            chain = writes(chain, left, key)
        return replace(mat, chain=chain, terms=())

    def _other_side(self, node: Expr) -> NotAffine:
        return NotAffine(f"it acts on the {'columns' if self.rows else 'rows'} of W", node.where, side=True)

    def value(self, node: Expr) -> Any:
        """An ``Expr`` (does not depend on W), a ``Mat``, a ``Lin``; raises ``NotAffine`` for anything else."""
        for n in ordered([node], self.known):
            affected = any(not isinstance(self.known[p], Expr) for p in n.parents)
            self.known[n] = self._combine(n) if affected else n
        return self.known[node]

    def _operands(self, node: Expr) -> list[Any]:
        """The values of what an operation is done to; a number is a constant."""
        return [self.value(a) if isinstance(a, Expr) else constant(node, a) if isinstance(a, (Number, Tensor)) else a for a in node.args]

    def _combine(self, node: Expr) -> Any:
        how: Callable[..., Any] | None = getattr(self, f"_{node.op}", None)
        what = next(a for a in node.parents if not isinstance(self.known[a], Expr))
        subject = "W" if isinstance(self.known[what], Mat) else "a read of W"
        if how is None:
            raise NotAffine(f"{node.op} of {subject} is not affine in W", node.where)
        out = None if node.kwargs else how(node, *self._operands(node))
        if out is None:
            others = [repr(p) for p in node.parents if isinstance(self.known[p], Expr)]
            others += ["a number or a constant matrix of no structure" if len(node.parents) == 1 else "another value that depends on W"]
            raise NotAffine(f"{node.op} of {subject} with {others[0]} has no normal form (diagonal plus outer products)", node.where)
        return out

    def matrix(self, x: Any) -> Mat | None:
        """``x`` as a ``Mat``, also if it does not depend on W; None if it is no matrix, or one of no structure."""
        x = self.value(x) if isinstance(x, Expr) else x
        if not isinstance(x, Expr):
            return x if isinstance(x, Mat) else None
        if x.op == "constant":
            return Mat(None) if x is constant(x, 0.0) else _constant_matrix(x)
        if x.meta.ndim != 2 or x.kwargs:
            return None
        if x.op == "diag" and len(x.args) == 1:
            return Mat(None, diag=x.args[0])
        how = getattr(self, f"_{x.op}", None)
        return how(x, *self._operands(x)) if how else None

    def _turned(self, x: Any) -> Mat | None:
        """The transpose of ``matrix(x)``."""
        mat = self.matrix(x)
        return None if mat is None else _flipped(mat)

    # ---- one method an operation; None means that it has no such form ------------------------------------------------

    def _neg(self, node: Expr, a: Any) -> Any:
        return self._scaled(node, a, constant(node, -1.0))

    def _add(self, node: Expr, a: Any, b: Any) -> Any:
        if isinstance(a, Lin) or isinstance(b, Lin):
            left, right = (self._broadcast(x, node) if node.meta.ndim == 1 else _as_line(x) for x in (a, b))
            if left is None or right is None or left.axis != right.axis:
                return None
            return left + right
        a, b = self.matrix(a), self.matrix(b)
        if a is None or b is None:
            return None
        if a.chain is not None and b.chain is not None:
            return self._sum_of_two(node, a, b, (a.chain, b.chain)) if a.flip == b.flip else None
        host = a if b.chain is None else b
        return self._committed(Mat(host.chain, a.terms + b.terms, plus(a.diag, b.diag), host.flip), node)

    def _broadcast(self, x: Any, node: Expr) -> Lin:
        """A vector or number as a vector of the shape of ``node``."""
        x = _lin(x)
        if x.const is not None and x.const.meta.ndim == 0:
            return replace(x, const=constant(node, torch.zeros(node.meta.shape)) + x.const)
        return x

    def _sum_of_two(self, node: Expr, a: Mat, b: Mat, chains: tuple[Chain, Chain]) -> Mat:
        """Two matrices that both contain W: both are expressed by the weights at their last common version."""
        version = shared_version(*chains)
        base, terms, factor = chains[0][:version], a.terms + b.terms, None
        for chain in chains:
            folded = fold(chain, version)
            factor = plus(factor, constant(node, 1.0) if folded.decay.linear is None else folded.decay.linear)
            pairs = [(Lin(None, (Reading(base, x),)), Lin(y)) for x, y in folded.erase]
            pairs += [(Lin(u), Lin(w)) for u, w in folded.write]
            terms += tuple((right, left) if a.flip else (left, right) for left, right in pairs)
        # a micro-step of its own, which the terms are merged into: they read ``base``
        return self._committed(Mat((*base, MicroStep(factor=factor)), terms, plus(a.diag, b.diag), a.flip), node)

    def _div(self, node: Expr, a: Any, b: Any) -> Any:
        return None if isinstance(b, (Lin, Mat)) else self._mul(node, a, 1 / b)

    def _mul(self, node: Expr, a: Any, b: Any) -> Any:
        left, right = _as_line(a), _as_line(b)
        if left is not None and right is not None and left.axis != right.axis:
            return self._outer(node, *((left, right) if left.axis == 1 else (right, left)))
        if isinstance(a, (Lin, Mat)) and isinstance(b, (Lin, Mat)):
            raise NotAffine("a product of two values that depend on W is not affine in W", node.where)
        if isinstance(b, (Lin, Mat)) or _rank(b) > _rank(a):
            a, b = b, a
        return None if isinstance(b, (Lin, Mat)) else self._scaled(node, a, b)

    def _scaled(self, node: Expr, a: Any, c: Expr) -> Any:
        """``a * c`` for a constant scalar or vector c."""
        shape = tuple(c.meta.shape)
        while shape and shape[0] == 1:
            c, shape = c[0], shape[1:]
        if isinstance(a, Lin):
            if shape and a.reads:
                raise NotAffine("a read of W is scaled by channel: that mixes rows and columns of W", node.where)
            reads = tuple(replace(r, q=times(c, r.q)) for r in a.reads)
            return Lin(None if a.const is None else times(c, a.const), reads, a.axis)
        mat = self.matrix(a)
        if mat is None:
            return None
        if len(shape) == 2:
            return _flipped(self._scale_columns(node, _flipped(mat), c[:, 0])) if shape[1] == 1 else None
        return self._scale_columns(node, mat, c)

    def _scale_columns(self, node: Expr, mat: Mat, c: Expr) -> Mat:
        by_channel = c.meta.ndim == 1
        if mat.chain is not None and by_channel and mat.flip:
            raise self._other_side(node)
        chain = None if mat.chain is None else decays(mat.chain, as_decay(c))
        terms = tuple(
            (left, self._scaled(node, right, c)) if by_channel or right.reads else (self._scaled(node, left, c), right)
            for left, right in mat.terms
        )
        return Mat(chain, terms, None if mat.diag is None else times(c, mat.diag), mat.flip)

    def _mT(self, node: Expr, a: Any) -> Any:
        return self._turned(a)

    def _transpose(self, node: Expr, a: Any, *axes: Any) -> Any:
        return self._turned(a) if {axis % 2 for axis in node.args[1:]} == {0, 1} else None

    def _outer(self, node: Expr, a: Any, b: Any) -> Any:
        return Mat(None, ((replace(_lin(a), axis=None), replace(_lin(b), axis=None)),))

    def _getitem(self, node: Expr, a: Any, index: Any) -> Any:
        axis = added_axis(node)
        return None if axis is None or not isinstance(a, Lin) else replace(a, axis=axis)

    def _matmul(self, node: Expr, a: Any, b: Any) -> Any:
        if _rank(a) == _rank(b) == 1:
            raise NotAffine("an inner product with a read of W is a number that mixes rows and columns of W", node.where)
        if 1 in (_rank(a), _rank(b)):
            mat, q = (self.matrix(a), b) if _rank(b) == 1 else (self._turned(b), a)
            return None if mat is None else self.read(node, mat, _lin(q))
        left, right = _as_line(a), _as_line(b)
        if left is not None and right is not None and (left.axis, right.axis) == (1, 0):
            return self._outer(node, left, right)
        product = self._product(node, self.matrix(a), self.matrix(b))
        if product is None and isinstance(a, Mat) and right is not None and right.axis == 1:
            return replace(self.read(node, a, right), axis=1)
        return product

    def _product(self, node: Expr, a: Mat | None, b: Mat | None) -> Mat | None:
        """W @ (diag + outer products), or the other way round."""
        if a is None or b is None or (a.chain is not None and b.chain is not None):
            return None
        if b.chain is not None:
            return self._turned(self._product(node, _flipped(b), _flipped(a)))
        out = Mat(None) if b.diag is None else self._scale_columns(node, a, b.diag)
        if any(left.reads for left, _ in b.terms):
            return None
        return self._committed(replace(out, terms=out.terms + tuple((self.read(node, a, left), right) for left, right in b.terms)), node)

    def read(self, node: Expr, mat: Mat, q: Lin) -> Lin:
        """``mat @ q``."""
        if q.reads or q.const is None:
            raise NotAffine("W is read at a key that is itself a read of W", node.where)
        out = Lin(None) if mat.chain is None else Lin(None, (Reading(mat.chain, q.const, mat.flip),))
        for left, right in mat.terms:
            if right.reads or right.const is None:
                raise NotAffine("an inner product with a read of W is a number that mixes rows and columns", node.where)
            out = out + self._scaled(node, left, right.const @ q.const)
        return out if mat.diag is None else out + Lin(mat.diag * q.const)


def _flipped(mat: Mat) -> Mat:
    return replace(mat, terms=tuple((right, left) for left, right in mat.terms), flip=not mat.flip)


def constant(near: Expr, number: Any) -> Expr:
    return near.tape.constant(number)


def _rank(x: Any) -> int:
    return (1 if x.axis is None else 2) if isinstance(x, Lin) else 2 if isinstance(x, Mat) else rank(x)


def as_decay(c: Expr) -> Decays:
    """A multiplier, with the exponentials among its factors kept in log space."""
    if is_one(c):
        return Decays()
    if c.op == "exp" and isinstance(c.args[0], Expr):
        return Decays(log=c.args[0])
    if c.op == "mul" and all(isinstance(a, Expr) for a in c.args):
        return as_decay(c.args[0]) * as_decay(c.args[1])
    if c.op == "getitem" and isinstance(c.args[0], Expr) and c.args[0].op == "exp":  # the only channel of one
        return Decays(log=c.args[0].args[0][c.args[1]])
    return Decays(factor=c)


def _lin(x: Any) -> Lin:
    return x if isinstance(x, Lin) else Lin(x)


def _as_line(x: Any) -> Lin | None:
    """A vector, a row or a column, as what ``column * row`` multiplies."""
    if isinstance(x, Lin):
        return replace(x, axis=0) if x.axis is None else x
    if not isinstance(x, Expr) or x.meta.ndim == 0:
        return None
    if x.meta.ndim == 1:
        return Lin(x, axis=0)
    if (axis := added_axis(x)) is not None:
        return Lin(x.args[0], axis=axis)
    shape = tuple(x.meta.shape)
    return Lin(x[:, 0], axis=1) if shape[1:] == (1,) else Lin(x[0], axis=0) if shape[:1] == (1,) else None


def _constant_matrix(x: Expr) -> Mat | None:
    """A matrix of numbers, if it is diagonal (an identity, say)."""
    value = x.args[0]
    if value.ndim != 2:
        return None
    if not bool(value.any()):
        return Mat(None)
    if value.shape[0] != value.shape[1] or not torch.equal(value, value.diagonal().diag()):
        return None
    return Mat(None, diag=constant(x, value.diagonal()))
