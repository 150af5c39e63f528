"""Evaluate expressions for all tokens and heads at once.

A value has leading axes (batch, time, heads) followed by the shape for one token. Leading axes broadcast, so a signal
with fewer heads is never repeated. Pointwise functions broadcast as they are; any other function runs under ``vmap``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .expr import Expr, ordered

_POINTWISE = frozenset(
    """
    add mul div neg pow abs mod exp exp2 expm1 log log2 log1p sigmoid logsigmoid log_sigmoid tanh relu silu gelu elu softplus
    sqrt rsqrt square reciprocal sin cos maximum minimum clamp clamp_min clamp_max where lt le gt ge eq ne and or xor invert
    erf sign floor detach
    """.split()  # noqa: SIM905
)


def evaluate(wanted: Iterable[Expr], values: dict[Expr, Tensor], lead: int) -> dict[Expr, Tensor]:
    """The values of ``wanted``, given those of the leaves in ``values``; both are in the returned dictionary.

    ``lead`` is the number of leading axes. Those of a constant are of size one.
    """
    done = dict(values)
    for node in ordered(wanted, done):
        args, kwargs = pytree.tree_map(lambda a: _value(a, done), (node.args, node.kwargs))
        done[node] = _apply(node, args, kwargs, lead)
    return done


def _value(arg: Any, done: dict[Expr, Tensor]) -> Any:
    if isinstance(arg, Expr):
        return done[arg]
    if isinstance(arg, Tensor) and done:
        if torch.compiler.is_compiling() and not arg.requires_grad:
            arg = torch.tensor(arg.tolist(), dtype=arg.dtype)  # made where tensors are fake, for these may not meet real ones
        like = next(iter(done.values()))
        return arg.to(like.device, like.dtype if arg.is_floating_point() else None)
    return arg


def _apply(node: Expr, args: Any, kwargs: Any, lead: int) -> Any:
    leading = (slice(None),) * lead
    if node.op == "constant":
        return args[0][(None,) * lead]
    if node.op in _POINTWISE and not any(isinstance(a, Expr) for a in pytree.tree_leaves(node.kwargs)):
        # axes behind the leading ones, so that operands broadcast as they do for one token
        missing = [node.meta.ndim - e.meta.ndim if isinstance(e, Expr) else 0 for e in node.args]
        return node.fn(*(x[leading + (None,) * n] if n else x for x, n in zip(args, missing, strict=True)), **kwargs)
    if node.op == "matmul" and all(isinstance(e, Expr) and e.meta.ndim == 1 for e in node.args):
        return (args[0] * args[1]).sum(-1)
    if node.op == "getitem" and not any(isinstance(i, (Tensor, list)) for i in pytree.tree_leaves(args[1])):
        return args[0][leading + (args[1] if isinstance(args[1], tuple) else (args[1],))]
    if node.op == "item":
        return node.fn(args[0])
    return _mapped(node, args, kwargs, lead)


def _mapped(node: Expr, args: Any, kwargs: Any, lead: int) -> Any:
    flat, spec = pytree.tree_flatten((args, kwargs))
    mapped = {i: flat[i] for i, given in enumerate(pytree.tree_leaves((node.args, node.kwargs))) if isinstance(given, Expr)}
    shape = torch.broadcast_shapes(*(x.shape[:lead] for x in mapped.values()))

    def one(values: dict[int, Tensor]) -> Any:
        a, k = pytree.tree_unflatten([values.get(i, x) for i, x in enumerate(flat)], spec)
        return node.fn(*a, **k)

    for _ in range(lead):
        one = torch.vmap(one)
    return one({i: x.expand(*shape, *x.shape[lead:]) for i, x in mapped.items()})
