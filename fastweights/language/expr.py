"""Expressions: what a rule's body computes, recorded by running the body on symbols instead of tensors.

An ``Expr`` is a node of a graph that lives on a ``Tape``. It behaves as a tensor of one token and one head: torch
functions, operators and indexing record new nodes, and shapes come from torch itself on the meta device.
"""

from __future__ import annotations

import linecache
import operator
import sys
import traceback
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import RuleError

_SAME = {
    "multiply": "mul", "truediv": "div", "true_divide": "div", "divide": "div", "subtract": "sub", "negative": "neg",
    "mv": "matmul", "mm": "matmul", "dot": "matmul", "vdot": "matmul", "ger": "outer", "absolute": "abs",
    "and_": "and", "or_": "or", "adjoint": "mT", "__getitem__": "getitem", "t": "mT", "_transpose": "mT",
}  # fmt: skip
_KEYWORDS = ("input", "self", "other", "vec", "vec2", "mat2", "exponent", "tensor")  # of functions of one or two tensors
_SAME_VALUE = ("clone", "contiguous")
_MADE_OF: dict[str, Callable[..., Any]] = {
    "sub": lambda a, b: a + -(b if isinstance(b, Expr) else a.tape.constant(b)),
    "addr": lambda a, u, w: a + torch.outer(u, w),
    "lerp": lambda a, b, weight: a + weight * (b - a),
}
_RANDOM = ("dropout", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial", "normal", "rrelu")
_PACKAGE = str(Path(__file__).parents[1])
_RULES = (str(Path(__file__).parents[1] / "rules"), str(Path(__file__).parents[1] / "neuro"))
_TORCH = str(Path(torch.__file__).parent)


def is_outside(file: str) -> bool:
    """Whether a file holds rules, or calls them: it is not torch's, and not the package's but for the catalogue."""
    return not file.startswith(_TORCH) and (file.startswith(_RULES) or not file.startswith(_PACKAGE))


class DataDependent(Exception):
    """The body asked for the value of a symbol: its control flow depends on data."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what, self.where = what, Where.caller()


@dataclass(frozen=True)
class Where:
    """A line of a rule: file, number, text."""

    file: str
    line: int

    @classmethod
    def caller(cls) -> Where:
        """The innermost line outside this package's language and outside torch."""
        frames = traceback.walk_stack(sys._getframe(1))
        return next(cls(frame.f_code.co_filename, line) for frame, line in frames if is_outside(frame.f_code.co_filename))

    def __str__(self) -> str:
        text = linecache.getline(self.file, self.line).strip()
        return f"{Path(self.file).name}:{self.line}" + (f": {text}" if text else "")


class Tape:
    """Records nodes in the order they are computed; equal nodes are one node."""

    def __init__(self) -> None:
        self.nodes: list[Expr] = []
        self._known: dict[Any, Expr] = {}
        self._numbers: dict[float, Tensor] = {}
        self.blame: Where | None = None  # the line that new nodes belong to, where it is not the caller's

    def leaf(self, name: str, shape: tuple[int, ...], op: str = "signal") -> Expr:
        return self._node(op, None, (name,), {}, torch.empty(shape, device="meta", dtype=torch.float64))

    def constant(self, value: Any) -> Expr:
        """A number or a tensor that no signal changes; equal numbers are one node."""
        if not isinstance(value, Tensor):
            value = self._numbers.setdefault(float(value), torch.tensor(float(value), dtype=torch.float64))
        return self._node("constant", None, (value,), {}, _to_meta(value))

    def wrote(self, value: Tensor) -> bool:
        """Whether a constant is a number that stands in the body, and no tensor of its surroundings, which may change."""
        return any(value is number for number in self._numbers.values())

    def record(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """The value of ``fn`` on symbols: a node, a tuple of nodes, or a plain value such as a shape."""
        name = getattr(fn, "__name__", str(fn))
        name = _SAME.get(name, name)
        if name.endswith("_") and not name.endswith("__"):
            raise in_place(name)
        if name in _RANDOM:
            raise RuleError(
                f"{Where.caller()}\n  a rule is a function of its arguments, but {name} draws at random: pass the noise as a signal"
            )
        if kwargs and set(kwargs) <= {*_KEYWORDS, "alpha"}:
            args = (*args, *(kwargs[n] for n in _KEYWORDS if n in kwargs))
            if "alpha" in kwargs:
                args = (args[0], args[1] * kwargs["alpha"], *args[2:])
            kwargs = {}
        if name in _SAME_VALUE or (name == "mT" and args[0].op == "mT"):
            return args[0] if name in _SAME_VALUE else args[0].args[0]
        if name in ("max", "min") and len(args) == 2 and isinstance(args[1], (Expr, Tensor)):
            return self.record(getattr(torch, f"{name}imum"), *args)
        if name in _MADE_OF and not kwargs:
            return _MADE_OF[name](*args)
        meta = self._meta(fn, name, args, kwargs)
        if name in ("zeros_like", "ones_like", "new_zeros", "new_ones"):
            return torch.full(meta.shape, float("ones" in name), dtype=torch.float64)
        if isinstance(meta, Tensor):
            if name in ("unsqueeze", "reshape", "view") and args[0].meta.ndim == 1 and meta.ndim == 2 and 1 in meta.shape and not kwargs:
                return args[0][:, None] if (args[1] % 2 if name == "unsqueeze" else meta.shape[1] == 1) else args[0][None]
            return self._stopped(self._node(name, fn, args, kwargs, meta))
        if isinstance(meta, (tuple, list)) and meta and all(isinstance(m, Tensor) for m in meta):
            whole = self._node(name, fn, args, kwargs, meta[0])
            items = [self._stopped(self._node("item", operator.itemgetter(i), (whole, i), {}, m)) for i, m in enumerate(meta)]
            return tuple(items) if type(meta) in (tuple, list) else type(meta)(items)
        return meta

    def _meta(self, fn: Any, name: str, args: Any, kwargs: Any) -> Any:
        """What ``fn`` does to shapes."""
        meta_args, meta_kwargs = pytree.tree_map(_to_meta, (args, kwargs))
        try:
            return fn(*meta_args, **meta_kwargs)
        except (RuntimeError, NotImplementedError) as error:
            if "meta" in str(error).lower() or "data-dependent" in str(error).lower():
                raise DataDependent(name) from error
            raise

    def _stopped(self, node: Expr) -> Expr:
        """The node, or what torch.no_grad() in a body makes of it."""
        if torch.is_grad_enabled() or node.op == "detach":
            return node
        return self._node("detach", torch.Tensor.detach, (node,), {}, node.meta)

    def _node(self, op: str, fn: Any, args: tuple, kwargs: dict, meta: Tensor) -> Expr:
        key = (op, _key(args), _key(sorted(kwargs.items())))
        if key not in self._known:
            node = Expr(self, len(self.nodes), op, fn, args, kwargs, meta, self.blame or Where.caller())
            self.nodes.append(node)
            self._known[key] = node
        return self._known[key]


def in_place(what: str) -> RuleError:
    return RuleError(
        f"{Where.caller()}\n  a rule is mathematics and changes nothing in place, but {what!r} does: "
        "write W = W + ..., or torch.where / torch.cat for parts"
    )


def rank(x: Any) -> int:
    return x.meta.ndim if isinstance(x, Expr) else x.ndim if isinstance(x, Tensor) else 0


def added_axis(x: Any) -> int | None:
    """0 where a vector becomes a row, 1 where it becomes a column, None elsewhere."""
    if not isinstance(x, Expr) or x.op != "getitem" or not isinstance(x.args[0], Expr):
        return None
    vector, index = x.args[0].meta, x.args[1] if isinstance(x.args[1], tuple) else (x.args[1],)
    if (vector.ndim, x.meta.ndim, vector.numel()) != (1, 2, x.meta.numel()) or any(isinstance(i, (Expr, Tensor, list)) for i in index):
        return None
    return 0 if index[0] is None else 1


def _to_meta(x: Any) -> Any:
    if isinstance(x, Expr):
        return x.meta
    if isinstance(x, Tensor):
        return x.to("meta", torch.float64 if x.is_floating_point() else None)
    return x


def _key(x: Any) -> Any:
    if isinstance(x, slice):
        return ("slice", _key(x.start), _key(x.stop), _key(x.step))
    if isinstance(x, (tuple, list)):
        return (type(x).__name__, *map(_key, x))
    by_value = getattr(x, "__hash__", None) and not isinstance(x, (Expr, Tensor))
    return (type(x).__name__, x if by_value else id(x))


def _forward(fn: Any) -> Callable[..., Expr]:
    return lambda self, *others: self.tape.record(fn, self, *others)


def _reflected(fn: Any) -> Callable[..., Expr]:
    return lambda self, other: self.tape.record(fn, other, self)


def _raises(error: Callable[[str], Exception], what: str) -> Callable[..., Any]:
    def method(self: Expr, *others: Any) -> Any:
        raise error(what)

    return method


class Expr:
    """A tensor of one token and one head, known only by how it is computed."""

    __slots__ = ("args", "fn", "index", "kwargs", "meta", "op", "tape", "where")

    def __init__(self, tape: Tape, index: int, op: str, fn: Any, args: tuple, kwargs: dict, meta: Tensor, where: Where):
        self.tape, self.index, self.op, self.fn = tape, index, op, fn
        self.args, self.kwargs, self.meta, self.where = args, kwargs, meta, where

    @property
    def parents(self) -> list[Expr]:
        return [a for a in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(a, Expr)]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tape = next(a.tape for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Expr))
        return tape.record(func, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("item", "tolist", "numpy"):
            raise DataDependent(f".{name}()")
        if name in ("mT", "T", "H", "mH"):
            return self.tape.record(_transpose, self)
        if name in ("data", "real"):
            return self.detach() if name == "data" else self
        if name in ("shape", "ndim", "dtype", "itemsize"):
            return getattr(self.meta, name)
        if name == "device":
            return torch.device("cpu")
        attribute = getattr(torch.Tensor, name)  # an AttributeError here is torch's own
        if not callable(attribute):
            raise AttributeError(f"the body of a rule cannot ask for .{name} of a tensor")
        return lambda *args, **kwargs: self.tape.record(attribute, self, *args, **kwargs)

    def __getitem__(self, index: Any) -> Expr:
        return self.tape.record(operator.getitem, self, index)

    __add__, __radd__, __iadd__ = _forward(operator.add), _reflected(operator.add), _raises(in_place, "+=")
    __sub__, __rsub__, __isub__ = _forward(operator.sub), _reflected(operator.sub), _raises(in_place, "-=")
    __mul__, __rmul__, __imul__ = _forward(operator.mul), _reflected(operator.mul), _raises(in_place, "*=")
    __truediv__, __rtruediv__, __itruediv__ = _forward(operator.truediv), _reflected(operator.truediv), _raises(in_place, "/=")
    __matmul__, __rmatmul__, __imatmul__ = _forward(operator.matmul), _reflected(operator.matmul), _raises(in_place, "@=")
    __pow__, __rpow__, __ipow__ = _forward(operator.pow), _reflected(operator.pow), _raises(in_place, "**=")
    __mod__, __rmod__, __setitem__ = _forward(operator.mod), _reflected(operator.mod), _raises(in_place, "x[...] = ...")
    __floordiv__, __rfloordiv__ = _forward(operator.floordiv), _reflected(operator.floordiv)
    __and__, __or__, __xor__ = (_forward(fn) for fn in (operator.and_, operator.or_, operator.xor))
    __neg__, __abs__, __invert__ = (_forward(fn) for fn in (operator.neg, operator.abs, operator.invert))
    __pos__ = _forward(torch.clone)
    __eq__, __ne__ = _forward(operator.eq), _forward(operator.ne)  # type: ignore[assignment]
    __array_ufunc__ = None  # numpy numbers leave arithmetic to the symbol
    __lt__, __le__, __gt__, __ge__ = (_forward(fn) for fn in (operator.lt, operator.le, operator.gt, operator.ge))
    __bool__, __float__, __int__, __index__ = (
        _raises(DataDependent, "if"),
        _raises(DataDependent, "float()"),
        _raises(DataDependent, "int()"),
        _raises(DataDependent, "an index"),
    )

    def __iter__(self) -> Any:
        return iter([self[i] for i in range(self.meta.shape[0])])

    def __len__(self) -> int:
        return self.meta.shape[0]

    def __repr__(self) -> str:
        from .show import text

        return text(self)

    __hash__ = object.__hash__


def _transpose(x: Tensor) -> Tensor:
    return x.mT if x.ndim > 1 else x


def ordered(wanted: Iterable[Expr], known: Container[Expr]) -> list[Expr]:
    """The nodes that ``wanted`` needs and that are not ``known``, each after those that it is computed from."""
    needed, stack = set[Expr](), list(wanted)
    while stack:
        node = stack.pop()
        if node not in needed and node not in known:
            needed.add(node)
            stack.extend(node.parents)
    return sorted(needed, key=lambda node: node.index)
