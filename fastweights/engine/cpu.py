"""The CPU backend: a program's expressions become operands of the compiled kernels, which are one custom operator.

Whatever the kernels take as it is (a leaf, a number times a leaf) is handed over as it is, at any strides; other expressions are
evaluated by torch for all tokens at once first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..language.expr import Expr
from ..language.program import MicroStep, Program
from .frames import Forward, Spec
from .inputs import Inputs
from .kernels import CHUNK, library
from .operator import scanned
from .watched import traced, transformed

if TYPE_CHECKING:
    from .lowered import Prepared

_DECAYS, _ERASES = ("none", "scalar", "key"), ("none", "tied", "free")


@dataclass(frozen=True, eq=False)
class Operand:
    """``scale * number * vector``, the vector times the decay of its micro-step if ``decayed``."""

    vector: Expr
    number: Expr | None = None
    scale: float = 1.0
    decayed: bool = False


@dataclass(frozen=True, eq=False)
class Operands:
    """A program as the kernels take it: the expressions to hand over, and how they are used, in numbers."""

    tensors: tuple[Expr, ...]
    spec: tuple[int, ...]
    scales: tuple[float, ...]


@functools.lru_cache(maxsize=256)
def operands(program: Program) -> Operands | str:
    """The operands of a program, or why the kernels do not run it."""
    with _disable_current_modes():  # as in tracing: what is recorded outlives the capture of a graph
        return _operands(program)


def _operands(program: Program) -> Operands | str:
    backward = {read.backward for read in program.reads}
    if any(step.factor is not None for step in program.steps):
        return "a decay is not written as an exponential"
    if max(program.n, len(program.reads)) > CHUNK:
        return f"a token has more than {CHUNK} micro-steps or reads"
    if len(backward) > 1 or not program.reads:
        return "it reads W and its transpose in one token" if backward else "it does not read W"
    tensors: dict[Expr, int] = {}

    def place(e: Expr | None) -> int:
        return -1 if e is None else tensors.setdefault(e, len(tensors))

    spec = [_DECAYS.index(program.decay), _ERASES.index(program.erase), int(backward.pop()), program.n, len(program.reads)]
    scales: list[float] = []
    for step in program.steps:
        x, u = split(step.x, step), split(step.u, step, may_decay=False)
        key = step.y if step.y is not None else step.w if program.erase == "tied" else None
        same = x is not None and x.vector is key
        w = None if program.erase == "tied" else step.w  # one vector with y
        parts = [None if x is None or same else x.vector, key, u and u.vector, w, x and x.number, u and u.number, step.log_decay]
        spec += [*map(place, parts), step.lag, int(same), int(x is not None and x.decayed)]
        scales += [x.scale if x else 0.0, u.scale if u else 0.0]
    for read in program.reads:
        spec += [place(read.q), read.version]
    return Operands(tuple(tensors), tuple(spec), tuple(scales))


def split(e: Expr | None, step: MicroStep, may_decay: bool = True) -> Operand | None:
    """A product, taken apart into its numbers and the vector among its factors."""
    if e is None:
        return None
    scale, numbers, vectors, decayed = 1.0, list[Expr](), list[Expr](), False
    for factor, inverse in _factors(e):
        if factor.op == "constant" and factor.meta.ndim == 0 and factor.tape.wrote(factor.args[0]):
            value = factor.args[0].item()
            scale = scale / value if inverse else scale * value
        elif may_decay and not decayed and not inverse and factor.op == "exp" and factor.args[0] is step.log_decay:
            decayed = True
        elif factor.meta.ndim:
            vectors.append(1 / factor if inverse else factor)
        else:
            numbers.append(1 / factor if inverse else factor)
    if not vectors or not math.isfinite(scale):
        return Operand(e)
    return Operand(_product(vectors), _product(numbers) if numbers else None, scale, decayed)


def _factors(e: Expr, inverse: bool = False) -> Iterator[tuple[Expr, bool]]:
    """The factors of a product, and whether each divides."""
    if e.op in ("mul", "div") and all(isinstance(a, Expr) for a in e.args):
        yield from _factors(e.args[0], inverse)
        yield from _factors(e.args[1], inverse != (e.op == "div"))
    elif e.op == "neg":
        yield e.tape.constant(-1.0), False
        yield from _factors(e.args[0], inverse)
    else:
        yield e, inverse


def _product(factors: list[Expr]) -> Expr:
    return functools.reduce(lambda a, b: a * b, factors)


def refusal(program: Program, given: Inputs) -> str:
    """Why the kernels do not run a call; nothing if they do."""
    if given.device.type != "cpu":
        return f"the signals are on {given.device}"
    if given.dtype != torch.float32:
        return f"the signals are {given.dtype}"
    if transformed():
        return "it runs inside a transform of torch.func, or under forward-mode derivatives"
    found = operands(program)
    return found if isinstance(found, str) else library().why


def blocks(prepared: Prepared, weights: Tensor) -> tuple[list[Tensor], Tensor]:
    """What the readers read, (B, T, *heads, D), and the final W, for the signals of a call."""
    given, heads = prepared.given, prepared.heads
    found = operands(prepared.program)
    assert isinstance(found, Operands)
    prepared.evaluate([e for e in found.tensors if e not in prepared.raw])
    tensors = [prepared.raw[e] if e in prepared.raw else flat(prepared.values[e], e, given, heads) for e in found.tensors]
    for e in mixed_decays(prepared.program):  # channels, so that the gradient is summed over them
        i = next(i for i, x in enumerate(found.tensors) if x is e)
        tensors[i] = tensors[i].unsqueeze(-1).expand(*tensors[i].shape, weights.shape[-1])
    first = weights.flatten(1, len(heads))
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, first))
    if traced((first, *tensors)):
        out, last, *_ = torch.ops.fastweights.scan(tensors, first, given.reset, found.spec, found.scales, given.out, save)
        outs = [out[i] for i in range(out.shape[0])]
    else:
        call = Forward(tensors, first, given.reset, found.spec, found.scales, given.out, save, given.rule.name)
        *outs, last = scanned(call, tensors, first, given.reset)
    return [o.unflatten(2, heads) for o in outs], last.unflatten(1, heads)


def mixed_decays(program: Program) -> list[Expr]:
    """The decays per head in a program that has others per key."""
    logs = {step.log_decay: None for step in program.steps if step.log_decay is not None}
    return [log for log in logs if log.meta.ndim == 0] if program.decay == "key" else []


def flat(x: Tensor, e: Expr, given: Inputs, heads: tuple[int, ...]) -> Tensor:
    """An evaluated expression (B, T, *heads, ...), with axes of one where it is constant, as (B, T, H, ...)."""
    lead = 2 + len(heads)
    x = x.to(given.dtype).reshape((1,) * (lead + e.meta.ndim - x.ndim) + x.shape)
    return x.expand(given.B, given.T, *heads, *x.shape[lead:]).flatten(2, lead - 1)


@functools.lru_cache(maxsize=256)
def together(program: Program) -> int:
    """Tokens that the kernels take together in the forward pass."""
    found = operands(program)
    assert isinstance(found, Operands)
    return Spec(found.spec).tokens()
