"""``scan``, ``unroll``, ``attention_matrix`` and ``plan``: check what was given, choose a form, run it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..language.errors import FormError, SignalError
from ..language.program import Program
from ..language.roles import ROLES
from ..language.rule import FORMS, RULES, Rule
from ..language.trace import Trace
from . import cpu, fla, lowered, prepared, sequential
from .capture import capturing, whole
from .chunk import chunked
from .coupled import coupled
from .inputs import Inputs, check, one_of, require_rule, whole_number
from .parallel import parallel
from .recurrent import recurrent
from .watched import may_look

BACKENDS = ("torch", "cpu", "fla")
_COUPLED_CHUNK = 32  # tokens


class Output(NamedTuple):
    """``y`` (B, T, H, V) and the final state: W (B, H, V, K), or a tuple of all states if the rule has several."""

    y: Tensor
    state: Any


class Plan(NamedTuple):
    """How a call will run: the form, the backend, tokens a chunk (None outside the chunk form), the cost and the reasons.

    ``flops`` counts multiplications and additions of the forward pass, roughly.
    """

    form: str
    backend: str
    chunk_size: int | None
    flops: float
    why: str

    def __str__(self) -> str:
        chunk = f", {self.chunk_size} tokens a chunk" if self.chunk_size else ""
        return f"form {self.form}{chunk}, backend {self.backend}, about {self.flops:.1e} flops: {self.why}"


def scan(
    rule: Rule,
    *,
    state: Any = None,
    reset: Tensor | None = None,
    form: str = "auto",
    backend: str = "auto",
    chunk_size: int | None = None,
    **signals: Tensor,
) -> Output:
    """Run a rule over a sequence: W_t = rule(W_{t-1}, signals_t), y_t = W_t q_t (or what the rule returns).

    Args:
        rule: what is written, such as ``fw.rules.gated_delta``.
        state: W before the first token, (B, H, V, K); zero if not given. A tuple for a rule with several states.
        reset: bool (B, T): W returns to zero before these tokens (packed documents).
        form: ``recurrent``, ``parallel``, ``chunk`` or ``auto``. All give the same numbers, up to rounding.
        backend: ``torch`` (any device), ``cpu`` (compiled: the chunk form of affine rules, the recurrent form of any), ``fla`` (the
            kernels of flash-linear-attention, if asked for, on a GPU) or ``auto``.
            ``form="recurrent"`` by itself runs the rule's body in torch, which is the reference.
        chunk_size: tokens a chunk, in the chunk form of torch.
        signals: by name, (B, T, H, ...); a signal may have fewer heads if their number divides H.

    Returns:
        ``(y, state)``: y (B, T, H, V) in the dtype of the values, the state in float32 (float64 for float64 signals).

    Raises:
        SignalError: a signal, the state or an option does not fit.
        FormError: the rule does not admit the form; the message names its line.

    >>> import torch, fastweights as fw
    >>> k = torch.eye(2).reshape(1, 2, 1, 2)  # two tokens, one head, two orthogonal keys
    >>> v, beta = torch.tensor([3.0, 5.0]).reshape(1, 2, 1, 1), torch.ones(1, 2, 1)
    >>> y, W = fw.scan(fw.rules.delta, q=k, k=k, v=v, beta=beta)
    >>> y.flatten().tolist(), W.squeeze().tolist()
    ([3.0, 5.0], [3.0, 5.0])
    """
    if capturing() and isinstance(rule, Rule):
        states = state if isinstance(state, tuple) else () if state is None else (state,)
        options = (form, backend, chunk_size, reset is not None, tuple(signals))
        y, *new = _scan_in_graph(rule.number, options, [*states, *(() if reset is None else (reset,)), *signals.values()])
        return Output(y, tuple(new) if len(new) > 1 else new[0])
    W = state[0] if isinstance(state, tuple) and len(state) == 1 else state
    if form == "auto" and backend in ("auto", "cpu") and chunk_size is None and (W is None or isinstance(W, Tensor)):
        done = prepared.scan(rule, W, reset, signals)
        if done is not None:
            return Output(*done)
    given = check(rule, signals, state, reset)
    return run(given, choose(given, form, backend, chunk_size))


@whole
def _scan_in_graph(number: int, options: tuple[Any, ...], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """A scan as one node of the graph that torch.compile captures; what it runs is captured behind it, from real code on fake tensors."""
    form, backend, chunk_size, resets, names = options
    rest = tensors[: len(tensors) - len(names)]
    state, reset = (rest[:-1], rest[-1]) if resets else (rest, None)
    signals = dict(zip(names, tensors[len(rest) :], strict=True))
    given = check(RULES[number], signals, tuple(state) or None, reset)
    out = run(given, choose(given, form, backend, chunk_size))
    return out.y, *(out.state if isinstance(out.state, tuple) else (out.state,))


def run(given: Inputs, chosen: Plan) -> Output:
    if chosen.form == "recurrent" and chosen.backend == "cpu":
        y, states = sequential.sequential(given.rule.trace_for(given.token_shapes()), given)
    elif chosen.form == "recurrent":
        y, states = recurrent(given)
    elif (joined := given.rule.trace_for(given.token_shapes()).coupled) is not None:
        y, states = coupled(joined, given.rule.trace_for(given.token_shapes()).leaves, given, chosen.chunk_size or 1)
    else:
        program = given.rule.trace_for(given.token_shapes()).program
        assert program is not None
        size = given.T * program.n if chosen.form == "parallel" else program.n * (chosen.chunk_size or 1)
        form = parallel if chosen.form == "parallel" else lambda micro, weights: chunked(micro, weights, size)
        engine = {"cpu": cpu.blocks, "fla": fla.blocks}.get(chosen.backend) or lowered.blocks(form, size)
        y, states = lowered.run(program, given, engine)
    # what nothing was written to is still the caller's: nobody expects to change both
    first, *others = (w.clone() if any(_shares(w, old) for old in given.states) else w for w in states)
    return Output(y.to(given.out), (first, *others) if others else first)


def _shares(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory, also behind torch.vmap and torch.compile."""
    return a is b or torch._C._is_alias_of(a, b)  # pyright: ignore[reportAttributeAccessIssue]


def plan(
    rule: Rule,
    *,
    state: Any = None,
    reset: Tensor | None = None,
    form: str = "auto",
    backend: str = "auto",
    chunk_size: int | None = None,
    **signals: Tensor,
) -> Plan:
    """Which form, backend and chunk size the same call of ``scan`` runs, and why.

    >>> import torch, fastweights as fw
    >>> k = torch.zeros(1, 1000, 2, 8)
    >>> fw.plan(fw.rules.hebb, q=k, k=k, v=k).form
    'chunk'
    """
    return choose(check(rule, signals, state, reset), form, backend, chunk_size)


def choose(given: Inputs, form: str, backend: str, chunk_size: int | None) -> Plan:
    rule = given.rule
    one_of(rule, "form", form, (*FORMS, "auto"))
    one_of(rule, "backend", backend, (*BACKENDS, "auto"))
    if chunk_size is not None:
        whole_number(rule, "chunk_size", chunk_size)
        if form not in ("chunk", "auto"):
            raise SignalError(f"{rule.name}: chunk_size belongs to the chunk form, but form is {form!r}; leave one of them out")
    known = rule.trace_for(given.token_shapes())
    if backend == "fla":
        return _fla_plan(given, known, form, chunk_size)
    if known.coupled is not None and (form == "chunk" or chunk_size is not None or (form == "auto" and backend == "torch")):
        return _coupled_plan(given, known, backend, chunk_size)
    if known.program is None and form in ("parallel", "chunk"):
        raise FormError(f"form {form!r} is refused: {rule.explain(known)}\n  It runs in form 'recurrent'.")
    if known.program is None or _idle(known.program) or (form == "recurrent" and backend == "cpu"):
        return _recurrent_plan(given, known, form, backend)
    affine = f"the rule is affine in W ({known.program.kind})"
    refused = _kernels_refuse(given, known.program, form, chunk_size)
    if backend == "cpu" and refused:
        raise FormError(f"backend 'cpu' is refused for rule {rule.name!r}: {refused}; leave backend='auto', or ask for 'torch'")
    if backend != "torch" and not refused:
        size = cpu.together(known.program)
        why = f"{affine}: the compiled kernels ({cpu.library().isa}) run it chunk by chunk"
        return Plan("chunk", "cpu", size, _flops(given, known, size), why)
    return _torch_plan(given, known, form, chunk_size, affine, "" if backend == "torch" else refused)


def _fla_plan(given: Inputs, known: Trace, form: str, chunk_size: int | None) -> Plan:
    """On the kernels of flash-linear-attention, which are chunkwise and choose the size of a chunk."""
    if form not in ("auto", "chunk") or chunk_size is not None:
        raise FormError("backend 'fla' has the chunk form with chunks of its own; leave form and chunk_size out")
    refused = given.rule.explain(known) if known.program is None else fla.refusal(known.program, given)
    if refused:
        raise FormError(f"backend 'fla' is refused for rule {given.rule.name!r}: {refused}; leave backend='auto'")
    assert known.program is not None
    found = fla.arguments(known.program)
    assert isinstance(found, fla.Arguments)
    return Plan("chunk", "fla", None, _flops(given, known, 64), f"asked for: {found.function} of flash-linear-attention")


def _coupled_plan(given: Inputs, known: Trace, backend: str, chunk_size: int | None) -> Plan:
    """Several matrices that are affine together, chunk by chunk in torch."""
    if backend == "cpu":
        raise FormError(f"backend 'cpu' runs {given.rule.name!r} in form 'recurrent', and a chunk was asked for; leave one of them out")
    size = min(chunk_size or _COUPLED_CHUNK, max(given.T, 1))
    return Plan("chunk", "torch", size, _flops(given, known, size), "its matrices are affine together: linear in T, chunk by chunk")


def _idle(program: Program) -> bool:
    """Whether W stays as it is."""
    return all(part is None for s in program.steps for part in (s.log_decay, s.factor, s.x, s.y, s.u, s.w))


def _recurrent_plan(given: Inputs, known: Trace, form: str, backend: str) -> Plan:
    """On the compiled machine where it may, token by token."""
    why = given.rule.explain(known) if known.program is None else "nothing is ever written" if _idle(known.program) else "asked for"
    refused = sequential.refusal(known, given)
    if backend == "cpu" and refused:
        raise FormError(f"backend 'cpu' is refused for rule {given.rule.name!r}: {refused}; leave backend='auto', or ask for 'torch'")
    compiled = backend == "cpu" or (backend == "auto" and form == "auto" and not refused)
    if compiled:
        why += f"\n  The compiled machine ({cpu.library().isa}) runs it token by token."
    elif backend != "torch" and form == "auto":
        why += f"\n  Not on the compiled machine: {refused}."
    return Plan("recurrent", "cpu" if compiled else "torch", None, _flops(given, known, 1), why)


def _kernels_refuse(given: Inputs, program: Program, form: str, chunk_size: int | None) -> str:
    """Why the compiled kernels do not run a call; nothing if they do."""
    if form not in ("chunk", "auto"):
        return f"form {form!r} was asked for, and the kernels run form 'chunk'"
    if chunk_size is not None:
        return f"chunk_size = {chunk_size} was asked for, and the kernels have their own"
    return cpu.refusal(program, given)


def _torch_plan(given: Inputs, known: Trace, form: str, chunk_size: int | None, affine: str, refused: str) -> Plan:
    assert known.program is not None
    if form == "auto" and given.T == 1:
        form, why = "recurrent", f"one token: nothing to gain from a chunk; {affine}"
    elif form == "auto":
        form, why = "chunk", f"{affine}: linear in T, and all tokens of a chunk at once"
    else:
        why = f"asked for; {affine}"
    if refused:
        why += f"; not on the compiled kernels: {refused}"
    if form == "recurrent":
        return Plan(form, "torch", None, _flops(given, known, 1), why)
    size = given.T if form == "parallel" else min(chunk_size or _chunk_size(given, known.program), max(given.T, 1))
    if lowered.widens(known.program, given.dtype, size * known.program.n):
        why += f"; a block of more than {lowered.SAFE_ERASE} micro-steps that erase is computed in float64, to keep float32 accuracy"
    return Plan(form, "torch", None if form == "parallel" else size, _flops(given, known, size), why)


def _chunk_size(given: Inputs, program: Program) -> int:
    """About as many tokens as a key has channels, where the work within chunks and between them balances; fewer to erase."""
    size = max(min(2 ** round(math.log2(max(given.K, given.V))), 64), 16)
    if program.erase != "none" and given.dtype == torch.float32:
        size = lowered.SAFE_ERASE
    return max(size // program.n, 1)


def _flops(given: Inputs, known: Trace, size: int) -> float:
    n = known.program.n if known.program else 1
    tokens = given.B * given.H * given.T
    return 2.0 * tokens * n * (3 * given.K * given.V + (n * size - 1) * (given.K + given.V))


def unroll(rule: Rule, *, state: Any = None, reset: Tensor | None = None, **signals: Tensor) -> Tensor:
    """Every W_t, (B, T, H, V, K), for looking at. The query may be left out if the rule does not take one itself.

    >>> import torch, fastweights as fw
    >>> k = torch.ones(1, 3, 1, 1)
    >>> fw.unroll(fw.rules.hebb, k=k, v=k).flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    require_rule(rule)
    given = check(rule, signals, state, reset, optional=() if rule.reads_itself else ("q",))
    every: list[Tensor] = []
    recurrent(given, lambda states: every.append(states[0]))
    return torch.stack(every, 1) if every else given.states[0].new_zeros(given.B, 0, *given.states[0].shape[1:])


def attention_matrix(rule: Rule, *, reset: Tensor | None = None, **signals: Tensor) -> Tensor:
    """The matrix A (B, H, T, T) with y = A v from an empty state: what a transformer would call attention.

    It exists where what is read is a sum of values with numbers as weights: for rules that are affine in W, act on columns
    and write ``v`` as it is. Pass every signal but ``v``. The cost is cubic in T: it is for looking at.

    >>> import torch, fastweights as fw
    >>> k = torch.ones(1, 3, 1, 1)
    >>> fw.attention_matrix(fw.rules.hebb, q=k, k=k)[0, 0].tolist()
    [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    """
    require_rule(rule)
    if "v" in signals:
        raise SignalError(f"{rule.name}: attention_matrix takes every signal but 'v', which it is the factor of")
    _refuse_if_no_matrix(rule)
    given = check(rule, signals, reset=reset, optional=("v",))
    values = torch.eye(given.T, dtype=given.out, device=given.device)[None, :, None, :].expand(given.B, given.T, given.H, given.T)
    y = _in_parallel(rule, {**signals, "v": values}, reset)
    A = y.permute(0, 2, 1, 3)
    shape = (given.B, given.T, given.H, 4)
    some = torch.linspace(-1, 2, math.prod(shape), dtype=given.out, device=given.device).sin().reshape(shape)
    seen = _in_parallel(rule, {**signals, "v": some}, reset)
    off = (torch.einsum("bhts,bshv->bthv", A, some) - seen).norm()
    if may_look(A) and bool(off > 100 * torch.finfo(A.dtype).eps * (seen.norm() + 1)):
        raise FormError(f"rule {rule.name!r} has no attention matrix: what it reads is not linear in v; use fw.unroll to look at W")
    return A


def _in_parallel(rule: Rule, signals: dict[str, Tensor], reset: Tensor | None) -> Tensor:
    given = check(rule, signals, reset=reset)
    return run(given, choose(given, "parallel", "auto", None)).y


def _refuse_if_no_matrix(rule: Rule) -> None:
    program = rule.program
    by_value = [n for n, s in rule.signals.items() if s.role.name in ("Value", "ValueVector", "ValueGate") and (n != "v" or s.sets)]
    if "v" not in rule.signals or rule.signals["v"].role is not ROLES["Value"]:
        raise FormError(f"rule {rule.name!r} has no value v, so y = A v has no meaning; use fw.unroll to look at W")
    if program.transposed or by_value:
        why = "it acts on the rows of W" if program.transposed else f"{', '.join(by_value)} tells value channels or values apart"
        raise FormError(f"rule {rule.name!r} has no attention matrix, because {why}; use fw.unroll to look at W")
