"""Learning rules as differential equations, dW/dt = rule(W, s(t)) - W: Runge-Kutta steps, which are rules, and torchdiffeq's solvers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..engine.scan import Output, scan
from ..language.errors import SignalError
from ..language.roles import ROLES, Signal
from ..language.rule import Rule, named

GRADIENTS = ("direct", "checkpoint", "adjoint")
ADAPTIVE = ("dopri5", "dopri8", "bosh3")


@dataclass(frozen=True)
class Tableau:
    """A Runge-Kutta method: stage i looks from W + h sum_j rows[i][j] slope_j, and the step is h sum_i weights[i] slope_i."""

    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]

    @property
    def nodes(self) -> tuple[float, ...]:
        """How far into the step each stage looks."""
        return tuple(sum(row) for row in self.rows)


METHODS: dict[str, Tableau] = {
    "euler": Tableau(((),), (1.0,)),
    "midpoint": Tableau(((), (0.5,)), (0.0, 1.0)),
    "rk4": Tableau(((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),  # Kutta's 3/8 rule, as in torchdiffeq
}


@functools.lru_cache(maxsize=64)
def runge_kutta(rule: Rule, method: str) -> Rule:
    """One step of a method (``euler``, ``midpoint``, ``rk4``) along dW/dt = rule(W, s(t)) - W, as a rule.

    Its signals are those of ``rule``, one set a stage where there are several, and ``step``, the seconds h of the step; it runs in
    the forms that its own normal form admits. An euler step of one second is ``rule`` itself.

    Raises:
        SignalError: the rule has other states than W, reads by itself, or has a signal named ``step``; the method is unknown.

    >>> from fastweights.rules import delta
    >>> runge_kutta(delta, "midpoint").forms
    ('recurrent', 'parallel', 'chunk')
    """
    require_flow(rule)
    if method not in METHODS:
        raise SignalError(f"method is {method!r}; known: {', '.join(METHODS)}")
    if "step" in rule.arguments.signals:
        raise SignalError(f"{rule.name} has a signal 'step', which is the name of a step's seconds; give it another name")
    table, (w, mine) = METHODS[method], (next(iter(rule.states)), rule.arguments.signals)
    stages = len(table.weights)
    stacked = {n: s if stages == 1 else replace(s, sets=stages * (s.sets or 1)) for n, s in mine.items()}

    def part(name: str, x: Any, i: int) -> Any:
        sets = mine[name].sets
        return x if stages == 1 else x[i] if sets is None else x[i * sets : (i + 1) * sets]

    def token(states: dict[str, Any], signals: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        h, slopes = signals["step"], []

        def moved(weights: Iterable[float]) -> Any:
            W = states[w]
            for share, slope in zip(weights, slopes, strict=True):
                W = W + h * share * slope if share else W
            return W

        for i, row in enumerate(table.rows):
            W = moved(row)
            (new,), _ = rule.apply({w: W}, {n: part(n, signals[n], i) for n in mine})
            slopes.append(new - W)
        return (moved(table.weights),), None

    step = {"step": Signal("step", ROLES["Scalar"])}
    return Rule(
        f"{method} step of {rule.name}", token, named(rule.states, stacked | step), cite=rule.cite, origin=(runge_kutta, (rule, method))
    )


def require_flow(rule: Rule) -> None:
    """A rule with one matrix, of which y = W q is read."""
    if len(rule.states) != 1 or next(iter(rule.states.values())).role.name != "Matrix" or rule.reads_itself:
        states = ", ".join(rule.states) + (", and reads y by itself" if rule.reads_itself else "")
        raise SignalError(f"{rule.name} has {states}; in continuous time a rule has one matrix W and y = W q, such as fw.rules.delta")


def driver(rule: Rule) -> str | None:
    """The value or key without which the rule writes nothing, so that dW = F(W, x) dx when it is made of dx/dt; None if there is none.

    >>> from fastweights.rules import delta, hebb_rate, oja
    >>> driver(hebb_rate), driver(oja), driver(delta)
    ('v', 'v', 'k')
    """
    states, signals = (
        {n: torch.linspace(0.2, 0.9, max(torch.Size(s.shapes(4, 3)[0]).numel(), 1)).reshape(s.shapes(4, 3)[0]) for n, s in part.items()}
        for part in rule.arguments
    )
    signals = {n: -x if rule.arguments.signals[n].role.log_decay else x for n, x in signals.items()}
    for role in ("Value", "Key"):
        for n, s in rule.arguments.signals.items():
            if s.role.name.endswith(role):
                new = rule.apply(states, signals | {n: torch.zeros_like(signals[n])})[0]
                if all(torch.equal(a, b) for a, b in zip(new, states.values(), strict=True)):
                    return n
    return None


def run_steps(rule: Rule, W: Tensor | None, signals: dict[str, Tensor], reset: Tensor | None, *, save_memory: bool) -> Output:
    """``scan`` of a Runge-Kutta step; to ``save_memory``, about sqrt(T) blocks of tokens are run again for the gradient."""
    many = rule.trace.program is not None and rule.program.n > 8 and rule.program.erase != "none"
    form = "recurrent" if many else "auto"  # what chunks save is lost where one token erases many times
    T = signals["step"].shape[1]
    if not save_memory or T == 0:
        return scan(rule, state=W, reset=reset, form=form, **signals)

    def block(W: Tensor | None, reset: Tensor | None, *given: Tensor) -> tuple[Tensor, Tensor]:
        return scan(rule, state=W, reset=reset, form=form, **dict(zip(signals, given, strict=True)))

    size, parts = max(round(T**0.5), 1), []
    for i in range(0, T, size):
        given = (x[:, i : i + size] for x in signals.values())
        y, W = checkpoint(block, W, None if reset is None else reset[:, i : i + size], *given, use_reentrant=False)
        parts.append(y)
    return Output(torch.cat(parts, 1), W)


@dataclass(frozen=True)
class Solver:
    """torchdiffeq's solver from one sample to the next, with its gradient: direct, checkpointed or by the adjoint equation."""

    method: str
    gradient: str
    rtol: float
    atol: float

    def __call__(self, slope: Callable[[Tensor, Tensor], Tensor], W: Tensor, parameters: Iterable[Tensor], steps: int) -> Tensor:
        """W at t = 1 from W at t = 0 along dW/dt = slope(t, W), which depends on ``parameters``; in ``steps`` steps if they are fixed."""
        try:
            import torchdiffeq
        except ImportError as error:
            raise ImportError(
                f"method={self.method!r} with gradient={self.gradient!r} needs torchdiffeq: pip install 'fastweights[continuous]'"
            ) from error
        ends = torch.tensor([0.0, 1.0], dtype=W.dtype, device=W.device)
        options: dict[str, Any] = {"rtol": self.rtol, "atol": self.atol, "method": self.method}
        if self.method in METHODS:
            options["options"] = {"grid_constructor": lambda _f, _y, t: t[0] + (t[-1] - t[0]) * _fractions(steps, t)}
        if self.gradient == "adjoint":
            return torchdiffeq.odeint_adjoint(slope, W, ends, adjoint_params=tuple(parameters), **options)[-1]
        if self.gradient == "checkpoint":
            return checkpoint(lambda W: torchdiffeq.odeint(slope, W, ends, **options)[-1], W, use_reentrant=False)  # type: ignore[return-value]
        return torchdiffeq.odeint(slope, W, ends, **options)[-1]


def _fractions(steps: int, t: Tensor) -> Tensor:
    return torch.arange(steps + 1, dtype=t.dtype, device=t.device) / steps
