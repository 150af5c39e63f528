"""Short-term plasticity: facilitation and depression of a synapse by the spikes that pass it, against their closed forms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...engine.scan import scan
from ...experiments.experiment import Finding, Result, Setting, experiment
from ...plots import COLOURS, figure
from ..curves import Curve, rows
from ..spikes import log_decay, poisson, regular, render, steady
from ..synapses import short_term

_DT = 0.001  # s
_SPIKES = 12  # of a regular train
_CELLS = 128  # that are run at a time


@dataclass(frozen=True)
class Synapse:
    """Utilisation U of a first spike, and time constants of facilitation and of recovery from depression, in seconds.

    >>> [round(s, 3) for s in Synapse(0.2, 1.5, 0.2).mean_field(20.0)]
    [0.886, 0.22]
    """

    U: float
    tau_f: float
    tau_d: float

    def signals(self, batch: int, length: int, dt: float) -> dict[str, Tensor]:
        """The numbers of the rule, at every step."""
        return steady(batch, length, U=self.U, g_f=log_decay(self.tau_f, dt), g_d=log_decay(self.tau_d, dt))

    def mean_field(self, rate: float) -> tuple[float, float]:
        """u* and x* at a rate in Hz, their correlation neglected."""
        u = self.U * (1 + self.tau_f * rate) / (1 + self.U * self.tau_f * rate)
        return u, 1 / (1 + u * self.tau_d * rate)

    def train(self, rate: float) -> Iterator[tuple[float, float]]:
        """u and x that each spike of a regular train finds: u_n = U + (1 - U) f (1 - c^n) in closed form, x_n from x_(n-1)."""
        a, b = math.exp(-1 / (rate * self.tau_f)), math.exp(-1 / (rate * self.tau_d))
        c = a * (1 - self.U)
        x = n = 1.0
        while True:
            u = self.U + (1 - self.U) * a * self.U / (1 - c) * (1 - c ** (n - 1))
            yield u, x
            x, n = 1 - b * (1 - x * (1 - u)), n + 1

    def regular(self, rate: float) -> tuple[float, float]:
        """u and x in the end, for a regular train."""
        a, b = math.exp(-1 / (rate * self.tau_f)), math.exp(-1 / (rate * self.tau_d))
        u = self.U + (1 - self.U) * a * self.U / (1 - a * (1 - self.U))
        return u, (1 - b) / (1 - b * (1 - u))

    def poisson(self, rate: float, dt: float, moments: int = 40) -> tuple[float, float, float, float]:
        """Means of u, x, u x and u^2 over Poisson trains in steps of ``dt``, where a step has at most one spike; exact.

        A step maps u to p0(u) = U (1 - a) + a u, or p1(u) = p0(u + U (1 - u)) with a spike, and x to 1 - b + b x, or 1 - b + b x (1 - u):
        stationary moments E[u^n] and E[u^n x] obey linear equations. Of the latter one each needs the next; the last is taken as zero.
        """
        p, a, b = 1 - math.exp(-rate * dt), math.exp(-dt / self.tau_f), math.exp(-dt / self.tau_d)
        u_moved, x_moved = torch.zeros(moments, moments, dtype=torch.float64), torch.zeros(moments, moments, dtype=torch.float64)
        for spike, chance in ((0, 1 - p), (1, p)):
            base = torch.tensor([self.U * (1 - a + spike * a), a * (1 - spike * self.U)], dtype=torch.float64)
            power = torch.ones(1, dtype=torch.float64)
            for n in range(moments):
                u_moved[n, : n + 1] += chance * power
                once = _times(power, torch.tensor([1.0, -float(spike)], dtype=torch.float64))[:moments]
                x_moved[n, : len(once)] += chance * b * once
                power = _times(power, base)
        first = torch.linalg.solve(torch.eye(moments - 1, dtype=torch.float64) - u_moved[1:, 1:], u_moved[1:, 0])
        of_u = torch.cat([first.new_ones(1), first])
        of_x = torch.linalg.solve(torch.eye(moments, dtype=torch.float64) - x_moved, (1 - b) * (u_moved @ of_u))
        return float(of_u[1]), float(of_x[0]), float(of_x[1]), float(of_u[2])


FACILITATING = Synapse(0.2, 1.5, 0.2)  # Mongillo, Barak and Tsodyks 2008
DEPRESSING = Synapse(0.5, 0.001, 0.8)  # between pyramidal cells, practically no facilitation (Tsodyks and Markram 1997)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """The product of two polynomials, by their coefficients from the lowest on; b has two."""
    return torch.cat([a * b[0], a.new_zeros(1)]) + torch.cat([a.new_zeros(1), a * b[1]])


@experiment(
    section="neuroscience",
    claim="Tsodyks and Markram's synapse is a rule whose query carries traces: regular trains, rates and Poisson trains as in closed form",
    cite="Tsodyks and Markram 1997; Tsodyks, Pawelzik and Markram 1998; Mongillo, Barak and Tsodyks 2008",
    quick=2, default=7, full=40,
)  # fmt: skip
def short_term_plasticity(setting: Setting) -> Result:
    """One facilitating synapse (U = 0.2, tau_F = 1.5 s, tau_D = 0.2 s) and one depressing (U = 0.5, tau_F = 1 ms, tau_D = 0.8 s).

    The rule is ``short_term``, run by ``fw.scan`` in its chunk form: W stays, and is read through what spikes release, y = W (u x q). The
    query q is presynaptic activity (spikes, or rate times dt); the facilitation f and the depression d (KeyStates: they belong to the
    presynaptic side) decay with g = -dt/tau_F and -dt/tau_D; u = U + (1 - U) f, x = 1 - d. There is no key, value or beta: nothing is
    learnt; no eligibility, neuromodulator or heterosynaptic term.

    Convention, the order of u and x: a spike releases u x with the u and x that it *finds*; then x <- x - u x and u <- u + U (1 - u), and u
    relaxes to U (Mongillo 2008). This is the same model as Tsodyks, Pawelzik and Markram 1998, where u relaxes to 0 and is raised before it
    releases: their u after the rise is this u before it. Decay is exact: trains on the grid do not depend on dt = 1 ms.

    Closed forms. Regular trains: u_n = U + (1 - U) a U (1 - c^n) / (1 - c), a = exp(-1/(r tau_F)), c = a (1 - U), x_n = 1 - b (1 - x_(n-1)
    (1 - u_(n-1))), b = exp(-1/(r tau_D)). Rates (q = r dt): u* = U (1 + tau_F r) / (1 + U tau_F r), x* = 1 / (1 + u* tau_D r), up to an
    error of order dt / tau_D. Poisson trains: E[u] = u* exactly; E[x] is not x*, for u and x are correlated: it follows from the moments
    E[u^n x] (``Synapse.poisson``, for steps of dt with at most one spike, so that r here means (1 - exp(-r dt)) / dt spikes a second).
    """
    kinds = {"facilitating": FACILITATING, "depressing": DEPRESSING}
    trains = [_train(name, s, 20.0) for name, s in kinds.items()]
    means = [_mean_field(name, s) for name, s in kinds.items()]
    noisy = [curve for name, s in kinds.items() for curve in _poisson(setting, name, s)]
    findings = [curve.finding() for curve in trains] + [curve.finding(high=5e-3, relative=True) for curve in means]
    findings += [curve.finding() for curve in noisy]
    findings.append(_same_in_the_limit())
    return Result(findings, rows(*trains, *means, *noisy), _draw(kinds, trains, noisy))


def released(synapse: Synapse, q: Tensor, dt: float) -> Tensor:
    """What q (B, T) releases in every step, u x q: read through a weight of 1."""
    one = torch.ones(q.shape[0], 1, 1, 1, dtype=q.dtype)
    zero = torch.zeros(q.shape[0], 1, 1, dtype=q.dtype)
    return scan(short_term, state=(one, zero, zero), q=q[:, :, None, None], **synapse.signals(*q.shape, dt)).y[:, :, 0, 0]


def _train(name: str, synapse: Synapse, rate: float) -> Curve:
    q = render(regular(rate, _SPIKES / rate), _SPIKES / rate, _DT)
    found = released(synapse, q[None], _DT)[0, q > 0]
    expected = [u * x for (u, x), _ in zip(synapse.train(rate), range(_SPIKES), strict=False)]
    return Curve(f"{name}, regular train of {rate:g} Hz", range(1, _SPIKES + 1), expected, [found.tolist()])


def _mean_field(name: str, synapse: Synapse) -> Curve:
    """u* x* at constant rates, after ten time constants."""
    rates = [1.0, 5.0, 10.0, 20.0, 50.0]
    length = round(10 * max(synapse.tau_f, synapse.tau_d) / _DT)
    q = (torch.tensor(rates, dtype=torch.float64) * _DT)[:, None].expand(-1, length)
    found = released(synapse, q, _DT)[:, -1] / q[:, -1]
    return Curve(f"{name}, constant rate: u x", rates, [math.prod(synapse.mean_field(r)) for r in rates], [found.tolist()])


def _poisson(setting: Setting, name: str, synapse: Synapse) -> list[Curve]:
    """Means of u, x and u x over cells after a while; their standard errors by the variance of u, and by the spread of cells."""
    rates = setting.pick(quick=[5.0, 40.0], default=[2.0, 5.0, 10.0, 20.0, 40.0, 60.0], full=[2.0, 5.0, 10.0, 20.0, 40.0, 60.0])
    cells = setting.pick(quick=128, default=512, full=4096)
    runs = []
    for seed in setting.each_seed():
        setting.tell(f"{name}: {cells} Poisson trains, seed {seed}")
        draw = torch.Generator().manual_seed(seed)
        runs.append(torch.stack([torch.cat([_ends(synapse, rate, draw) for _ in range(cells // _CELLS)], 1) for rate in rates]))
    variance = torch.stack(runs).var(-1).mean(0)
    shown = [0.5 + i for i in range(70)]
    expected, line = (torch.tensor([synapse.poisson(r, _DT) for r in at]) for at in (rates, shown))
    variance[:, 0] = expected[:, 3] - expected[:, 0] ** 2
    spread = variance.div(cells).sqrt()
    what = ("u", "x", "u x")
    return [
        Curve(
            f"{name}, Poisson trains: {what[i]}", rates, expected[:, i].tolist(), [run[:, i].mean(-1).tolist() for run in runs],
            spread[:, i].tolist(), (shown, line[:, i].tolist()),
        )
        for i in range(3)
    ]  # fmt: skip


def _ends(synapse: Synapse, rate: float, draw: torch.Generator, duration: float = 5.0) -> Tensor:
    """u, x and u x of some cells, (3, cells), as a spike would find them ``duration`` seconds after they were at their means."""
    q = torch.stack([render(poisson(rate, duration, draw), duration, _DT) for _ in range(_CELLS)], 1).clamp(max=1)[None, :, None]
    numbers = synapse.signals(*q.shape[:2], _DT)
    kept_f, kept_d = (numbers[n][0, 0, 0].exp() for n in ("g_f", "g_d"))
    u, x, *_ = synapse.poisson(rate, _DT)
    start = [q.new_full((1, 1, _CELLS), mean) for mean in ((u - synapse.U) / (1 - synapse.U) / kept_f, (1 - x) / kept_d)]
    _, f, d = scan(short_term, state=(q.new_zeros(1, 1, 1, _CELLS), *start), q=q, **numbers).state
    u, x = synapse.U + (1 - synapse.U) * (kept_f * f).flatten(), 1 - (kept_d * d).flatten()
    return torch.stack([u, x, u * x])


def _same_in_the_limit() -> Finding:
    """E[u] under Poisson trains as dt goes to zero, next to u*."""
    off = [abs(s.poisson(20.0, 1e-7)[0] / s.mean_field(20.0)[0] - 1) for s in (FACILITATING, DEPRESSING)]
    return Finding("E[u] under Poisson trains for dt = 0.1 us: relative deviation from u*", [max(off)], "0", high=1e-4)


def _draw(kinds: dict[str, Synapse], trains: list[Curve], noisy: list[Curve]):
    made, (left, middle, right) = figure(3, width=3.9)
    for i, curve in enumerate(trains):
        curve.draw(left, i, label=curve.label.split(",")[0])
    left.set_xlabel("spike of a regular train of 20 Hz")
    left.set_ylabel("share released, u x")
    for i, name in enumerate("ux"):
        noisy[i].draw(middle, 2 + i, label=f"{name}, Poisson (exact)")
    rates = noisy[0].line[0] if noisy[0].line else []
    for i, name in enumerate("ux"):
        middle.plot(rates, [FACILITATING.mean_field(r)[i] for r in rates], "--", color=COLOURS[2 + i], lw=1, label=f"{name}*, mean field")
    middle.set_xlabel("presynaptic rate (Hz)")
    middle.set_ylabel("u, x of the facilitating synapse")
    for i, (name, s) in enumerate(kinds.items()):
        curve = noisy[3 * i + 2]
        line = [r * y for r, y in zip(rates, curve.line[1], strict=True)] if curve.line else []
        right.plot(rates, line, color=COLOURS[i], label=f"{name}, Poisson (exact)")
        right.plot(rates, [r * math.prod(s.mean_field(r)) for r in rates], "--", color=COLOURS[i], lw=1, label="mean field")
        right.plot(rates, [r * math.prod(s.regular(r)) for r in rates], ":", color=COLOURS[i], lw=1, label="regular trains")
        for run in curve.measured:
            right.plot(curve.x, [r * y for r, y in zip(curve.x, run, strict=True)], "o", color=COLOURS[i], ms=4, mec="white", mew=0.4)
    right.set_xlabel("presynaptic rate (Hz)")
    right.set_ylabel("release, r u x (1/s)")
    for axes in (left, middle, right):
        axes.legend(frameon=False, fontsize=7)
    return made
