"""What follows a read-out, or stands between two projections: norm, weight and gate in one pass over memory, forward and backward.

Also what is made of the same parts: keys of length one, the gated unit of an MLP, a share of the values.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..language.errors import SignalError, SignalTypeError
from .kernels import TYPES, CTensor, library, opened, rows
from .memory import empty
from .watched import traced

UNIT_EPSILON = 1e-6
ACTIVATIONS = {"sigmoid": torch.sigmoid, "swish": F.silu}


class How(NamedTuple):
    """Groups of how many channels are normalised (0: none), and with what eps; how the gate acts, and whether it comes before the norm;
    whether the mean of a group is taken away; whether the first half of the channels is the gate of the others; a factor."""

    size: int = 0
    eps: float = 0.0
    activation: str = ""
    gate_first: bool = False
    centred: bool = False
    halves: bool = False
    scale: float = 1.0


class Given(NamedTuple):
    """What there is: y (..., C) or, with its gate in it, (..., 2 C); a gate like y, a weight; how much of x a head adds to y first."""

    y: Tensor
    gate: Tensor | None = None
    weight: Tensor | None = None
    skip: Tensor | None = None
    x: Tensor | None = None


class _CGatedNorm(ctypes.Structure):
    _fields_ = [
        *(
            (n, ctypes.c_int64)
            for n in ("B", "T", "channels", "size", "weights", "skips", "activation", "gate_first", "centred", "threads")
        ),
        *((n, ctypes.c_double) for n in ("epsilon", "scale")),
        *((n, ctypes.c_void_p) for n in ("weight", "skip", "sums")),
        *((n, CTensor) for n in ("y", "gate", "x", "out", "dy", "dgate", "dx")),
    ]


def gated_norm(
    y: Tensor, gate: Tensor | None = None, weight: Tensor | None = None, *, size: int = 0, eps: float = 1e-5, activation: str = "swish",
    gate_first: bool = False, centred: bool = False,
) -> Tensor:  # fmt: skip
    """weight * normalised(y) * a(gate), or weight * normalised(y * a(gate)) if the gate comes first.

    Args:
        y: (..., C), which is normalised in groups of ``size`` channels: y / sqrt(mean(y^2) + eps); not at all if 0.
        gate: (..., C), through the ``activation``: a(z) = sigmoid(z), or swish z sigmoid(z).
        weight: (C,), or as many numbers as a group has, for all groups alike.
        centred: the mean of a group is taken away first: (y - mean(y)) / sqrt(mean((y - mean(y))^2) + eps).

    Computed in float32, or in the type of y if that is wider; returned in the type of y. Runs on the compiled kernels where they are
    (float32 and 16 bits on a CPU), else in torch.

    >>> gated_norm(torch.ones(1, 4), torch.zeros(1, 4), size=2, activation="sigmoid")
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    channels = y.shape[-1] if y.ndim else 0
    if activation not in ACTIVATIONS:
        raise SignalError(f"activation is {activation!r}; known: {', '.join(ACTIVATIONS)}")
    if gate is not None and gate.shape != y.shape:
        raise SignalError(f"gate is {tuple(gate.shape)}, expected the shape of y, {tuple(y.shape)}")
    if size < 0 or (size and channels % size):
        raise SignalError(f"size is {size}, expected a divisor of the {channels} channels of y, or 0 for no norm")
    if weight is not None and weight.shape not in ((channels,), (size or channels,)):
        expected = f"a number for each of the {channels} channels of y{f' or the {size} of a group' if size else ''}"
        raise SignalError(f"weight is {tuple(weight.shape)}, expected {expected}")
    if gate is None and weight is None and not size:
        return y
    return _run(Given(y, gate, weight), How(size, eps, "" if gate is None else activation, gate_first and gate is not None, centred))


def gated_unit(x: Tensor) -> Tensor:
    """swish(first half of the channels) * the second half: what an MLP has between its projections; (..., 2 C) -> (..., C).

    >>> gated_unit(torch.tensor([[0.0, 100.0, 3.0, 4.0]]))
    tensor([[  0., 400.]])
    """
    if x.shape[-1] % 2:
        raise SignalError(f"x is {tuple(x.shape)}, expected an even number of channels: those of the gate, then as many others")
    return _run(Given(x), How(activation="swish", halves=True))


def unit_length(x: Tensor, scale: float = 1.0) -> Tensor:
    """scale * x / sqrt(|x|^2 + 1e-6) over the last axis: keys and queries of length one.

    >>> unit_length(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """
    size = x.shape[-1]
    return _run(Given(x), How(size, UNIT_EPSILON / size, scale=scale * size**-0.5)) if size else x


def with_share(y: Tensor, skip: Tensor, x: Tensor) -> Tensor:
    """y + skip x, with a number a head: y and x (B, T, H, D), skip (H,).

    >>> with_share(torch.zeros(1, 1, 2, 1), torch.tensor([1.0, 2.0]), torch.ones(1, 1, 2, 1)).flatten()
    tensor([1., 2.])
    """
    if y.shape != x.shape or skip.shape != y.shape[2:3]:
        raise SignalError(f"y is {tuple(y.shape)}, skip {tuple(skip.shape)}, x {tuple(x.shape)}, expected y and x (B, T, H, D), skip (H,)")
    return _run(Given(y.flatten(2), skip=skip, x=x.flatten(2)), How()).view_as(y)


def _run(given: Given, how: How) -> Tensor:
    y, tensors = given.y, [t for t in given if t is not None]
    if not y.ndim or not y.is_floating_point():
        raise SignalTypeError(f"y is {y.dtype} of shape {tuple(y.shape)}, expected floating-point numbers (..., C)")
    if torch.compiler.is_compiling() or traced(tensors) or not _compiled(tensors) or library().lib is None or not y.numel():
        return _in_torch(given, how)
    if y.ndim != 3:
        given = given._replace(y=_three(y), gate=None if given.gate is None else _three(given.gate))
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    out = _GatedNorm.apply(how, *given) if wanted else _forward(given, how)
    return out if y.ndim == 3 else out.view(*y.shape[:-1], -1)  # pyright: ignore[reportOptionalMemberAccess, reportReturnType]


def _three(x: Tensor) -> Tensor:
    """(..., C) as (B, T, C)."""
    return x.reshape(1, -1, x.shape[-1]) if x.ndim < 3 else x.flatten(0, -3)


def _compiled(tensors: list[Tensor]) -> bool:
    return all(t.device.type == "cpu" and t.dtype in TYPES for t in tensors)


def _in_torch(given: Given, how: How) -> Tensor:
    y, gate, weight, skip, x = given
    gate, y = y.chunk(2, -1) if how.halves else (gate, y)
    single = torch.promote_types(y.dtype, torch.float32)
    u = y.to(single)
    if skip is not None and x is not None:
        u = u + (skip.to(single).unsqueeze(-1) * x.to(single).unflatten(-1, (len(skip), -1))).flatten(-2)
    a = None if gate is None else ACTIVATIONS[how.activation](gate.to(single))
    u = u * a if a is not None and how.gate_first else u
    if how.size:
        z = u.unflatten(-1, (-1, how.size))
        z = z - z.mean(-1, keepdim=True) if how.centred else z
        u = (z * torch.rsqrt(z.square().mean(-1, keepdim=True) + how.eps)).flatten(-2)
    u = u if how.scale == 1 else u * how.scale
    if weight is not None:
        u = (u.unflatten(-1, (-1, len(weight))) * weight.to(single)).flatten(-2)
    return (u * a if a is not None and not how.gate_first else u).to(y.dtype)


class _GatedNorm(torch.autograd.Function):
    """The kernels; for derivatives of gradients, and for whoever watches the backward pass, the same in torch."""

    @staticmethod
    def forward(ctx: Any, how: How, *given: Tensor | None) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(*given)
        return _forward(Given(*given), how)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        given = Given(*ctx.saved_tensors)
        watched = torch.is_grad_enabled() or torch.compiler.is_compiling() or traced([grad])
        return None, *(_gradients_in_torch if watched else _gradients)(grad, given, ctx.how)


def _forward(given: Given, how: How) -> Tensor:
    c, _single = _problem(given, how)
    out = empty((c.B, c.T, c.channels), given.y.dtype)
    c.out = rows(out)
    opened().fastweights_gated_norm(ctypes.byref(c))
    return out


def _gradients(grad: Tensor, given: Given, how: How) -> tuple[Tensor | None, ...]:
    c, _single = _problem(given, how)
    dy, dgate, dx = (None if t is None else empty(t.shape, t.dtype) for t in (given.y, given.gate, given.x))
    assert dy is not None
    c.out, c.dy, c.dgate, c.dx = rows(grad), rows(dy), rows(dgate), rows(dx)
    if how.halves:
        c.dgate, c.dy = (rows(half) for half in dy.chunk(2, -1))
    lib = opened()
    sums = torch.empty(-(-c.B * c.T // lib.fastweights_gated_norm_rows()), c.weights + c.skips, dtype=torch.float32, device="cpu")
    c.sums = sums.data_ptr()
    lib.fastweights_gated_norm_backward(ctypes.byref(c))
    total = sums.sum(0).split([c.weights, c.skips])
    dweight, dskip = (None if t is None else s.to(t.dtype) for t, s in zip((given.weight, given.skip), total, strict=True))
    return dy, dgate, dweight, dskip, dx


def _gradients_in_torch(grad: Tensor, given: Given, how: How) -> list[Tensor | None]:
    def apart(t: Tensor) -> Tensor:  # so that nothing before it is walked, or hears of it, twice
        return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()

    with torch.enable_grad():
        again = Given(*(None if t is None else apart(t) for t in given))  # type: ignore[arg-type]
        out = _in_torch(again, how)
    found = iter(torch.autograd.grad(out, [t for t in again if t is not None], grad, create_graph=torch.is_grad_enabled()))
    return [None if t is None else next(found) for t in given]


def _problem(given: Given, how: How) -> tuple[_CGatedNorm, list[Tensor | None]]:
    y, gate, _, _, x = given
    gate, y = y.chunk(2, -1) if how.halves else (gate, y)
    single = [None if t is None else t.detach().float().contiguous() for t in given[2:4]]  # which must live as long as the call
    weight, skip = ((0, None) if t is None else (len(t), t.data_ptr()) for t in single)
    act = ("", *ACTIVATIONS).index(how.activation)
    sizes = (*y.shape, how.size, weight[0], skip[0], act, how.gate_first, how.centred, torch.get_num_threads(), how.eps, how.scale)
    c = _CGatedNorm(*sizes, weight[1], skip[1])
    c.y, c.gate, c.x = rows(y), rows(gate), rows(x)
    return c, single
