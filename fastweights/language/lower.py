"""From what a rule's body computed to its normal form, or to the line that prevents one.

The graph is read once with values of two new kinds: a ``Mat`` is a matrix that depends on W, held as the chain of
micro-steps that led to it plus outer products not yet added; a ``Lin`` is a vector that is affine in W, held as a
constant plus reads of W. Whatever cannot be expressed with these is not affine, or mixes rows with columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .chain import Chain, Lin, Reading, decays, fold, plus, shared_version, times, writes
from .expr import Expr, Where, ordered
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

    def depends(self, node: Any) -> bool:
        return isinstance(node, Expr) and not isinstance(self.value(node), Expr)

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
        assert mat.chain is not None
        grouped: dict[Expr, Lin] = {}
        for left, right in mat.terms:
            left, right = (right, left) if mat.flip else (left, right)
            if right.reads or any(r.backward for r in left.reads):
                raise self._other_side(node)
            assert right.const is not None
            known = grouped.get(right.const)
            grouped[right.const] = left if known is None else Lin(plus(known.const, left.const), known.reads + left.reads)
        chain = mat.chain
        for key, left in grouped.items():
            chain = writes(chain, left, key)
        return replace(mat, chain=chain, terms=())

    def _other_side(self, node: Expr) -> NotAffine:
        return NotAffine(f"it acts on the {'columns' if self.rows else 'rows'} of W", node.where, side=True)

    def value(self, node: Expr) -> Any:
        """An ``Expr`` (does not depend on W), a ``Mat``, a ``Lin``; raises ``NotAffine`` for anything else."""
        for n in ordered([node], self.known):
            args = [self.known[a] if isinstance(a, Expr) else a for a in n.args]
            flat = [self.known[p] for p in n.parents]
            self.known[n] = self._combine(n, args) if any(not isinstance(a, Expr) for a in flat) else n
        return self.known[node]

    def _combine(self, node: Expr, args: list[Any]) -> Any:
        how: Callable[..., Any] | None = getattr(self, f"_{node.op}", None)
        what = next(a for a in node.parents if not isinstance(self.known[a], Expr))
        subject = "W" if isinstance(self.known[what], Mat) else "a read of W"
        if how is None:
            raise NotAffine(f"{node.op} of {subject} is not affine in W", node.where)
        out = None if node.kwargs else how(node, *args)
        if out is None:
            other = _other(node, self.known)
            raise NotAffine(f"{node.op} of {subject} with {other} has no normal form (diagonal plus outer products)", node.where)
        return out

    def matrix(self, node: Any) -> Mat | None:
        """``node`` as a ``Mat``, also if it does not depend on W; None if it is a matrix of no structure."""
        value = self.value(node) if isinstance(node, Expr) else node
        if isinstance(value, Mat) or value is None:
            return value
        if isinstance(value, (int, float)):
            return Mat(None) if value == 0 else None
        if isinstance(value, Tensor):
            return _constant_matrix(value, self.weights)
        return self._structure(value) if isinstance(value, Expr) else None

    def _structure(self, node: Expr) -> Mat | None:
        """A matrix of signals alone as outer products and a diagonal, where it is made so."""
        if node.meta.ndim != 2:
            return None
        how = {"add": self._add, "sub": self._sub, "neg": self._neg, "mul": self._mul, "div": self._div,
               "outer": self._outer, "mT": self._mT, "matmul": self._matmul}.get(node.op)  # fmt: skip
        if node.op == "diag":
            return Mat(None, diag=node.args[0])
        if node.op == "constant":
            return _constant_matrix(node.args[0], node)
        return how(node, *node.args) if how and not node.kwargs else None

    # ---- one method an operation; None means that it has no such form ------------------------------------------------

    def _neg(self, node: Expr, a: Any) -> Any:
        return self._scaled(node, a, constant(node, -1.0))

    def _add(self, node: Expr, a: Any, b: Any) -> Any:
        if node.meta.ndim == 1:
            a, b = (self._broadcast(x, node) for x in (a, b))
            return Lin(plus(a.const, b.const), a.reads + b.reads) if a.axis is b.axis is None else None
        left, right = _as_line(a), _as_line(b)
        if (isinstance(a, Lin) or isinstance(b, Lin)) and left is not None and right is not None:
            return Lin(plus(left.const, right.const), left.reads + right.reads, left.axis) if left.axis == right.axis else None
        a, b = self.matrix(a), self.matrix(b)
        if a is None or b is None or (a.chain is not None and b.chain is not None and a.flip != b.flip):
            return None
        if a.chain is not None and b.chain is not None:
            return self._sum_of_two(a, b, node)
        host = a if b.chain is None else b
        out = Mat(host.chain, a.terms + b.terms, plus(a.diag, b.diag), host.flip)
        return out if out.chain is None else self._committed(out, node)

    def _broadcast(self, x: Any, node: Expr) -> Lin:
        """A vector or number as a vector of the shape of ``node``."""
        x = _lin(x, node)
        if x.const is not None and x.const.meta.ndim == 0:
            return replace(x, const=constant(node, torch.zeros(node.meta.shape)) + x.const)
        return x

    def _sum_of_two(self, a: Mat, b: Mat, node: Expr) -> Mat:
        """Two matrices that both contain W: both are expressed by the weights at their last common version."""
        assert a.chain is not None
        assert b.chain is not None
        version = shared_version(a.chain, b.chain)
        base, terms, factor = a.chain[:version], a.terms + b.terms, None
        for chain in (a.chain, b.chain):
            folded = fold(chain, version)
            factor = plus(factor, constant(node, 1.0) if folded.decay.linear is None else folded.decay.linear)
            pairs = [(Lin(None, (Reading(base, x),)), Lin(y)) for x, y in folded.erase]
            pairs += [(Lin(u), Lin(w)) for u, w in folded.write]
            terms += tuple((right, left) if a.flip else (left, right) for left, right in pairs)
        # a micro-step of its own, which the terms are merged into: they read ``base``
        return self._committed(Mat((*base, MicroStep(factor=factor)), terms, plus(a.diag, b.diag), a.flip), node)

    def _sub(self, node: Expr, a: Any, b: Any) -> Any:
        return self._add(node, a, self._scaled(node, as_value(node, b), constant(node, -1.0)))

    def _addr(self, node: Expr, a: Any, left: Any, right: Any) -> Any:
        return self._add(node, a, self._outer(node, left, right))

    def _lerp(self, node: Expr, a: Any, b: Any, weight: Any) -> Any:
        between = self._add(node, b, self._scaled(node, as_value(node, a), constant(node, -1.0)))
        return None if between is None or isinstance(weight, (Lin, Mat)) else self._add(node, a, self._mul(node, weight, between))

    def _div(self, node: Expr, a: Any, b: Any) -> Any:
        return None if isinstance(b, (Lin, Mat)) else self._scaled(node, as_value(node, a), 1 / as_expr(node, b))

    def _mul(self, node: Expr, a: Any, b: Any) -> Any:
        left, right = _as_line(a), _as_line(b)
        if left is not None and right is not None and {left.axis, right.axis} == {0, 1}:
            column, row = (left, right) if left.axis == 1 else (right, left)
            return Mat(None, ((replace(column, axis=None), replace(row, axis=None)),))
        if isinstance(a, (Lin, Mat)) and isinstance(b, (Lin, Mat)):
            raise NotAffine("a product of two values that depend on W is not affine in W", node.where)
        if isinstance(b, (Lin, Mat)) or _rank(b) > _rank(a):
            a, b = b, a
        return None if isinstance(b, (Lin, Mat)) else self._scaled(node, as_value(node, a), as_expr(node, b))

    def _scaled(self, node: Expr, a: Any, c: Expr) -> Any:
        """``a * c`` for a constant scalar or vector c."""
        shape = tuple(c.meta.shape)
        while shape and shape[0] == 1:
            c, shape = c[0], shape[1:]
        if isinstance(a, Expr) and a.meta.ndim < 2:
            return times(c, a)
        if isinstance(a, Lin):
            if shape and a.reads:
                raise NotAffine("a read of W is scaled by channel: that mixes rows and columns of W", node.where)
            reads = tuple(replace(r, q=times(c, r.q)) for r in a.reads)
            return Lin(None if a.const is None else times(c, a.const), reads, a.axis)
        mat = self.matrix(a)
        if mat is None:
            return None
        if len(shape) == 2:
            return self._rows(node, mat, c[:, 0]) if shape[1] == 1 else None
        return self._scale_columns(node, mat, c)

    def _rows(self, node: Expr, mat: Mat, c: Expr) -> Mat:
        return _flipped(self._scale_columns(node, _flipped(mat), c))

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
        mat = self.matrix(a)
        return None if mat is None else _flipped(mat)

    def _transpose(self, node: Expr, a: Any, i: int, j: int) -> Any:
        return self._mT(node, a) if {i % 2, j % 2} == {0, 1} else None

    def _outer(self, node: Expr, a: Any, b: Any) -> Any:
        return Mat(None, ((_lin(a, node), _lin(b, node)),))

    def _unsqueeze(self, node: Expr, a: Any, axis: int) -> Any:
        return replace(_lin(a, node), axis=axis % 2) if isinstance(a, Lin) and a.axis is None else None

    def _reshape(self, node: Expr, a: Any, *shape: Any) -> Any:
        """A vector as a column or a row."""
        new = tuple(node.meta.shape)
        axis = 1 if new[1:] == (1,) else 0 if new[:1] == (1,) and len(new) == 2 else None
        return None if axis is None else self._unsqueeze(node, a, axis)

    _view = _reshape

    def _getitem(self, node: Expr, a: Any, index: Any) -> Any:
        axis = _new_axis(index)
        return None if axis is None or not isinstance(a, Lin) else self._unsqueeze(node, a, axis)

    def _matmul(self, node: Expr, a: Any, b: Any) -> Any:
        if _is_vector(b) and not _is_vector(a):
            mat = self.matrix(a)
            return None if mat is None else self.read(node, mat, b)
        if _is_vector(a) and not _is_vector(b):
            mat = self.matrix(b)
            return None if mat is None else self.read(node, _flipped(mat), a)
        if _is_vector(a) and _is_vector(b):
            raise NotAffine("an inner product with a read of W is a number that mixes rows and columns of W", node.where)
        left, right = _as_line(a), _as_line(b)
        if left is not None and right is not None and (left.axis, right.axis) == (1, 0):
            return Mat(None, ((replace(left, axis=None), replace(right, axis=None)),))
        product = self._product(node, self.matrix(a), self.matrix(b))
        if product is None and isinstance(a, Mat) and right is not None and right.axis == 1:
            return replace(self.read(node, a, right if right.reads else right.const), axis=1)
        return product

    def _product(self, node: Expr, a: Mat | None, b: Mat | None) -> Mat | None:
        """W @ (diag + outer products), or the other way round."""
        if a is None or b is None or (a.chain is not None and b.chain is not None):
            return None
        if b.chain is not None:
            turned = self._product(node, _flipped(b), _flipped(a))
            return None if turned is None else _flipped(turned)
        out = Mat(None) if b.diag is None else self._scale_columns(node, a, b.diag)
        if any(left.reads for left, _ in b.terms):
            return None
        out = replace(out, terms=out.terms + tuple((self.read(node, a, left.const), right) for left, right in b.terms))
        return out if out.chain is None else self._committed(out, node)

    def read(self, node: Expr, mat: Mat, q: Any) -> Lin:
        """``mat @ q``."""
        if isinstance(q, Lin):
            raise NotAffine("W is read at a key that is itself a read of W", node.where)
        q = as_expr(node, q)
        out = Lin(None) if mat.chain is None else Lin(None, (Reading(mat.chain, q, mat.flip),))
        for left, right in mat.terms:
            if right.reads or right.const is None:
                raise NotAffine("an inner product with a read of W is a number that mixes rows and columns", node.where)
            part = self._scaled(node, left, right.const @ q)
            out = Lin(plus(out.const, part.const), out.reads + part.reads)
        return out if mat.diag is None else replace(out, const=plus(out.const, mat.diag * q))


def _flipped(mat: Mat) -> Mat:
    return replace(mat, terms=tuple((right, left) for left, right in mat.terms), flip=not mat.flip)


def constant(near: Expr, number: float | Tensor) -> Expr:
    return near.tape.constant(number)


def as_expr(near: Expr, x: Any) -> Expr:
    return x if isinstance(x, Expr) else constant(near, x)


def as_value(near: Expr, x: Any) -> Any:
    """What an operation is done to: a number or a vector of numbers becomes an expression."""
    return x if isinstance(x, (Lin, Mat)) or _rank(x) > 1 else as_expr(near, x)


def _rank(x: Any) -> int:
    if isinstance(x, (Lin, Mat)):
        return 1 if isinstance(x, Lin) and x.axis is None else 2
    return x.meta.ndim if isinstance(x, Expr) else x.ndim if isinstance(x, Tensor) else 0


def as_decay(c: Expr) -> Decays:
    """A multiplier, with the exponentials among its factors kept in log space."""
    if c.op == "constant" and bool((c.args[0] == 1).all()):
        return Decays()
    if c.op == "exp" and isinstance(c.args[0], Expr):
        return Decays(log=c.args[0])
    if c.op == "mul" and all(isinstance(a, Expr) for a in c.args):
        return as_decay(c.args[0]) * as_decay(c.args[1])
    return Decays(factor=c)


def _is_vector(x: Any) -> bool:
    return x.axis is None if isinstance(x, Lin) else _rank(x) == 1


def _lin(x: Any, near: Expr) -> Lin:
    return x if isinstance(x, Lin) else Lin(as_expr(near, x))


def _as_line(x: Any) -> Lin | None:
    """A vector, a row or a column, as what ``column * row`` multiplies."""
    if isinstance(x, Lin):
        return replace(x, axis=0) if x.axis is None else x
    if not isinstance(x, Expr) or x.meta.ndim == 0:
        return None
    if x.meta.ndim == 1:
        return Lin(x, axis=0)
    axis = _new_axis(x.args[1]) if x.op == "getitem" else x.args[1] % 2 if x.op == "unsqueeze" else None
    if axis is not None and _is_vector(x.args[0]):
        return Lin(x.args[0], axis=axis)
    shape = tuple(x.meta.shape)
    return Lin(x[:, 0], axis=1) if shape[1:] == (1,) else Lin(x[0], axis=0) if shape[:1] == (1,) else None


def _new_axis(index: Any) -> int | None:
    """The axis that ``[:, None]`` (1) or ``[None]`` (0) adds; None for any other index."""
    index = index if isinstance(index, tuple) else (index,)
    full = slice(None)
    if any(isinstance(i, (Expr, Tensor)) for i in index):
        return None
    if index == (full, None) or index == (Ellipsis, None):
        return 1
    return 0 if index in ((None,), (None, full), (None, Ellipsis)) else None


def _constant_matrix(value: Tensor, near: Expr) -> Mat | None:
    """A matrix of numbers, if it is diagonal (an identity, say)."""
    if value.ndim != 2:
        return None
    if not bool(value.any()):
        return Mat(None)
    if value.shape[0] != value.shape[1] or not torch.equal(value, value.diagonal().diag()):
        return None
    return Mat(None, diag=constant(near, value.diagonal()))


def _other(node: Expr, known: dict[Expr, Any]) -> str:
    others = [p for p in node.parents if isinstance(known[p], Expr)]
    if others:
        return repr(others[0])
    return "a number or a constant matrix of no structure" if len(node.parents) == 1 else "another value that depends on W"
