"""What follows a read-out, or stands between two projections: norm, weight and gate in one pass over memory, forward and backward."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..language.errors import SignalError
from .kernels import TYPES, CTensor, library, opened, rows
from .memory import empty
from .watched import traced

UNIT_EPSILON = 1e-6
ACTIVATIONS = {"sigmoid": torch.sigmoid, "swish": F.silu}


class How(NamedTuple):
    """Groups of how many channels are normalised (0: none), and with what eps; how the gate acts; whether it comes before the norm."""

    size: int = 0
    eps: float = 0.0
    activation: str = ""
    gate_first: bool = False
    centred: bool = False
    halves: bool = False  # the first half of the channels is the gate of the others
    scale: float = 1.0


class _CGatedNorm(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("B", "T", "channels", "size", "weights", "activation", "gate_first", "centred", "threads")),
        *((n, ctypes.c_double) for n in ("epsilon", "scale")),
        *((n, ctypes.c_void_p) for n in ("weight", "sums")),
        *((n, CTensor) for n in ("y", "gate", "out", "dy", "dgate")),
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
        centred: the mean of a group is taken away first.

    Computed in float32 or more, returned in the type of y. Runs on the compiled kernels where they are (float32 and 16 bits on a CPU),
    else in torch.

    >>> gated_norm(torch.ones(1, 4), torch.zeros(1, 4), size=2, activation="sigmoid")
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    channels = y.shape[-1]
    if activation not in ACTIVATIONS:
        raise SignalError(f"activation is {activation!r}; known: {', '.join(ACTIVATIONS)}")
    if gate is not None and gate.shape != y.shape:
        raise SignalError(f"gate is {tuple(gate.shape)}, expected the shape of y, {tuple(y.shape)}")
    if size < 0 or (size and channels % size):
        raise SignalError(f"size is {size}, expected a divisor of the {channels} channels of y, or 0 for no norm")
    if weight is not None and weight.shape not in ((channels,), (size,)):
        expected = f"a number for each of the {channels} channels of y{f' or the {size} of a group' if size else ''}"
        raise SignalError(f"weight is {tuple(weight.shape)}, expected {expected}")
    if gate is None and weight is None and not size:
        return y
    return _run(y, gate, weight, How(size, eps, "" if gate is None else activation, gate_first and gate is not None, centred))


def gated_unit(x: Tensor) -> Tensor:
    """swish(first half of the channels) * the second half: what an MLP has between its projections; (..., 2 C) -> (..., C).

    >>> gated_unit(torch.tensor([[0.0, 100.0, 3.0, 4.0]]))
    tensor([[  0., 400.]])
    """
    if x.shape[-1] % 2:
        raise SignalError(f"x is {tuple(x.shape)}, expected an even number of channels: those of the gate, then as many others")
    return _run(x, None, None, How(activation="swish", halves=True))


def unit_length(x: Tensor, scale: float = 1.0) -> Tensor:
    """scale * x / sqrt(|x|^2 + 1e-6) over the last axis: keys and queries of length one.

    >>> unit_length(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """
    size = x.shape[-1]
    return _run(x, None, None, How(size, UNIT_EPSILON / size, scale=scale * size**-0.5)) if size else x


def _run(y: Tensor, gate: Tensor | None, weight: Tensor | None, how: How) -> Tensor:
    given = [t for t in (y, gate, weight) if t is not None]
    if torch.compiler.is_compiling() or traced(given) or not _compiled(given) or library().lib is None or not y.numel():
        return _in_torch(y, gate, weight, how)
    z, g = _three(y), None if gate is None else _three(gate)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    out = _GatedNorm.apply(z, g, weight, how) if wanted else _forward(z, g, weight, how)
    return out if y.ndim == 3 else out.view(*y.shape[:-1], -1)  # pyright: ignore[reportOptionalMemberAccess, reportReturnType]


def _three(x: Tensor) -> Tensor:
    """(..., C) as (B, T, C)."""
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1]) if x.ndim < 3 else x.flatten(0, -3)


def _compiled(given: list[Tensor]) -> bool:
    return all(t.device.type == "cpu" and t.dtype in TYPES for t in given)


def _in_torch(y: Tensor, gate: Tensor | None, weight: Tensor | None, how: How) -> Tensor:
    gate, y = y.chunk(2, -1) if how.halves else (gate, y)
    single = torch.promote_types(y.dtype, torch.float32)
    u = y.to(single)
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


def _forward(y: Tensor, gate: Tensor | None, weight: Tensor | None, how: How) -> Tensor:
    c, _single = _problem(y, gate, weight, how)
    out = empty((c.B, c.T, c.channels), y.dtype)
    c.out = rows(out)
    opened().fastweights_gated_norm(ctypes.byref(c))
    return out


class _GatedNorm(torch.autograd.Function):
    """The kernels; for derivatives of gradients, and for whoever watches the backward pass, the same in torch."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor | None, weight: Tensor | None, how: How) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(y, gate, weight)
        return _forward(y, gate, weight, how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, gate, weight = ctx.saved_tensors
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or traced([grad]):
            return *_gradients_in_torch(grad, (y, gate, weight), ctx.how), None
        c, _single = _problem(y, gate, weight, ctx.how)
        dy = empty(y.shape, y.dtype)
        dgate = None if gate is None else empty(gate.shape, gate.dtype)
        c.out, c.dy, c.dgate = rows(grad), rows(dy), rows(dgate)
        if ctx.how.halves:
            c.dgate, c.dy = (rows(half) for half in dy.chunk(2, -1))
        lib = opened()
        sums = torch.empty(-(-c.B * c.T // lib.fastweights_gated_norm_rows()), c.weights, dtype=torch.float32, device="cpu")
        c.sums = sums.data_ptr()
        lib.fastweights_gated_norm_backward(ctypes.byref(c))
        return dy, dgate, None if weight is None else sums.sum(0).to(weight.dtype), None


def _gradients_in_torch(grad: Tensor, inputs: tuple[Tensor | None, ...], how: How) -> list[Tensor | None]:
    with torch.enable_grad():
        again = [t if t is None or t.requires_grad else t.detach().requires_grad_() for t in inputs]
        out = _in_torch(*again, how)  # type: ignore[arg-type]
    found = iter(torch.autograd.grad(out, [t for t in again if t is not None], grad, create_graph=torch.is_grad_enabled()))
    return [None if t is None else next(found) for t in inputs]


def _problem(y: Tensor, gate: Tensor | None, weight: Tensor | None, how: How) -> tuple[_CGatedNorm, Tensor | None]:
    gate, y = y.chunk(2, -1) if how.halves else (gate, y)
    B, T, channels = y.shape
    single = None if weight is None else weight.detach().float().contiguous()  # which must live as long as the call
    weights = 0 if single is None else len(single)
    activation = ("", *ACTIVATIONS).index(how.activation)
    c = _CGatedNorm(B, T, channels, how.size, weights, activation, how.gate_first, how.centred, torch.get_num_threads(), how.eps, how.scale)
    c.weight, c.y, c.gate = None if single is None else single.data_ptr(), rows(y), rows(gate)
    return c, single
