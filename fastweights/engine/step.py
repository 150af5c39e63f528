"""``step``: one token. Calls that the compiled kernels can serve are prepared once for each signature, and then cost microseconds."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor

from ..language.errors import SignalError, SignalTypeError
from ..language.rule import Rule
from . import cpu
from .inputs import Inputs, check, may_look
from .kernels import library
from .scan import Output, choose, run, scan

_MOST_SIGNATURES = 256
_known = threading.local()


def step(
    rule: Rule, W: Any = None, /, *, form: str = "auto", backend: str = "auto", out: Tensor | None = None, **signals: Tensor
) -> Output:
    """One token: like ``scan``, with signals (B, H, ...) that have no T axis.

    The new state is a new tensor, or is written to ``out``, which may be ``W`` itself: a stream then needs no memory but its own.

    >>> import torch, fastweights as fw
    >>> k, v = torch.ones(1, 1, 1), torch.full((1, 1, 2), 3.0)
    >>> y, W = fw.step(fw.rules.hebb, None, q=k, k=k, v=v)
    >>> y.tolist(), W.shape
    ([[[3.0, 3.0]]], torch.Size([1, 1, 2, 1]))
    """
    if torch.compiler.is_compiling() and out is None:
        y, state = scan(rule, state=W, form=form, backend=backend, **{n: x.unsqueeze(1) for n, x in signals.items()})
        return Output(y.squeeze(1), state)
    if form == "auto" and backend != "torch" and isinstance(W, Tensor) and may_look():
        call = _prepared(rule, W, signals)
        if call is not None and (out is None or call.takes(out)):
            return call(W, out, signals)
    given = check(rule, signals, W, time=False)
    y, state = run(given, choose(given, form, backend, None))
    if out is not None:
        state = _into(rule, out, state)
    return Output(y.squeeze(1), state)


def _into(rule: Rule, out: Any, state: Any) -> Tensor:
    if not isinstance(out, Tensor) or not isinstance(state, Tensor):
        raise SignalTypeError(f"{rule.name}: out is a {type(out).__name__}; it is a tensor for the new W of a rule with one state")
    if out.shape != state.shape or out.dtype != state.dtype or out.device != state.device:
        raise SignalError(f"{rule.name}: out is {out.dtype} {tuple(out.shape)}, but the new state is {state.dtype} {tuple(state.shape)}")
    if torch.is_grad_enabled() and (state.requires_grad or out.requires_grad):
        raise SignalError(f"{rule.name}: out cannot hold a state that needs a gradient; leave it out, or use torch.no_grad()")
    return out.copy_(state)


def _prepared(rule: Any, W: Tensor, signals: dict[str, Any]) -> _Call | None:
    """The call for what was given, from this thread's own; None where the kernels' step does not serve it."""
    given = [W, *signals.values()]
    if not all(isinstance(x, Tensor) and x.is_cpu for x in given):
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return None
    key = (id(rule), *signals, *((x.shape, x.stride(), x.dtype) for x in given))
    calls: dict[Any, tuple[Any, _Call | None]] = _known.__dict__.setdefault("calls", {})
    if key not in calls:
        if len(calls) >= _MOST_SIGNATURES:
            calls.clear()
        calls[key] = rule, _prepare(check(rule, signals, W, time=False))  # the rule is kept, so that its id stays its own
    return calls[key][1]


def _prepare(given: Inputs) -> _Call | None:
    W = given.states[0]
    program = given.rule.trace_for(given.token_shapes()).program
    if program is None or program.carries or len(given.states) > 1 or W.stride(-1) != 1 or cpu.refusal(program, given):
        return None
    found = cpu.operands(program)
    plain = len(program.reads) == 1 and program.output is program.read_leaves[0] and not any(step.lag for step in program.steps)
    names = {leaf: name for name, leaf in program.leaves.items()}
    if isinstance(found, str) or not plain or program.reads[0].backward or not all(e in names for e in found.tensors):
        return None
    return _Call(given, found, [names[e] for e in found.tensors])


class _Call:
    """A prepared step: its C structures, in which only addresses change from call to call."""

    def __init__(self, given: Inputs, found: cpu.Operands, names: list[str]) -> None:
        self.B, self.H, self.dtype = given.B, given.H, given.out
        W, self.rule = given.states[0], given.rule
        tensors = [given.signals[n] for n in names]
        shape = cpu.Shape(tensors, W, list(found.spec))
        self.y_shape = (given.B, given.H, shape.width)
        like = torch.empty(given.B, 1, given.H, shape.width, dtype=given.out)
        self.problem = p = shape.problem(tensors, W, None, list(found.scales), [cpu.tensor(like)])
        self.W_like = torch.empty_like(W)
        p.last = cpu.state(self.W_like)
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
        self.run, self.reference = library().lib.fastweights_step, ctypes.byref(p)  # type: ignore[union-attr]

    def takes(self, out: Any) -> bool:
        like = self.W_like
        return isinstance(out, Tensor) and (out.shape, out.stride(), out.dtype) == (like.shape, like.stride(), like.dtype) and out.is_cpu

    def __call__(self, W: Tensor, out: Tensor | None, signals: dict[str, Tensor]) -> Output:
        for name, places in self.slots:
            address = signals[name].data_ptr()
            for place in places:
                place.data = address
        y = torch.empty(self.y_shape, dtype=self.dtype)
        new = torch.empty_like(W) if out is None else out
        self.first.data, self.last.data, self.read.data = W.data_ptr(), new.data_ptr(), y.data_ptr()
        self.problem.threads = torch.get_num_threads()
        self.run(self.reference)
        if self.positive.value:
            self.positive.value = 0
            raise cpu.positive_decay(self.rule.name)
        return Output(y, new)
