"""Calls of the kernels, prepared once for each signature (shapes, strides, types, gradients): later ones cost microseconds.

In a stream of single tokens, what lies between the caller and the kernel has left the caches since the last one: every object that is
looked at costs more than what is done with it. So little is looked at.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..language.program import Program
from ..language.rule import Rule
from . import cpu
from .frames import Forward, Frame, positive_decay
from .inputs import Inputs, check
from .kernels import at, opened, state, tensor
from .operator import scanned
from .watched import forward_derivatives, modes, recorded, traced

_MOST = 256  # signatures that a thread keeps
_address, _empty_like, _threads = Tensor.data_ptr, torch.empty_like, torch.get_num_threads
# y and the new state of signals and a W; None if the state cannot be written to where it is to go
Token = Callable[[tuple[Tensor, ...], Tensor | None], tuple[Tensor, Tensor] | None]
# the last step of a rule: the names of its signals, whether such tensors are like those, and the call
Last = tuple[tuple[str | None, ...], Callable[..., bool], Token | None]
NONE: Last = (None,), bool, None


class _Known(threading.local):
    """The calls of a thread, for their structures are not for two at once: of tensors like these, such a call (none: not by this way)."""

    def __init__(self) -> None:
        self.calls: dict[tuple[Any, ...], list[tuple[Callable[..., bool], Any]]] = {}
        self.last: dict[int, Last] = {}  # by the rule's number


known = _Known()


def scan(rule: Any, W: Tensor | None, reset: Tensor | None, signals: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """What is read, and the last state; None where the call must be looked at anew every time, or the kernels do not serve it."""
    if modes() or forward_derivatives() or not isinstance(rule, Rule):
        return None
    given = (*signals.values(), *(() if W is None else (W,)), *(() if reset is None else (reset,)))
    key = (rule.number, torch.is_grad_enabled(), *signals, W is None, reset is None, getattr(given[0], "shape", None) if given else None)
    found = _find(key, given)
    if found is None:
        if recorded():
            return None
        checked = check(rule, signals, W, reset)
        if traced(given):
            return None
        found = _keep(key, given, _prepare_scan(checked, given))
    _, call = found
    if call is None:
        return None
    forward, names = call
    y, new = scanned(forward, [signals[n] for n in names], W, reset)
    return y, new


def step(rule: Rule, W: Tensor, signals: dict[str, Any], given: tuple[Tensor, ...]) -> Token | None:
    """A call for one token of ``given``, the signals and W, where no gradient is asked for; ``step.py`` tries the rule's last one first."""
    key = (rule.number, torch.is_grad_enabled(), *signals, W.shape)
    found = _find(key, given)
    if found is None:
        if recorded():
            return None
        checked = check(rule, signals, W, time=False)
        if traced(given):
            return None
        found = _keep(key, given, _prepare_step(checked, given))
    fits, call = found
    if not any(x.requires_grad for x in given):  # else it would depend on torch.no_grad whether the call is right for them
        if len(known.last) >= _MOST:
            known.last.clear()
        known.last[rule.number] = tuple(signals), fits, call
    return call


def _find(key: tuple[Any, ...], given: tuple[Tensor, ...]) -> tuple[Callable[..., bool], Any] | None:
    for found in known.calls.get(key, ()):
        if found[0](*given):
            return found
    return None


def _keep(key: tuple[Any, ...], given: tuple[Tensor, ...], call: Any) -> tuple[Callable[..., bool], Any]:
    calls = known.calls
    calls[key] = [(_fits(given), call), *calls.pop(key, ())]
    while len(calls) > 1 and sum(map(len, calls.values())) > _MOST:
        del calls[next(iter(calls))]
    del calls[key][_MOST:]
    return calls[key][0]


def _fits(given: tuple[Tensor, ...]) -> Callable[..., bool]:
    """Says of tensors whether they are of the types, sizes and strides of these, and ask for the same gradients; no, if someone watches."""
    sizes: list[Any] = [[*x.shape] for x in given]
    strides: list[Any] = [[*x.stride()] for x in given]
    try:
        # as torch.compile does: one call instead of five a tensor, which also sees transforms and tracers
        from torch._C._dynamo.guards import TensorGuards
    except ImportError:  # it is no public part of torch
        return fits_in_python(given)
    if len({*map(id, given)}) < len(given):  # which those do not take
        return fits_in_python(given)
    try:
        return TensorGuards(*given, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    except TypeError:
        return fits_in_python(given)


def fits_in_python(given: tuple[Tensor, ...]) -> Callable[..., bool]:
    """The same without a part of torch that may change."""

    def of(x: Any) -> tuple[Any, ...] | None:
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            return None
        return type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.is_neg() or x._is_zerotensor()

    known = [of(x) for x in given]
    return lambda *tensors: not recorded() and [of(x) for x in tensors] == known


def _handed_over(given: Inputs) -> tuple[Program, cpu.Operands, list[str]] | None:
    """A program, what the kernels are handed, and which signals that is; None if some of it is computed first, or they do not serve it."""
    known = given.rule.trace_for(given.token_shapes())
    program = known.program
    if program is None or program.carries or program.transposed or len(given.states) > 1 or not given.T or cpu.refusal(program, given):
        return None
    found, names = cpu.operands(program), {leaf: name for name, leaf in program.leaves.items()}
    if isinstance(found, str) or len(program.reads) != 1 or program.output is not program.read_leaves[0] or program.reads[0].backward:
        return None
    fit = known.lasting and all(e in names for e in found.tensors)
    return (program, found, [names[e] for e in found.tensors]) if fit else None


def _prepare_scan(given: Inputs, tensors: tuple[Tensor, ...]) -> tuple[Forward, list[str]] | None:
    parts, save = _handed_over(given), torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if parts is None or (save and (given.slow or cpu.mixed_decays(parts[0]))):
        return None
    _, found, names = parts
    handed = [given.signals[n] for n in names]
    return Forward(handed, given.states[0], given.reset, found.spec, found.scales, given.out, save, given.rule.name), names


def _prepare_step(given: Inputs, tensors: tuple[Tensor, ...]) -> Token | None:
    parts, W = _handed_over(given), given.states[0]
    if parts is None or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return None
    program, found, names = parts
    if any(step.lag for step in program.steps) or 1 not in W.stride()[-2:]:  # csrc/step.cpp
        return None
    return Step(given, found, names).call()


class Step:
    """What a call of one token needs."""

    def __init__(self, given: Inputs, found: cpu.Operands, names: list[str]) -> None:
        W, self.where = given.states[0], given.rule.name
        self.frame = frame = Frame([given.signals[n] for n in names], W, None, found.spec, found.scales)
        y = torch.empty(given.B, given.T, given.H, given.V, dtype=given.out)
        self.y_like, self.W_like = y.squeeze(1), torch.empty_like(W)
        frame.c_read[0].out, frame.problem.last = tensor(y), state(self.W_like)
        places = dict(zip(names, frame.tensor_places, strict=True))
        states = [at(frame.problem, "first")], [at(frame.problem, "last")]
        frame.bind(*(places.get(n, []) for n in given.signals), *states, [at(frame.c_read[0], "out")])

    def call(self) -> Token:
        """The call, with what it needs at hand."""
        y_like, W_like, addresses, reference = self.y_like, self.W_like, self.frame.addresses, self.frame.reference
        run = opened().fastweights_step

        def token(given: tuple[Tensor, ...], out: Tensor | None) -> tuple[Tensor, Tensor] | None:
            if out is not None and not self.takes(out, given[-1]):
                return None
            y = _empty_like(y_like)
            new = _empty_like(W_like) if out is None else out
            if run(reference, addresses(*map(_address, given), new.data_ptr(), y.data_ptr()), _threads()):
                raise positive_decay(self.where)
            if out is not None and not out.is_inference():
                torch.autograd.graph.increment_version(out)
            return y, new

        return token

    def takes(self, out: Any, W: Tensor) -> bool:
        """Whether the new state may be written to ``out`` while W is read: it is W, or no part of it."""
        like = self.W_like
        if out is W:
            return W.stride() == like.stride() and not (torch.is_grad_enabled() and W.requires_grad)
        if not isinstance(out, Tensor) or (out.shape, out.stride(), out.dtype) != (like.shape, like.stride(), like.dtype) or traced((out,)):
            return False
        if not out.is_cpu or (torch.is_grad_enabled() and out.requires_grad):
            return False
        a, b = out.data_ptr(), W.data_ptr()
        return (a == b and W.stride() == like.stride()) or a >= b + _span(W) or b >= a + _span(out)


def _span(x: Tensor) -> int:
    """Bytes from the first number to behind the last."""
    return x.itemsize * (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)))
