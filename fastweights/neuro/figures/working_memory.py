"""Working memory in synapses: facilitation outlasts the activity that made it, and any input brings the activity back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ... import rules
from ...engine.scan import scan
from ...engine.step import step
from ...experiments.experiment import Finding, Result, Setting, experiment
from ...plots import COLOURS, figure
from ..curves import Curve, rows
from ..protocols import steps
from ..synapses import short_term
from .short_term_plasticity import FACILITATING, Synapse

_DT = 0.001  # s
_LOADED = 1  # the population that is loaded
_LOAD = (0.2, 0.5)  # s, from and to
_SETTLED = 0.1  # s after the load, until its activity is gone


@dataclass(frozen=True)
class Network:
    """Excitatory populations that excite themselves through facilitating synapses, and one inhibitory population common to all.

    Rates and currents in Hz, times in seconds: tau dh/dt = -h + J u x R - J_EI R_I + I, tau dh_I/dt = -h_I + J_IE sum R,
    R = alpha log(1 + exp(h / alpha)).

    >>> Network().W.shape
    torch.Size([5, 5])
    """

    synapse: Synapse = FACILITATING
    populations: int = 5
    J: float = 6.0
    J_EI: float = 1.1
    J_IE: float = 1.75
    tau: float = 0.008
    alpha: float = 1.5
    background: float = -3.0  # so low that nothing fires by itself
    load: float = 50.0  # to one population, for 0.3 s
    pulse: float = 10.0  # to all populations, for 0.1 s

    @property
    def W(self) -> Tensor:
        """The weights that Hebb's rule writes when every population has been active once by itself, at rate J; (P, P)."""
        one = torch.eye(self.populations, dtype=torch.float64)[None, :, None]
        beta = torch.full((1, self.populations, 1), self.J, dtype=torch.float64)
        return scan(rules.hebb_rate, q=one, k=one, v=one, beta=beta).state[0, 0]


class Activity(NamedTuple):
    """Rates R in Hz, and u and x that the next spike finds, each (B, T, P)."""

    R: Tensor
    u: Tensor
    x: Tensor


@experiment(
    section="neuroscience",
    claim="After a second of silence a pulse to all populations brings back only the one that was loaded: facilitation is the memory",
    cite="Mongillo, Barak and Tsodyks 2008, Science 319; Mi, Katkov and Tsodyks 2017, Neuron 93 (rate model)",
    quick=3, default=5, full=40,
)  # fmt: skip
def working_memory(setting: Setting) -> Result:
    """Five populations with the synapses of Mongillo et al. (U = 0.2, tau_F = 1.5 s, tau_D = 0.2 s). One is excited for 0.3 s; nothing
    happens for a while; then all of them receive the same weak pulse of 0.1 s.

    The rule is ``short_term``, one ``fw.step`` a time step: the query q is presynaptic activity, the rates times dt, and what is read,
    y = W (u x q) / dt, is the recurrent input. W is long-term memory, written by Hebb's rule (``hebb_rate``: k = v = one population,
    beta = J) and fixed here; the facilitation f (a KeyState, g = -dt/tau_F) is working memory, d (g = -dt/tau_D) the fatigue that ends each
    burst. No eligibility, no neuromodulator, no heterosynaptic term. Rates of populations stand for the spikes of the paper's 8,000
    neurons; the currents are so chosen that the network is in its regime of low background, where activity does not last by itself.

    Conventions: u x is read before u and x are updated (see short-term-plasticity); currents relax exactly over dt = 1 ms towards what
    rates and releases of the last step command, so that results change by the order of dt / tau (tau = 8 ms, of the currents).

    Expected: while it is silent, u = U + (u0 - U) exp(-t/tau_F) and x = 1 - (1 - x0) exp(-t/tau_D), from 0.1 s after the load on; with
    background rates below 0.1 Hz u may be above that by U (1 - U) tau_F r = 0.024, and x below by r tau_D = 0.02. The pulse brings the
    loaded population above 10 Hz and no other above 5 Hz; without a load, or without facilitation (tau_F = 0.05 s), none.
    """
    silences = setting.pick(
        quick=[0.25, 1.0, 2.0], default=[0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0], full=[0.25 * i for i in range(1, 33)]
    )
    setting.tell(f"{len(silences)} lengths of silence")
    dt = setting.pick(quick=_DT, default=_DT, full=_DT / 4)
    found = simulate(Network(), silences, dt)
    second = silences.index(1.0)
    shown = Activity(*(part[second] for part in found))
    unloaded = simulate(Network(load=0.0), [1.0], dt).R
    plain = simulate(Network(Synapse(0.2, 0.05, 0.2)), [1.0], dt).R
    memory = [_silence(name, getattr(shown, name), start, tau, dt) for name, start, tau in (("u", FACILITATING.U, 1.5), ("x", 1.0, 0.2))]
    silent = shown.R[steps(_LOAD[1] + _SETTLED, dt) : steps(_LOAD[1] + 1.0, dt)]
    peaks = [peak(found.R[i : i + 1], silence, dt) for i, silence in enumerate(silences)]
    findings = [
        Finding("highest rate in the silence (Hz)", [float(silent.max())], "below 0.1", high=0.1, source="paper"),
        *(curve.finding(high=0.03) for curve in memory),
        Finding("peak rate of the loaded population (Hz)", [peaks[second][0]], "above 10", low=10.0, source="paper"),
        Finding("peak rate of the others (Hz)", [peaks[second][1]], "below 5", high=5.0, source="paper"),
        Finding("peak rate of any, nothing loaded (Hz)", [max(peak(unloaded, 1.0, dt))], "below 5", high=5.0, source="paper"),
        Finding("peak rate of any, without facilitation (Hz)", [max(peak(plain, 1.0, dt))], "below 5", high=5.0, source="paper"),
    ]
    table = [*rows(*memory), *({"silence": s, "loaded": a, "others": b} for s, (a, b) in zip(silences, peaks, strict=True))]
    return Result(findings, table, _draw(shown, memory, silences, peaks, dt))


def simulate(net: Network, silences: Sequence[float], dt: float) -> Activity:
    """One run of the network for every length of silence, all as long as the longest takes."""
    batch, end = len(silences), _LOAD[1] + max(silences) + 0.4
    numbers = {n: x[:, 0] for n, x in net.synapse.signals(batch, 1, dt).items()}
    kept_f, kept_d, kept = numbers["g_f"][0, 0].exp(), numbers["g_d"][0, 0].exp(), math.exp(-dt / net.tau)
    h = torch.full((batch, net.populations), net.background, dtype=torch.float64)
    inhibition = h.new_zeros(batch, 1)
    state = (net.W.expand(batch, 1, -1, -1), *(h.new_zeros(batch, 1, net.populations) for _ in range(2)))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    currents = _currents(net, silences, steps(end, dt), dt)
    for now in currents.unbind(1):
        R, R_I = (net.alpha * softplus(x / net.alpha) for x in (h, inhibition))
        y, state = step(short_term, state, q=R[:, None] * dt, **numbers)
        h = kept * h + (1 - kept) * (y[:, 0] / dt - net.J_EI * R_I + now)
        inhibition = kept * inhibition + (1 - kept) * net.J_IE * R.sum(1, keepdim=True)
        seen.append((R, net.synapse.U + (1 - net.synapse.U) * kept_f * state[1][:, 0], 1 - kept_d * state[2][:, 0]))
    return Activity(*(torch.stack(part, 1) for part in zip(*seen, strict=True)))


def _currents(net: Network, silences: Sequence[float], length: int, dt: float) -> Tensor:
    """What comes from outside, (B, T, P)."""
    t = (torch.arange(length, dtype=torch.float64) + 0.5) * dt
    out = torch.full((len(silences), length, net.populations), net.background, dtype=torch.float64)
    out[:, (t > _LOAD[0]) & (t < _LOAD[1]), _LOADED] += net.load
    for row, silence in zip(out, silences, strict=True):
        row[(t > _LOAD[1] + silence) & (t < _LOAD[1] + silence + 0.1)] += net.pulse
    return out


def peak(R: Tensor, silence: float, dt: float) -> tuple[float, float]:
    """The highest rates from the pulse on, of the loaded population and of the others."""
    highest = R[0, steps(_LOAD[1], dt) + round(silence / dt) :].amax(0)
    others = [p for p in range(len(highest)) if p != _LOADED]
    return float(highest[_LOADED]), float(highest[others].max())


def _silence(name: str, found: Tensor, rest: float, tau: float, dt: float) -> Curve:
    """Of the loaded population, from when its activity is gone until the pulse."""
    begin, end = steps(_LOAD[1] + _SETTLED, dt), steps(_LOAD[1] + 1.0, dt)
    at = range(begin, end, (end - begin) // 30)
    start = float(found[begin, _LOADED])
    expected = [rest + (start - rest) * math.exp(-(i - begin) * dt / tau) for i in at]
    return Curve(f"{name} in the silence", [i * dt for i in at], expected, [[float(found[i, _LOADED]) for i in at]])


def _draw(shown: Activity, memory: list[Curve], silences: Sequence[float], peaks: list[tuple[float, float]], dt: float):
    made, (left, middle, right) = figure(3, width=3.9)
    end = steps(_LOAD[1] + 1.4, dt)
    t = [i * dt for i in range(end)]
    for axes in (left, middle):
        axes.axvspan(*_LOAD, color=COLOURS[0], alpha=0.12, lw=0)
        axes.axvspan(_LOAD[1] + 1.0, _LOAD[1] + 1.1, color="grey", alpha=0.2, lw=0)
        axes.set_xlabel("time (s)")
    for p in range(shown.R.shape[1]):
        loaded = p == _LOADED
        label = "loaded" if loaded else "others" if p == 0 else None
        left.plot(t, shown.R[:end, p], color=COLOURS[0 if loaded else 1], lw=1.5, label=label, zorder=3 if loaded else 2)
    left.set_ylabel("rate (Hz)")
    for i, (name, curve) in enumerate(zip("ux", memory, strict=True)):
        middle.plot(t, getattr(shown, name)[:end, _LOADED], color=COLOURS[2 + i], lw=0.8, alpha=0.6)
        curve.draw(middle, 2 + i, every=3, label=("$U + (u_0 - U)e^{-t/\\tau_F}$", "$1 - (1 - x_0)e^{-t/\\tau_D}$")[i])
    middle.plot(t, shown.u[:end, 0], "--", color=COLOURS[2], lw=1, label="u, others")
    middle.set_ylabel("utilisation u, resources x")
    for i, name in enumerate(("loaded", "others")):
        right.semilogy(silences, [p[i] for p in peaks], "o-", color=COLOURS[i], ms=4, label=name)
    right.set_xlabel("silence before the pulse (s)")
    right.set_ylabel("peak rate from the pulse on (Hz)")
    for axes, place in ((left, "upper center"), (middle, (0.3, 0.1)), (right, "best")):
        axes.legend(frameon=False, fontsize=8, loc=place)
    return made
