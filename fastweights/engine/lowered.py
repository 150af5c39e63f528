"""Run a program over time: evaluate its expressions for all tokens, run the micro-steps in a form, put the output together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..language.evaluate import evaluate
from ..language.expr import Expr, ordered
from ..language.program import Carry, Program
from . import carry
from .block import Micro
from .decay import Decay, only
from .inputs import Inputs
from .watched import may_look

Form = Callable[[Micro, Tensor], tuple[list[Tensor], Tensor]]
Engine = Callable[["Prepared", Tensor], tuple[list[Tensor], Tensor]]  # what is read (B, T, *heads, D) and the final W

# Beyond this many micro-steps a block that erases loses digits that the recurrence keeps: what is erased cancels only in
# the sum over the block. Measured with keys of one sign: error against the float32 recurrence 1.5x at 16, 2.2x at 32, 4x at 64.
SAFE_ERASE = 16


def widens(program: Program, dtype: torch.dtype, block: int) -> bool:
    """Whether blocks of that many micro-steps are computed in float64, so that float32 errors stay those of the recurrence."""
    return dtype == torch.float32 and program.erase != "none" and block > SAFE_ERASE


class Prepared:
    """A call of a program: its signals as values of the leaves, and the states beside W carried over time.

    ``values`` have the axes (B, T, *heads, ...), ``lead`` of them before those of one token; ``raw`` are the signals as given.
    """

    def __init__(self, program: Program, given: Inputs) -> None:
        self.program, self.given = program, given
        self.heads = _head_axes([x.shape[2] for x in given.signals.values()] + [given.H])
        self.lead = 2 + len(self.heads)
        self.raw = {program.leaves[n]: x for n, x in given.signals.items()}
        self.values: dict[Expr, Tensor] = {}
        self.starts = {n: s.unflatten(1, self.heads) for n, s in zip(given.rule.states, given.states, strict=True)}
        self.finals: dict[str, Tensor] = {}
        for step in program.carries:
            self.evaluate([e for e in (step.decay, step.input) if e is not None])
            self.finals[step.name] = _carried(step, program, self.values, self.starts[step.name], given, self.lead)

    def evaluate(self, wanted: Iterable[Expr]) -> None:
        """Adds what is wanted to ``values``."""
        wanted = [e for e in wanted if e not in self.values]
        if not wanted:
            return
        for leaf in ordered(wanted, self.values):
            if leaf in self.raw:
                self.values[leaf] = _spread(self.raw[leaf].to(self.given.dtype), self.heads)
        self.values = evaluate(wanted, self.values, self.lead)


def run(program: Program, given: Inputs, engine: Engine) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The outputs (B, T, H, ...) and the final states; ``engine`` runs the micro-steps."""
    if not given.T:
        return given.empty(), given.states
    prepared = Prepared(program, given)
    first, *others = given.rule.states
    weights = prepared.starts[first]
    reads, weights = engine(prepared, weights.mT if program.transposed else weights)
    prepared.values |= dict(zip(program.read_leaves, reads, strict=True))
    prepared.evaluate([program.output])
    y, lead, heads = prepared.values[program.output], prepared.lead, prepared.heads
    y = y.expand(given.B, given.T, *heads, *y.shape[lead:]).flatten(2, lead - 1)
    finals = {**prepared.finals, first: weights.mT if program.transposed else weights}
    return y, tuple(finals[n].expand(prepared.starts[n].shape).flatten(1, lead - 2) for n in (first, *others))


def blocks(form: Form, block: int) -> Engine:
    """The engine of the torch forms; ``block`` is how many micro-steps the form takes at once."""

    def engine(prepared: Prepared, weights: Tensor) -> tuple[list[Tensor], Tensor]:
        program, given = prepared.program, prepared.given
        prepared.evaluate(program.expressions())
        micro, weights, spoilt, unread = _contained(_micro(program, prepared.values, given, prepared.lead), weights)
        if widens(program, given.dtype, block):
            reads, weights = form(micro.map(lambda t, _: t.double()), weights.double())
            reads, weights = [r.to(given.dtype) for r in reads], weights.to(given.dtype)
        else:
            reads, weights = form(micro, weights)
        if spoilt is not None:
            parts = zip(reads, unread, program.reads, strict=True)
            reads = [torch.where((spoilt.any(-1, keepdim=True) if at.backward else spoilt) | no, torch.nan, r) for r, no, at in parts]
            weights = torch.where(spoilt[..., -1, :].unsqueeze(-1), torch.nan, weights)
        return [read[..., program.n - 1 :: program.n, :].movedim(-2, 1) for read in reads], weights

    return engine


def _head_axes(counts: list[int]) -> tuple[int, ...]:
    """The heads as a product of axes, such that every number of heads that occurs is that of the first few axes."""
    axes, reached = [], 1
    for count in sorted(set(counts)):
        if count % reached == 0:
            axes.append(count // reached)
            reached = count
    if reached != max(counts):
        return (max(counts),)
    return tuple(axes)


def _spread(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """(B, T, h, ...) as (B, T, *heads, ...), with axes of one where the signal is the same for several heads."""
    shape, reached = [], 1
    for axis in heads:
        shape.append(axis if reached < x.shape[2] else 1)
        reached *= axis if reached < x.shape[2] else 1
    if reached == x.shape[2]:
        return x.unflatten(2, shape)
    total = torch.Size(heads).numel()
    return x.repeat_interleave(total // x.shape[2], 2).unflatten(2, heads)


def _carried(step: Carry, program: Program, values: dict[Expr, Tensor], start: Tensor, given: Inputs, lead: int) -> Tensor:
    """Adds the state before every token to ``values``; returns the state after the last."""
    linear = step.kind == "linear"
    parts = [values[e] if e is not None else torch.zeros(()) for e in (step.decay, step.input)]
    scalar = program.leaves[step.name].meta.ndim == 0
    begin = start.unsqueeze(-1) if scalar else start
    shape = (given.B, given.T, *start.shape[1 : lead - 1], begin.shape[-1])
    a, b = (_over_time(p.to(given.device, given.dtype), lead, shape, scalar) for p in parts)
    bad = a.isnan() | b.isnan() | a.isposinf() | b.isposinf()
    if linear:
        bad = bad | ~a.isfinite() | ~b.isfinite()
    a, b = torch.where(bad, 0.0, a), torch.where(bad, 0.0, b)
    at = None if given.reset is None else given.reset.reshape(given.B, *(1,) * (lead - 2), given.T, 1)
    if at is not None:
        zero = torch.zeros((), dtype=a.dtype, device=a.device)
        b = b if linear else torch.where(at, torch.maximum(a, b), b)
        a = torch.where(at, zero if linear else zero - torch.inf, a)
    spoilt = spoilt_since(bad, ~begin.isfinite(), at)
    begin = only(begin.isfinite(), begin)
    after = torch.where(spoilt, torch.nan, (carry.linear if linear else carry.maximum)(a, b, begin))
    before = torch.cat([begin.expand(after[..., 0, :].shape).unsqueeze(-2), after[..., :-1, :]], -2)
    if at is not None:
        before = only(~at, before)
    before = before.movedim(-2, 1)
    values[program.leaves[step.name]] = before.squeeze(-1) if scalar else before
    last = after[..., -1, :]
    return last.squeeze(-1) if scalar else last


def _over_time(x: Tensor, lead: int, shape: tuple[int, ...], scalar: bool) -> Tensor:
    """(B, T, *heads[, D]) or a constant as (B, *heads, T, D)."""
    if x.ndim < lead:
        x = x.reshape((1,) * lead + x.shape)
    elif scalar is False and x.ndim == lead:
        x = x.unsqueeze(-1)
    x = x if x.ndim > lead else x.unsqueeze(-1)
    return x.expand(shape).movedim(1, -2)


def _micro(program: Program, values: dict[Expr, Tensor], given: Inputs, lead: int) -> Micro:
    """The expressions of all micro-steps, over time."""
    steps = program.steps

    def column(exprs: list[Expr | None], nothing: float = 0.0) -> Tensor | None:
        """One part of every micro-step as (..., T * n, D)."""
        if all(e is None for e in exprs):
            return None
        parts = [torch.full((), nothing, dtype=given.dtype, device=given.device) if e is None else values[e] for e in exprs]
        widths = [e.meta.shape[-1] if e is not None and e.meta.ndim else 1 for e in exprs]
        full = [_with_time(p.to(given.dtype), e, lead, given.T) for p, e in zip(parts, exprs, strict=True)]
        shape = torch.broadcast_shapes(*(p.shape[:lead] for p in full))
        full = [p.expand(*shape, max(widths)) for p in full]
        joined = full[0] if len(full) == 1 else torch.stack(full, 2).flatten(1, 2)
        return joined.movedim(1, -2)

    tied = program.erase == "tied"
    keys = [s.y if s.y is not None else s.w for s in steps] if tied else [s.y for s in steps]
    x, y, u = column([s.x for s in steps]), column(keys), column([s.u for s in steps])
    w = (y if u is not None else None) if tied else column([s.w for s in steps])
    decay = Decay(column([s.log_decay for s in steps]), column([s.factor for s in steps], 1.0))
    reset = None
    if given.reset is not None:
        at = given.reset.reshape(given.B, *(1,) * (lead - 2), given.T, 1).to(given.dtype)
        reset = at if program.n == 1 else _at_micro_step(at, 0, program.n)
    readers = []
    for read in program.reads:
        q = _with_time(values[read.q].to(given.dtype), read.q, lead, given.T).movedim(1, -2)
        readers.append(q if program.n == 1 else _at_micro_step(q, program.n - 1, program.n))
    back = tuple(program.n - read.version for read in program.reads)
    backward = tuple(read.backward for read in program.reads)
    return Micro(decay, x, y, u, w, tied, tuple(s.lag for s in steps), tuple(readers), back, backward, reset)


def _with_time(x: Tensor, e: Expr | None, lead: int, steps: int) -> Tensor:
    """(B, T, *heads, D) with D = 1 for a number and axes of one where a constant lacks them."""
    rank = 0 if e is None else e.meta.ndim
    if x.ndim < lead + rank:
        x = x.reshape((1,) * lead + x.shape[x.ndim - rank :])
    x = x if rank else x.unsqueeze(-1)
    return x.expand(x.shape[0], steps, *x.shape[2:])


def _at_micro_step(x: Tensor, which: int, n: int) -> Tensor:
    """(..., T, D) as (..., T * n, D): at one micro-step of each token, zero at the others."""
    zeros = torch.zeros_like(x)
    return torch.stack([x if i == which else zeros for i in range(n)], -2).flatten(-3, -2)


def _contained(micro: Micro, weights: Tensor) -> tuple[Micro, Tensor, Tensor | None, list[Tensor]]:
    """Keep what is not finite to its own batch row, head and later tokens.

    A matrix product over a block would spread it to earlier tokens. So it is taken out here; the third result (..., S, V) says
    which rows of W are not finite after which micro-step, the fourth where readers themselves were not.
    """
    keys = [t for t in (micro.x, micro.y, micro.w, micro.decay.factor) if t is not None]
    bad = torch.zeros((), dtype=torch.bool, device=weights.device)
    for t in keys:
        bad = bad | ~t.isfinite().all(-1, keepdim=True)
    if micro.decay.log is not None:  # a log of -inf is a decay of zero
        bad = bad | (micro.decay.log.isnan() | micro.decay.log.isposinf()).any(-1, keepdim=True)
    if micro.u is not None:
        bad = bad | ~micro.u.isfinite()
    unread = [~q.isfinite().all(-1, keepdim=True) for q in micro.readers]
    start = ~weights.isfinite().all(-1)
    if may_look(weights) and not any(bool(flag.any()) for flag in (bad, start, *unread)):
        return micro, weights, None, unread
    shape = torch.broadcast_shapes(bad.shape, start.unsqueeze(-2).shape, (micro.steps, 1))
    bad = bad.expand(shape)
    everywhere = bad.any(-1, keepdim=True)
    clean = replace(micro, readers=tuple(torch.where(no, 0.0, q) for q, no in zip(micro.readers, unread, strict=True)))
    clean = replace(clean.map(lambda t, nothing: torch.where(everywhere, nothing, t)), reset=micro.reset, readers=clean.readers)
    return clean, only(~start.unsqueeze(-1), weights), spoilt_since(bad, start, micro.reset), unread


def spoilt_since(bad: Tensor, start: Tensor, reset: Tensor | None) -> Tensor:
    """Where something bad happened at a step (..., S, D) or earlier, or at the start (..., D), with no reset in between."""
    shape = torch.broadcast_shapes(bad.shape[:-2], start.shape[:-1])
    before = start.unsqueeze(-2).expand(*shape, 1, bad.shape[-1])
    count = torch.cat([before, bad.expand(*shape, *bad.shape[-2:])], -2).cumsum(-2)
    since = torch.zeros_like(count[..., 1:, :])
    if reset is not None:
        since = torch.where(reset != 0, count[..., :-1, :], since).cummax(-2).values
    return count[..., 1:, :] > since
