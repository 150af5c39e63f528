"""Three-factor plasticity: an eligibility at every synapse waits for a reward, and what it has lost by then is the credit that it gets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...engine.scan import scan
from ...engine.step import step
from ...experiments.experiment import Result, Setting, experiment
from ...plots import figure
from ...rules import eligibility as rule
from ..curves import Curve, rows
from ..protocols import steps
from ..spikes import log_decay, steady
from ..synapses import rewarded_stdp

_TAU = 1.0  # s, of the eligibility
_PAUSE = 30.0  # s between trials
_PAIR = (0.010, 0.020, 1.0)  # s between the spikes, s time constant of the pre-synaptic trace, amplitude


@experiment(
    section="neuroscience",
    claim="A reward delayed by D gives the credit exp(-D/tau); with perturbed neurons that is the delta rule, slower by the same factor",
    cite="Izhikevich 2007; Williams 1992; Fiete and Seung 2006; Fremaux and Gerstner 2016",
    quick=1, default=3, full=20,
)  # fmt: skip
def three_factor(setting: Setting) -> Result:
    """A synapse is active once and a reward follows after D seconds; then neurons learn a target from nothing but delayed rewards.

    The rule is the catalogue's ``eligibility``: E <- exp(-dt/tau) E + v k^T, W <- W + r E, run by ``fw.scan`` and ``fw.step``. Presynaptic
    activity is k, postsynaptic activity (or its perturbation) v, E the eligibility (a Matrix state), g = -dt/tau its log decay, the reward
    or neuromodulator r takes the place of beta; no heterosynaptic term. ``rewarded_stdp`` is the same with STDP (``stdp``) as what writes
    to E.

    Conventions: E is read after the step's own write, so that a reward in the same step (D = 0) gets the credit 1; tau = 1 s, dt = 10 ms
    (5 ms with spikes). Decay is exact: with pairs and rewards on the grid nothing depends on dt.

    Closed forms: credit lambda^(D/dt) = exp(-D/tau), lambda = exp(-dt/tau); with a pair of spikes s = 10 ms apart it is A+ exp(-s/tau+)
    exp(-D/tau). Node perturbation: the output is y = W k + xi with noise xi of variance sigma^2, v = xi, and r is eta times the reward
    -|target - y|^2 less what was to be expected, -|target - W k|^2. The mean of r xi is 2 eta sigma^2 (target - W k): in the mean W moves
    by the delta rule with beta = 2 eta sigma^2 exp(-D/tau), and the mean error after n trials is (1 - beta |k|^2)^n of the first.
    """
    delays = [0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0]
    credits = [_credit(delays), _spiking_credit(delays)]
    learning = [_learning(setting, delay) for delay in (0.0, 0.5, 1.5)]
    findings = [curve.finding() for curve in [*credits, *learning]]
    return Result(findings, rows(*credits, *learning), _draw(credits, learning))


def credit(delays: list[float], dt: float) -> list[float]:
    """What a reward of 1 that comes ``delays`` seconds after an active step makes of it, one row of a batch each."""
    length = steps(max(delays), dt) + 1
    active = torch.zeros(len(delays), length, 1, 1, dtype=torch.float64)
    active[:, 0] = 1
    numbers = steady(len(delays), length, g=log_decay(_TAU, dt))
    W, _ = scan(rule, q=active, k=active, v=active, r=_reward(delays, 0.0, length, dt), **numbers).state
    return W.flatten().tolist()


def spiking_credit(delays: list[float], dt: float) -> list[float]:
    """The same for a pair of spikes, by the delay after the second one."""
    interval, tau, amplitude = _PAIR
    length = steps(interval + max(delays), dt) + 1
    pre, post = (torch.zeros(len(delays), length, 1, 1, dtype=torch.float64) for _ in range(2))
    pre[:, 0], post[:, steps(interval, dt)] = 1, 1
    decays = {n: log_decay(t, dt) for n, t in (("g", _TAU), ("g_pre", tau), ("g_post", tau))}
    numbers = steady(len(delays), length, a_plus=amplitude, a_minus=amplitude, **decays)
    W, *_ = scan(rewarded_stdp, q=pre, k=pre, v=post, r=_reward(delays, interval, length, dt), **numbers).state
    return W.flatten().tolist()


def _reward(delays: list[float], after: float, length: int, dt: float) -> Tensor:
    r = torch.zeros(len(delays), length, 1, dtype=torch.float64)
    for row, delay in zip(r, delays, strict=True):
        row[steps(after + delay, dt)] = 1
    return r


def _credit(delays: list[float]) -> Curve:
    shown = [i / 50 for i in range(round(50 * max(delays)) + 1)]
    line = (shown, [math.exp(-d / _TAU) for d in shown])
    return Curve("credit of a rate", delays, [math.exp(-d / _TAU) for d in delays], [credit(delays, 0.010)], line=line)


def _spiking_credit(delays: list[float]) -> Curve:
    interval, tau, amplitude = _PAIR
    one = amplitude * math.exp(-interval / tau)
    shown = [i / 50 for i in range(round(50 * max(delays)) + 1)]
    line = (shown, [one * math.exp(-d / _TAU) for d in shown])
    return Curve(
        "credit of a pair of spikes", delays, [one * math.exp(-d / _TAU) for d in delays], [spiking_credit(delays, 0.005)], line=line
    )


def _learning(setting: Setting, delay: float, rate: float = 0.5, noise: float = 0.3) -> Curve:
    """The mean error over independent learners after every trial, along its first direction, as a share of the first."""
    learners, trials = setting.pick(quick=4000, default=20000, full=200000), 40
    runs, spreads = [], []
    for seed in setting.each_seed():
        setting.tell(f"{learners} learners, reward after {delay:g} s, seed {seed}")
        errors = _errors(learners, trials, delay, rate, noise, torch.Generator().manual_seed(seed))
        runs.append(errors.mean(0).tolist())
        spreads.append(errors.var(0) / learners)
    error = torch.stack(spreads).mean(0).sqrt().tolist()
    beta = 2 * rate * noise**2 * math.exp(-delay / _TAU)
    x = range(1, trials + 1)
    return Curve(f"error with the reward after {delay:g} s", x, [(1 - beta) ** n for n in x], runs, error)


def _errors(learners: int, trials: int, delay: float, rate: float, noise: float, draw: torch.Generator) -> Tensor:
    """(learners, trials). A trial has two tokens: activity, after a pause that let the eligibility be forgotten, and the reward."""
    k = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64).expand(learners, 1, 3)
    target = torch.tensor([1.0, -1.0], dtype=torch.float64).expand(learners, 1, 2)
    first = target[0, 0] @ target[0, 0]
    silence, zero = (k * 0, target * 0), k.new_zeros(learners, 1)
    wait, pause = (k.new_full((learners, 1), log_decay(_TAU, seconds)) if seconds else zero for seconds in (delay, _PAUSE))
    state: tuple[Tensor, ...] = (k.new_zeros(learners, 1, 2, 3), k.new_zeros(learners, 1, 2, 3))
    errors = []
    for _ in range(trials):
        xi = noise * torch.randn(learners, 1, 2, generator=draw, dtype=torch.float64)
        read, state = step(rule, state, q=k, k=k, v=xi, r=zero, g=pause)
        surprise = ((target - read) ** 2 - (target - read - xi) ** 2).sum(-1)
        read, state = step(rule, state, q=k, k=silence[0], v=silence[1], r=rate * surprise, g=wait)
        errors.append((target - read)[:, 0] @ target[0, 0] / first)
    return torch.stack(errors, 1)


def _draw(credits: list[Curve], learning: list[Curve]):
    made, (left, right) = figure(2, width=4.6)
    credits[0].draw(left, 0, label=r"$e^{-D/\tau}$, rate")
    credits[1].draw(left, 1, label=r"$A_+ e^{-s/\tau_+} e^{-D/\tau}$, spikes 10 ms apart")
    left.set_xlabel("delay D of the reward (s)")
    left.set_ylabel("credit (change of the weight)")
    for i, curve in enumerate(learning):
        curve.draw(right, 2 + i, every=2, label=f"D = {curve.label.split()[-2]} s")
    right.set_xlabel("trial")
    right.set_ylabel("mean error (of the first)")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.legend(frameon=False)
    return made
