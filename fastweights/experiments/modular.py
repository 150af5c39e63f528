"""Modular arithmetic: sums modulo n as rotations, each of two reflections, without training and with it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rules
from ..engine.scan import scan
from ..plots import COLOURS, figure
from ..tasks.arithmetic import SYMBOLS, Modular
from ..tasks.source import IGNORED
from .entrants import CHANCE, SOLVED, Entrant, scaled
from .experiment import Finding, Result, Setting, experiment
from .training import ShortFirst, accuracy, fit, parameters

_MODULI = (3, 5, 7)
_PLUS, _MINUS, _TIMES, _OPENS, _CLOSES, _EQUALS = range(len(SYMBOLS))
SHORT, TRAINED, TESTED = (1, 9), (1, 40), (41, 80)  # symbols of an expression


class _Row(NamedTuple):
    entrant: Entrant
    brackets: bool
    solves: bool
    quick: bool = False
    claimed: bool = True  # in the small sizes; all are in the full one

    @property
    def name(self) -> str:
        return self.entrant.name + (", brackets" if self.brackets else "")


_PRODUCT = Entrant("DeltaProduct, 2 steps, rates to 2", ("delta * 2",), {"negative_eigenvalues": True})
ROWS = (
    _Row(_PRODUCT, False, True, True),
    _Row(Entrant("DeltaNet, 1 step, rates to 2", ("delta",), {"negative_eigenvalues": True}), False, False),
    _Row(Entrant("DeltaProduct, 2 steps, rates to 1", ("delta * 2",)), False, False, True),
    _Row(Entrant("LSTM", ("lstm",)), False, True, claimed=False),
    _Row(_PRODUCT, True, False),
    _Row(Entrant("LSTM", ("lstm",)), True, False),
)


@experiment(
    section="expressivity",
    claim="Two delta rule steps a token with rates to 2 add modulo n at any length, as rotations; one step or rates to 1 do not",
    cite="Siems et al. 2025 (DeltaProduct); Grazzi et al. 2024; Deletang et al. 2023 (the task)",
    quick=27, default=270, full=20_000,
)  # fmt: skip
def modular(setting: Setting) -> Result:
    """Expressions such as 2-0+1-2=, over the numbers 0 ... n - 1; their value modulo n is to be told at =, and nowhere else.

    Without training: W is 2 by 2 and begins as the identity. A number x turns it by x/n of a circle, backwards behind a minus: a product of
    two reflections, that is two steps of the delta rule with unit keys, rate 2 and value 0; every other symbol has rate 0. W (1, 0) then
    points at the value so far. Brackets: one that opens behind a minus reflects W, by which all that follows turns the other way round, and
    the one that closes it reflects back. Which bracket closes which is told by a stack outside, since what a token writes is a function of
    the tokens near it: the memory knows the sum, not the brackets that are open. With the second step left out, or with rate 1, the value
    is lost. (n = 2 is parity, for which one reflection is enough.) Products of numbers are left out: times 0 forgets, which no rotation
    does.

    With training: n = 3, one layer without an MLP behind causal convolutions of 2 tokens, as a number is read with its sign. Expressions of
    up to 9 symbols for the first half of training and of up to 40 for the second; tested on 41 to 80, and without a claim on 128 to 256,
    where little is left of what so short a training gives. Accuracy is scaled, 0 at chance (1/3)
    and 1 where all is right. All models see the same data for the same number of steps, and each has the width that brings its parameters
    nearest to those of the others. "Solves" is 0.95 or more, "does not" 0.1 or less. With brackets, drawn as published, "does not solve" is
    less than 0.95: short ones can be told without a stack. The LSTM without brackets is claimed in the full size alone: in so few steps it
    finds the sum with some seeds, then at every length, and not with others. Published are larger models with n = 5, trained much longer.
    """
    findings, table, shares = _untrained(setting)
    found: dict[str, dict[str, list[float]]] = {}
    for row in (r for r in ROWS if r.quick or setting.size != "quick"):
        size, runs = 0, []
        for seed in setting.each_seed():
            by_length, size = _trained(row, setting, seed)
            runs.append(by_length)
        found[row.name] = {where: [run[where] for run in runs] for where in runs[0]}
        far = found[row.name][_said(TESTED)]
        bounds = {"low": SOLVED} if row.solves else {"high": SOLVED if row.brackets else CHANCE}
        expected = "1.00" if row.solves else "below 0.95" if row.brackets else "about 0"
        what = f"Z_3 trained, {row.name}: scaled accuracy at {_said(TESTED)} symbols"
        if row.claimed or setting.size == "full":
            findings.append(Finding(what, far, expected, source="paper", **bounds))
        table += [
            {"model": row.name, "n": 3, "parameters": size, "symbols": where, "right (trained: scaled)": sum(z) / len(z)}
            for where, z in found[row.name].items()
        ]
    return Result(findings, table, _draw(shares, found))


# -- without training


def signals(tokens: Tensor, modulus: int) -> tuple[Tensor, Tensor]:
    """Keys (B, T, 2, 2), two a token, and rates (B, T, 2) in turns of 2 for what each symbol of expressions (B, T) does.

    A number x turns W by x of ``modulus`` parts of a circle, backwards behind a minus; a bracket that opens behind a minus reflects, and
    so does the one that closes it. Everything else writes nothing.
    """
    angle, rate = torch.zeros(*tokens.shape, 2), torch.zeros(*tokens.shape, 2)
    for row, said in enumerate(tokens.tolist()):
        minus, opened = False, []
        for t, token in enumerate(said):
            symbol = token - modulus
            if symbol < 0:
                angle[row, t, 0], rate[row, t] = (-1 if minus else 1) * math.pi * token / modulus, 2.0
            flips = symbol == _OPENS and minus
            if symbol == _OPENS:
                opened.append(minus)
            elif symbol == _CLOSES:
                flips = opened.pop()
            if flips:
                angle[row, t, 0], rate[row, t, 0] = math.pi / 2, 2.0
            minus = symbol == _MINUS and not minus  # a - -b adds
    return torch.stack([angle.cos(), angle.sin()], -1), rate


def values(tokens: Tensor, modulus: int, steps: int = 2, rate: float = 2.0) -> Tensor:
    """What W points at after every symbol of expressions (B, T), (B, T): without the second step, or with another rate, on request.

    >>> tokens = torch.tensor([[2, 4, 1, 4, 2, 8]])  # 2-1-2=
    >>> values(tokens, 3).tolist()
    [[2, 2, 1, 1, 2, 2]]
    """
    k, beta = signals(tokens, modulus)
    k, beta = k[:, :, None, :steps], (beta * rate / 2)[:, :, None, :steps]
    query = torch.tensor([1.0, 0.0]).expand(*tokens.shape, 1, 2)
    if steps == 1:
        k, beta = k[:, :, :, 0], beta[:, :, :, 0]
    empty = torch.eye(2).expand(len(tokens), 1, 2, 2)
    read = scan(rules.delta * steps, q=query, k=k, v=torch.zeros_like(k), beta=beta, state=empty).y[:, :, 0]
    angle = torch.atan2(read[..., 1], read[..., 0])
    return (angle * modulus / (2 * math.pi)).round().long() % modulus


_WAYS = {"2 reflections": (2, 2.0), "1 reflection": (1, 2.0), "rate 1": (2, 1.0)}


def _untrained(setting: Setting) -> tuple[list[Finding], list[dict], dict[tuple[str, str], list[float]]]:
    T = setting.pick(quick=1024, default=4096, full=65536)
    findings: list[Finding] = []
    table: list[dict] = []
    shares: dict[tuple[str, str], list[float]] = {}
    for brackets in (False, True):
        for n in _MODULI:
            told = [Modular(modulus=n, brackets=brackets, multiply=False, lengths=(T, T)).batch(s, 0, 32) for s in setting.each_seed()]
            said = f"Z_{n}" + (", brackets" if brackets else "")
            for way, (steps, rate) in _WAYS.items():
                shares[said, way] = [_share(values(x, n, steps, rate), y) for x, y in told]
                right = sum(shares[said, way]) / setting.seeds
                table.append({"model": way, "n": said, "parameters": 0, "symbols": f"{T}", "right (trained: scaled)": right})
            what = f"{said}, no training: share right of expressions of {T:,} symbols"
            findings.append(Finding(f"{what}, 2 reflections", shares[said, "2 reflections"], "1", low=1.0))
            lost = [max(a, b) for a, b in zip(shares[said, "1 reflection"], shares[said, "rate 1"], strict=True)]
            findings.append(Finding(f"{what}, 1 reflection or rate 1", lost, f"about 1/{n}", high=(1 + 1 / n) / 2))
    return findings, table, shares


def _share(told: Tensor, targets: Tensor) -> float:
    counted = targets != IGNORED
    return float((told == targets)[counted].double().mean())


# -- with training


def expressions(lengths: tuple[int, int], brackets: bool = False) -> Modular:
    """Sums and differences modulo 3 of so many symbols."""
    return Modular(modulus=3, multiply=False, brackets=brackets, lengths=lengths)


def _said(lengths: tuple[int, int]) -> str:
    return f"{lengths[0]} to {lengths[1]}"


def _trained(row: _Row, setting: Setting, seed: int) -> tuple[dict[str, float], int]:
    """Scaled accuracy by length, and the number of parameters."""
    steps, batch = setting.pick(quick=(1000, 32), default=(1500, 32), full=(20_000, 256))
    source = ShortFirst(expressions(SHORT, row.brackets), expressions(TRAINED, row.brackets), steps)
    model = row.entrant.build(source, setting.pick(quick=64, default=64, full=128), 1, seed, heads=4, conv=2, d_hidden=0)
    lr = setting.pick(quick=1e-2, default=1e-2, full=3e-3)
    fit(model, source, steps, batch=batch, lr=lr, seed=seed, cosine=True, setting=setting, name=row.name)
    lengths = (TRAINED, TESTED, (128, 256))
    return {_said(n): scaled(accuracy(model, expressions(n, row.brackets).validation(128)), 1 / 3) for n in lengths}, parameters(model)


def _draw(shares: dict[tuple[str, str], list[float]], found: dict[str, dict[str, list[float]]]) -> Any:
    made, (left, right) = figure(2, width=5.2, height=4.0)
    cases = list(dict.fromkeys(said for said, _ in shares))
    for colour, mark, way in zip(COLOURS, "osx", _WAYS, strict=False):
        left.plot([sum(z := shares[c, way]) / len(z) for c in cases], range(0, -len(cases), -1), mark, color=colour, ms=7, label=way)
    left.plot([1 / int(c[2]) for c in cases], range(0, -len(cases), -1), "|", color="0.4", ms=14, label="chance")
    left.set_yticks(range(0, -len(cases), -1), cases)
    left.set_xlim(-0.05, 1.08)
    left.set_xlabel("share of expressions right, without training")
    left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=4, columnspacing=1, handletextpad=0.3)
    for i, (name, by_length) in enumerate(found.items()):
        means = [sum(z) / len(z) for z in by_length.values()]
        right.plot(list(by_length), means, ("o-", "s--")[name.endswith("brackets")], color=COLOURS[i], label=name)
    right.set_ylim(-0.12, 1.08)
    right.set_xlabel("symbols of an expression (trained: the first)")
    right.set_ylabel("scaled accuracy, Z_3 trained")
    right.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return made
