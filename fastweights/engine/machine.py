"""Any rule as a list of loops: what the body computes for one token, and its gradient, for the compiled machine of ``csrc/machine.cpp``.

The machine knows one instruction: a loop over at most three axes that computes ``out = f(a, b, c)``, or adds that to ``out``, number
by number, where any operand may stand still along any axis. A product of matrices, a write, a softmax and a sum are such loops. The
body's expressions are translated one by one; their derivatives are loops again, and are run in the opposite order.

Memory is a few buffers: the states before and after the token, a workspace (signals, all that is computed, the output), and what is the
same for all tokens. The gradient of every number has its place in four more buffers of the same layout, and there is one for what only
gradients need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..language.expr import Expr, ordered
from ..language.trace import Trace

STATE, WORK, NEW, FIXED = range(4)  # the buffers; those of gradients come after
GRADIENT, SCRATCH = 4, 8
# in the order of csrc/machine.cpp
OPS = (
    "copy", "neg", "add", "sub", "mul", "div", "add_product", "sub_product", "maximum", "minimum", "greater", "equal", "greater_equal",
    "select",
    "exp", "log", "sqrt", "tanh", "sigmoid", "softplus", "relu", "abs", "sign", "sin", "cos", "erf", "expm1", "log1p", "floor", "pow",
    "tanh_slope", "sigmoid_slope", "divide_or_zero", "negative_product", "zero",
)  # fmt: skip
CODES = {name: i for i, name in enumerate(OPS)}
_SUMMED = ("copy", "mul", "negative_product")
SET, ADD, TOP = range(3)  # what is done with out: set it, add to it, keep the larger
_VIEWS = {
    "getitem", "mT", "transpose", "unsqueeze", "squeeze", "expand", "reshape", "view", "flatten", "unflatten", "narrow", "select",
    "diagonal", "broadcast_to", "expand_as",
}  # fmt: skip
_TUPLES = {"unbind", "split", "chunk", "tensor_split"}
_UNARY = {
    "exp", "log", "sqrt", "tanh", "sigmoid", "softplus", "relu", "abs", "sign", "sin", "cos", "erf", "expm1", "log1p", "floor", "neg",
}  # fmt: skip


class Unsupported(Exception):
    """The body uses something that the machine does not know."""


class View(NamedTuple):
    """A tensor in a buffer; ``slot`` is the whole that it is a part of."""

    buffer: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    slot: int

    def along(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Strides when it is broadcast to a shape."""
        missing = len(shape) - len(self.shape)
        mine = [0 if n == 1 else s for n, s in zip(self.shape, self.strides, strict=True)]
        return (0,) * missing + tuple(mine)


class Loop(NamedTuple):
    """``out = f(args)`` for every index of ``shape``; the innermost ``reduced`` axes are those along which ``out`` stands still."""

    op: int
    mode: int
    shape: tuple[int, int, int]
    reduced: int
    operands: tuple[tuple[int, int, tuple[int, int, int]], ...]  # out, a, b, c: buffer, offset, strides


@dataclass
class Machine:
    """A rule for given sizes: loops forward and backward, and where things are.

    ``states``, ``signals`` and ``fixed`` (slow weights) are (name, offset, size) in their buffers; ``constants`` follow the slow weights.
    """

    states: list[tuple[str, int, int]]
    signals: list[tuple[str, int, int]]
    fixed: list[tuple[str, int, int]]
    constants: list[float]
    sizes: list[int]
    output: View
    forward: list[Loop]
    backward: list[Loop]

    @property
    def output_size(self) -> int:
        return math.prod(self.output.shape)


def machine(known: Trace, states: Sequence[str], slow: Sequence[str]) -> Machine:
    """The machine of a traced rule; raises ``Unsupported`` where the body does what it cannot."""
    if known.states is None:
        raise Unsupported("its control flow depends on data")
    return _Builder(known, states, slow).build()


@dataclass
class _Builder:
    known: Trace
    names: Sequence[str]
    slow: Sequence[str]
    loops: list[Loop] = field(default_factory=list)
    sizes: list[int] = field(default_factory=lambda: [0] * 9)
    slots: list[tuple[int, int, int]] = field(default_factory=list)  # buffer, offset, size
    done: dict[Expr, View] = field(default_factory=dict)
    items: dict[Expr, Any] = field(default_factory=dict)
    numbers: dict[float, View] = field(default_factory=dict)
    constants: list[float] = field(default_factory=list)
    constant_slots: set[int] = field(default_factory=set)
    reverse: list[tuple[int, Callable[[], None]]] = field(default_factory=list)  # the slot whose gradient it hands on
    ready: set[int] = field(default_factory=set)  # slots whose gradient has been set
    uses: dict[Expr, int] = field(default_factory=dict)
    new_of: dict[Expr, int] = field(default_factory=dict)

    # ---- the whole -----------------------------------------------------------------------------------------------------------------

    def build(self) -> Machine:
        known = self.known
        assert known.states is not None
        leaves = known.leaves
        output = known.output if known.output is not None else known.states[0] @ leaves["q"]
        wanted = [*known.states, output]
        for node in ordered(wanted, ()):
            for p in node.parents:
                self.uses[p] = self.uses.get(p, 0) + 1
        places: dict[int, list[tuple[str, int, int]]] = {STATE: [], WORK: [], FIXED: []}
        for name, leaf in leaves.items():
            buffer = STATE if name in self.names else FIXED if name in self.slow else WORK
            view = self.done[leaf] = self.room(buffer, tuple(leaf.meta.shape))
            places[buffer].append((name, view.offset, math.prod(view.shape)))
        new = [self.room(NEW, tuple(s.meta.shape)) for s in known.states]
        for view, s in zip(new, known.states, strict=True):
            if s not in self.done and s.op not in _VIEWS | {"item", "constant"} and s not in self.new_of:
                self.new_of[s] = view.slot
        order = sorted(places[STATE], key=lambda place: list(self.names).index(place[0]))
        if [p[1] for p in order] != [v.offset for v in new]:
            raise Unsupported("its states are not in the order of its arguments")
        for node in ordered(wanted, self.done):
            if node not in self.done and not self.later(node):
                self.value(node)
        self.finish(known.states, new)
        y = self.finished(output)
        forward = self.loops
        self.loops = []
        self.ready = {y.slot, *(v.slot for v in new)}
        for slot, step in reversed(self.reverse):
            if slot in self.ready:  # else nothing that counts depends on it
                step()
        for view in (self.done[leaf] for name, leaf in leaves.items() if name not in self.slow):
            if view.slot not in self.ready:
                self.emit("zero", SET, self.grad(view), ())
        return Machine(order, places[WORK], places[FIXED], self.constants, list(self.sizes), y, forward, self.loops)

    def finish(self, states: Sequence[Expr], new: Sequence[View]) -> None:
        """States that are not computed in their place are copied there."""
        for s, view in zip(states, new, strict=True):
            if self.value(s) != view:
                self.apply("copy", view, self.value(s))

    def finished(self, output: Expr) -> View:
        """The output, contiguous in the workspace and nobody else's."""
        found = self.value(output)
        plain = self.room(WORK, found.shape)
        self.apply("copy", plain, found)
        return plain

    def later(self, node: Expr) -> bool:
        """A product that is computed where it is added."""
        return node.op in ("outer", "mul", "neg") and node.meta.ndim == 2 and self.uses.get(node) == 1 and node not in self.new_of

    # ---- memory --------------------------------------------------------------------------------------------------------------------

    def room(self, buffer: int, shape: tuple[int, ...]) -> View:
        size = math.prod(shape)
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        self.slots.append((buffer, self.sizes[buffer], size))
        self.sizes[buffer] += size
        return View(buffer, self.slots[-1][1], shape, strides, len(self.slots) - 1)

    def room_for(self, node: Expr) -> View:
        if node in self.new_of:
            buffer, offset, _ = self.slots[self.new_of[node]]
            shape = tuple(node.meta.shape)
            return View(buffer, offset, shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))), self.new_of[node])
        return self.room(WORK, tuple(node.meta.shape))

    def number(self, x: float) -> View:
        if x not in self.numbers:
            self.numbers[x] = self.constant(torch.tensor(x, dtype=torch.float64))
        return self.numbers[x]

    def constant(self, x: Tensor) -> View:
        """Something that the body has from elsewhere, behind the slow weights."""
        if x.requires_grad:
            raise Unsupported("a tensor of its surroundings that needs a gradient")
        made = self.room(FIXED, tuple(x.shape))
        self.constants += x.double().flatten().tolist()
        self.constant_slots.add(made.slot)
        return made

    def grad(self, v: View) -> View:
        return v._replace(buffer=v.buffer + GRADIENT)

    # ---- loops ---------------------------------------------------------------------------------------------------------------------

    def emit(self, op: str, mode: int, out: View, args: Sequence[View], shape: tuple[int, ...] | None = None, at: Any = None) -> None:
        """A loop over ``shape`` (that of ``out``); ``at`` gives the strides of out and args along it where they are not broadcast."""
        shape = out.shape if shape is None else shape
        strides = [v.along(shape) for v in (out, *args)] if at is None else at
        if math.prod(shape) == 0 and mode != SET:
            return
        axes = [[n, *(s[i] for s in strides)] for i, n in enumerate(shape) if n != 1]
        free, summed = _merged([a for a in axes if a[1]]), _merged([a for a in axes if not a[1]])
        if summed and op not in _SUMMED:  # the machine sums what is there already
            made = self.room(SCRATCH if out.buffer >= GRADIENT else WORK, shape)
            self.emit(op, SET, made, args, shape, [made.strides, *strides[1:]])
            self.emit("copy", mode, out, (made,), shape, [strides[0], made.strides])
            return
        merged, reduced = free + summed, len(summed)
        if len(merged) > 3:
            raise Unsupported(f"{op} over {len(merged)} axes")
        merged = [[1] + [0] * (len(args) + 1)] * (3 - len(merged)) + merged
        operands = tuple((v.buffer, v.offset, (merged[0][j + 1], merged[1][j + 1], merged[2][j + 1])) for j, v in enumerate((out, *args)))
        self.loops.append(Loop(CODES[op], mode, (merged[0][0], merged[1][0], merged[2][0]), reduced, operands))

    def collect(self, op: str, target: View, args: Sequence[View], shape: tuple[int, ...] | None = None, at: Any = None) -> None:
        """Add to the gradient of ``target``; the first of them sets it."""
        out = self.grad(target)
        if target.buffer == FIXED:
            if target.slot not in self.constant_slots:
                self.emit(op, ADD, out, args, shape, at)
            return
        if target.slot not in self.ready:
            buffer, offset, size = self.slots[target.slot]
            self.ready.add(target.slot)
            whole = math.prod(target.shape) == size and self._covers(target, shape, at)
            if whole:
                self.emit(op, SET, out, args, shape, at)
                return
            self.emit("zero", SET, View(buffer + GRADIENT, offset, (size,), (1,), target.slot), ())
        self.emit(op, ADD, out, args, shape, at)

    def _covers(self, target: View, shape: tuple[int, ...] | None, at: Any) -> bool:
        """Whether a loop visits every number of the target, and along other axes only adds up."""
        shape = target.shape if shape is None else shape
        strides = target.along(shape) if at is None else at[0]
        return math.prod(n for n, s in zip(shape, strides, strict=True) if s) == math.prod(target.shape)

    def temporary(self, op: str, args: Sequence[View], shape: tuple[int, ...]) -> View:
        """Something that only gradients need."""
        out = self.room(SCRATCH, shape)
        self.emit(op, SET, out, args)
        return out

    # ---- forward -------------------------------------------------------------------------------------------------------------------

    def value(self, x: Any) -> View:
        if not isinstance(x, Expr):
            if isinstance(x, Tensor) and x.ndim:
                return self.constant(x)
            return self.number(float(x))
        if x not in self.done:
            self.done[x] = self.translate(x)
        return self.done[x]

    def apply(self, op: str, out: View, *args: View) -> View:
        """One function of as many operands, with its derivative."""
        self.emit(op, SET, out, args)
        self.reverse.append((out.slot, lambda: _SLOPES[op](self, out, self.grad(out), args)))
        return out

    def make(self, op: str, shape: tuple[int, ...], *args: View) -> View:
        return self.apply(op, self.room(WORK, shape), *args)

    def translate(self, e: Expr) -> View:
        op, args = e.op, e.args
        if op == "constant":
            return self.value(args[0])
        if op in _VIEWS:
            return self.view(e, self.value(args[0]), lambda t: e.fn(t, *args[1:], **e.kwargs))
        if op == "item":
            whole = args[0]
            if whole.op not in _TUPLES:
                raise Unsupported(whole.op)
            return self.view(e, self.value(whole.args[0]), lambda t: whole.fn(t, *whole.args[1:], **whole.kwargs)[args[1]])
        how = getattr(self, f"_{op}", None)
        if how is not None:
            return how(e, *args, **e.kwargs)
        if op in _UNARY and len(args) == 1 and not e.kwargs:
            return self.apply(op, self.room_for(e), self.value(args[0]))
        if op in ("maximum", "minimum", "div") and not e.kwargs:
            return self.apply(op, self.room_for(e), *map(self.value, args))
        raise Unsupported(op)

    def view(self, e: Expr, of: View, fn: Callable[[Tensor], Tensor]) -> View:
        """A part of a tensor, or the tensor seen otherwise; found by asking torch about strides."""
        if any(isinstance(a, (Expr, Tensor)) for a in pytree.tree_leaves((e.args[1:], e.kwargs))):
            raise Unsupported(f"{e.op} with an index that is computed")
        room = max(of.offset + sum((n - 1) * s for n, s in zip(of.shape, of.strides, strict=True)) + 1, 1)
        given = torch.empty(room, device="meta").as_strided(of.shape, of.strides, of.offset)
        seen = fn(given)
        if seen is not given and seen._base is None:
            plain = self.make("copy", of.shape, of)
            return self.view(e, plain, fn) if of != plain and math.prod(of.strides) else plain
        return View(of.buffer, int(seen.storage_offset()), tuple(seen.shape), tuple(seen.stride()), of.slot)

    def product(self, x: Any) -> tuple[View, View, bool] | None:
        """Factors of a matrix that is a product, used once, and so far not computed: whose product it is, and whether negative."""
        if not isinstance(x, Expr) or not self.later(x) or x in self.done:
            return None
        if x.op == "outer":
            u, w = map(self.value, x.args)
            return _column(u), w, False
        if x.op == "neg":
            found = self.product(x.args[0])
            return None if found is None else (found[0], found[1], not found[2])
        a, b = x.args
        for number, other in ((a, b), (b, a)):
            found = self.product(other) if not isinstance(number, Expr) or number.meta.ndim == 0 else None
            if found is not None:
                return self.make("mul", found[0].shape, self.value(number), found[0]), found[1], found[2]
        return self.value(a), self.value(b), False

    def _add(self, e: Expr, a: Any, b: Any) -> View:
        for plain, other in ((a, b), (b, a)):
            if isinstance(other, Expr) and e.meta.ndim == 2 and tuple(other.meta.shape) == tuple(e.meta.shape):
                found = self.product(other)
                if found is not None:
                    base = self.value(plain)
                    return self.apply("sub_product" if found[2] else "add_product", self.room_for(e), base, *found[:2])
        return self.apply("add", self.room_for(e), self.value(a), self.value(b))

    def _mul(self, e: Expr, a: Any, b: Any) -> View:
        return self.apply("mul", self.room_for(e), self.value(a), self.value(b))

    def _neg(self, e: Expr, a: Any) -> View:
        return self.apply("neg", self.room_for(e), self.value(a))

    def _outer(self, e: Expr, u: Any, w: Any) -> View:
        return self.apply("mul", self.room_for(e), _column(self.value(u)), self.value(w))

    def _detach(self, e: Expr, a: Any) -> View:
        out = self.room_for(e)
        self.emit("copy", SET, out, (self.value(a),))
        return out

    def _square(self, e: Expr, a: Any) -> View:
        return self._mul(e, a, a)

    def _pow(self, e: Expr, a: Any, p: Any) -> View:
        if isinstance(p, Expr) and p.op != "constant":
            raise Unsupported("a power that is computed")
        exponent = float(p.args[0] if isinstance(p, Expr) else p)
        if exponent == 2:
            return self._mul(e, a, a)
        return self.apply("pow", self.room_for(e), self.value(a), self.number(exponent))

    def _rsqrt(self, e: Expr, a: Any) -> View:
        root = self.make("sqrt", tuple(e.meta.shape), self.value(a))
        return self.apply("div", self.room_for(e), self.number(1.0), root)

    def _reciprocal(self, e: Expr, a: Any) -> View:
        return self.apply("div", self.room_for(e), self.number(1.0), self.value(a))

    def _silu(self, e: Expr, a: Any, inplace: bool = False) -> View:
        x = self.value(a)
        return self.apply("mul", self.room_for(e), x, self.make("sigmoid", x.shape, x))

    def _logsigmoid(self, e: Expr, a: Any) -> View:
        x = self.value(a)
        plus = self.make("softplus", x.shape, self.make("neg", x.shape, x))
        return self.apply("neg", self.room_for(e), plus)

    _log_sigmoid = _logsigmoid

    def _where(self, e: Expr, c: Any, a: Any, b: Any) -> View:
        return self.apply("select", self.room_for(e), self.value(c), self.value(a), self.value(b))

    def _gt(self, e: Expr, a: Any, b: Any) -> View:
        return self.apply("greater", self.room_for(e), self.value(a), self.value(b))

    def _lt(self, e: Expr, a: Any, b: Any) -> View:
        return self._gt(e, b, a)

    def _ge(self, e: Expr, a: Any, b: Any) -> View:
        return self.apply("greater_equal", self.room_for(e), self.value(a), self.value(b))

    def _le(self, e: Expr, a: Any, b: Any) -> View:
        return self._ge(e, b, a)

    def _eq(self, e: Expr, a: Any, b: Any) -> View:
        return self.apply("equal", self.room_for(e), self.value(a), self.value(b))

    def _clamp(self, e: Expr, a: Any, min: Any = None, max: Any = None) -> View:
        """Bounded; the gradient passes where the bounds do not bind."""
        x = self.value(a)
        for bound, of in ((min, "low"), (max, "high")):
            if bound is None:
                continue
            limit = self.value(bound)
            ok = self.room(WORK, tuple(e.meta.shape))
            self.emit("greater_equal", SET, ok, (x, limit) if of == "low" else (limit, x))
            passed = self.room(WORK, tuple(e.meta.shape))
            x = self.apply("select", passed, ok, x, limit)
        return self.apply("copy", self.room_for(e), x)

    def _clamp_min(self, e: Expr, a: Any, min: Any) -> View:
        return self._clamp(e, a, min=min)

    def _clamp_max(self, e: Expr, a: Any, max: Any) -> View:
        return self._clamp(e, a, max=max)

    # ---- sums and products ---------------------------------------------------------------------------------------------------------

    def _sum(self, e: Expr, a: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> View:
        if dtype is not None:
            raise Unsupported("a sum of another dtype")
        return self.total(self.value(a), dim, self.room_for(e))

    def total(self, x: View, dim: Any, out: View) -> View:
        at = (_kept(out, x.shape, dim), x.strides)
        self.emit("copy", SET, out, (x,), x.shape, at)
        self.reverse.append((out.slot, lambda: self.collect("copy", x, (self.grad(out),), x.shape, at[::-1])))
        return out

    def _mean(self, e: Expr, a: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> View:
        if dtype is not None:
            raise Unsupported("a mean of another dtype")
        x = self.value(a)
        shape = tuple(e.meta.shape)
        count = math.prod(x.shape) // max(math.prod(shape), 1)
        return self.apply("mul", self.room_for(e), self.total(x, dim, self.room(WORK, shape)), self.number(1 / max(count, 1)))

    def _softmax(self, e: Expr, a: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> View:
        if dtype is not None or dim is None:
            raise Unsupported("softmax of another dtype, or without its axis")
        x = self.value(a)
        shape = tuple(n if i != dim % len(x.shape) else 1 for i, n in enumerate(x.shape))
        top, total = self.room(WORK, shape), self.room(WORK, shape)
        shifted, raised, out = self.room(WORK, x.shape), self.room(WORK, x.shape), self.room_for(e)
        self.emit("copy", TOP, top, (x,), x.shape, (top.along(x.shape), x.strides))
        self.emit("sub", SET, shifted, (x, top))
        self.emit("exp", SET, raised, (shifted,))
        self.emit("copy", SET, total, (raised,), x.shape, (total.along(x.shape), raised.strides))
        self.emit("div", SET, out, (raised, total))

        def slope() -> None:
            g = self.grad(out)
            weighed = self.temporary("mul", (g, out), x.shape)
            summed = self.room(SCRATCH, shape)
            self.emit("copy", SET, summed, (weighed,), x.shape, (summed.along(x.shape), weighed.strides))
            self.collect("mul", x, (self.temporary("sub", (g, summed), x.shape), out))

        self.reverse.append((out.slot, slope))
        return out

    def _norm(self, e: Expr, a: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> View:
        if p not in (2, 2.0, "fro", None) or dtype is not None:
            raise Unsupported("a norm other than the Euclidean one")
        return self.euclid(self.value(a), dim, self.room_for(e))

    def euclid(self, x: View, dim: Any, out: View) -> View:
        """The root of a sum of squares, whose slope at zero is taken to be zero."""
        squares, total = self.room(WORK, x.shape), self.room(WORK, out.shape)
        kept = _kept(total, x.shape, dim)
        self.emit("mul", SET, squares, (x, x))
        self.emit("copy", SET, total, (squares,), x.shape, (kept, squares.strides))
        self.emit("sqrt", SET, out, (total,))

        def slope() -> None:
            share = self.room(SCRATCH, out.shape)
            self.emit("divide_or_zero", SET, share, (self.grad(out), out))
            self.collect("mul", x, (share, x), x.shape, (x.strides, kept, x.strides))

        self.reverse.append((out.slot, slope))
        return out

    def _normalize(self, e: Expr, a: Any, p: Any = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> View:
        if p != 2 or out is not None:
            raise Unsupported("normalize by another norm")
        x = self.value(a)
        axis = dim % max(len(x.shape), 1)
        shape = tuple(1 if i == axis else n for i, n in enumerate(x.shape))
        size = self.euclid(x, dim, self.room(WORK, shape))
        ok = self.room(WORK, shape)
        self.emit("greater", SET, ok, (size, self.number(eps)))
        bounded = self.make("select", shape, ok, size, self.number(eps))
        return self.apply("div", self.room_for(e), x, bounded)

    def _linalg_vector_norm(self, e: Expr, a: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False) -> View:
        return self._norm(e, a, ord, dim, keepdim)

    _vector_norm = _linalg_vector_norm

    def _matmul(self, e: Expr, a: Any, b: Any) -> View:
        x, y = self.value(a), self.value(b)
        out = self.room_for(e)
        if len(x.shape) > 2 or len(y.shape) > 2:
            raise Unsupported("a product of stacks of matrices")
        # axes: rows of x, columns of y, what is summed over
        rows = (x.shape[0],) if len(x.shape) == 2 else ()
        columns = (y.shape[1],) if len(y.shape) == 2 else ()
        shape = (*rows, *columns, x.shape[len(rows)])
        at = (
            (*out.strides, 0),
            (*x.strides[: len(rows)], *(0,) * len(columns), x.strides[len(rows)]),
            (*(0,) * len(rows), *y.strides[1:], y.strides[0]),
        )
        self.emit("mul", SET, out, (x, y), shape, at)

        def slope() -> None:
            g = self.grad(out)
            self.collect("mul", x, (g, y), shape, (at[1], at[0], at[2]))
            self.collect("mul", y, (g, x), shape, (at[2], at[0], at[1]))

        self.reverse.append((out.slot, slope))
        return out

    def _cat(self, e: Expr, tensors: Any, dim: int = 0) -> View:
        out = self.room_for(e)
        start = 0
        axis = dim % len(out.shape)
        for t in tensors:
            part = self.value(t)
            shape = tuple(part.shape[i] if i == axis else n for i, n in enumerate(out.shape))
            into = View(out.buffer, out.offset + start * out.strides[axis], shape, out.strides, out.slot)
            start += shape[axis]
            self.apply("copy", into, part)
        return out

    _concat = _concatenate = _cat

    def _diag(self, e: Expr, a: Any, diagonal: int = 0) -> View:
        x, out = self.value(a), self.room_for(e)
        if len(x.shape) != 1 or diagonal:
            raise Unsupported("a diagonal of a matrix, or beside it")
        self.emit("zero", SET, out, ())
        self.apply("copy", View(out.buffer, out.offset, x.shape, (x.shape[0] + 1,), out.slot), x)
        return out

    _diag_embed = _diag

    def _stack(self, e: Expr, tensors: Any, dim: int = 0) -> View:
        out = self.room_for(e)
        axis = dim % len(out.shape)
        rest = [i for i in range(len(out.shape)) if i != axis]
        for n, t in enumerate(tensors):
            shape, strides = tuple(out.shape[i] for i in rest), tuple(out.strides[i] for i in rest)
            self.apply("copy", View(out.buffer, out.offset + n * out.strides[axis], shape, strides, out.slot), self.value(t))
        return out


def _merged(axes: list[list[int]]) -> list[list[int]]:
    """Neighbouring axes that every operand walks through as if they were one, as one."""
    made: list[list[int]] = []
    for axis in axes:
        if made and all(a == b * axis[0] for a, b in zip(made[-1][1:], axis[1:], strict=True)):
            made[-1] = [made[-1][0] * axis[0], *axis[1:]]
        else:
            made.append(axis)
    return made


def _column(u: View) -> View:
    return u._replace(shape=(*u.shape, 1), strides=(*u.strides, 1))


def _kept(out: View, shape: tuple[int, ...], dim: Any) -> tuple[int, ...]:
    """Strides of what is left of a tensor when some axes are summed over, along its axes."""
    axes = range(len(shape)) if dim is None or dim == () else [dim] if isinstance(dim, int) else dim
    gone = {d % max(len(shape), 1) for d in axes}
    left = [n for i, n in enumerate(shape) if i not in gone]
    strides = iter([math.prod(left[i + 1 :]) for i in range(len(left))])
    return tuple(0 if i in gone else next(strides) for i in range(len(shape)))


# ---- derivatives ---------------------------------------------------------------------------------------------------------------------

_Slope = Callable[[_Builder, View, View, tuple[View, ...]], None]


def _along_out(b: _Builder, op: str, target: View, args: Sequence[View], out: View) -> None:
    """Add f(args), of the shape of ``out``, to the gradient of an operand, which may have been broadcast."""
    at = [target.along(out.shape), *(v.along(out.shape) for v in args)]
    b.collect(op, target, args, out.shape, at)


def _nothing(b: _Builder, out: View, g: View, args: tuple[View, ...]) -> None:
    return None


def _with(*each: tuple[int, str, Callable[..., Sequence[View]]]) -> _Slope:
    """Gradients of operands as functions of what ``of`` makes of (gradient, out, operands)."""

    def slope(b: _Builder, out: View, g: View, args: tuple[View, ...]) -> None:
        for i, op, of in each:
            if args[i].slot not in b.constant_slots:
                _along_out(b, op, args[i], of(b, g, out, args), out)

    return slope


def _half_at_ties(b: _Builder, g: View, a: View, other: View, out: View) -> View:
    """The gradient that an operand of a maximum gets: all where it is larger, half where they are equal."""
    larger, same = b.temporary("greater", (a, other), out.shape), b.temporary("equal", (a, other), out.shape)
    share = b.temporary("add", (larger, b.temporary("mul", (same, b.number(0.5)), out.shape)), out.shape)
    return b.temporary("mul", (g, share), out.shape)


def _extreme(sign: int) -> _Slope:
    def slope(b: _Builder, out: View, g: View, args: tuple[View, ...]) -> None:
        for i in (0, 1):
            mine, other = (args[i], args[1 - i])[::sign]
            if args[i].slot not in b.constant_slots:
                _along_out(b, "copy", args[i], [_half_at_ties(b, g, mine, other, out)], out)

    return slope


def _over(b: _Builder, g: View, x: View, out: View) -> View:
    return b.temporary("div", (g, x), out.shape)


_SLOPES: dict[str, _Slope] = {
    "copy": _with((0, "copy", lambda b, g, out, args: [g])),
    "neg": _with((0, "neg", lambda b, g, out, args: [g])),
    "add": _with((0, "copy", lambda b, g, out, args: [g]), (1, "copy", lambda b, g, out, args: [g])),
    "sub": _with((0, "copy", lambda b, g, out, args: [g]), (1, "neg", lambda b, g, out, args: [g])),
    "mul": _with((0, "mul", lambda b, g, out, args: [g, args[1]]), (1, "mul", lambda b, g, out, args: [g, args[0]])),
    "div": _with(
        (0, "div", lambda b, g, out, args: [g, args[1]]),
        (1, "negative_product", lambda b, g, out, args: [_over(b, g, args[1], out), out]),
    ),
    "add_product": _with(
        (0, "copy", lambda b, g, out, args: [g]),
        (1, "mul", lambda b, g, out, args: [g, args[2]]),
        (2, "mul", lambda b, g, out, args: [g, args[1]]),
    ),
    "sub_product": _with(
        (0, "copy", lambda b, g, out, args: [g]),
        (1, "negative_product", lambda b, g, out, args: [g, args[2]]),
        (2, "negative_product", lambda b, g, out, args: [g, args[1]]),
    ),
    "maximum": _extreme(1),
    "minimum": _extreme(-1),
    "greater": _nothing, "equal": _nothing, "greater_equal": _nothing, "sign": _nothing, "floor": _nothing,
    "select": _with(
        (1, "select", lambda b, g, out, args: [args[0], g, b.number(0.0)]),
        (2, "select", lambda b, g, out, args: [args[0], b.number(0.0), g]),
    ),
    "exp": _with((0, "mul", lambda b, g, out, args: [g, out])),
    "expm1": _with((0, "mul", lambda b, g, out, args: [g, b.temporary("add", (out, b.number(1.0)), out.shape)])),
    "log": _with((0, "div", lambda b, g, out, args: [g, args[0]])),
    "log1p": _with((0, "div", lambda b, g, out, args: [g, b.temporary("add", (args[0], b.number(1.0)), out.shape)])),
    "sqrt": _with((0, "div", lambda b, g, out, args: [g, b.temporary("add", (out, out), out.shape)])),
    "tanh": _with((0, "tanh_slope", lambda b, g, out, args: [g, out])),
    "sigmoid": _with((0, "sigmoid_slope", lambda b, g, out, args: [g, out])),
    "softplus": _with((0, "mul", lambda b, g, out, args: [g, b.temporary("sigmoid", (args[0],), out.shape)])),
    "relu": _with((0, "select", lambda b, g, out, args: [b.temporary("greater", (args[0], b.number(0.0)), out.shape), g, b.number(0.0)])),
    "abs": _with((0, "mul", lambda b, g, out, args: [g, b.temporary("sign", (args[0],), out.shape)])),
    "sin": _with((0, "mul", lambda b, g, out, args: [g, b.temporary("cos", (args[0],), out.shape)])),
    "cos": _with((0, "negative_product", lambda b, g, out, args: [g, b.temporary("sin", (args[0],), out.shape)])),
    "erf": _with((0, "mul", lambda b, g, out, args: [g, _bell(b, args[0], out)])),
    "pow": _with((0, "mul", lambda b, g, out, args: [g, _power_slope(b, args, out)])),
}  # fmt: skip


def _bell(b: _Builder, x: View, out: View) -> View:
    """2 / sqrt(pi) exp(-x^2), the slope of erf."""
    square = b.temporary("negative_product", (x, x), out.shape)
    return b.temporary("mul", (b.temporary("exp", (square,), out.shape), b.number(2 / math.sqrt(math.pi))), out.shape)


def _power_slope(b: _Builder, args: tuple[View, ...], out: View) -> View:
    p = next(x for x, v in b.numbers.items() if v == args[1])
    below = b.temporary("pow", (args[0], b.number(p - 1)), out.shape)
    return b.temporary("mul", (below, args[1]), out.shape)
