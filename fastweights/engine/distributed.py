"""One sequence over several processes, each with its part of the time axis: the context grows with the number of machines.

What a part does to the weights that enter it is affine, W <- W A + B: B is what the part makes of W = 0, and A what it makes of
the identity if it writes nothing. So each process finds its A and B without waiting for the others, all exchange them, and each
knows the weights that enter its part,

    W_1 = B_0,   W_{r+1} = W_r A_r + B_r    (B_0 is made of the initial state),

from where it scans its part as it would any sequence, on whatever runs fastest there. That is one scan more than adding W_r to
outputs made from zero would take, but adding needs A at every token in place of at the end, keeps it for the backward pass, and is
not possible where W is read backwards. Gradients are affine in the same way. With G_r the gradient of the losses of process r with
respect to W_r, the gradient with respect to the weights that leave part r is

    L_r = G_{r+1} + L_{r+1} A_{r+1}^T,

so each process first takes the gradients of its outputs back to G_r, all exchange that, and then each takes them and L_r back to its
signals: A and B themselves are never differentiated.

States beside W (a normaliser, a running maximum) do the same with s <- a s + b or s <- max(a + s, b), elementwise. They come
before W, which may depend on them, and in the backward pass after it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..language.errors import FastWeightError, FormError, SignalError
from ..language.program import Carry, Program, Read
from ..language.rule import Rule
from . import cpu, lowered
from .chunk import chunked
from .decay import only
from .inputs import Inputs, check
from .scan import Output, Plan, choose, run


def scan_across(rule: Rule, *, group: Any = None, state: Any = None, reset: Tensor | None = None, **signals: Tensor) -> Output:
    """``scan`` of one sequence whose tokens are spread over the processes of a group, in the order of their ranks.

    Each process passes its own part, (B, its T, H, ...); parts may differ in length and may be empty. The numbers are those of one
    ``scan`` of all tokens, and so are the gradients, of the sum of the losses of all processes.

    Of every head each process sends B and the last W, of (V, K), and A, of (K, K), or (1, K) where nothing is erased; in the backward
    pass twice as much as W. No length of time enters. The first and the last process scan their part once, those between also for A
    and for B, without gradients (A is cheap where nothing is erased); in the backward pass all but the first go through their part
    twice. So R equal parts take about 3 / R of the time of one scan, and 2 / R of it with gradients: two processes halve the memory,
    and time is gained from three or four on.

    Args:
        rule: one that is affine in W, such as ``fw.rules.gated_delta``.
        group: the processes; all of them if not given.
        state: before the first token, as in ``scan``. That of the first process counts, and gets the gradient.
        reset: bool (B, T) of this part: W returns to zero before these tokens.
        signals: by name, (B, T, H, ...).

    Returns:
        ``(y, state)``: the outputs of this part, and the state after the last token of all, on every process.

    Raises:
        FormError: the rule is not affine in W.
        SignalError: what a process passed does not fit the rule, or the other processes; all processes raise.

    All processes call it, and if one takes gradients, each has a loss that depends on its y or state. First derivatives only.

    >>> import torch, torch.distributed as dist, fastweights as fw
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # under torchrun: init_process_group("gloo")
    >>> k = torch.ones(1, 3, 1, 1)
    >>> y, W = scan_across(fw.rules.hebb, q=k, k=k, v=k)
    >>> y.flatten().tolist(), W.item()
    ([1.0, 2.0, 3.0], 3.0)
    >>> dist.destroy_process_group()
    """
    if not dist.is_available() or not dist.is_initialized():
        raise SignalError("there is no process group: start with torchrun and call torch.distributed.init_process_group, or use fw.scan")
    if dist.get_rank(group) < 0:
        raise SignalError("this process is not in the group whose processes share the sequence; call scan_across in its processes only")
    part = _agree(rule, signals, state, reset, group)
    if not part.last:
        return run(part.given, part.chosen)
    anchor = torch.zeros((), requires_grad=True) if part.learns else None  # where one process takes gradients, all do
    y, *states = _Across.apply(part, anchor, *part.given.states, *part.given.signals.values())  # type: ignore[misc]
    return Output(y, tuple(states) if len(states) > 1 else states[0])


# ---- what is agreed before anything runs -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The part of one process: what it was given, its place among the others (``last`` is the last rank), and what all know.

    ``kept`` says for every process in which rows (B,) its part has no reset; None if no part has any. ``learns``: some process
    takes gradients.
    """

    given: Inputs
    program: Program
    chosen: Plan
    group: Any
    rank: int
    last: int
    kept: list[Tensor] | None
    learns: bool

    def rows(self, r: int, like: Tensor) -> Tensor | None:
        """Which rows of a state process r does not forget; None if all."""
        return None if self.kept is None else self.kept[r].reshape(-1, *(1,) * (like.ndim - 1))

    def exchange(self, x: Tensor) -> list[Tensor]:
        """That of every process."""
        x = x.contiguous()
        every = [torch.empty_like(x) for _ in range(self.last + 1)]
        dist.all_gather(every, x, group=self.group)
        return every


def _agree(rule: Rule, signals: Mapping[str, Any], state: Any, reset: Any, group: Any) -> Part:
    """Checks what all processes were given. One that raised alone would leave the others waiting, so all raise."""
    try:
        given = check(rule, signals, state, reset)
        known = rule.trace_for(given.token_shapes())
        if known.program is None:
            raise FormError(f"a sequence over several processes is refused: {rule.explain(known)}\n  Use fw.scan, in one process.")
        every = _tell_all(group, _description(given))
    except FastWeightError as error:
        _tell_all(group, {"error": str(error)})
        raise
    _refuse(rule.name, every)
    resets = any(other["kept"] is not None for other in every)
    kept = [torch.tensor(other["kept"] or [True] * given.B, device=given.device) for other in every] if resets else None
    learns = any(other["learns"] for other in every)
    return Part(given, known.program, choose(given, "auto", "auto", None), group, dist.get_rank(group), len(every) - 1, kept, learns)


def _tell_all(group: Any, what: dict[str, Any]) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, what, group=group)
    return every


def _description(given: Inputs) -> dict[str, Any]:
    grad = torch.is_grad_enabled()
    sizes = {"rule": f"{given.rule.name}({', '.join(given.signals)})", "B": given.B, "H": given.H, "K": given.K, "V": given.V}
    kept = None if given.reset is None else (~given.reset.any(1)).tolist()
    learns = grad and any(x.requires_grad for x in (*given.states, *given.signals.values()))
    return {"error": "", "sizes": sizes | {"dtype": str(given.out)}, "kept": kept, "grad": grad, "learns": learns}


def _refuse(name: str, every: list[Any]) -> None:
    for r, other in enumerate(every):
        if other["error"]:
            raise SignalError(f"process {r} cannot run its part of the sequence:\n  {other['error']}")
    for r, other in enumerate(every):
        for what, first in every[0]["sizes"].items():
            if other["sizes"][what] != first:
                raise SignalError(
                    f"{name}: process {r} has {what} = {other['sizes'][what]}, but process 0 has {what} = {first}; "
                    "the parts of one sequence differ in nothing but T"
                )
    learns = [r for r, other in enumerate(every) if other["learns"]]
    frozen = [r for r, other in enumerate(every) if not other["grad"]]
    if learns and frozen:
        raise SignalError(f"{name}: process {learns[0]} takes gradients, but process {frozen[0]} is under torch.no_grad(); do one on all")


# ---- a part as a map of its states ------------------------------------------------------------------------------------


class Maps:
    """How the states of a rule go through a part.

    ``A`` is (B, H, K, K), or (B, H, 1, K) where it is diagonal because the rule erases nothing, of S = W^T if the rule acts on rows;
    for a state beside W it has the state's shape.
    """

    def __init__(self, part: Part) -> None:
        self.part, self.program = part, part.program
        self.carries = {c.name: c for c in self.program.carries}
        self.order = [*self.carries, next(iter(part.given.rule.states))]  # each after those that it depends on

    def move(self, name: str, s: Tensor, A: Tensor, back: bool = False) -> Tensor:
        """s A, or with ``back`` s A^T, of a gradient."""
        if name in self.carries:
            return s * A
        S = s.mT if self.program.transposed else s
        S = S * A if self.program.erase == "none" else S @ (A.mT if back else A)
        return S.mT if self.program.transposed else S

    def through(self, name: str, s: Tensor, A: Tensor, B: Tensor, kept: Tensor | None) -> Tensor:
        """The state that leaves a part, given the one that enters it; where not ``kept``, that is forgotten."""
        new = torch.maximum(s + A, B) if self._is_max(name) else self.move(name, s, A) + B
        return new if kept is None else torch.where(kept, new, B)

    def nothing(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of a part without tokens."""
        given, is_max = self.part.given, self._is_max(name)
        like = given.states[list(given.rule.states).index(name)]
        if name in self.carries:  # a state must be finite
            return torch.full_like(like, 0.0 if is_max else 1.0), torch.full_like(like, torch.finfo(like.dtype).min if is_max else 0.0)
        K = like.shape[2 if self.program.transposed else 3]
        A = like.new_ones(1, K) if self.program.erase == "none" else torch.eye(K, dtype=like.dtype, device=like.device)
        return A.expand(*like.shape[:2], *A.shape), torch.zeros_like(like)

    def of(self, name: str, states: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A and B of this part, given the other states that enter it."""
        given, (A, B) = replace(self.part.given, states=tuple(states.values())), self.nothing(name)
        if not given.T:
            return A, B
        if (carry := self.carries.get(name)) is not None:
            silent = self.program.leaves[name].tape.constant(-torch.inf) if self._is_max(name) else None
            return self._carried(given, replace(carry, input=silent), A), self._carried(given, carry, B)
        B = self._weights(given, B.mT if self.program.transposed else B, writes=True)
        return self._weights(given, A, writes=False), B.mT if self.program.transposed else B

    def _is_max(self, name: str) -> bool:
        return name in self.carries and self.carries[name].kind == "max"

    def _carried(self, given: Inputs, carry: Carry, start: Tensor) -> Tensor:
        """What a recurrence beside W makes of a state."""
        before = self.program.carries[: self.order.index(carry.name)]
        states = tuple(start if n == carry.name else s for n, s in zip(given.rule.states, given.states, strict=True))
        prepared = lowered.Prepared(replace(self.program, carries=(*before, carry)), replace(given, states=states))
        return prepared.finals[carry.name].expand(prepared.starts[carry.name].shape).flatten(1, len(prepared.heads))

    def _weights(self, given: Inputs, start: Tensor, writes: bool) -> Tensor:
        """What the micro-steps make of rows, on the backend of the scan."""
        program, engine = _silent(self.program, writes, reads=True), cpu.blocks
        if self.part.chosen.backend != "cpu" or cpu.refusal(program, given):
            size = self.program.n * (self.part.chosen.chunk_size or 1)
            program, engine = _silent(self.program, writes, reads=False), lowered.blocks(lambda m, w: chunked(m, w, size), size)
        if next(program.expressions(), None) is None:
            return start
        prepared = lowered.Prepared(program, given)
        return engine(prepared, start.unflatten(1, prepared.heads))[1].flatten(1, len(prepared.heads))


@functools.lru_cache(maxsize=256)
def _silent(program: Program, writes: bool, reads: bool) -> Program:
    """The program without its reads, or with any one, for the kernels; without writes only what acts on W remains."""
    steps = program.steps if writes else tuple(replace(s, u=None, w=None) for s in program.steps)
    keys = [r.q for r in program.reads if not r.backward] + [e for s in program.steps for e in (s.y, s.w, s.x) if e is not None]
    return replace(program, steps=steps, reads=tuple(Read(q, program.n) for q in keys[:1] if reads))


# ---- the scan of all parts ----------------------------------------------------------------------------------------------


def _entering(part: Part, left: Sequence[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
    """The states that enter this part, and the A of W of every process; the first process knows what its own part ``left``."""
    maps, names, A = Maps(part), list(part.given.rule.states), list[Tensor]()
    states = dict(zip(names, part.given.states, strict=True))
    for name in maps.order:
        a, b = maps.nothing(name) if part.rank in (0, part.last) else maps.of(name, states)  # the last is nobody's past
        A, B = part.exchange(a), part.exchange(b if left is None else left[names.index(name)])
        if part.rank:
            states[name] = B[0]
        for r in range(1, part.rank):
            states[name] = maps.through(name, states[name], A[r], B[r], part.rows(r, B[r]))
    return list(states.values()), A


class _Across(torch.autograd.Function):
    """From the states and signals of this process to its outputs and the last states of all."""

    @staticmethod
    def forward(ctx: Any, part: Part, anchor: Tensor | None, *tensors: Tensor) -> Any:
        n, named = len(part.given.states), list(part.given.signals)
        needed = ctx.needs_input_grad[2 + n :]
        signals = [x.detach().requires_grad_(part.learns and wanted) for x, wanted in zip(tensors[n:], needed, strict=True)]

        def scanned(states: Sequence[Tensor]) -> tuple[Tensor, ...]:
            """The states as leaves, y, and the states that leave the part."""
            states = tuple(s.detach().requires_grad_(part.learns) for s in states)
            with torch.set_grad_enabled(part.learns):
                y, left = run(replace(part.given, states=states, signals=dict(zip(named, signals, strict=True))), part.chosen)
            return *states, y, *(left if isinstance(left, tuple) else (left,))

        own = scanned(tensors[:n]) if part.rank == 0 else None
        entering, A = _entering(part, own and [s.detach() for s in own[n + 1 :]])
        own = own or scanned(entering)
        if part.learns:
            ctx.part = replace(part, given=replace(part.given, signals={}))  # these would outlive the backward pass
            ctx.save_for_backward(*own[:n], *signals, *own[n:], *A[part.rank + 1 : part.last])
        return own[n].detach(), *(part.exchange(s.detach())[part.last] for s in own[n + 1 :])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        part: Part = ctx.part
        maps, names, saved = Maps(part), list(part.given.rule.states), list(ctx.saved_tensors)
        n, m = len(names), len(ctx.needs_input_grad) - 2
        leaves, y, left, middle = saved[:m], saved[m], saved[m + 1 : m + 1 + n], saved[m + 1 + n :]
        total: list[Tensor | None] = [None] * m

        def take_back(outputs: list[Tensor], slopes: list[Tensor]) -> None:
            for i, g in enumerate(_slopes(outputs, slopes, leaves)):
                before = total[i]
                total[i] = g if before is None else before if g is None else before + g

        last = part.rank == part.last
        ends = [torch.stack(part.exchange(g)).sum(0) for g in grads[1:]]
        own = ([y, *left], [grads[0], *ends]) if last else ([y], [grads[0]])
        G = _slopes(*own, leaves[:1])[0] if part.rank else None
        L = _leaving(part, maps, names[0], dict(enumerate(middle, part.rank + 1)), _or_zero(G, leaves[0]))
        take_back(*(own if last else ([y, left[0]], [grads[0], L])))
        for name in reversed(maps.carries):
            i = names.index(name)  # the slope of a maximum depends on what entered
            slope = _slopes([left[i]], [torch.ones_like(left[i])], [leaves[i]])[0]
            L = _leaving(part, maps, name, part.exchange(_or_zero(slope, leaves[i])), _or_zero(total[i], leaves[i]))
            if not last:
                take_back([left[i]], [L])
        return None, None, *(total[:n] if part.rank == 0 else [None] * n), *total[n:]


def _leaving(part: Part, maps: Maps, name: str, A: Mapping[int, Tensor] | Sequence[Tensor], mine: Tensor) -> Tensor:
    """The gradient with respect to a state that leaves this part, from those with respect to the states that enter all parts."""
    G = part.exchange(mine)
    L = G[part.last]
    for r in range(part.last - 1, part.rank, -1):
        back, kept = maps.move(name, L, A[r], back=True), part.rows(r, L)
        L = G[r] + (back if kept is None else only(kept, back))
    return L


def _slopes(outputs: list[Tensor], slopes: list[Tensor], leaves: list[Tensor]) -> list[Tensor | None]:
    """The gradient of some outputs with respect to each leaf, None where there is none."""
    pairs = [(x, g) for x, g in zip(outputs, slopes, strict=True) if x.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not pairs or not wanted:
        return [None] * len(leaves)
    found = iter(torch.autograd.grad([x for x, _ in pairs], wanted, [g for _, g in pairs], retain_graph=True, allow_unused=True))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def _or_zero(g: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if g is None else g
