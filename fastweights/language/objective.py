"""Local objectives: what a rule descends, and its slope.

Where W is a symbol the gradient is found symbolically, so that a quadratic objective gives a rule with every form; where
W is a tensor, torch.func finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from .expr import Expr, rank

if TYPE_CHECKING:
    from .rule import Rule


# of y = f(a), given the gradient of y
_UNARY: dict[str, Callable[[Any, Any, Any], Any]] = {
    "neg": lambda g, a, y: -g,
    "square": lambda g, a, y: g * 2 * a,
    "abs": lambda g, a, y: g * torch.sign(a),
    "exp": lambda g, a, y: g * y,
    "log": lambda g, a, y: g / a,
    "tanh": lambda g, a, y: g * (1 - y * y),
    "sqrt": lambda g, a, y: g / (2 * y),
}


@dataclass(frozen=True)
class Objective:
    """The local objective of a rule.

    ``loss(W, **signals)`` is a number for one token and one head, its arguments named as the rule's. The rule is one
    descent step of size ``rate`` (the name of a signal, or a number) from the weights that ``first`` (a rule; usually
    the decay) leaves; if ``proximal``, it is instead the minimum of 1/2 |W - W'|^2 + rate * loss(W).
    """

    equation: str
    loss: Callable[..., Any]
    rate: str | float = "beta"
    first: Rule | None = None
    proximal: bool = False


def gradient(loss: Callable[..., Any], W: Any, *args: Any, **kwargs: Any) -> Any:
    """d loss / d W, for a tensor or for a symbol."""
    if not isinstance(W, Expr):
        return torch.func.grad(loss)(W, *args, **kwargs)
    value = loss(W, *args, **kwargs)
    grads: dict[Expr, Any] = {value: 1.0}
    for node in reversed(W.tape.nodes[: value.index + 1]):
        if node in grads and node is not W and node.parents:
            W.tape.blame = node.where
            for parent, g in _opaque(node, grads[node]) if node.kwargs else _pull(node, grads[node]):
                if isinstance(parent, Expr):
                    grads[parent] = g if parent not in grads else grads[parent] + g
    W.tape.blame = None
    return grads.get(W, torch.zeros(W.meta.shape))


def _pull(node: Expr, g: Any) -> list[tuple[Any, Any]]:
    """The gradients of a node's arguments, given its own (a number stands for a constant vector)."""
    a, b, *_ = (*node.args, None)
    match node.op:
        case "add":
            return [(x, _sum_to(x, g, node)) for x in (a, b)]
        case "mul":
            return [(a, _sum_to(a, g * b, node)), (b, _sum_to(b, g * a, node))]
        case "div":
            return [(a, _sum_to(a, g / b, node)), (b, _sum_to(b, -g * a / (b * b), node))]
        case "pow" if not isinstance(b, Expr):
            return [(a, g * b * (a if b == 2 else a ** (b - 1)))]
        case "sum" | "mean" if node.meta.ndim == 0:
            return [(a, g if node.op == "sum" else g / a.meta.numel())]
        case "mT":
            return [(a, _full(g, node).mT)]
        case "matmul":
            return _pull_matmul(a, b, _full(g, node))
    return [(a, _UNARY[node.op](g, a, node))] if node.op in _UNARY else _opaque(node, g)


def _opaque(node: Expr, g: Any) -> list[tuple[Any, Any]]:
    """A function whose gradient is not known here: torch finds it, and to the lowering it is one opaque function."""
    parents = node.parents

    def pull(g: Any, *values: Any) -> Any:
        def f(*xs: Any) -> Any:
            given = dict(zip((p.index for p in parents), xs, strict=True))
            args = pytree.tree_map(lambda a: given[a.index] if isinstance(a, Expr) else a, node.args)
            return node.fn(*args, **node.kwargs)

        return torch.func.vjp(f, *values)[1](torch.as_tensor(g).expand(node.meta.shape))

    pull.__name__ = f"gradient of {node.op}"
    pulled = node.tape.record(pull, g, *parents)
    return list(zip(parents, pulled, strict=True))


def _pull_matmul(a: Any, b: Any, g: Any) -> list[tuple[Any, Any]]:
    ranks = (rank(a), rank(b))
    if ranks == (1, 1):
        return [(a, g * b), (b, g * a)]
    if ranks == (2, 1):
        return [(a, torch.outer(g, b)), (b, a.mT @ g)]
    if ranks == (1, 2):
        return [(a, b @ g), (b, torch.outer(a, g))]
    return [(a, g @ b.mT), (b, a.mT @ g)]


def _full(g: Any, node: Expr) -> Any:
    """A gradient of the shape of its node: a number stands for a constant."""
    shape = g.meta.shape if isinstance(g, Expr) else torch.as_tensor(g).shape
    return g if shape == node.meta.shape else g * torch.ones(node.meta.shape, dtype=torch.float64)


def _sum_to(x: Any, g: Any, node: Expr) -> Any:
    """Undo broadcasting: the gradient of a number is the sum of the gradients of its copies."""
    if not isinstance(x, Expr) or x.meta.shape == node.meta.shape:
        return g
    g = _full(g, node)
    return g.sum() if x.meta.ndim == 0 else g.sum_to_size(*x.meta.shape)
