"""Spike-timing dependent plasticity: two traced writes make the window, and what it does at all frequencies and to Poisson trains."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...engine.scan import scan
from ...experiments.experiment import Finding, Result, Setting, experiment
from ...language.rule import Rule
from ...plots import COLOURS, figure
from ..curves import Curve, rows
from ..spikes import BI_POO_1998, SJOSTROM_2001, Pairing, log_decay, poisson, render, steady
from ..synapses import nearest_stdp
from ..synapses import stdp as all_pairs

_DT = 0.001  # s
_STRETCHES = 16  # of time that Poisson trains are cut into


@dataclass(frozen=True)
class Window:
    """Amplitudes of a pair, and time constants in seconds, of potentiation (+) and depression (-).

    >>> Window().change(0.0168) == 0.777 / 60 * math.exp(-1)
    True
    """

    a_plus: float = 0.777 / 60  # fits to Bi and Poo's data, for their 60 pairs (Bi and Poo 2001, Annu. Rev. Neurosci. 24)
    a_minus: float = 0.273 / 60
    tau_plus: float = 0.0168
    tau_minus: float = 0.0337

    def change(self, interval: float) -> float:
        """What one pair does, t_post - t_pre = ``interval`` in seconds."""
        plus, minus = self.a_plus * math.exp(-abs(interval) / self.tau_plus), self.a_minus * math.exp(-abs(interval) / self.tau_minus)
        return plus if interval > 0 else -minus if interval < 0 else 0.0

    def signals(self, batch: int, length: int, dt: float) -> dict[str, Tensor]:
        """The numbers of a rule, at every step."""
        g_pre, g_post = log_decay(self.tau_plus, dt), log_decay(self.tau_minus, dt)
        return steady(batch, length, a_plus=self.a_plus, a_minus=self.a_minus, g_pre=g_pre, g_post=g_post)


# depression a little stronger, 5 %, at equal time constants (Song, Miller and Abbott 2000)
SONG_2000 = Window(0.005, 1.05 * 0.005, 0.020, 0.020)


@experiment(
    section="neuroscience",
    claim="STDP is two traced writes, affine in W: window, dependence on frequency and drift under Poisson trains are the closed forms",
    cite="Bi and Poo 1998; Song, Miller and Abbott 2000; Kempter, Gerstner and van Hemmen 1999; Morrison, Diesmann and Gerstner 2008",
    quick=4, default=18, full=140,
)  # fmt: skip
def stdp(setting: Setting) -> Result:
    """Pairs of spikes at one interval, 60 at 1 Hz; pairs at many frequencies; independent Poisson trains on both sides.

    The rules are ``stdp`` (all pairs of spikes) and ``nearest_stdp`` (a spike and the last one of the other side), run by ``fw.scan`` in
    their chunk form: x <- exp(-dt/tau+) x, z <- exp(-dt/tau-) z, W <- W + A+ v x^T - A- z k^T, then x <- x + k, z <- z + v. Presynaptic
    spikes are k, postsynaptic ones v; the presynaptic trace x (a KeyState) and the postsynaptic z (a ValueState) are what either side
    remembers, beta is A+ or A-, g are -dt/tau+ and -dt/tau-. It is Hebb's rule twice, with a trace in the place of k and then of v: no
    eligibility (a trace is of one side), no neuromodulator, and no heterosynaptic term: a synapse changes only with its own spikes.

    Conventions: the traces are read *before* the spikes of a step enter them, so that a pair at dt = 0 does nothing; dt = 1 ms. Traces
    decay exactly, so that window and regular trains do not depend on dt where spikes lie on the grid. Under Poisson trains the pairs
    within one step are missing: the drift of all pairs is r_pre r_post dt (A+ / (e^(dt/tau+) - 1) - A- / (e^(dt/tau-) - 1)), which is below
    the r_pre r_post (A+ tau+ - A- tau-) of continuous time by r_pre r_post (A+ - A-) dt / 2 to first order.

    Closed forms: A+ exp(-t/tau+) and -A- exp(t/tau-) a pair; n pairs at period P, geometric sums of these over all pairs of spikes, or
    n A+ e^(-s/tau+) - (n - 1) A- e^(-(P - s)/tau-) for nearest neighbours with 0 < s < P; nearest neighbours under Poisson trains drift by
    r_pre r_post (A+ / (r_pre + 1/tau+) - A- / (r_post + 1/tau-)).
    """
    window = _window(Window())
    trains = [_frequencies(rule, s) for rule in (all_pairs, nearest_stdp) for s in (0.010, -0.010)]
    drifts = [_drift(setting, rule, w) for rule, w in ((all_pairs, Window()), (all_pairs, SONG_2000), (nearest_stdp, Window()))]
    curves = [window, *trains, *drifts]
    return Result([curve.finding() for curve in curves] + [_bias()], rows(*curves), _draw(window, trains, drifts))


def measure(rule: Rule, protocols: list[Pairing], window: Window, dt: float) -> list[float]:
    """The weight of one synapse after each protocol, (protocols,), from zero; they are a batch, the shorter ones followed by silence."""
    trains = [protocol.render(dt) for protocol in protocols]
    pre, post = (pad_sequence([t[side] for t in trains], batch_first=True)[:, :, None, None] for side in (0, 1))
    return scan(rule, q=pre, k=pre, v=post, **window.signals(len(trains), pre.shape[1], dt)).state[0].flatten().tolist()


def _window(window: Window) -> Curve:
    intervals = [p.interval for p in BI_POO_1998]
    shown = [i / 1000 for i in range(-100, 101)]
    return Curve(
        "60 pairs at 1 Hz", intervals, [60 * window.change(s) for s in intervals], [measure(all_pairs, list(BI_POO_1998), window, _DT)],
        line=(shown, [60 * window.change(s) if s else math.nan for s in shown]),
    )  # fmt: skip


def pairs_in_closed_form(p: Pairing, window: Window, nearest: bool) -> float:
    """The change by a regular train of pairs, interval shorter than the period: each spike with the earlier ones of the other side."""
    period, s = 1 / p.frequency, p.interval
    lead, lag = (window.a_plus, window.tau_plus), (-window.a_minus, window.tau_minus)
    within, between = (lead, lag) if s > 0 else (lag, lead)

    def total(amplitude: float, tau: float, first: float, count: int) -> float:
        back = 1 if nearest else count
        return amplitude * sum((count - j) * math.exp(-(first + j * period) / tau) for j in range(back))

    return total(*within, abs(s), p.count) + total(*between, period - abs(s), p.count - 1)


def _frequencies(rule: Rule, interval: float) -> Curve:
    protocols = [p for p in SJOSTROM_2001 if p.interval == interval and p.frequency >= 1]
    nearest = rule is nearest_stdp
    expected = [pairs_in_closed_form(p, Window(), nearest) for p in protocols]
    hertz = [1 + i / 4 for i in range(197)]
    line = [pairs_in_closed_form(replace(protocols[0], frequency=f), Window(), nearest) for f in hertz]
    label = f"{'nearest neighbours' if nearest else 'all pairs'}, {'+' if interval > 0 else '−'}{abs(1000 * interval):.0f} ms"
    measured = measure(rule, protocols, Window(), _DT)
    return Curve(label, [p.frequency for p in protocols], expected, [measured], line=(hertz, line))


def _area(window: Window) -> float:
    return window.a_plus * window.tau_plus - window.a_minus * window.tau_minus


def expected_drift(rule: Rule, window: Window, rate: float, dt: float) -> float:
    """Of the weight, a second, both sides at ``rate`` Hz; in steps of dt, or in continuous time for dt = 0."""
    sides = (window.a_plus, window.tau_plus), (-window.a_minus, window.tau_minus)
    if rule is nearest_stdp:
        p = 1 - math.exp(-rate * dt)
        return sum(a * (p * p / dt / (math.exp(dt / tau) - 1 + p) if dt else rate**2 / (rate + 1 / tau)) for a, tau in sides)
    return rate**2 * sum(a * (dt / (math.exp(dt / tau) - 1) if dt else tau) for a, tau in sides)


def _bias() -> Finding:
    """What steps of 1 ms take from the drift of all pairs, next to what is said of it."""
    off = []
    for w in (Window(), SONG_2000):
        missing = expected_drift(all_pairs, w, 1.0, 0) - expected_drift(all_pairs, w, 1.0, _DT)
        off.append(abs(missing / ((w.a_plus - w.a_minus) * _DT / 2) - 1))
    return Finding("drift that is missing with dt = 1 ms, over r^2 (A+ - A-) dt / 2, minus 1", [max(off)], "0", high=0.05)


def _drift(setting: Setting, rule: Rule, window: Window) -> Curve:
    """The mean over all synapses; its standard error is Campbell's for all pairs, else that between stretches."""
    cells, duration = 32, setting.pick(quick=1.0, default=3.0, full=10.0)
    rates = setting.pick(quick=[10.0, 20.0, 40.0], default=[5.0, 10.0, 20.0, 30.0, 40.0], full=[5.0, 10.0, 20.0, 30.0, 40.0])
    found = []
    for seed in setting.each_seed():
        setting.tell(f"{rule.name}, Poisson trains of {_STRETCHES} x {duration:g} s, seed {seed}")
        draw = torch.Generator().manual_seed(seed)
        found.append(torch.stack([_poisson_drifts(rule, window, rate, duration, cells, draw) for rate in rates]))
    if rule is nearest_stdp:
        error = torch.stack(found).var(2).mean(0).div(_STRETCHES).sqrt().tolist()
    else:
        square, area = (window.a_plus**2 * window.tau_plus + window.a_minus**2 * window.tau_minus) / 2, _area(window)
        error = [math.sqrt((r**2 * square / cells**2 + 2 * r**3 * area**2 / cells) / (_STRETCHES * duration)) for r in rates]
    shown = [float(r) for r in range(int(rates[-1]) + 1)]
    name = {all_pairs: "all pairs", nearest_stdp: "nearest neighbours"}[rule] + (", A− τ− = 1.05 A+ τ+" if window == SONG_2000 else "")
    line = (shown, [expected_drift(rule, window, r, _DT) for r in shown])
    expected = [expected_drift(rule, window, r, _DT) for r in rates]
    return Curve(f"drift of {name}", rates, expected, [f.mean(1).tolist() for f in found], error, line)


def _poisson_drifts(rule: Rule, window: Window, rate: float, duration: float, cells: int, draw: torch.Generator) -> Tensor:
    """In each of some stretches of time, mean over synapses, from traces that are as large at the start as they are on average."""
    whole = _STRETCHES * duration
    k, v = (torch.stack([render(poisson(rate, whole, draw), whole, _DT) for _ in range(cells)], 1) for _ in range(2))
    if rule is nearest_stdp:
        k, v = k.clamp(max=1), v.clamp(max=1)
    k, v = (x.reshape(_STRETCHES, -1, 1, cells) for x in (k, v))
    start = [k.new_full((_STRETCHES, 1, cells), _mean_trace(rule, rate, tau)) for tau in (window.tau_plus, window.tau_minus)]
    numbers = window.signals(_STRETCHES, k.shape[1], _DT)
    W, *_ = scan(rule, state=(k.new_zeros(_STRETCHES, 1, cells, cells), *start), q=k, k=k, v=v, **numbers).state
    return W.mean((1, 2, 3)) / duration


def _mean_trace(rule: Rule, rate: float, tau: float) -> float:
    """Of a trace after a step, in steps of ``_DT``: what the next step finds, before its decay."""
    kept, p = math.exp(-_DT / tau), 1 - math.exp(-rate * _DT)
    return p / (1 - (1 - p) * kept) if rule is nearest_stdp else rate * _DT / (1 - kept)


def _draw(window: Curve, trains: list[Curve], drifts: list[Curve]):
    made, (left, middle, right) = figure(3, width=3.9)
    shown, theory = window.line or ([], [])
    left.plot([1000 * s for s in shown], [100 * e for e in theory], color=COLOURS[0], label=r"$A_+e^{-t/\tau_+}$, $-A_-e^{t/\tau_-}$")
    left.plot([1000 * s for s in window.x], [100 * m for m in window.measured[0]], "o", color=COLOURS[0], ms=4, mec="white", mew=0.4)
    left.axhline(0, color="grey", lw=0.8)
    left.set_xlabel(r"$t_\mathrm{post} - t_\mathrm{pre}$ (ms)")
    left.set_ylabel("weight change, 60 pairs (%)")
    for i, curve in enumerate(trains):
        curve.draw(middle, (0, 1)[i % 2], label=curve.label, style="-" if i < 2 else "--", marker="o" if i < 2 else "s")
    middle.set_xlabel("frequency of pairs (Hz)")
    middle.set_ylabel("weight change, 75 pairs (fraction)")
    for curve, colour, style, marker in zip(drifts, (2, 3, 4), ("-", "-", "--"), "oos", strict=True):
        curve.draw(right, colour, label=curve.label.removeprefix("drift of "), style=style, marker=marker)
    hertz = drifts[0].line[0] if drifts[0].line else []
    limit = [expected_drift(all_pairs, Window(), r, 0) for r in hertz]
    right.plot(hertz, limit, ":", color=COLOURS[6], lw=1, label=r"all pairs, $dt \to 0$: $r^2(A_+\tau_+ - A_-\tau_-)$")
    right.set_xlabel("rate of both Poisson trains (Hz)")
    right.set_ylabel("drift of the weight (1/s)")
    for axes in (left, middle, right):
        axes.legend(frameon=False, fontsize=8)
    return made
