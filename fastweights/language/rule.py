"""A rule as a value: combined, compared, shown and traced."""

from __future__ import annotations

import importlib
import inspect
import itertools
import operator
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from .errors import FormError, RuleError, SignalTypeError
from .objective import Objective
from .probe import OVERFLOW, matches, probe
from .program import Program
from .roles import ROLES, Signal
from .show import equations
from .trace import Trace, line_of, trace

Origin = tuple[Callable[..., "Rule"], tuple[Any, ...]]
Token = Callable[[dict[str, Any], dict[str, Any]], tuple[tuple[Any, ...], Any]]
FORMS = ("recurrent", "parallel", "chunk")


class Named(NamedTuple):
    """The states and signals of a rule by name, in order."""

    states: Mapping[str, Signal]
    signals: Mapping[str, Signal]


RULES: weakref.WeakValueDictionary[int, Rule] = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Rule:
    """How one token changes the fast weights W, and what is read from them.

    A rule is a frozen value. ``r1 >> r2`` runs both on each token in that order (signals of the same name are the same
    signal); ``r * n`` is n micro-steps a token with n sets of signals, decays acting once, first; ``r.T`` exchanges the
    roles of keys and values. Two rules are equal when they compute the same map from the same signals.

    >>> from fastweights.rules import delta, oja
    >>> delta.T == oja, delta * 1 == delta, delta * 2 == delta
    (True, True, False)
    >>> delta
    delta(k: Key, v: Value, beta: Rate): W ← W + β (v − W k) kᵀ
    """

    name: str
    token: Token = field(repr=False)
    arguments: Named = field(repr=False)
    objective: Objective | None = None
    cite: str = ""
    doc: str = ""
    number: int = field(default_factory=itertools.count().__next__, repr=False)  # by which a compiled graph finds this object in RULES
    origin: Origin | None = field(default=None, repr=False)  # what makes this rule again in another process
    _traces: dict[Any, Trace] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        RULES[self.number] = self

    @property
    def states(self) -> Mapping[str, Signal]:
        """What the rule rewrites: W first, then any other states."""
        return self.arguments.states

    @cached_property
    def signals(self) -> Mapping[str, Signal]:
        """What every token brings: the arguments of the body, and the query ``q`` if the body does not read by itself."""
        mine = self.arguments.signals
        if self.reads_itself:
            return mine
        if ("q" in mine and not mine["q"].role.name.endswith("Query")) or "q" in self.states:
            raise RuleError(f"rule {self.name!r}: q is the query, y = W q; give the other one another name, or return (W, y)")
        return types.MappingProxyType({"q": Signal("q", ROLES["Query"]), **mine})

    @property
    def reads_itself(self) -> bool:
        """Whether the body returns ``(W, y)``; otherwise y = W q with the new W."""
        return self._example[1]

    @property
    def trace(self) -> Trace:
        """What tracing found for small generic sizes, decays per head where the rule allows it."""
        pick = self.shapes[0]
        return self.trace_for({n: s.shapes(4, 3)[pick] for part in (self.states, self.signals) for n, s in part.items()})

    @property
    def program(self) -> Program:
        """The normal form; raises ``FormError``, naming the line, if the rule has none."""
        if self.trace.program is None:
            raise FormError(self.explain())
        return self.trace.program

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms in which the rule can run over time."""
        if self.trace.program is None:
            return (FORMS[0], FORMS[2]) if self.trace.coupled is not None else FORMS[:1]
        return FORMS

    @property
    def kind(self) -> str:
        """The class of the normal form in words, such as ``decay scalar, erase tied``; raises ``FormError`` if there is none."""
        per_channel = " or per channel" if len(self.shapes) > 1 else ""
        return self.program.kind.replace("decay scalar", f"decay scalar{per_channel}")

    def apply(self, states: Mapping[str, Any], signals: Mapping[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """The body on those that it needs of the named states and signals of one token and one head: new states; y, or None."""
        return self.token({n: states[n] for n in self.states}, {n: signals[n] for n in self.arguments.signals})

    def explain(self, known: Trace | None = None) -> str:
        """Which forms the rule has, and if it is not all of them, why: the reason and the line."""
        known = known or self.trace
        if known.program is not None:
            return f"rule {self.name!r} has every form: it is affine in W ({known.program.kind})"
        missing = "parallel form (its matrices are affine together, and have a chunk form)" if known.coupled else "parallel or chunk form"
        return f"rule {self.name!r} has no {missing}: {known.reason}\n  {known.where}"

    def equation(self) -> str:
        """The new W (and y, if it is not W q) in plain text.

        >>> from fastweights.rules import gated_delta
        >>> gated_delta.equation()
        'W ← exp(g) W + β (v − exp(g) W k) kᵀ'
        """
        return self._written(latex=False)

    def latex(self) -> str:
        """The new W (and y, if it is not W q) in LaTeX."""
        return self._written(latex=True)

    def _written(self, latex: bool) -> str:
        known = self.trace
        if known.states is None:
            return next(iter(self.states)) + (" \\leftarrow \\ldots" if latex else " ← ...")
        parts = dict(zip(self.states, known.states, strict=True))
        return equations(parts if known.output is None else parts | {"y": known.output}, latex)

    def trace_for(self, shapes: dict[str, tuple[int, ...]]) -> Trace:
        """The trace for given shapes of the states and signals of one token and one head."""
        key = tuple(sorted(shapes.items()))
        if key in self._traces:
            return self._traces[key]
        found = trace(self, shapes)
        if found.lasting:
            self._traces[key] = found
        return found

    def expect_tensor(self, name: str, found: Any, expected: tuple[int, ...]) -> None:
        """A state that the body returned must be a tensor of the state's shape."""
        shape = getattr(found, "shape", None)
        if shape is None:
            raise RuleError(f"rule {self.name!r} returns a {type(found).__name__} as {name}, expected a tensor of shape {expected}")
        if tuple(shape) != expected:
            raise RuleError(f"rule {self.name!r} returns {name} of shape {tuple(shape)}, but {name} has shape {expected}")

    @property
    def shapes(self) -> tuple[int, ...]:
        """Which shapes of its roles the body accepts: 0 for decays per head, -1 for decays per channel."""
        return self._example[0]

    @cached_property
    def _example(self) -> tuple[tuple[int, ...], bool]:
        """``shapes``, and whether the body reads by itself: found by running it once."""
        accepted: dict[int, bool] = {}
        errors: list[Exception] = []
        several = any(len(s.role.spaces) > 1 for s in self.arguments.signals.values())
        for pick, dtype in itertools.product((0, -1) if several else (0,), (torch.float32, torch.float64)):
            if pick in accepted:  # a body may hold a matrix of either dtype
                continue
            try:
                states, signals = (
                    {n: torch.full(s.shapes(4, 3)[pick], -0.5 if s.role.log_decay else 0.5, dtype=dtype) for n, s in part.items()}
                    for part in self.arguments
                )
                accepted[pick] = self.token(states, signals)[1] is not None
            except RuleError:
                raise
            except Exception as error:  # whatever a body may raise is told with its line
                errors.append(error)
        if not accepted:
            text = f"the body of rule {self.name!r} fails on tensors of the shapes of its roles\n  {line_of(errors[0])}\n  {errors[0]}"
            raise RuleError(text) from errors[0]
        return tuple(accepted), any(accepted.values())

    # ---- the algebra -------------------------------------------------------------------------------------------------

    def __rshift__(self, other: Rule) -> Rule:
        if not isinstance(other, Rule):
            return NotImplemented
        name = f"{self.name} >> {other.name}"
        for n in self.arguments.signals.keys() & other.arguments.signals.keys():
            mine, theirs = self.arguments.signals[n], other.arguments.signals[n]
            if mine != theirs:
                raise RuleError(f"{name}: {n!r} is a {mine.role} in one and a {theirs.role} in the other")
        (w, *_), (_, *rest) = self.states, other.states
        both = {**self.states, **{n: other.states[n] for n in rest}}
        both_signals = {**self.arguments.signals, **other.arguments.signals}
        clash = {n for n in rest if n in self.states and (n == w or self.states[n].role != other.states[n].role)}
        clash |= (both.keys() - {w}) & both_signals.keys()
        if clash:
            raise RuleError(f"{name}: {', '.join(sorted(clash))} is one thing in one and another in the other; rename it")

        def token(states: dict[str, Any], signals: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
            new, y = self.apply(states, signals)
            states = states | dict(zip(self.states, new, strict=True))
            theirs = dict(zip(other.states, (states[n] for n in (w, *rest)), strict=True))
            new, y2 = other.apply(theirs, signals)
            states = states | dict(zip((w, *rest), new, strict=True))
            return tuple(states[n] for n in both), y if y2 is None else y2

        cite = "; ".join(dict.fromkeys(c for c in (self.cite, other.cite) if c))
        return Rule(name, token, named(both, both_signals), cite=cite, origin=(operator.rshift, (self, other)))

    def __mul__(self, n: int) -> Rule:
        if not isinstance(n, int) or isinstance(n, bool):
            return NotImplemented
        if n < 1:
            raise RuleError(f"{self.name} * {n}: the number of micro-steps must be at least 1")
        if n == 1:
            return self
        mine = self.arguments.signals
        once = {name for name, s in mine.items() if s.role.log_decay or s.role.slow or s.role.name.endswith("Query")}
        stacked = {name: s if name in once else replace(s, sets=n * (s.sets or 1)) for name, s in mine.items()}

        def part(name: str, x: Any, i: int) -> Any:
            if name in once:
                return torch.zeros_like(x) if i and mine[name].role.log_decay else x
            sets = mine[name].sets
            return x[i] if sets is None else x[i * sets : (i + 1) * sets]

        def token(states: dict[str, Any], signals: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
            y = None
            for i in range(n):
                new, y = self.token(states, {name: part(name, signals[name], i) for name in mine})
                states = dict(zip(self.states, new, strict=True))
            return tuple(states.values()), y

        name = f"({self.name}) * {n}" if " " in self.name else f"{self.name} * {n}"
        return Rule(name, token, named(self.states, stacked), cite=self.cite, origin=(operator.mul, (self, n)))

    __rmul__ = __mul__

    @property
    def T(self) -> Rule:
        """The rule with the roles of keys and values exchanged: what it does to W^T."""
        if self.reads_itself:
            raise RuleError(f"{self.name}.T: a rule with a read-out of its own has no transpose, for the query would change sides")
        mine = self.arguments
        sides = [[n for n, s in mine.signals.items() if s.role.name.endswith(side)] for side in ("Key", "Value")]
        swap = {a: b for pair in zip(*sides, strict=False) for a, b in (pair, pair[::-1])}
        signals = {swap.get(n, n): replace(s, name=swap.get(n, n), role=ROLES[s.role.mirror]) for n, s in mine.signals.items()}
        signals = {n: signals[n] for n in [*mine.signals, *signals] if n in signals}
        states = {n: replace(s, role=ROLES[s.role.mirror]) for n, s in mine.states.items()}

        def token(given: dict[str, Any], given_signals: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
            turned = {n: x.mT if states[n].role.name == "Matrix" else x for n, x in given.items()}
            new, _ = self.token(turned, {n: given_signals[swap.get(n, n)] for n in mine.signals})
            return tuple(x.mT if states[n].role.name == "Matrix" else x for n, x in zip(states, new, strict=True)), None

        name = f"({self.name}).T" if " " in self.name else f"{self.name}.T"
        return Rule(name, token, named(states, signals), cite=self.cite, origin=(operator.attrgetter("T"), (self,)))

    # ---- identity ----------------------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the mathematics of the rule: its arguments, and its values at fixed points (for JSON)."""
        described = {n: f"{s.role}" + (f" x {s.sets}" if s.sets else "") for part in self.arguments for n, s in part.items()}
        described["W"] = described.pop(next(iter(self.states)))
        return {
            "arguments": dict(sorted(described.items())),
            "forms": list(self.forms),
            "values": probe(self),
            "equation": self.equation(),
        }

    def matches(self, fingerprint: Mapping[str, Any]) -> bool:
        """Whether a stored fingerprint is that of this rule, up to rounding.

        Where the values overflow they tell nothing, and the equation as written must be the same.
        """
        mine = self.fingerprint
        if any(mine[part] != fingerprint[part] for part in ("arguments", "forms")) or not matches(mine["values"], fingerprint["values"]):
            return False
        return OVERFLOW not in mine["values"] or mine["equation"] == fingerprint["equation"]

    def __copy__(self) -> Rule:
        return self

    def __deepcopy__(self, memo: object) -> Rule:
        """A value: copies of models share it."""
        return self

    def __reduce__(self) -> Origin:
        """Pickled as a function is: by the name under which a module has it, or by what it is made of."""
        if self.origin is None or (self.origin[0] is imported and not self._can_be_imported(*self.origin[1])):
            place = f", as {self.origin[1][0]}.{self.origin[1][1]}" if self.origin else ""
            raise RuleError(
                f"rule {self.name!r} cannot be pickled, for no other process finds it{place}; define it at the top of a module, "
                "under the name of its function"
            )
        return self.origin

    def _can_be_imported(self, module: str, name: str) -> bool:
        try:
            return imported(module, name) is self
        except (ImportError, AttributeError, ValueError):
            return False

    def made_by(self, make: Callable[..., Rule], *args: Any) -> Rule:
        """The same, pickled as a call of ``make``, a function of a module that returns this rule."""
        return replace(self, origin=(make, args))

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Rule) and self.matches(other.fingerprint))

    def __hash__(self) -> int:
        return hash(tuple(sorted((n, s.role.name, s.sets) for n, s in self.arguments.signals.items())))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The body itself, on the tensors (or symbols) of one token and one head."""
        names = [*self.states, *self.arguments.signals]
        parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
        try:
            given = inspect.Signature(parameters).bind(*args, **kwargs).arguments
        except TypeError as error:
            raise SignalTypeError(
                f"{self.name}({', '.join(names)}) is the body, for one token and one head: {error}; "
                "fw.scan runs it over a sequence, fw.step over one token of all heads"
            ) from None
        states, y = self.apply(given, given)
        out = states if y is None else (*states, y)
        return out[0] if len(out) == 1 else out

    def __repr__(self) -> str:
        roles = ", ".join(f"{n}: {s.role}" for n, s in self.arguments.signals.items())
        return f"{self.name}({roles}): {self.equation()}"


def imported(module: str, name: str) -> Any:
    """What a module has under a name."""
    return operator.attrgetter(name)(importlib.import_module(module))


def named(states: Mapping[str, Signal], signals: Mapping[str, Signal]) -> Named:
    return Named(types.MappingProxyType(dict(states)), types.MappingProxyType(dict(signals)))
