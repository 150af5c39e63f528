"""The recurrent form on the compiled machine: any traced rule, token by token, forward and backward, for float32 and float64."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..language.trace import Trace
from .inputs import Inputs
from .kernels import library
from .machine import OPS, Machine, Unsupported, machine
from .watched import traced, transformed

_SEGMENT_BYTES = 1 << 20  # of what is kept of a segment of tokens on the way back
_MOST_TOKENS = 64


class _COperand(ctypes.Structure):
    _fields_ = [("buffer", ctypes.c_int64), ("offset", ctypes.c_int64), ("stride", ctypes.c_int64 * 3)]


class _CLoop(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_int64) for n in ("op", "mode", "reduced")), ("size", ctypes.c_int64 * 3), ("operand", _COperand * 4)]


class _CPort(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((n, ctypes.c_int64) for n in ("batch", "time", "head", "heads", "size", "offset"))]


_Ports = ctypes.POINTER(_CPort)


class _CProgram(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("B", "T", "H", "lanes", "wide", "threads", "segment")),
        ("sizes", ctypes.c_int64 * 9),
        *((n, ctypes.c_int64) for n in ("forwards", "backwards", "signals", "fixed", "states", "constants")),
        ("forward", ctypes.POINTER(_CLoop)), ("backward", ctypes.POINTER(_CLoop)),
        ("signal", _Ports), ("slow", _Ports), ("first", _Ports), ("last", _Ports),
        ("constant", ctypes.POINTER(ctypes.c_double)),
        ("y", _CPort),
        ("reset", ctypes.c_void_p), ("reset_batch", ctypes.c_int64), ("reset_time", ctypes.c_int64),
        ("checkpoints", ctypes.c_void_p),
        ("dsignal", _Ports), ("dslow", _Ports), ("dfirst", _Ports), ("dlast", _Ports),
        ("dy", _CPort),
    ]  # fmt: skip


class _Compiled(NamedTuple):
    """A machine with its loops as the library reads them."""

    machine: Machine
    forward: Any
    backward: Any
    constants: Any


_known: weakref.WeakKeyDictionary[Trace, _Compiled | str] = weakref.WeakKeyDictionary()


def refusal(known: Trace, given: Inputs) -> str:
    """Why the machine does not run a call; nothing if it does."""
    if given.device.type != "cpu":
        return f"the signals are on {given.device}"
    if torch.compiler.is_compiling() or transformed():
        return "it runs inside a transform of torch.func, under forward-mode derivatives, or is compiled"
    if traced((*given.signals.values(), *given.states)):
        return "someone records what runs"
    found = compiled(known, given)
    return found if isinstance(found, str) else library().why


def compiled(known: Trace, given: Inputs) -> _Compiled | str:
    """The machine of a rule at some sizes, or why there is none."""
    if known not in _known:
        try:
            slow = [n for n, s in given.rule.signals.items() if s.role.slow]
            _known[known] = _compile(machine(known, list(given.rule.states), slow))
        except Unsupported as error:
            _known[known] = f"the machine does not know {error}"
    return _known[known]


def _compile(found: Machine) -> _Compiled:
    def loops(items: Sequence[Any]) -> Any:
        made = (_CLoop * max(len(items), 1))()
        for c, loop in zip(made, items, strict=False):
            c.op, c.mode, c.reduced = loop.op, loop.mode, loop.reduced
            c.size[:] = loop.shape
            for slot, (buffer, offset, strides) in zip(c.operand, loop.operands, strict=False):
                slot.buffer, slot.offset = buffer, offset
                slot.stride[:] = strides
        return made

    constants = (ctypes.c_double * max(len(found.constants), 1))(*found.constants)
    return _Compiled(found, loops(found.forward), loops(found.backward), constants)


def sequential(known: Trace, given: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The outputs (B, T, H, ...) and the final states."""
    found = compiled(known, given)
    assert isinstance(found, _Compiled)
    tensors = [given.slow.get(n, x) for n, x in given.signals.items()]  # what is slow was expanded over batch and time, and is read once
    y, *states = _Sequential.apply(found, given, list(given.signals), *tensors, *given.states)  # type: ignore[misc]
    return y, tuple(states)


def _plain(x: Tensor, dtype: torch.dtype, lead: int) -> Tensor:
    """In the machine's dtype, what belongs to one token and head side by side."""
    x = x.to(dtype).resolve_neg()
    inner = x.shape[lead:].numel()
    if x.numel() and inner > 1 and x.flatten(lead).stride()[-1] != 1:
        x = x.contiguous()
    return x if x.ndim <= lead or x.flatten(lead).data_ptr() == x.data_ptr() else x.contiguous()


def _ports(items: Sequence[_CPort]) -> Any:
    return (_CPort * max(len(items), 1))(*items)


def _port(x: Tensor | None, place: tuple[str, int, int], lead: tuple[int, int, int], H: int) -> _CPort:
    """``lead`` says which axes of x are batch, time and head; -1: it has none."""
    _, offset, size = place
    if x is None:
        return _CPort(None, 0, 0, 0, H, size, offset)
    strides = [x.stride(axis) if axis >= 0 else 0 for axis in lead]
    return _CPort(x.data_ptr(), *strides, x.shape[lead[2]], size, offset)


_TOKENS, _STATE, _SLOW = (0, 1, 2), (0, -1, 1), (-1, -1, 0)


class _Sequential(torch.autograd.Function):
    """``apply(compiled, given, names, *signals, *states)`` to y and the final states."""

    @staticmethod
    def forward(ctx: Any, found: _Compiled, given: Inputs, names: list[str], *tensors: Tensor) -> Any:
        signals, states = tensors[: len(names)], tensors[len(names) :]
        slow = [given.rule.signals[n].role.slow for n in names]
        plain = [_plain(x, given.dtype, 1 if s else 3) for x, s in zip(signals, slow, strict=True)]
        first = [_plain(x, given.dtype, 2) for x in states]
        shape = (given.B, given.T, given.H, *found.machine.output.shape)
        y = torch.empty(shape, dtype=given.dtype)
        last = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in first]
        program = _program(found, given, dict(zip(names, plain, strict=True)), first)
        save = torch.is_grad_enabled() or any(ctx.needs_input_grad)
        tasks = -(-given.B * given.H // program.lanes)
        segments = -(-given.T // program.segment) if save else 0
        kept = torch.empty(tasks * segments * found.machine.sizes[0] * program.lanes + 16, dtype=given.dtype)
        program.checkpoints = _aligned(kept) if save else None
        places = found.machine.states
        program.last = _ports([_port(x, place, _STATE, given.H) for x, place in zip(last, places, strict=True)])
        program.y = _port(y, ("y", found.machine.output.offset, y.shape[3:].numel()), _TOKENS, given.H)
        _run(program, back=False)
        if save:
            ctx.save_for_backward(*plain, *first, kept)
            ctx.found, ctx.given, ctx.names, ctx.slow = found, given, names, slow
            ctx.dtypes = [x.dtype for x in tensors]
            ctx.set_materialize_grads(False)
        return y, *last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        dy, dlast = grads[0], list(grads[1:])
        found, given, names = ctx.found, ctx.given, ctx.names
        *tensors, kept = ctx.saved_tensors
        plain, first = tensors[: len(names)], tensors[len(names) :]
        program = _program(found, given, dict(zip(names, plain, strict=True)), first)
        program.checkpoints = _aligned(kept)
        B, T, H = given.B, given.T, given.H
        made: dict[str, Tensor] = {}
        for n, x, slow in zip(names, plain, ctx.slow, strict=True):
            made[n] = x.new_empty((B, H, *x.shape[1:]) if slow else (B, T, H, *x.shape[3:]))
        dfirst = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in first]
        found_machine = found.machine
        program.dsignal = _ports([_port(made[p[0]], p, _TOKENS, H) for p in found_machine.signals])
        program.dslow = _ports([_port(made[p[0]], p, _STATE, H) for p in found_machine.fixed])
        program.dfirst = _ports([_port(x, p, _STATE, H) for x, p in zip(dfirst, found_machine.states, strict=True)])
        given_last = [None if d is None else _plain(d, given.dtype, 2) for d in dlast]
        program.dlast = _ports([_port(d, p, _STATE, H) for d, p in zip(given_last, found_machine.states, strict=True)])
        dy = None if dy is None else _plain(dy, given.dtype, 3)
        program.dy = _port(dy, ("y", found_machine.output.offset, found_machine.output_size), _TOKENS, H)
        _run(program, back=True)
        made_grads = [_folded(made[n], x, slow) for n, x, slow in zip(names, plain, ctx.slow, strict=True)]
        return None, None, None, *(g.to(d) for g, d in zip((*made_grads, *dfirst), ctx.dtypes, strict=True))


def _folded(grad: Tensor, like: Tensor, slow: bool) -> Tensor:
    """Summed over the batch where a weight is the same for all, and over heads that share a signal."""
    if slow:
        grad, axis = grad.sum(0), 0
    else:
        axis = 2
    heads = like.shape[axis]
    return grad if grad.shape[axis] == heads else grad.unflatten(axis, (heads, -1)).sum(axis + 1)


def _program(found: _Compiled, given: Inputs, signals: dict[str, Tensor], first: Sequence[Tensor]) -> _CProgram:
    """All but what only one direction needs."""
    m = found.machine
    p = _CProgram()
    p.B, p.T, p.H, p.wide, p.threads = given.B, given.T, given.H, int(given.dtype == torch.float64), torch.get_num_threads()
    p.lanes = 16 if 4 * p.threads < given.B * given.H else 4
    number = 8 if p.wide else 4
    p.segment = max(min(_SEGMENT_BYTES // ((m.sizes[0] + m.sizes[1] + 1) * p.lanes * number), _MOST_TOKENS, max(given.T, 1)), 1)
    p.sizes[:] = m.sizes
    p.forwards, p.backwards, p.constants = len(m.forward), len(m.backward), len(m.constants)
    p.signals, p.fixed, p.states = len(m.signals), len(m.fixed), len(m.states)
    p.forward, p.backward, p.constant = found.forward, found.backward, found.constants
    p.signal = _ports([_port(signals[place[0]], place, _TOKENS, given.H) for place in m.signals])
    p.slow = _ports([_port(signals[place[0]], place, _SLOW, given.H) for place in m.fixed])
    p.first = _ports([_port(x, place, _STATE, given.H) for x, place in zip(first, m.states, strict=True)])
    if given.reset is not None:
        p.reset, (p.reset_batch, p.reset_time) = given.reset.data_ptr(), given.reset.stride()
    return p


def _aligned(x: Tensor) -> int:
    return -(-x.data_ptr() // 64) * 64


def _run(program: _CProgram, back: bool) -> None:
    lib = library().lib
    assert lib is not None
    if lib.fastweights_machine_ops() != len(OPS):
        raise RuntimeError("the compiled machine is of another version than fastweights; install it again")
    if program.B * program.H:
        lib.fastweights_machine(ctypes.byref(program), ctypes.c_int64(back))
