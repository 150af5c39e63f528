"""Expressions as people write them: one printer, two alphabets (plain text and LaTeX)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .expr import Expr, added_axis, ordered, rank
from .program import Program

_GREEK = {"beta": "β", "gamma": "γ", "eta": "η", "phi": "φ", "alpha": "α", "mu": "μ", "lam": "λ", "theta": "θ", "tau": "τ"}
_SUM, _PRODUCT, _ATOM = 1, 2, 3
_HIDDEN = ("constant", "expand", "expand_as", "unsqueeze")


@dataclass(frozen=True)
class Alphabet:
    """How the pieces of a formula are written."""

    minus: str
    transpose: str
    odot: str
    fraction: str
    exp: str
    diag: str
    function: str
    latex: bool

    def name(self, name: str) -> str:
        head, _, tail = name.partition("_")
        if not self.latex:
            return _GREEK.get(head, head) + (f"_{tail}" if tail else "")
        head = f"\\{'lambda' if head == 'lam' else head}" if head in _GREEK else re.sub(r"(\d+)$", r"_{\1}", head)
        return head + (f"_{{\\mathrm{{{tail}}}}}" if tail else "")


_TEXT = Alphabet("−", "ᵀ", " ⊙ ", "{} / {}", "exp({})", "diag({})", "{}({})", latex=False)
_LATEX = Alphabet(
    "-", "^\\top", " \\odot ", "\\frac{{{}}}{{{}}}", "e^{{{}}}", "\\mathrm{{diag}}({})", "\\operatorname{{{}}}({})", latex=True
)


def text(node: Any) -> str:
    """The expression in plain text."""
    return _Printer(_TEXT).show(node)[0]


def equations(parts: dict[str, Expr], latex: bool = False) -> str:
    """Several expressions by name; long parts that occur twice get a letter of their own, told behind them."""
    printer = _Printer(_LATEX if latex else _TEXT)
    arrow, comma, told = (" \\leftarrow ", ",\\quad ", " \\quad\\text{with } ") if latex else (" ← ", ", ", "; with ")
    shared = {node: f"s_{{{i}}}" if latex else f"s{i}" for i, node in enumerate(_shared(list(parts.values())), 1)}
    printer.names = shared
    out = comma.join(f"{n}{' = ' if n == 'y' else arrow}{printer.show(e)[0]}" for n, e in parts.items())
    definitions = comma.join(f"{name} = {printer.formula(node)[0]}" for node, name in shared.items())
    return out + (told + definitions if shared else "")


def _shared(parts: list[Expr]) -> list[Expr]:
    """Numbers and vectors that are computed once and used several times, in order."""
    nodes = ordered(parts, ())
    uses = Counter([*parts, *(parent for node in nodes for parent in node.parents)])
    return [n for n in nodes if uses[n] > 1 and n.meta.ndim < 2 and n.parents and n.op != "neg" and len(text(n)) > 8]


class _Printer:
    """Each method returns a formula and how tightly it binds."""

    def __init__(self, style: Alphabet) -> None:
        self.style = style
        self.names: dict[Expr, str] = {}

    def show(self, node: Any) -> tuple[str, int]:
        if isinstance(node, Tensor):
            return (f"{node.item():g}" if node.ndim == 0 else "const"), _ATOM
        if not isinstance(node, Expr):
            return (f"{node:g}" if isinstance(node, float) else str(node)), _ATOM
        return (self.names[node], _ATOM) if node in self.names else self.formula(node)

    def formula(self, node: Expr) -> tuple[str, int]:
        """What the node is, also if it has a name."""
        if node.op in ("signal", "state", "read"):
            return self.style.name(node.args[0]), _ATOM
        if node.op in _HIDDEN or added_axis(node) is not None:
            return self.show(node.args[0])
        method = getattr(self, f"_{node.op}", None)
        return method(*node.args) if method else self._call(node)

    def at(self, node: Any, level: int) -> str:
        shown, binds = self.show(node)
        return shown if binds >= level else f"({shown})"

    def _call(self, node: Expr) -> tuple[str, int]:
        shown = [self.show(a)[0] for a in pytree.tree_leaves(node.args) if isinstance(a, (Expr, int, float))]
        shown += [f"{n}={self.show(a)[0]}" for n, a in node.kwargs.items() if isinstance(a, (Expr, int, float))]
        op = node.op.replace("maximum", "max").replace("minimum", "min")
        op = op.replace("_", "\\_") if self.style.latex else op
        return self.style.function.format(op, ", ".join(shown)), _ATOM

    def _add(self, a: Any, b: Any) -> tuple[str, int]:
        if isinstance(b, Expr) and b.op == "neg":
            return f"{self.at(a, _SUM)} {self.style.minus} {self.at(b.args[0], _PRODUCT)}", _SUM
        return f"{self.at(a, _SUM)} + {self.at(b, _SUM)}", _SUM

    def _neg(self, a: Any) -> tuple[str, int]:
        return f"{self.style.minus}{self.at(a, _PRODUCT)}", _SUM

    def _mul(self, a: Any, b: Any) -> tuple[str, int]:
        """Numbers stand in front; a vector beside a matrix is a diagonal matrix."""
        if rank(a) == rank(b) == 1:
            return f"{self.at(a, _PRODUCT)}{self.style.odot}{self.at(b, _PRODUCT)}", _PRODUCT
        for column, row in ((a, b), (b, a)):
            if added_axis(column) == 1 and (rank(row) == 1 or added_axis(row) == 0):
                return self._outer(column, row)
        if 2 in (rank(a), rank(b)):
            matrix, other = (a, b) if rank(a) == 2 and added_axis(a) is None else (b, a)
            diagonal = self.style.diag.format(self.show(other)[0])
            if added_axis(other) is not None:
                return f"{diagonal} {self.at(matrix, _PRODUCT)}", _PRODUCT
            if rank(other) == 1:
                return f"{self.at(matrix, _PRODUCT)} {diagonal}", _PRODUCT
        first, second = sorted((a, b), key=rank)
        return f"{self.at(first, _PRODUCT)} {self.at(second, _PRODUCT)}", _PRODUCT

    def _div(self, a: Any, b: Any) -> tuple[str, int]:
        if self.style.latex:
            return self.style.fraction.format(self.show(a)[0], self.show(b)[0]), _PRODUCT
        return self.style.fraction.format(self.at(a, _PRODUCT), self.at(b, _ATOM)), _PRODUCT

    def _pow(self, a: Any, b: Any) -> tuple[str, int]:
        return f"{self.at(a, _ATOM)}^{{{self.show(b)[0]}}}" if self.style.latex else f"{self.at(a, _ATOM)}^{self.at(b, _ATOM)}", _PRODUCT

    def _exp(self, a: Any) -> tuple[str, int]:
        return self.style.exp.format(self.show(a)[0]), _PRODUCT if self.style.latex else _ATOM

    def _abs(self, a: Any) -> tuple[str, int]:
        return f"|{self.show(a)[0]}|", _ATOM

    def _mT(self, a: Any) -> tuple[str, int]:
        return f"{self.at(a, _ATOM)}{self.style.transpose}", _PRODUCT if self.style.latex else _ATOM

    def _matmul(self, a: Any, b: Any) -> tuple[str, int]:
        left = self.at(a, _PRODUCT if rank(a) == 2 else _ATOM)
        dot = self.style.transpose if rank(a) == 1 else ""
        return f"{left}{dot} {self.at(b, _ATOM)}", _PRODUCT

    def _outer(self, a: Any, b: Any) -> tuple[str, int]:
        return f"{self.at(a, _PRODUCT)} {self.at(b, _ATOM)}{self.style.transpose}", _PRODUCT

    def _getitem(self, a: Any, index: Any) -> tuple[str, int]:
        return f"{self.at(a, _ATOM)}[{_index(index)}]", _ATOM


def _index(index: Any) -> str:
    if isinstance(index, tuple):
        return ", ".join(map(_index, index))
    if isinstance(index, slice):
        return ":".join("" if e is None else str(e) for e in (index.start, index.stop))
    return "..." if index is Ellipsis else str(index)


def normal_form(program: Program) -> str:
    """The micro-steps and reads of a program, a line each."""
    state = "Wᵀ" if program.transposed else "W"
    at = _Printer(_TEXT).at
    lines = [program.kind]
    for carry in program.carries:
        decay = "0" if carry.decay is None else at(carry.decay, _PRODUCT)
        other = "0" if carry.input is None else text(carry.input)
        shown = "max({} + {}, {})" if carry.kind == "max" else "{} {} + {}"
        lines.append(f"{carry.name} ← " + shown.format(decay, carry.name, other))
    for step in program.steps:
        linear = step.decay.linear
        inside = "I" if linear is None else f"diag({text(linear)})" if linear.meta.ndim else f"{at(linear, _PRODUCT)} I"
        inside += "" if step.x is None else f" + {at(step.x, _PRODUCT)} {at(step.y, _ATOM)}ᵀ"
        write = "" if step.u is None else f" + {at(step.u, _PRODUCT)} {at(step.w, _ATOM)}ᵀ"
        note = f"   (reads W {step.lag} micro-steps earlier)" if step.lag else ""
        lines.append(f"{state} ← {state} [{inside}]{write}{note}")
    for i, read in enumerate(program.reads):
        when = "new" if read.version == program.n else "old" if read.version == 0 else f"after {read.version}"
        lines.append(f"read {i} = {state}{'ᵀ' if read.backward else ''} {at(read.q, _ATOM)}   [{when} {state}]")
    return "\n".join([*lines, f"y = {text(program.output)}"])
