"""A rule with traces as equations of Brian2: what a synapse is made of, and what pre- and postsynaptic spikes do to it."""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

from ..language.errors import FormError, SignalError
from ..language.expr import Expr, ordered
from ..language.rule import Rule
from .spikes import log_decay

_RESERVED = ("i", "j", "N", "t", "dt", "lastspike", "lastupdate", "not_refractory")
_LOCAL = ("add", "mul", "neg", "div", "pow", "exp", "outer", "mT", "getitem", "unsqueeze")


class BrianSynapses(NamedTuple):
    """The arguments of ``brian2.Synapses``: equations, what a spike of either side does, and the numbers that they name."""

    model: str
    on_pre: str
    on_post: str
    namespace: dict[str, float]


def synapses(rule: Rule, *, tau: Mapping[str, float], read: str = "v", **numbers: float) -> BrianSynapses:
    """Write a rule as the event-driven equations of one synapse, for ``brian2.Synapses(source, target, **result._asdict())``.

    A presynaptic spike is a key of 1 (a query, in a rule that reads by itself), a postsynaptic spike a value of 1. A state that decays by
    ``g.exp()`` a step becomes a differential equation. The names of states are kept, W is ``w``. A read-out y = W (...) of the rule's own
    is added to the variable ``read`` of the postsynaptic neuron; that of other rules, y = W q, is for ``on_pre`` of another pathway.

    Convention: if both sides spike in one step, Brian2 runs ``on_pre``, then ``on_post``, which sees the new traces; the rule may differ.

    Args:
        rule: a rule whose update is local to the synapse and happens at spikes.
        tau: the time constant in seconds of each log decay, by the signal's name.
        read: the postsynaptic variable that receives what a rule reads by itself.
        numbers: the other signals, which are constant.

    Raises:
        FormError: the rule has no such equations; the message names its line.
        SignalError: a number is missing, unknown or impossible.

    >>> from fastweights.neuro.synapses import stdp
    >>> made = synapses(stdp, tau={"g_pre": 0.02, "g_post": 0.02}, a_plus=0.01, a_minus=0.012)
    >>> print(made.model)
    w : 1
    dx/dt = -x/(tau_pre*second) : 1 (event-driven)
    dz/dt = -z/(tau_post*second) : 1 (event-driven)
    >>> made.on_pre.splitlines(), made.on_post.splitlines()
    (['w += -a_minus*z', 'x += 1'], ['w += a_plus*x', 'z += 1'])
    """
    _check_numbers(rule, tau, numbers)
    one = _OneSynapse(rule)
    model = []
    for state, name in one.names.items():
        decay = one.decay(state)
        model.append(f"{name} : 1" if decay is None else f"d{name}/dt = -{name}/({_tau(decay)}*second) : 1 (event-driven)")
    namespace = {_tau(n): float(seconds) for n, seconds in tau.items()} | {n: float(x) for n, x in numbers.items()}
    return BrianSynapses("\n".join(model), one.spike("pre", read), one.spike("post", read), namespace)


def _tau(decay: str) -> str:
    return "tau_" + (decay.removeprefix("g_") if decay != "g" else "w")


def _side(rule: Rule, name: str) -> str:
    """``pre``, ``post``, ``decay`` or ``number``: what a signal is to a synapse."""
    role = rule.signals[name].role
    if role.log_decay:
        return "decay"
    spaces = {"key": "pre", "value": "post"}
    return spaces[role.spaces[0]] if role.name in ("Key", "Query", "PositiveKey", "PositiveQuery", "Value") else "number"


def _check_numbers(rule: Rule, tau: Mapping[str, float], numbers: Mapping[str, float]) -> None:
    for what, given in (("decay", tau), ("number", numbers)):
        wanted = {n for n in rule.arguments.signals if _side(rule, n) == what}
        if wanted != set(given):
            missing, unknown = sorted(wanted - set(given)), sorted(set(given) - wanted)
            where = "tau, in seconds," if what == "decay" else "the numbers"
            raise SignalError(
                f"{rule.name}: {where} must name {', '.join(sorted(wanted)) or 'nothing'}; missing {missing}, unknown {unknown}"
            )
    for seconds in tau.values():
        log_decay(seconds, 1.0)


class _OneSynapse:
    """A rule between one presynaptic and one postsynaptic neuron, as algebra."""

    def __init__(self, rule: Rule) -> None:
        import sympy  # which torch brings

        self.rule, self.sympy = rule, sympy
        trace = rule.trace
        if trace.states is None:
            raise FormError(f"rule {rule.name!r} has no equations for Brian2: {trace.reason}\n  {trace.where}")
        self.names = {state: "w" if i == 0 else state for i, state in enumerate(rule.states)}
        taken = sorted({*self.names.values()} & {*rule.signals, *_RESERVED})
        if taken:
            raise FormError(
                f"rule {rule.name!r} has no equations for Brian2: the state {taken[0]!r} has the name of something else; rename it"
            )
        self.symbols = {n: sympy.Symbol(self.names.get(n, n)) for n in (*rule.states, *rule.signals)}
        self.new = {n: self._algebra(node) for n, node in zip(rule.states, trace.states, strict=True)}
        self.output = self._output(trace.output) if rule.reads_itself else None
        for state, node in zip(rule.states, trace.states, strict=True):
            if self._needs_both(self.new[state]):
                why = f"{self.names[state]} is written where both sides spike in one step: give the rule a trace of one of them"
                raise self._refusal(why, node)

    def _needs_both(self, new: Any) -> bool:
        """Whether spikes of both sides in one step do something at rest, or at all, that spikes of one side do not."""
        both, pre, post, none = (self._at(new, spikes) for spikes in (("pre", "post"), ("pre",), ("post",), ()))
        at_rest = self.sympy.expand(both - pre - post + none).subs({self.symbols[n]: 0 for n in self.rule.states})
        return at_rest != 0 or (pre == none == post != both)

    def _algebra(self, root: Expr, reading: bool = False) -> Any:
        known: dict[Expr, Any] = {}
        for node in ordered([root], ()):
            if node.op == "constant":
                if node.args[0].numel() != 1:
                    raise self._refusal("a matrix or vector of numbers tells synapses apart", node)
                known[node] = self.sympy.Float(float(node.args[0])) if float(node.args[0]) % 1 else self.sympy.Integer(int(node.args[0]))
            elif not node.parents:
                known[node] = self.symbols[node.args[0]]
            else:
                known[node] = self._operation(node, known, reading and node is root)
        return known[root]

    def _operation(self, node: Expr, known: dict[Expr, Any], reading: bool) -> Any:
        args = [known[a] if isinstance(a, Expr) else a for a in node.args]
        match node.op:
            case "add":
                return args[0] + args[1]
            case "mul" | "outer":
                return args[0] * args[1]
            case "matmul" if reading:
                return args[0] * args[1]
            case "neg":
                return -args[0]
            case "div":
                return args[0] / args[1]
            case "pow":
                return args[0] ** args[1]
            case "exp":
                return self.sympy.exp(args[0])
            case "mT" | "getitem" | "unsqueeze" if node.op == "mT" or node.meta.numel() == node.args[0].meta.numel():
                return args[0]
        why = "it sums over synapses" if node.op in ("matmul", "sum", "mean") else f"{node.op} is not among {', '.join(_LOCAL)}"
        raise self._refusal(why, node)

    def _refusal(self, why: str, node: Expr) -> FormError:
        return FormError(f"rule {self.rule.name!r} has no equations for Brian2: {why}\n  {node.where}")

    def _output(self, output: Expr | None) -> Any:
        assert output is not None
        if output.op != "matmul":
            raise self._refusal("what it reads is not W at a vector", output)
        return self._algebra(output, reading=True)

    def _at(self, expression: Any, spikes: tuple[str, ...], decayed: bool = True) -> Any:
        """An expression with spikes on these sides, where decays are those of no time (``decayed``: they are done elsewhere)."""
        sides = {self.symbols[n]: _side(self.rule, n) for n in self.rule.signals}
        values = {symbol: int(side in spikes) for symbol, side in sides.items() if side in ("pre", "post")}
        values |= {symbol: 0 for symbol, side in sides.items() if decayed and side == "decay"}
        return self.sympy.expand(expression.subs(values))

    def decay(self, state: str) -> str | None:
        """The name of the log decay of a state between spikes; None if it stays as it is."""
        between = self._at(self.new[state], (), decayed=False)
        factor = self.sympy.simplify(between / self.symbols[state])
        if factor == 1:
            return None
        for n in self.rule.signals:
            if _side(self.rule, n) == "decay" and self.sympy.simplify(factor - self.sympy.exp(self.symbols[n])) == 0:
                return n
        raise FormError(
            f"rule {self.rule.name!r} has no equations for Brian2: between spikes {self.names[state]} changes other than by one decay, "
            f"to {between}; run it with fw.scan, or write it clock-driven"
        )

    def spike(self, event: str, read: str) -> str:
        """What a spike does, a line a variable, each before the variables that it needs are overwritten."""
        new = {n: self._at(x, (event,)) for n, x in self.new.items()}
        changed = {n: x for n, x in new.items() if self.sympy.expand(x - self.symbols[n]) != 0}
        # a variable is overwritten after those that read it
        before = {n: {m for m in changed if m != n and self.symbols[n] in changed[m].free_symbols} for n in changed}
        try:
            order = list(TopologicalSorter(before).static_order())
        except CycleError as error:
            raise FormError(f"rule {self.rule.name!r} has no equations for Brian2: {', '.join(error.args[1])} need each other") from error
        lines = [self._statement(n, changed[n]) for n in order]
        if self.output is not None and (y := self._at(self.output, (event,))) != 0:
            lines.insert(0, f"{read}_post += {self.sympy.factor(y)}")
        return "\n".join(lines)

    def _statement(self, state: str, new: Any) -> str:
        name, own = self.names[state], self.symbols[state]
        if own not in new.free_symbols:
            return f"{name} = {new}"
        return f"{name} += {self.sympy.expand(new - own)}"
