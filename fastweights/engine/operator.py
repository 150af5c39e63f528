"""The kernels as one operator of torch where someone sees what runs, and as an autograd function where nobody does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..language.errors import FormError
from .frames import Backward, Forward, Sizes
from .memory import empty_as
from .watched import traced


def no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise FormError("the compiled kernels have first derivatives only; for derivatives of gradients run fw.scan(..., backend='torch')")


class KernelScan(torch.autograd.Function):
    """The operator where nobody records what runs: without its way through the dispatcher, which costs 0.3 ms.

    It gives what each reader read, and the last state.
    """

    @staticmethod
    def forward(ctx: Any, call: Forward, first: Tensor | None, reset: Tensor | None, *tensors: Tensor) -> Any:
        outs, last, saved = call(tensors, first, reset)
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(*tensors, reset, *saved)
        return *outs, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        call, (*tensors, reset, values, checkpoints) = ctx.call, ctx.saved_tensors
        *grad_outs, grad_last = grads
        needed = (*ctx.needs_input_grad[3:], ctx.needs_input_grad[1])
        # the operator says that there is no second derivative, to whoever takes one
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or traced([g for g in grads if g is not None]):
            some = next((g for g in grad_outs if g is not None), None)
            whole = None if some is None else torch.stack([torch.zeros_like(some) if g is None else g for g in grad_outs])
            like = tensors[0].new_empty(call.state_like.shape, dtype=torch.float32)
            arguments = (tensors, like, reset, values, checkpoints, whole, grad_last, call.spec, call.scales, needed)
            *found, grad_first = _given_back(torch.ops.fastweights.scan_backward(*arguments), needed)
        else:
            *found, grad_first = call.gradients(needed, tensors, reset, values, checkpoints, grad_outs, grad_last)
        return None, grad_first, None, *found


def scanned(call: Forward, tensors: Sequence[Tensor], first: Tensor | None, reset: Tensor | None) -> Sequence[Tensor]:
    """What each reader read, and the last state; with gradients if the call saves what they need."""
    if call.save:
        return KernelScan.apply(call, first, reset, *tensors)  # pyright: ignore[reportReturnType]
    outs, last, _ = call(tensors, first, reset)
    return *outs, last


# ---- the operator ----------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastweights", "DEF")
_library.define(
    "scan(Tensor[] tensors, Tensor first, Tensor? reset, int[] spec, float[] scales, ScalarType dtype, bool save)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "scan_backward(Tensor[] tensors, Tensor first, Tensor? reset, Tensor values, Tensor checkpoints, Tensor? grad_out, Tensor? grad_last,"
    " int[] spec, float[] scales, bool[] needed) -> Tensor[]"
)


def _scan(
    tensors: list[Tensor], first: Tensor, reset: Tensor | None, spec: list[int], scales: list[float], dtype: torch.dtype, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Forward(tensors, first, reset, spec, scales, dtype, save)
    out = empty_as(call.like.expand(call.reads, *call.like.shape))
    _, last, saved = call(tensors, first, reset, out.unbind())
    values, checkpoints = saved or (first.new_empty(size) for size in call.saved(False))
    return out, last, values, checkpoints


def _scan_fake(tensors: Any, first: Any, reset: Any, spec: Any, scales: Any, dtype: Any, save: bool) -> Any:
    call = Sizes(tensors, first, spec)
    out = first.new_empty(call.reads, call.B, call.T, call.H, call.width, dtype=dtype)
    return out, torch.empty_like(first), *(first.new_empty(size) for size in call.saved(save))


def _scan_backward(
    tensors: list[Tensor], first: Tensor, reset: Tensor | None, values: Tensor, checkpoints: Tensor, grad_out: Tensor | None,
    grad_last: Tensor | None, spec: list[int], scales: list[float], needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    call = Backward(tensors, first, reset, spec, scales, needed)
    grad_outs = [None] * call.reads if grad_out is None else list(grad_out.unbind())
    found = call(tensors, reset, values, checkpoints, grad_outs, grad_last)
    return [t.new_empty(0) if g is None else g for g, t in zip(found, [*tensors, first], strict=True)]


def _given_back(found: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    return [g if wanted else None for g, wanted in zip(found, needed, strict=True)]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    tensors, first, reset, spec, scales, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.scales = spec, scales
    ctx.needed = [t.requires_grad for t in [*tensors, first]]
    ctx.save_for_backward(*tensors, first, reset, *output[2:])
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, grad_out: Tensor | None, grad_last: Tensor | None, *_: Any) -> Any:
    *tensors, first, reset, values, checkpoints = ctx.saved_tensors
    given = (tensors, first, reset, values, checkpoints, grad_out, grad_last, ctx.spec, ctx.scales, ctx.needed)
    *found, grad_first = _given_back(torch.ops.fastweights.scan_backward(*given), ctx.needed)
    return found, grad_first, None, None, None, None, None


_library.impl("scan", _scan, "CPU")
_library.impl("scan_backward", _scan_backward, "CPU")
torch.library.register_fake("fastweights::scan", _scan_fake, lib=_library)
torch.library.register_fake(
    "fastweights::scan_backward",
    lambda tensors, first, reset, values, checkpoints, go, gl, spec, scales, needed: [
        torch.empty_like(t, memory_format=torch.contiguous_format) if wanted else t.new_empty(0)
        for t, wanted in zip([*tensors, first], needed, strict=True)
    ],
    lib=_library,
)
torch.library.register_autograd("fastweights::scan", _backward, setup_context=_setup, lib=_library)
torch.library.register_autograd("fastweights::scan_backward", no_second_derivative, lib=_library)
