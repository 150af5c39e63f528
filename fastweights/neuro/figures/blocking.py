"""Blocking: a cue learns nothing about an outcome that another cue predicts already."""

from __future__ import annotations

import torch

from ... import rules
from ...engine.scan import unroll
from ...experiments.experiment import Result, Setting, experiment
from ...plots import figure
from ..curves import Curve, rows
from ..protocols import Conditioning, Phase

_SECOND = 20  # trials of AB+


@experiment(
    section="neuroscience",
    claim="Blocking follows from the delta rule in closed form, and not from Hebb's",
    cite="Kamin 1969; Rescorla and Wagner 1972",
    quick=2, default=4, full=5,
)  # fmt: skip
def blocking(setting: Setting) -> Result:
    """A+ for n1 trials, then AB+ for n2 = 20: what does B come to predict? The control group has n1 = 0.

    The rule is ``delta``, W <- W + beta (v - W k) k^T, run by ``fw.unroll``: presynaptic activity k is the cues present, the postsynaptic
    target v the outcome lambda = 1, beta the learning rate eta, v - W k the prediction error (neuromodulator) that all cues share; no
    eligibility, no heterosynaptic term. V_A and V_B are the entries of W, read after a trial's update.

    Both cues share one error, so V_A + V_B approaches lambda by the factor 1 - 2 eta a trial, and each cue takes half of the rise:
    V_B = (lambda - V_A)(1 - (1 - 2 eta)^n2) / 2 with V_A = lambda (1 - (1 - eta)^n1). Hebb's rule (``hebb_rate``), which has no error,
    gives V_B = eta lambda n2 whatever n1 is.
    """
    groups = {n1: _trials(n1, 0.1) for n1 in (0, 30)}
    pretraining = list(range(0, 41, setting.pick(quick=4, default=2, full=1)))
    ends = [_ends(rate, pretraining) for rate in (0.05, 0.1, 0.3)]
    k_and_v = [_conditioned(n1, 0.1).signals(0.1) for n1 in pretraining]
    hebb = [float(unroll(rules.hebb_rate, **signals)[0, -1, 0, 0, 1]) for signals in k_and_v]
    without = Curve("V_B of Hebb's rule at the end", pretraining, [0.1 * _SECOND] * len(pretraining), [hebb])
    curves = [curve for group in groups.values() for curve in group] + ends + [without]
    return Result([c.finding() for c in curves], rows(*curves), _draw(groups, ends))


def _conditioned(n1: int, rate: float) -> Conditioning:
    return Conditioning((Phase("A+", n1), Phase("AB+", _SECOND)))


def _strengths(n1: int, rate: float) -> torch.Tensor:
    return unroll(rules.delta, **_conditioned(n1, rate).signals(rate))[0, :, 0, 0]


def _trials(n1: int, rate: float) -> list[Curve]:
    """V_A and V_B after every trial."""
    V = _strengths(n1, rate)
    before = [1 - (1 - rate) ** n for n in range(1, n1 + 1)]
    start = before[-1] if n1 else 0.0
    gained = [(1 - start) * (1 - (1 - 2 * rate) ** n) / 2 for n in range(1, _SECOND + 1)]
    x = range(1, n1 + _SECOND + 1)
    expected = {"A": before + [start + g for g in gained], "B": [0.0] * n1 + gained}
    return [Curve(f"V_{cue} with n1 = {n1}", x, e, [V[:, i].tolist()]) for i, (cue, e) in enumerate(expected.items())]


def _ends(rate: float, pretraining: list[int]) -> Curve:
    """V_B at the end, by how long A was trained before."""
    shown = [n1 / 4 for n1 in range(4 * pretraining[-1] + 1)]
    expected, line = ([(1 - rate) ** n1 * (1 - (1 - 2 * rate) ** _SECOND) / 2 for n1 in xs] for xs in (pretraining, shown))
    measured = [float(_strengths(n1, rate)[-1, 1]) for n1 in pretraining]
    return Curve(f"V_B at the end, rate {rate:g}", pretraining, expected, [measured], line=(shown, line))


def _draw(groups: dict[int, list[Curve]], ends: list[Curve]):
    made, (control, blocked, right) = figure(3, width=3.7)
    for axes, (n1, curves) in zip((control, blocked), groups.items(), strict=True):
        for colour, curve in enumerate(curves if n1 else curves[:1]):
            curve.draw(axes, colour, every=2, label=f"$V_{'AB'[colour]}$" if n1 else "$V_A = V_B$")
        if n1:
            axes.axvline(n1 + 0.5, color="grey", lw=0.8, ls=":")
            axes.text(n1 / 2, 1.04, "A+", ha="center")
        axes.text(n1 + _SECOND / 2, 1.04, "AB+", ha="center")
        axes.set_ylim(-0.03, 1.14)
        axes.set_title("blocking" if n1 else "control", fontsize=10)
        axes.set_xlabel("trial")
        axes.set_ylabel(r"associative strength (of $\lambda$)")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(0.5, 0.65 if not n1 else 0.5))
    for colour, curve in enumerate(ends):
        curve.draw(right, colour + 2, label=r"$\eta$ = " + curve.label.split()[-1])
    right.set_xlabel(r"trials of A+ before, $n_1$")
    right.set_ylabel(rf"$V_B$ after {_SECOND} trials of AB+ (of $\lambda$)")
    right.set_title("by training of A", fontsize=10)
    right.legend(frameon=False)
    return made
