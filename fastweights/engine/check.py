"""Do the forms, precisions and gradients of a rule agree, and does it descend its objective? Also the engine of the tests.

The reference is the rule's own body in float64, one token after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..language.objective import Objective
from ..language.roles import Signal
from ..language.rule import FORMS, Rule
from .inputs import require_rule
from .scan import Output, scan

TOLERANCE = 1e-10


class Row(NamedTuple):
    """One line of a report. Errors are relative; ``passed`` is None where nothing was run, and ``note`` says why."""

    what: str
    dtype: str
    chunk: int | None
    error: float | None
    gradient: float | None
    tokens_per_second: float | None
    passed: bool | None
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
    out = {}
    for name, s in rule.signals.items():
        space = s.role.spaces[-1 if per_channel else 0]
        size = {"scalar": (), "key": (K,), "value": (V,), "matrix": (V, K)}[space]
        shape = (B, T, H, *(() if s.sets is None else (s.sets,)), *size)
        out[name] = _draw(s, shape, draw).to(dtype)
    return out


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
    if not b.numel():
        return 0.0
    return ((a.double() - b.double()).norm() / (b.double().norm() + 1e-300)).item()


def _states(out: Output) -> tuple[Tensor, ...]:
    return out.state if isinstance(out.state, tuple) else (out.state,)


def _error(out: Output, want: Output) -> float:
    return max(distance(a, b) for a, b in zip((out.y, *_states(out)), (want.y, *_states(want)), strict=True))


def gradients(rule: Rule, signals: dict[str, Any], state: tuple[Tensor, ...], **how: Any) -> list[Tensor]:
    """Gradients of a fixed function of the outputs with respect to every signal and state."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in signals.items()}
    states = [s.detach().clone().requires_grad_() for s in state]
    out = scan(rule, **leaves, state=tuple(states), **how)
    total = sum((x.double() * _pattern(x)).sum() for x in (out.y, *_states(out)))
    found = torch.autograd.grad(total, [*leaves.values(), *states], allow_unused=True)  # type: ignore[arg-type]
    return [torch.zeros_like(x) if g is None else g for x, g in zip([*leaves.values(), *states], found, strict=True)]


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
    rows = [*_reference_rows(rule, seed, T)]
    reference = rows[-1]
    for form in FORMS[1:]:
        if form not in rule.forms:
            rows.append(Row(form, "", None, None, None, None, None, f"refused: {rule.trace.reason}"))
            continue
        for size in chunk_sizes if form == "chunk" else (None,):
            how = {"form": form} | ({"chunk_size": size} if size else {})
            rows.append(_form_row(rule, seed, T, how, size))
        rows.append(_single_row(rule, seed, T, form, reference.error or 0.0))
    if rule.objective is not None:
        error = descent_error(rule, rule.objective, seed)
        rows.append(Row("objective", "float64", None, error, None, None, error < TOLERANCE, rule.objective.equation))
    return Report(rule.name, rows)


def _variants(rule: Rule, seed: int, T: int, dtype: torch.dtype) -> Iterator[tuple[dict[str, Any], tuple[Tensor, ...]]]:
    """Signals and states: decays per head and per channel, where the rule takes both."""
    for pick in rule.shapes:
        signals = example(rule, T=T, per_channel=pick == -1, seed=seed)
        draw = torch.Generator().manual_seed(seed + 1)
        shapes = [s.shapes(5, 4)[0] for s in rule.states.values()]
        states = tuple(0.3 * torch.rand((2, 2, *shape), generator=draw, dtype=torch.float64) for shape in shapes)
        yield {n: x.to(dtype) for n, x in signals.items()}, tuple(s.to(dtype) for s in states)


def _reference_rows(rule: Rule, seed: int, T: int) -> list[Row]:
    split, gradient, single = 0.0, 0.0, 0.0
    for signals, state in _variants(rule, seed, T, torch.float64):
        whole = scan(rule, **signals, state=state, form="recurrent")
        cut = T // 3
        first = scan(rule, **{n: x[:, :cut] for n, x in signals.items()}, state=state, form="recurrent")
        rest = scan(rule, **{n: x[:, cut:] for n, x in signals.items()}, state=first.state, form="recurrent")
        split = max(split, _error(Output(torch.cat([first.y, rest.y], 1), rest.state), whole))
        gradient = max(gradient, _finite_difference(rule, signals, state))
        low = scan(rule, **{n: x.float() for n, x in signals.items()}, state=tuple(s.float() for s in state), form="recurrent")
        single = max(single, _error(low, whole))
    speed = _speed(rule, "recurrent")
    return [
        Row(
            "recurrent",
            "float64",
            None,
            split,
            gradient,
            speed,
            split < TOLERANCE and gradient < 1e-5,
            "the error is that of a split sequence, the gradient is compared with finite differences",
        ),
        Row("recurrent", "float32", None, single, None, None, None, "the rounding of the rule itself, for comparison"),
    ]


def _finite_difference(rule: Rule, signals: dict[str, Any], state: tuple[Tensor, ...]) -> float:
    """The derivative along one direction, by autograd and by central differences."""
    short = {n: x[:1, :5, :1] - 0.01 * rule.signals[n].role.log_decay for n, x in signals.items()}
    start = tuple(s[:1, :1] for s in state)
    leaves = [*short.values(), *start]

    def at(h: float) -> float:
        moved = [x + h * _pattern(x) for x in leaves]
        out = scan(rule, **dict(zip(short, moved, strict=False)), state=tuple(moved[len(short) :]), form="recurrent")
        return sum((x * _pattern(x)).sum().item() for x in (out.y, *_states(out)))

    h = 1e-6
    found = gradients(rule, short, start, form="recurrent")
    exact = sum((g * _pattern(g)).sum().item() for g in found)
    return abs((at(h) - at(-h)) / (2 * h) - exact) / (abs(exact) + 1e-3)


def _form_row(rule: Rule, seed: int, T: int, how: dict[str, Any], size: int | None) -> Row:
    error, gradient = 0.0, 0.0
    for signals, state in _variants(rule, seed, T, torch.float64):
        want = scan(rule, **signals, state=state, form="recurrent")
        error = max(error, _error(scan(rule, **signals, state=state, **how), want))
        ours, theirs = gradients(rule, signals, state, **how), gradients(rule, signals, state, form="recurrent")
        gradient = max(gradient, distance(torch.cat([g.flatten() for g in ours]), torch.cat([g.flatten() for g in theirs])))
    speed = _speed(rule, how["form"]) if size in (None, 16) else None
    return Row(how["form"], "float64", size, error, gradient, speed, max(error, gradient) < TOLERANCE)


def _single_row(rule: Rule, seed: int, T: int, form: str, rounding: float) -> Row:
    error = 0.0
    for (signals, state), (double, start) in zip(
        _variants(rule, seed, T, torch.float32), _variants(rule, seed, T, torch.float64), strict=True
    ):
        want = scan(rule, **double, state=start, form="recurrent")
        error = max(error, _error(scan(rule, **signals, state=state, form=form), want))
    allowed = 2 * rounding + torch.finfo(torch.float32).eps
    return Row(form, "float32", None, error, None, None, error <= allowed, f"allowed {allowed:.1e}, twice the rounding of the recurrence")


def _speed(rule: Rule, form: str) -> float:
    """Tokens a second, forward, at B1 H2 K32 V32."""
    T = 512 if form != "recurrent" else 64
    signals = example(rule, 1, T, 2, 32, 32, per_channel=rule.shapes[0] == -1, dtype=torch.float32)
    state = tuple(torch.zeros(1, 2, *s.shapes(32, 32)[0]) for s in rule.states.values())

    def once() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            scan(rule, **signals, state=state, form=form)
        return time.perf_counter() - start

    return T / min(once() for _ in range(3))


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
    slope = torch.func.grad(objective.loss)(at, **_arguments(objective.loss, mine))
    return distance(new, start - rate * slope)


def _arguments(fn: Callable[..., Any], signals: dict[str, Any]) -> dict[str, Any]:
    import inspect

    return {n: signals[n] for n in list(inspect.signature(fn).parameters)[1:]}
