"""Do the forms, precisions and gradients of a rule agree, and does it descend its objective? Also the engine of the tests.

The reference is the rule's own body in float64, one token after the other.
"""

from __future__ import annotations

import inspect
import timeit
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..language.objective import Objective
from ..language.roles import Signal
from ..language.rule import FORMS, Rule
from . import sequential
from .inputs import check as check_inputs
from .inputs import require_rule
from .scan import Output, scan

TOLERANCE = 1e-10

Case = tuple[dict[str, Any], tuple[Tensor, ...]]  # signals and states


class Row(NamedTuple):
    """One line of a report. Errors are relative; ``passed`` is None where nothing was run, and ``note`` says why."""

    what: str
    dtype: str = ""
    chunk: int | None = None
    error: float | None = None
    gradient: float | None = None
    tokens_per_second: float | None = None
    passed: bool | None = None
    note: str = ""


class Report(NamedTuple):
    """The rows of a check; ``print`` it for a table."""

    rule: str
    rows: list[Row]

    @property
    def passed(self) -> bool:
        return all(row.passed is not False for row in self.rows)

    def __str__(self) -> str:
        lines = [f"{'':4} {'':11} {'dtype':8} {'chunk':>5} {'error':>8} {'gradient':>8} {'tokens/s':>9}"]
        for r in self.rows:
            verdict = "-" if r.passed is None else "PASS" if r.passed else "FAIL"
            errors = " ".join(f"{'' if e is None else f'{e:.1e}':>8}" for e in (r.error, r.gradient))
            speed = "" if r.tokens_per_second is None else f"{r.tokens_per_second:,.0f}"
            lines.append(f"{verdict:4} {r.what:11} {r.dtype:8} {r.chunk or '':>5} {errors} {speed:>9}".rstrip())
        return "\n".join([*lines, f"{self.rule}: {'PASS' if self.passed else 'FAIL'}"])


def example(
    rule: Rule, B: int = 2, T: int = 33, H: int = 2, K: int = 5, V: int = 4, *, per_channel: bool = False, seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:  # fmt: skip
    """Random signals of sensible size for every role: keys of about unit length, rates and gates in (0, 1), decays of all kinds."""
    draw = torch.Generator().manual_seed(seed)
    pick = -1 if per_channel else 0
    leads = {n: (H,) if s.role.slow else (B, T, H) for n, s in rule.signals.items()}
    return {n: _draw(s, (*leads[n], *s.shapes(K, V)[pick]), draw).to(dtype) for n, s in rule.signals.items()}


def _draw(s: Signal, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=draw, dtype=torch.float64)
    if s.role.log_decay:
        return -3 * uniform**4
    if s.role.name == "Rate" or s.role.name.endswith("Gate"):
        return uniform
    normal = torch.randn(shape, generator=draw, dtype=torch.float64)
    if s.role.name == "Scalar":
        return 0.5 * normal.tanh()
    if s.role.name.startswith("Positive"):
        normal = normal.abs() + 0.1
    elif s.role.name in ("Key", "Query"):
        normal = normal + 1  # far from orthogonal
    return normal / normal.norm(dim=-1, keepdim=True) * (0.5 + 0.5 * uniform[..., :1])


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return ((a.double() - b.double()).norm() / (b.double().norm() + 1e-300)).item()


def _parts(out: Output) -> tuple[Tensor, ...]:
    return (out.y, *out.state) if isinstance(out.state, tuple) else (out.y, out.state)


def gradients(rule: Rule, signals: dict[str, Any], state: tuple[Tensor, ...], **how: Any) -> list[Tensor]:
    """Gradients of a fixed function of the outputs with respect to every signal and state."""
    leaves = [x.detach().clone().requires_grad_() for x in (*signals.values(), *state)]
    return list(torch.autograd.grad(_weighed(rule, signals, leaves, **how), leaves, materialize_grads=True))


def _weighed(rule: Rule, names: Iterable[str], leaves: list[Tensor], **how: Any) -> Tensor:
    """A fixed function of the outputs and final states, given the signals of these names and then the states."""
    signals = dict(zip(names, leaves, strict=False))
    out = scan(rule, **signals, state=tuple(leaves[len(signals) :]), **how)
    return torch.stack([(x.double() * _pattern(x)).sum() for x in _parts(out)]).sum()


def _pattern(x: Tensor) -> Tensor:
    return torch.arange(x.numel(), dtype=torch.float64, device=x.device).sin().reshape(x.shape)


def check(rule: Rule, *, seed: int = 0, T: int = 33, chunk_sizes: tuple[int, ...] = (1, 7, 16)) -> Report:
    """Run a rule in every form on random signals and compare with its own body in float64.

    Compared are outputs, final states and the gradients of every signal and of the initial state; the gradient of the body
    itself is compared with finite differences; a sequence split in two with the whole; the rule with its objective.

    >>> import fastweights as fw
    >>> fw.check(fw.rules.delta).passed
    True
    """
    require_rule(rule)
    cases = [_case(rule, seed, T, pick == -1) for pick in rule.shapes]
    rounding = _error(rule, cases, torch.float32, form="recurrent")
    allowed = 2 * rounding + torch.finfo(torch.float32).eps
    rows = [_reference(rule, cases), Row("recurrent", "float32", error=rounding, note="the rounding of the rule itself, for comparison")]
    rows += _machine(rule, cases, allowed)
    for form in FORMS[1:]:
        if form not in rule.forms:
            rows.append(Row(form, note=f"refused: {rule.trace.reason}"))
            continue
        able = [case for case in cases if _admits(rule, case)]
        rows += [_double(rule, able, form, size) for size in (chunk_sizes if form == "chunk" else (None,))]
        error = _error(rule, able, torch.float32, form=form)
        note = f"allowed {allowed:.1e}, twice the rounding of the recurrence"
        rows.append(Row(form, "float32", error=error, passed=error <= allowed, note=note))
    if rule.objective is not None:
        error = descent_error(rule, rule.objective, seed)
        rows.append(Row("objective", "float64", error=error, passed=error < TOLERANCE, note=rule.objective.equation))
    return Report(rule.name, rows)


def _admits(rule: Rule, case: Case) -> bool:
    """Whether there is more than the recurrence for signals of these shapes."""
    known = rule.trace_for(check_inputs(rule, *case).token_shapes())
    return known.program is not None or known.coupled is not None


def _machine(rule: Rule, cases: list[Case], allowed: float) -> list[Row]:
    """The compiled machine against the body, where it runs."""
    for signals, states in cases:
        given = check_inputs(rule, signals, states)
        refused = sequential.refusal(rule.trace_for(given.token_shapes()), given)
        if refused:
            return [Row("machine", note=f"refused: {refused}")]
    how: dict[str, Any] = {"form": "recurrent", "backend": "cpu"}
    if not all(bool(x.isfinite().all()) for g, s in cases for x in _parts(scan(rule, **g, state=s, form="recurrent"))):
        return [Row("machine", note="not compared: the rule itself overflows on these signals")]
    error = _error(rule, cases, **how)
    gradient = max(distance(_slopes(rule, case, **how), _slopes(rule, case, form="recurrent")) for case in cases)
    single = _error(rule, cases, torch.float32, **how)
    passed = max(error, gradient) < TOLERANCE
    return [
        Row("machine", "float64", None, error, gradient, _speed(rule, **how), passed),
        Row("machine", "float32", error=single, passed=single <= allowed, note=f"allowed {allowed:.1e}"),
    ]


def _slopes(rule: Rule, case: Case, **how: Any) -> Tensor:
    return torch.cat([g.flatten() for g in gradients(rule, *case, **how)])


def _case(rule: Rule, seed: int, T: int, per_channel: bool) -> Case:
    draw = torch.Generator().manual_seed(seed + 1)
    shapes = [s.shapes(5, 4)[0] for s in rule.states.values()]
    states = tuple(0.3 * torch.rand((2, 2, *shape), generator=draw, dtype=torch.float64) for shape in shapes)
    return example(rule, T=T, per_channel=per_channel, seed=seed), states


def _apart(out: Output, want: Output) -> float:
    return max(distance(a, b) for a, b in zip(_parts(out), _parts(want), strict=True))


def _error(rule: Rule, cases: list[Case], dtype: torch.dtype = torch.float64, **how: Any) -> float:
    """The largest distance of outputs and final states from those of the body in float64."""
    errors = []
    for signals, states in cases:
        out = scan(rule, **{n: x.to(dtype) for n, x in signals.items()}, state=tuple(s.to(dtype) for s in states), **how)
        errors.append(_apart(out, scan(rule, **signals, state=states, form="recurrent")))
    return max(errors)


def _reference(rule: Rule, cases: list[Case]) -> Row:
    """The body itself: a sequence split in two, and its gradient."""
    split = gradient = 0.0
    for signals, state in cases:
        cut = next(iter(signals.values())).shape[1] // 3
        first = scan(rule, **_cut(rule, signals, slice(cut)), state=state, form="recurrent")
        rest = scan(rule, **_cut(rule, signals, slice(cut, None)), state=first.state, form="recurrent")
        joined = Output(torch.cat([first.y, rest.y], 1), rest.state)
        split = max(split, _apart(joined, scan(rule, **signals, state=state, form="recurrent")))
        gradient = max(gradient, _finite_difference(rule, signals, state))
    note = "the error is that of a split sequence, the gradient is compared with finite differences"
    passed = split < TOLERANCE and gradient < 1e-5
    return Row("recurrent", "float64", None, split, gradient, _speed(rule, "recurrent"), passed, note)


def _cut(rule: Rule, signals: dict[str, Any], tokens: slice) -> dict[str, Any]:
    return {n: x if rule.signals[n].role.slow else x[:, tokens] for n, x in signals.items()}


def _finite_difference(rule: Rule, signals: dict[str, Any], state: tuple[Tensor, ...]) -> float:
    """The derivative along one direction, by autograd and by central differences."""
    short = {n: x[:1] if rule.signals[n].role.slow else x[:1, :5, :1] - 0.01 * rule.signals[n].role.log_decay for n, x in signals.items()}
    start = tuple(s[:1, :1] for s in state)

    def at(h: float) -> float:
        return _weighed(rule, short, [x + h * _pattern(x) for x in (*short.values(), *start)], form="recurrent").item()

    h = 1e-6
    exact = sum((g * _pattern(g)).sum().item() for g in gradients(rule, short, start, form="recurrent"))
    return abs((at(h) - at(-h)) / (2 * h) - exact) / (abs(exact) + 1e-3)


def _double(rule: Rule, cases: list[Case], form: str, size: int | None) -> Row:
    """A form in float64: what it computes and its gradients, against the body."""
    error = _error(rule, cases, form=form, chunk_size=size)
    gradient = max(distance(_slopes(rule, case, form=form, chunk_size=size), _slopes(rule, case, form="recurrent")) for case in cases)
    speed = _speed(rule, form) if size in (None, 16) else None
    return Row(form, "float64", size, error, gradient, speed, max(error, gradient) < TOLERANCE)


def _speed(rule: Rule, form: str, **how: Any) -> float:
    """Tokens a second, forward, at B1 H2 K32 V32."""
    T = 512 if form != "recurrent" else 64
    signals = example(rule, 1, T, 2, 32, 32, per_channel=rule.shapes[0] == -1, dtype=torch.float32)
    state = tuple(torch.zeros(1, 2, *s.shapes(32, 32)[0]) for s in rule.states.values())

    with torch.no_grad():
        return T / min(timeit.repeat(lambda: scan(rule, **signals, state=state, form=form, **how), number=1, repeat=3))


def descent_error(rule: Rule, objective: Objective, seed: int = 0) -> float:
    """How far the rule is from one descent step on its objective, or from the minimum of the proximal problem."""
    pick = rule.shapes[0]
    signals = {n: x[0, 0, 0] for n, x in example(rule, 1, 1, 1, per_channel=pick == -1, seed=seed).items()}
    W = torch.rand(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mine = {n: signals[n] for n in rule.arguments.signals}
    new = rule(W, **mine)
    start = W if objective.first is None else objective.first(W, **{n: signals[n] for n in objective.first.arguments.signals})
    rate = mine[objective.rate] if isinstance(objective.rate, str) else objective.rate
    at = new if objective.proximal else start
    arguments = list(inspect.signature(objective.loss).parameters)[1:]
    slope = torch.func.grad(objective.loss)(at, **{n: mine[n] for n in arguments})
    return distance(new, start - rate * slope)
