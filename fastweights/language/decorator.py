"""``@rule``: from a function of one token and one head to a ``Rule``; ``descend``: from an objective to a ``Rule``.

``outer`` is what the body of a rule writes with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from .errors import RuleError
from .objective import Objective, gradient
from .roles import ROLES, Key, Rate, Role, Signal, Value, several
from .rule import Rule, imported, named

_RESERVED = {"rule", "state", "reset", "form", "backend", "chunk_size"}


def _arguments(fn: Callable[..., Any], name: str) -> dict[str, Signal]:
    """What a body's arguments are, W included."""
    try:
        parameters = list(inspect.signature(fn, eval_str=True).parameters.values())
    except NameError as error:
        raise RuleError(f"rule {name!r}: {error}; import the roles at the top of the file: from fastweights import Key, ...") from error
    if not parameters:
        raise RuleError(f"rule {name!r} has no arguments; the first is W, as in def {name}(W, k: Key, v: Value)")
    first = parameters[0]
    found = {} if first.annotation is not first.empty else {first.name: Signal(first.name, ROLES["Matrix"])}
    for p in parameters[len(found) :]:
        hints = getattr(p.annotation, "__metadata__", ())
        role = next((m for m in hints if isinstance(m, Role)), None)
        if role is None or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.default is not p.empty:
            raise RuleError(
                f"argument {p.name!r} of rule {name!r} needs a role and no default, as in {p.name}: Key; the roles are {', '.join(ROLES)}"
            )
        if not found and not role.state:
            raise RuleError(f"argument {p.name!r} of rule {name!r} is the first, so the fast weights, but {role.name} is no state")
        found[p.name] = Signal(p.name, role, next((m.sets for m in hints if isinstance(m, several)), None))
    return found


@overload
def rule(body: Callable[..., Any], /) -> Rule: ...
@overload
def rule(*, name: str = "", objective: Objective | None = None, cite: str = "") -> Callable[[Callable[..., Any]], Rule]: ...
def rule(body: Callable[..., Any] | None = None, /, *, name: str = "", objective: Objective | None = None, cite: str = "") -> Any:
    """Make a rule of a function of one token and one head.

    The first argument is the fast weights ``W`` (dv, dk); every other one is annotated with its role. The body returns
    the new ``W``, or ``(W, y)`` if it reads otherwise than by ``y = W q``. A rule with further states (``Matrix``,
    ``KeyState``, ...) returns them after ``W``, in the order of its arguments.

    >>> import fastweights as fw
    >>> from fastweights import Key, LogDecay, Rate, Value, outer
    >>> @fw.rule
    ... def forgetful(W, k: Key, v: Value, beta: Rate, g: LogDecay):
    ...     W = W + outer(beta * (v - W @ k), k)
    ...     return W * g.exp()
    >>> forgetful.forms
    ('recurrent', 'parallel', 'chunk')
    """
    return rule_of(body) if body is not None else partial(rule_of, name=name, objective=objective, cite=cite)


def rule_of(fn: Callable[..., Any], *, name: str = "", objective: Objective | None = None, cite: str = "") -> Rule:
    name = name or fn.__name__
    given = _arguments(fn, name)
    if reserved := sorted(_RESERVED & given.keys()):
        raise RuleError(f"rule {name!r}: {', '.join(reserved)} is an option of scan and cannot name a signal; choose another name")
    states = {n: s for n, s in given.items() if s.role.state}
    signals = {n: s for n, s in given.items() if not s.role.state}

    def token(states_in: dict[str, Any], signals_in: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        (_, w), *others = states_in.items()
        out = fn(w, **dict(others), **signals_in)
        out = out if isinstance(out, tuple) else (out,)
        if len(out) not in (len(states), len(states) + 1):
            expected = ", ".join(states)
            raise RuleError(f"rule {name!r} returns {len(out)} values; expected {expected} or {expected}, y")
        return tuple(out[: len(states)]), out[len(states)] if len(out) > len(states) else None

    place = (imported, (fn.__module__, getattr(fn, "__qualname__", name)))
    return Rule(name, token, named(states, signals), objective, cite, inspect.getdoc(fn) or "", origin=place)


def descend(objective: Callable[..., Any], *, name: str = "", cite: str = "") -> Rule:
    """The rule of one gradient step a token with rate ``beta`` on a local objective.

    ``W <- W - beta * dL/dW``. ``objective(W, k, v)`` returns a number for one token and one head; arguments named ``k`` and
    ``v`` are a key and a value, others carry a role as in a rule. A quadratic objective gives a rule with every form.

    >>> import fastweights as fw
    >>> half_squared_error = lambda W, k, v: 0.5 * ((v - W @ k) ** 2).sum()
    >>> fw.descend(half_squared_error) == fw.rules.delta
    True
    """
    usual = {"k": Key, "v": Value}
    w, *others = inspect.signature(objective, eval_str=True).parameters.values()
    hints = {p.name: usual.get(p.name, p.empty) if p.annotation is p.empty else p.annotation for p in others}

    def body(W: Any, beta: Any, **signals: Any) -> Any:
        return W - beta * gradient(objective, W, **signals)

    arguments = {w.name: w.empty, **hints, "beta": Rate}
    signature = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hint) for n, hint in arguments.items()]
    body.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    label = name or getattr(objective, "__name__", "").replace("<lambda>", "") or "objective"
    body.__doc__ = inspect.getdoc(objective) or f"One descent step on the objective {label}."
    found = rule_of(body, name=name or f"descend({label})", objective=Objective(label, objective), cite=cite)
    return found.made_by(partial(descend, name=name, cite=cite), objective)


def outer(u: Tensor, w: Tensor) -> Tensor:
    """The outer product u w^T: row i is u_i w.

    >>> outer(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])).tolist()
    [[1.0, 0.0], [2.0, 0.0]]
    """
    return torch.outer(u, w)
