"""Learning by the mismatch of soma and dendrite: a neuron of two compartments follows the delta rule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import rules
from ...engine.scan import scan, unroll
from ...experiments.experiment import Finding, Result, Setting, experiment
from ...plots import COLOURS, figure
from ..curves import Curve, rows
from ..protocols import steps
from ..spikes import log_decay, poisson, render, steady
from ..synapses import dendritic_error as rule

_DT = 0.001  # s, of patterns
_SPIKE_DT = 0.002  # s, of spikes
_PERIOD = 1.0  # s, of the melody that the spiking neuron learns
_INPUTS = 200


@dataclass(frozen=True)
class Neuron:
    """Conductances in 1/s (over the capacitance): leak, dendrite to soma, and teacher.

    dU/dt = -g_L U + g_D (W k - U) + g_T (v - U); the dendrite predicts the soma by V* = a W k, as it would be without a teacher.

    >>> neuron = Neuron()
    >>> f"{neuron.attenuation:.3f} {neuron.nudging:.3f} {1000 * neuron.tau:.3f} ms"
    '0.952 0.300 0.333 ms'
    """

    leak: float = 100.0
    dendrite: float = 2000.0
    teacher: float = 900.0

    @property
    def attenuation(self) -> float:
        """a = g_D / (g_L + g_D)."""
        return self.dendrite / (self.leak + self.dendrite)

    @property
    def nudging(self) -> float:
        """The share n of the teacher in the soma, g_T / (g_L + g_D + g_T)."""
        return self.teacher * self.tau

    @property
    def tau(self) -> float:
        """The time constant of the soma in seconds."""
        return 1 / (self.leak + self.dendrite + self.teacher)


@experiment(
    section="neuroscience",
    claim="The mismatch of soma and dendrite is the delta rule's error, up to the time that the soma needs; with spikes it learns a melody",
    cite="Urbanczik and Senn 2014, Neuron 81",
    quick=7, default=17, full=50,
)  # fmt: skip
def dendritic_error(setting: Setting) -> Result:
    """A teacher nudges the soma; synapses on the dendrite learn from what the dendrite did not predict of the soma.

    The neuron: dU/dt = -g_L U + g_D (W k - U) + g_T (v - U), dW/dt = eta (U - V*) k^T with V* = a W k, a = g_D / (g_L + g_D). A soma that
    has settled is U = (1 - n) V* + n v, n = g_T / (g_L + g_D + g_T), so that U - V* = n (v - a W k): the rule ``dendritic_error``, which is
    ``delta`` for the value v / a and beta eta n a. Presynaptic activity (postsynaptic potentials) is k, the teacher's potential v, the
    mismatch is the error v - W k; there is no eligibility, no neuromodulator (the soma is the third factor), and no heterosynaptic term.

    Left: patterns k are shown for T seconds each, in turn. While one is shown W k relaxes at the rate eta n a |k|^2, so that a presentation
    is one step of ``delta`` with beta = (1 - exp(-eta n a |k|^2 T)) / |k|^2, run by ``fw.unroll``; the neuron's own equations are
    integrated beside it. Middle: the two differ by what the soma adds until it has settled, which takes tau = 1 / (g_L + g_D + g_T) =
    0.33 ms, a share of an update of the order of tau / (n T). Conventions: the error is read before the update; U is integrated exactly
    over dt = 1 ms with W held, and W is changed by the mean of U over the step.

    Right: with spikes. The soma fires at random at the rate phi(U) = 100 Hz / (1 + exp(-2 U)); dW = eta (S - phi(V*) dt) k^T with S its
    spikes of a step of 2 ms. k are the traces (tau = 20 ms) of 200 inputs with the same Poisson trains of 10 Hz in every period of 1 s; the
    teacher's potential is a sum of sines. phi makes this a rule that is not affine, the delta rule on rates in the mean. Expected: the
    dendrite alone then fires like the teacher (correlation above 0.9).
    """
    neuron = Neuron()
    learning = _learning(neuron, 0.1)
    lengths = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    off = [_difference(neuron, T) for T in lengths]
    slope = math.log(off[-1] / off[-3]) / math.log(lengths[-1] / lengths[-3])
    epochs = setting.pick(quick=200, default=600, full=2000)
    setting.tell(f"{epochs} periods of a spiking neuron, {setting.seeds} at once")
    target, before, after = spiking(neuron, list(setting.each_seed()), epochs, _SPIKE_DT)
    match = [float(torch.corrcoef(torch.stack([t, a]))[0, 1]) for t, a in zip(target, after, strict=True)]
    findings = [
        Finding("largest difference to the delta rule, over tau / (n T), T = 0.1 s", [off[3] / _share(neuron, 0.1)], "below 1", high=1.0),
        Finding("slope of log difference over log T, from T = 0.1 s on", [slope], "-1", -1.15, -0.85),
        Finding("delta rule next to dendritic_error: largest difference", [_same_rule(neuron)], "0", high=1e-12),
        Finding("spikes: correlation of the dendrite's rate with the teacher's", match, "above 0.9", low=0.9, source="order"),
    ]
    table = [*rows(learning), *({"curve": "difference", "x": T, "measured": o} for T, o in zip(lengths, off, strict=True))]
    return Result(findings, table, _draw(neuron, learning, lengths, off, (target[0], before[0], after[0])))


def _share(neuron: Neuron, length: float) -> float:
    return neuron.tau / (neuron.nudging * length)


def _patterns(count: int = 6, inputs: int = 10) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    k = torch.randn(count, inputs, generator=draw, dtype=torch.float64)
    return k / k.norm(dim=1, keepdim=True), torch.randn(count, generator=draw, dtype=torch.float64)


def _mismatches(neuron: Neuron, length: float, rounds: int = 8) -> Tensor:
    """v - a W k at the presentations, (2, rounds, patterns): by the delta rule, and by the neuron; each presentation undoes 0.8 of it."""
    k, v = (x.repeat(rounds, *(1,) * (x.ndim - 1)) for x in _patterns())
    eta = -math.log(0.2) / (neuron.nudging * neuron.attenuation * length)
    beta = torch.full((1, len(k), 1), 0.8, dtype=torch.float64)
    W = unroll(rules.delta, k=k[None, :, None], v=v[None, :, None, None] / neuron.attenuation, beta=beta)[0, :, 0, 0]
    delta = torch.cat([torch.zeros_like(W[:1]), W[:-1]])
    both = torch.stack([delta, two_compartments(neuron, k, v, eta, length, _DT)])
    return (v - neuron.attenuation * (both * k).sum(-1)).unflatten(1, (rounds, -1))


def _learning(neuron: Neuron, length: float) -> Curve:
    expected, found = _mismatches(neuron, length).square().mean(-1).sqrt().tolist()
    return Curve("mismatch of soma and dendrite", range(1, len(expected) + 1), expected, [found])


def _difference(neuron: Neuron, length: float) -> float:
    delta, found = _mismatches(neuron, length)
    return float((delta - found).abs().max())


def two_compartments(neuron: Neuron, k: Tensor, v: Tensor, eta: float, length: float, dt: float) -> Tensor:
    """The weights of the neuron before each presentation, (presentations, inputs), by its differential equations."""
    W, soma, found = torch.zeros_like(k[0]), k.new_zeros(()), []
    kept = math.exp(-dt / neuron.tau)
    mean = neuron.tau / dt * (1 - kept)  # of what decays, over a step
    for pattern, teacher in zip(k, v, strict=True):
        found.append(W)
        for _ in range(steps(length, dt)):
            potential = W @ pattern
            settled = (neuron.dendrite * potential + neuron.teacher * teacher) * neuron.tau
            mismatch = settled + (soma - settled) * mean - neuron.attenuation * potential
            soma = settled + (soma - settled) * kept
            W = W + eta * dt * mismatch * pattern
    return torch.stack(found)


def _same_rule(neuron: Neuron) -> float:
    """The read-outs of ``dendritic_error`` and of ``delta`` on the same patterns."""
    k, v = _patterns()
    k, v = k[None, :, None], v[None, :, None, None]
    numbers = steady(1, k.shape[1], beta=0.7, a=neuron.attenuation, n=neuron.nudging)
    other = steady(1, k.shape[1], beta=0.7 * neuron.attenuation * neuron.nudging)
    one, two = scan(rule, q=k, k=k, v=v, **numbers), scan(rules.delta, q=k, k=k, v=v / neuron.attenuation, **other)
    return float((one.y - two.y).abs().max())


def _rate(u: Tensor) -> Tensor:
    """The rate of the soma, in Hz."""
    return 100 * torch.sigmoid(2 * u)


def spiking(neuron: Neuron, seeds: list[int], epochs: int, dt: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rates (seeds, T) of the teacher, and of the dendrite alone before and after learning, over a period."""
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    trains = torch.stack([torch.stack([render(poisson(10.0, _PERIOD, d), _PERIOD, dt) for _ in range(_INPUTS)], 1) for d in draws])
    k = _traces(trains, 0.020, dt)
    t = torch.arange(k.shape[1], dtype=torch.float64) * dt / _PERIOD
    phases = torch.stack([torch.rand(3, generator=d, dtype=torch.float64) for d in draws])
    v = sum(0.6 * torch.sin(2 * math.pi * ((i + 1) * t + phases[:, i : i + 1])) for i in range(3))
    assert isinstance(v, Tensor)
    W, a, n = torch.zeros_like(k[:, 0]), neuron.attenuation, neuron.nudging
    before = _rate(a * torch.einsum("btk,bk->bt", k, W))
    for epoch in range(epochs):
        eta = 0.005 / (1 + 9 * epoch / epochs)
        chance = torch.stack([torch.rand(k.shape[1], generator=d, dtype=torch.float64) for d in draws], 1)
        for now, teacher, luck in zip(k.unbind(1), v.unbind(1), chance, strict=True):
            dendrite = a * (W * now).sum(1)
            spikes = (luck < _rate((1 - n) * dendrite + n * teacher) * dt).to(k.dtype)
            W = W + (eta * (spikes - _rate(dendrite) * dt))[:, None] * now
    return _rate(v), before, _rate(a * torch.einsum("btk,bk->bt", k, W))


def _traces(trains: Tensor, tau: float, dt: float) -> Tensor:
    """Exponential traces of periodic trains (B, T, K): the weights that decayed Hebb writes with a value of 1."""
    twice = trains.repeat(1, 2, 1)[:, :, None]
    one = torch.ones_like(twice[..., :1])
    g = torch.full(twice.shape[:3], log_decay(tau, dt), dtype=twice.dtype)
    return unroll(rules.decayed_hebb, k=twice, v=one, g=g)[:, trains.shape[1] :, 0, 0]


def _draw(neuron: Neuron, learning: Curve, lengths: list[float], off: list[float], rates: tuple[Tensor, Tensor, Tensor]):
    made, (left, middle, right) = figure(3, width=3.9)
    left.set_yscale("log")
    learning.draw(left, 0, label="delta rule")
    left.plot([], [], "o", color=COLOURS[0], ms=4, label="neuron of two compartments")
    left.set_xlabel("round of 6 patterns, 0.1 s each")
    left.set_ylabel("mismatch $v - a W k$, rms")
    middle.loglog([1000 * T for T in lengths], [_share(neuron, T) for T in lengths], "--", color=COLOURS[6], lw=1, label=r"$\tau / (n T)$")
    middle.loglog([1000 * T for T in lengths], off, "o", color=COLOURS[1], ms=4, label="largest difference of a mismatch")
    middle.set_xlabel("duration T of a pattern (ms)")
    middle.set_ylabel("difference to the delta rule")
    t = [i * _SPIKE_DT for i in range(len(rates[0]))]
    looks = (("teacher", 6, "-"), ("dendrite, before", 5, ":"), ("dendrite, after", 2, "-"))
    for x, (label, colour, style) in zip(rates, looks, strict=True):
        right.plot(t, x.tolist(), style, color=COLOURS[colour], lw=1.2, label=label)
    right.set_xlabel("time in the period (s)")
    right.set_ylabel("rate (Hz)")
    right.set_ylim(0, 135)
    for axes in (left, middle, right):
        axes.legend(frameon=False, fontsize=8)
    return made
