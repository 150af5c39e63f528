"""Acquisition, extinction and partial reinforcement: the delta rule with cues as keys."""

from __future__ import annotations

import math

import torch

from ... import rules
from ...engine.scan import scan
from ...experiments.experiment import Finding, Result, Setting, experiment
from ...plots import figure
from ..curves import EXACT, SIGMAS, Curve, rows
from ..protocols import Conditioning, Phase
from ..recorder import record

_TRIALS = 30
_CHANCE = 0.5  # that the outcome follows, in partial reinforcement


@experiment(
    section="neuroscience",
    claim="Rescorla and Wagner's model is the delta rule with cues as keys: acquisition, extinction and partial reinforcement as predicted",
    cite="Rescorla and Wagner 1972; Widrow and Hoff 1960",
    quick=3, default=9, full=65,
)  # fmt: skip
def rescorla_wagner(setting: Setting) -> Result:
    """A cue is followed by an outcome (A+) for 30 trials, then no more (A-) for 30; V is the associative strength of the cue.

    The rule is ``delta``, W <- W + beta (v - W k) k^T, run by ``fw.step``. Presynaptic activity k is the cues that are present (each at
    the square root of its salience, here 1), the postsynaptic target v is the size lambda of the outcome, beta is the learning rate eta,
    v - W k is the prediction error, the neuromodulator, which dopamine is said to carry; there is no eligibility (cue and outcome fall in
    one trial) and no heterosynaptic term (cues that are absent have k = 0). V = W k.

    Convention: V_n is read after the update of trial n; the error of trial n before it. Acquisition V_n = lambda (1 - (1 - eta)^n),
    extinction V_0 (1 - eta)^n, error lambda (1 - eta)^(n - 1). The unit of time is the trial; a trial of D seconds in which V relaxes with
    time constant tau has eta = 1 - exp(-D/tau). If the outcome follows with chance p, V settles at mean p lambda and variance
    eta p (1 - p) lambda^2 / (2 - eta) over animals.
    """
    curves = [_acquisition_and_extinction(rate) for rate in (0.05, 0.1, 0.3)]
    animals = setting.pick(quick=2000, default=10000, full=40000)
    rates = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9]
    runs = [_partial(rates, animals, seed) for seed in setting.each_seed()]
    variance = _CHANCE * (1 - _CHANCE)
    expected = [rate * variance / (2 - rate) for rate in rates]
    line = [i / 100 for i in range(101)]
    # the error of a variance is that of a normal variable: a sum of coin tosses has lighter tails
    spread = Curve(
        "variance under partial reinforcement", rates, expected, [[v for _, v in run] for run in runs],
        error=[e * math.sqrt(2 / animals) for e in expected], line=(line, [x * variance / (2 - x) for x in line]),
    )  # fmt: skip
    off = [max(abs(m - _CHANCE) / math.sqrt(e / animals) for (m, _), e in zip(run, expected, strict=True)) for run in runs]
    findings = [curve.finding() for curve in curves]
    findings.append(
        Finding("prediction error in acquisition: largest deviation from lambda (1 - eta)^(n-1)", [_error(0.1)], "0", high=EXACT)
    )
    findings.append(Finding("mean under partial reinforcement: largest deviation from p lambda, in standard errors", off, "0", high=SIGMAS))
    findings.append(spread.finding())
    return Result(findings, rows(*curves, spread), _draw(curves, spread))


def _acquisition_and_extinction(rate: float) -> Curve:
    protocol = Conditioning((Phase("A+", _TRIALS), Phase("A-", _TRIALS)))
    measured = record(rules.delta, **protocol.signals(rate)).W.flatten().tolist()
    up = [1 - (1 - rate) ** n for n in range(1, _TRIALS + 1)]
    down = [up[-1] * (1 - rate) ** n for n in range(1, _TRIALS + 1)]
    return Curve(f"acquisition and extinction, rate {rate:g}", range(1, 2 * _TRIALS + 1), up + down, [measured])


def _error(rate: float) -> float:
    found = record(rules.delta, **Conditioning((Phase("A+", _TRIALS),)).signals(rate)).error
    assert found is not None
    return max(abs(e - (1 - rate) ** n) for n, e in enumerate(found.flatten().tolist()))


def _partial(rates: list[float], animals: int, seed: int) -> list[tuple[float, float]]:
    """Mean and variance of V over animals for every rate, after so many trials that no start is left."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for rate in rates:
        trials = math.ceil(math.log(1e-8) / math.log(1 - rate))
        v = (torch.rand(animals, trials, 1, 1, generator=draw, dtype=torch.float64) < _CHANCE).double()
        k = torch.ones_like(v)
        V = scan(rules.delta, q=k, k=k, v=v, beta=torch.full_like(v[..., 0], rate)).state.flatten()
        found.append((float(V.mean()), float(V.var())))
    return found


def _draw(curves: list[Curve], spread: Curve):
    made, (left, right) = figure(2, width=4.6)
    for colour, curve in enumerate(curves):
        curve.draw(left, colour, every=2, label=curve.label.replace("acquisition and extinction, rate", r"$\eta$ ="))
    left.axvline(_TRIALS + 0.5, color="grey", lw=0.8, ls=":")
    left.text(_TRIALS / 2, 1.04, "A+", ha="center")
    left.text(_TRIALS * 1.5, 1.04, "A−", ha="center")
    left.set_ylim(-0.03, 1.12)
    left.set_xlabel("trial")
    left.set_ylabel(r"associative strength $V_A$ (of $\lambda$)")
    left.legend(frameon=False)
    spread.draw(right, 3, label=r"$\eta\,p(1-p)/(2-\eta)$, p = 0.5")
    right.set_xlabel(r"learning rate $\eta$ (per trial)")
    right.set_ylabel(r"variance of $V_A$ over animals (of $\lambda^2$)")
    right.legend(frameon=False)
    return made
