"""Calls of the kernels that need no gradient, prepared once for each signature (shapes, strides, types): later ones cost microseconds."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .inputs import Inputs, check, may_look
from .kernels import NOTHING, large, library

_MOST_SIGNATURES = 256
_known = threading.local()  # the structures of a call are not for two threads at once


def prepared(rule: Any, W: Tensor | None, signals: dict[str, Any], time: bool) -> Call | None:
    """The call for what was given; None where it must be looked at anew every time, or the kernels do not serve it."""
    if not may_look():
        return None
    given = signals.values() if W is None else (W, *signals.values())
    try:
        key = (id(rule), time, W is None, *signals, *[(x.shape, x.stride(), x.dtype, x.is_cpu) for x in given])
    except (AttributeError, TypeError):  # not a tensor: the check will say so
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return None
    try:
        calls = _known.calls
    except AttributeError:
        calls = _known.calls = {}
    if key not in calls:
        if len(calls) >= _MOST_SIGNATURES:
            calls.clear()
        calls[key] = rule, _prepare(check(rule, signals, W, time=time), W is None, time)  # the rule is kept: its id stays its own
    return calls[key][1]


def _prepare(given: Inputs, from_zero: bool, time: bool) -> Call | None:
    program, W = given.rule.trace_for(given.token_shapes()).program, given.states[0]
    if program is None or program.carries or program.transposed or len(given.states) > 1 or not given.T or cpu.refusal(program, given):
        return None
    found = cpu.operands(program)
    names = {leaf: name for name, leaf in program.leaves.items()}
    if isinstance(found, str) or len(program.reads) != 1 or program.output is not program.read_leaves[0] or program.reads[0].backward:
        return None
    if not all(e in names for e in found.tensors):
        return None
    if not time and (any(step.lag for step in program.steps) or 1 not in W.stride()[-2:]):  # csrc/step.cpp
        return None
    return Call(given, found, [names[e] for e in found.tensors], from_zero, time)


def _span(x: Tensor) -> int:
    """Bytes from the first number to behind the last."""
    return x.itemsize * (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)))


class Call:
    """A prepared call: its C structures, in which only addresses change from call to call."""

    def __init__(self, given: Inputs, found: cpu.Operands, names: list[str], from_zero: bool, time: bool) -> None:
        self.rule, W = given.rule, given.states[0]
        tensors = [given.signals[n] for n in names]
        shape = cpu.Shape(tensors, W, list(found.spec))
        like = torch.empty(given.B, given.T, given.H, shape.width, dtype=given.out)
        self.y_like = like if time else like.squeeze(1)
        self.problem = p = shape.problem(tensors, W, None, list(found.scales), [cpu.tensor(like)])
        self.W_like = torch.empty_like(W)
        p.first, p.last = NOTHING if from_zero else p.first, cpu.state(self.W_like)
        self.positive = ctypes.c_int64(0)
        p.positive = ctypes.pointer(self.positive)
        slots: dict[str, list[Any]] = {n: [] for n in names}
        for micro, m in zip(p.micro[: shape.n], shape.micro, strict=True):
            for slot, i in zip(cpu.SLOTS, m, strict=False):
                if i >= 0:
                    slots[names[i]].append(getattr(micro, slot))
        slots[names[shape.queries[0][0]]].append(p.read[0].q)
        self.slots = list(slots.items())
        self.first, self.last, self.read = p.first, p.last, p.read[0].out
        lib = library().lib
        assert lib is not None
        self.run, self.reference = lib.fastweights_forward if time else lib.fastweights_step, ctypes.byref(p)

    def takes(self, out: Any, W: Tensor) -> bool:
        """Whether the new state may be written to ``out`` while W is read: it is W, or no part of it."""
        like = self.W_like
        if not isinstance(out, Tensor) or (out.shape, out.stride(), out.dtype) != (like.shape, like.stride(), like.dtype) or not out.is_cpu:
            return False
        a, b = out.data_ptr(), W.data_ptr()
        return a == b or a >= b + _span(W) or b >= a + _span(out)

    def __call__(self, W: Tensor | None, out: Tensor | None, signals: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What is read, and the new state, in ``out`` if given."""
        for name, places in self.slots:
            address = signals[name].data_ptr()
            for place in places:
                place.data = address
        y = large(torch.empty_like(self.y_like))
        new = torch.empty_like(self.W_like) if out is None else out
        if W is not None:
            self.first.data = W.data_ptr()
        self.last.data, self.read.data = new.data_ptr(), y.data_ptr()
        self.problem.threads = torch.get_num_threads()
        self.run(self.reference)
        if self.positive.value:
            self.positive.value = 0
            raise cpu.positive_decay(self.rule.name)
        return y, new
