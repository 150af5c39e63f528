"""The short causal convolution of a programmer, with the activation and the norm that follow it, in one pass over memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..language.errors import SignalError
from .capture import capturing, whole
from .gated_norm import unit_length
from .kernels import TYPES, CTensor, array, library, opened, rows
from .memory import empty
from .operator import no_second_derivative
from .watched import traced, transformed

WIDTHS = range(2, 9)  # of the compiled kernels


class Part(NamedTuple):
    """Consecutive channels that are treated alike: how many, whether through silu, in groups of how many they get unit norm (0: none)."""

    channels: int
    silu: bool = False
    group: int = 0


class _CPart(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("end", "silu", "group")]


class _CConvolution(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("B", "T", "channels", "width", "parts")),
        ("part", ctypes.POINTER(_CPart)),
        *((n, ctypes.c_void_p) for n in ("weight", "bias")),
        *((n, CTensor) for n in ("x", "y", "before", "dy", "dx", "dbefore")),
        ("sums", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    ]


def short_convolution(x: Tensor, weight: Tensor, before: Tensor, parts: tuple[Part, ...] = (), bias: Tensor | None = None) -> Tensor:
    """y_t = norm(silu(bias + sum_j weight_j x_{t - width + 1 + j})): a causal convolution of each channel with its own weights.

    Args:
        x: (B, T, C), at any strides.
        weight: (C, width).
        before: (B, width - 1, C), the inputs before x.
        parts: what follows the convolution, channel by channel (``Part``); nothing by default.
        bias: (C,), added before what follows.

    Runs on the compiled kernels where they are (float32 and 16 bits on a CPU, width 2 to 8), else in torch.

    >>> x = torch.ones(1, 3, 2)
    >>> short_convolution(x, torch.ones(2, 2), torch.zeros(1, 1, 2))[0, :, 0].tolist()
    [1.0, 2.0, 2.0]
    """
    B, _, channels = x.shape
    if sum(p.channels for p in parts or [Part(channels)]) != channels or any(p.group and p.channels % p.group for p in parts):
        raise SignalError(f"parts is {parts}, expected parts of {channels} channels together, each of whole groups")
    if weight.shape[0] != channels or before.shape != (B, weight.shape[1] - 1, channels):
        raise SignalError(
            f"weight is {tuple(weight.shape)} and before {tuple(before.shape)}, expected ({channels}, width) and (B, width - 1, {channels})"
        )
    spec = [n for part in parts or (Part(x.shape[-1]),) for n in (part.channels, int(part.silu), part.group)]
    capturing()  # a graph learns of the next line
    return _convolution(x, weight, before, bias, spec)


@whole
def _convolution(x: Tensor, weight: Tensor, before: Tensor, bias: Tensor | None, spec: list[int]) -> Tensor:
    compiled = x.device.type == "cpu" and x.dtype in TYPES and weight.shape[1] in WIDTHS and library().lib is not None
    if compiled and not transformed() and x.shape[1]:
        given = (x, weight, before.to(x.dtype), bias)
        tensors = [t for t in given if t is not None]
        if traced(tensors):
            return torch.ops.fastweights.convolve(*given, spec)
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return _Convolution.apply(*given, spec) if wanted else _convolve(*given, spec)  # pyright: ignore[reportReturnType]
    parts = tuple(Part(n, bool(silu), group) for n, silu, group in zip(*(spec[i::3] for i in range(3)), strict=True))
    return _in_torch(x, weight, before, parts, bias)


def _in_torch(x: Tensor, weight: Tensor, before: Tensor, parts: tuple[Part, ...], bias: Tensor | None = None) -> Tensor:
    extended, steps = torch.cat([before.to(x.dtype), x], 1), x.shape[1]
    z = torch.stack([extended[:, j : j + steps] * weight[:, j] for j in range(weight.shape[1])]).sum(0)
    z = z if bias is None else z + bias
    done = []
    for part, s in zip(parts, z.split([p.channels for p in parts], -1), strict=True):
        s = F.silu(s) if part.silu else s
        done.append(unit_length(s.unflatten(-1, (-1, part.group))).flatten(-2) if part.group else s)
    return torch.cat(done, -1).to(x.dtype)


_ops = torch.library.Library("fastweights", "FRAGMENT")
_ops.define("convolve(Tensor x, Tensor weight, Tensor before, Tensor? bias, int[] parts) -> Tensor")
_ops.define(
    "convolve_backward(Tensor grad, Tensor x, Tensor weight, Tensor before, Tensor? bias, int[] parts) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _problem(x: Tensor, weight: Tensor, before: Tensor, bias: Tensor | None, parts: list[int]) -> tuple[_CConvolution, list[Tensor]]:
    B, T, channels = x.shape
    single = [weight.detach().float().t().contiguous(), *([] if bias is None else [bias.detach().float().contiguous()])]
    ends = [sum(parts[: i + 1 : 3]) for i in range(0, len(parts), 3)]
    c = _CConvolution(B, T, channels, weight.shape[1], len(ends))
    c.part = array(_CPart, [_CPart(end, *parts[3 * i + 1 : 3 * i + 3]) for i, end in enumerate(ends)])
    c.weight, c.x, c.before, c.threads = single[0].data_ptr(), rows(x), rows(before), torch.get_num_threads()
    if bias is not None:
        c.bias = single[1].data_ptr()
    return c, single  # which must live as long as the call


def _convolve(x: Tensor, weight: Tensor, before: Tensor, bias: Tensor | None, parts: list[int]) -> Tensor:
    c, _single = _problem(x, weight, before, bias, parts)
    y = empty(x.shape, x.dtype)
    c.y = rows(y)
    opened().fastweights_convolve(ctypes.byref(c))
    return y


def _convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, before: Tensor, bias: Tensor | None, parts: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c, _single = _problem(x, weight, before, bias, parts)
    dx, dbefore = empty(x.shape, x.dtype), torch.empty(before.shape, dtype=before.dtype, device="cpu")
    lib = opened()
    runs = x.shape[0] * -(-x.shape[1] // lib.fastweights_convolution_run())
    sums = torch.empty(runs, weight.shape[1] + 1, x.shape[2], dtype=torch.float32, device="cpu")
    c.dy, c.dx, c.dbefore, c.sums = rows(grad), rows(dx), rows(dbefore), sums.data_ptr()
    lib.fastweights_convolve_backward(ctypes.byref(c))
    total = sums.sum(0)
    return dx, total[:-1].t().to(weight.dtype), dbefore, total[-1].to(weight.dtype if bias is None else bias.dtype)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, before, bias, ctx.parts = inputs
    ctx.save_for_backward(x, weight, before, bias)


def _backward(ctx: Any, grad: Tensor, run: Callable[..., Any] = torch.ops.fastweights.convolve_backward) -> Any:
    saved = ctx.saved_tensors  # which may be looked at once, under activation checkpointing
    *grads, dbias = run(grad, *saved, ctx.parts)
    return *grads, None if saved[3] is None else dbias, None


class _Convolution(torch.autograd.Function):
    """The operator where nobody records what runs: without its way through the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _setup(ctx, inputs, None)
        return _convolve(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        watched = torch.is_grad_enabled() or torch.compiler.is_compiling() or traced([grad])
        return _backward(ctx, grad) if watched else _backward(ctx, grad, _convolve_backward)


_ops.impl("convolve", _convolve, "CPU")
_ops.impl("convolve_backward", _convolve_backward, "CPU")
torch.library.register_fake("fastweights::convolve", lambda x, weight, before, bias, parts: x.new_empty(x.shape), lib=_ops)
torch.library.register_fake(
    "fastweights::convolve_backward",
    lambda grad, x, weight, before, bias, parts: (
        x.new_empty(x.shape),
        torch.empty_like(weight),
        before.new_empty(before.shape),
        (weight if bias is None else bias).new_empty(x.shape[2]),
    ),
    lib=_ops,
)
torch.library.register_autograd("fastweights::convolve", _backward, setup_context=_setup, lib=_ops)
torch.library.register_autograd("fastweights::convolve_backward", no_second_derivative, lib=_ops)
