"""Run a rule's body once on a symbolic W and find its program, or why it has none."""

from __future__ import annotations

import operator
import traceback
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from .chain import Chain, Lin, is_one, plus, since, times
from .couple import Coupled, NotCoupled, couple
from .errors import RuleError
from .expr import DataDependent, Expr, Tape, Where, is_outside, ordered
from .lower import Lowering, NotAffine, constant
from .program import Carry, Program, Read

if TYPE_CHECKING:
    from .rule import Rule


@dataclass(frozen=True, eq=False)
class Trace:
    """What is known of a rule for given sizes.

    ``states`` and ``output`` are what the body returned (None if its control flow depends on data, ``output`` None for
    the usual read-out). Either ``program`` is there, or ``reason`` says why not and ``where`` at which line.
    """

    leaves: dict[str, Expr]
    states: tuple[Expr, ...] | None
    output: Expr | None
    program: Program | None
    reason: str = ""
    where: Where | None = None
    coupled: Coupled | None = None  # where several matrices are affine together

    @property
    def lasting(self) -> bool:
        """Whether the trace holds no tensors but numbers of the body: one of the surroundings may change, or belong to a graph."""
        tape = next(iter(self.leaves.values())).tape
        held = (t for node in tape.nodes for t in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(t, Tensor))
        return all(tape.wrote(t) for t in held)


def trace(rule: Rule, shapes: dict[str, tuple[int, ...]]) -> Trace:
    """Trace ``rule`` for the shapes of W, its states and its signals for one token and one head."""
    # numbers on the tape outlive the call, which may run inside a graph's capture, where tensors are fake
    with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        return _trace(rule, shapes)


def _trace(rule: Rule, shapes: dict[str, tuple[int, ...]]) -> Trace:
    tape = Tape()
    leaves = {n: tape.leaf(n, s, "state" if n in rule.states else "signal") for n, s in shapes.items()}
    try:
        states, output = rule.apply(leaves, leaves)
    except DataDependent as stop:
        return Trace(leaves, None, None, None, f"its control flow depends on the data ({stop.what} of a signal or of a read)", stop.where)
    except RuleError:
        raise
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
        sizes = ", ".join(f"{n} {tuple(s)}" for n, s in shapes.items())
        raise RuleError(f"rule {rule.name!r} fails for one token and one head with {sizes}\n  {line_of(error)}\n  {error}") from error
    for name, new in zip(rule.states, states, strict=True):
        rule.expect_tensor(name, new, shapes[name])
    states = tuple(new if isinstance(new, Expr) else tape.constant(new) for new in states)
    output = output if output is None or isinstance(output, Expr) else tape.constant(output)
    try:
        return Trace(leaves, states, output, _lower(rule, leaves, states, output, rows=False))
    except NotAffine as on_columns:
        if not on_columns.side:
            found = _coupled(rule, leaves, states, output)
            return Trace(leaves, states, output, None, on_columns.why, on_columns.where, found)
        try:
            return Trace(leaves, states, output, _lower(rule, leaves, states, output, rows=True))
        except NotAffine as on_rows:
            why = f"{on_columns.why} ({on_columns.where}) and also on its columns" if on_rows.side else on_rows.why
            return Trace(leaves, states, output, None, why, on_rows.where)


def _coupled(rule: Rule, leaves: dict[str, Expr], states: tuple[Expr, ...], output: Expr | None) -> Coupled | None:
    try:
        return None if output is not None else couple([leaves[n] for n in rule.states], states, leaves["q"])
    except NotCoupled:
        return None


def line_of(error: Exception) -> Where | str:
    """The line of the rule at which an exception arose."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    found = [Where(file, line) for file, line in frames if is_outside(file)]
    return found[-1] if found else ""


def _lower(rule: Rule, leaves: dict[str, Expr], states: tuple[Expr, ...], output: Expr | None, rows: bool) -> Program:
    first, *others = rule.states
    weights = leaves[first]
    lowering = Lowering(weights, rows)
    carries = _carries(dict(zip(others, states[1:], strict=True)), leaves, weights)
    chain = lowering.chain(states[0])
    shown = states[0] @ leaves["q"] if output is None else output
    reads = _Reads(lowering, chain)
    y = reads.rewrite(shown)
    return Program(leaves, chain, tuple(Read(*key) for key in reads.leaves), tuple(reads.leaves.values()), y, carries, rows)


class _Reads:
    """Finds the reads of W in the output, and puts leaves in their place."""

    def __init__(self, lowering: Lowering, chain: Chain) -> None:
        self.lowering, self.chain = lowering, chain
        self.leaves: dict[tuple[Expr, int, bool], Expr] = {}  # by key, version, and whether W is read backwards
        # what depends on W, and what of that is still a matrix that no read has made a vector of
        self.below, self.raw = {lowering.weights}, {lowering.weights}
        for node in lowering.weights.tape.nodes:
            if any(p in self.below for p in node.parents):
                self.below.add(node)
                if any(p in self.raw for p in node.parents) and not self._is_read(node):
                    self.raw.add(node)
        self.done: dict[Expr, Expr] = {}

    def _is_read(self, node: Expr) -> bool:
        raw = [p for p in node.parents if p in self.raw]
        touched = [p for p in node.parents if p in self.below]
        return node.op == "matmul" and len(raw) == len(touched) == 1 and raw[0].meta.ndim == 2 and node.meta.ndim == 1

    def rewrite(self, arg: Any) -> Any:
        """The same with reads in the place of W; also inside lists, as in torch.cat([W @ q, v])."""
        if isinstance(arg, (list, tuple)):
            return type(arg)(map(self.rewrite, arg))
        if not isinstance(arg, Expr) or arg not in self.below:
            return arg
        if arg not in self.done:
            self.done[arg] = self._rewrite(arg)
        return self.done[arg]

    def _rewrite(self, node: Expr) -> Expr:
        if self._is_read(node):
            return self._read(self.lowering.value(node), node)
        if node in self.raw:
            raise NotAffine(f"the output uses W other than by W @ x or W.mT @ x (in {node.op})", node.where)
        whole = node.args[0] if node.op == "item" else node
        kwargs = {n: self.rewrite(a) for n, a in whole.kwargs.items()}
        out = node.tape.record(whole.fn, *map(self.rewrite, whole.args), **kwargs)
        return out if whole is node else out[node.args[1]]

    def _read(self, lin: Lin, node: Expr) -> Expr:
        out = lin.const
        for reading in lin.reads:
            version, later = since(reading.chain, self.chain)
            q, const = (reading.q, None) if reading.backward else later.read(reading.q)
            key = (q, version, reading.backward)
            if key not in self.leaves:
                self.leaves[key] = node.tape.leaf(f"read {len(self.leaves)}", tuple(node.meta.shape), "read")
            read = self.leaves[key]
            out = plus(out, later.read_back(read, q) if reading.backward else plus(read, const))
        assert out is not None
        return out


def _carries(states: dict[str, Expr], leaves: dict[str, Expr], weights: Expr) -> tuple[Carry, ...]:
    """The vector and scalar states as recurrences that the signals drive, in an order in which they can be computed."""
    needs: dict[str, list[str]] = {}
    for name, new in states.items():
        if leaves[name].meta.ndim == 2:
            raise NotAffine(f"{name} is a second matrix that moves together with {weights.args[0]}", new.where)
        used = _leaves_of(new)
        if weights in used:
            raise NotAffine(f"the state {name} depends on W, which depends on it", new.where)
        needs[name] = [other for other in states if other != name and leaves[other] in used]
    try:
        order = list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        cycle = [name for name in states if name in error.args[1]]
        raise NotAffine(f"the states {', '.join(cycle)} depend on each other", states[cycle[0]].where) from error
    return tuple(_recurrence(name, states[name], leaves[name]) for name in order)


def _leaves_of(node: Expr) -> set[Expr]:
    return {n for n in ordered([node], ()) if not n.parents}


def _recurrence(name: str, new: Expr, leaf: Expr) -> Carry:
    if new.op == "maximum":
        for own, other in (new.args, new.args[::-1]):
            parts = _linear(own, leaf)
            if parts and is_one(parts[0]) and isinstance(other, Expr) and leaf not in _leaves_of(other):
                return Carry(name, "max", parts[1], other)
    parts = _linear(new, leaf)
    if parts is None:
        raise NotAffine(f"the state {name} is not s <- a * s + b or s <- max(a + s, b)", new.where)
    return Carry(name, "linear", *parts)


def _linear(node: Expr, leaf: Expr) -> tuple[Expr | None, Expr | None] | None:
    """The ``a, b`` with node = a * leaf + b, elementwise; a missing one is zero."""
    if node is leaf:
        return constant(leaf, 1.0), None
    if leaf not in _leaves_of(node):
        return None, node
    if node.kwargs or not all(isinstance(a, (Expr, Tensor, int, float)) for a in node.args):
        return None
    parts = [_linear(a, leaf) if isinstance(a, Expr) else (None, constant(leaf, a)) for a in node.args]
    match node.op, parts:
        case "add", [(a, b), (c, d)]:
            return plus(a, c), plus(b, d)
        case "neg", [(a, b)]:
            how, by = operator.neg, []
        case ("mul", [(a, b), (None, Expr() as c)]) | ("mul", [(None, Expr() as c), (a, b)]):
            how, by = times, [c]
        case "div", [(a, b), (None, Expr() as c)]:
            how, by = operator.truediv, [c]
        case _:
            return None
    return None if a is None else how(a, *by), None if b is None else how(b, *by)
