"""Palimpsests: synapses that forget old memories as new ones come, by leak, by bounds, or by chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ... import rules
from ...engine.scan import scan
from ...experiments.experiment import Result, Setting, experiment
from ...plots import figure
from ..curves import Curve, rows
from ..spikes import log_decay

_INTERVAL = 60.0  # s from memory to memory
_AGES = (0, 1, 2, 3, 5, 7, 10, 14, 19, 25, 33, 45, 60, 80, 100)  # in memories since
_MEMORIES, _NEW = 120, 20  # stored, and never stored: the overlap with these is the noise


@experiment(
    section="neuroscience",
    claim="Leaky, bounded and binary stochastic synapses forget along their closed-form curves of signal to noise",
    cite="Parisi 1986; Amit and Fusi 1994; Fusi and Abbott 2007",
    quick=7, default=26, full=70,
)  # fmt: skip
def palimpsest(setting: Setting) -> Result:
    """A neuron with N synapses stores a random pattern xi of +1 and -1 every minute; how well is one of some age still recognised?

    Presynaptic activity k = xi, postsynaptic activity v = 1; there is no neuromodulator and no eligibility.
    Leak: ``decayed_hebb``, W <- W exp(g) + v k^T, g = -dt/tau. Binary stochastic: a synapse that takes part in a memory (chance q, a draw
    m in {0, 1} for each, passed as a signal) becomes xi, the others stay, W <- W (1 - m) + m xi, which is ``decayed_hebb`` again with a
    log decay for each key, g = log(1 - m), and k = m xi; the decay is the heterosynaptic term. Bounded: W <- clip(W + v k^T, -b, b),
    ``clip``, with n = 2 b + 1 levels, which is not affine and runs as a recurrence.

    Convention: reads come after all writes; age 0 is the last memory. SNR is the mean overlap w . xi with a stored pattern over the
    standard deviation of the overlap with patterns never stored (that with the stored pattern itself, which ``capacity`` divides by, has a
    variance smaller by the square of the signal).

    Leak: SNR(age) = exp(-age/tau) sqrt(N (1 - lambda^2)), lambda = exp(-dt/tau). Binary: SNR(age) = sqrt(N) q (1 - q)^age. Bounded: w is a
    random walk between reflecting walls, SNR(age) = sqrt(N) S / sqrt((n^2 - 1)/12) with S(age) = 2/n^2 sum over odd j < n of
    cot^2(pi j / 2n) cos^age(pi j / n). Synapses start from their stationary distribution (leak: from zero, which is accounted for).
    """
    N = 200
    draws = setting.pick(quick=500, default=2000, full=5000)
    cases = [(f"leak, tau = {minutes:g} min", _leak, minutes * 60.0) for minutes in (5, 20, 60)]
    cases += [(f"bounded, {n} levels", _bounded, n) for n in (3, 7, 15)]
    cases += [(f"binary, q = {q:g}", _binary, q) for q in (0.5, 0.2, 0.05)]
    theory = {_leak: leak_snr, _bounded: bounded_snr, _binary: binary_snr}
    curves = []
    for label, write, parameter in cases:
        expected = [theory[write](parameter, age) * math.sqrt(N) for age in _AGES]
        setting.tell(label)
        runs = [_recognise(write, parameter, N, draws, seed) for seed in setting.each_seed()]
        # of the mean over draws, and of the standard deviation over draws and new patterns
        error = [math.sqrt((1 + s * s / (2 * _NEW)) / draws) for s in expected]
        shown = range(_AGES[-1] + 1)
        line = _minutes(shown), [theory[write](parameter, age) * math.sqrt(N) for age in shown]
        curves.append(Curve(label, _minutes(_AGES), expected, runs, error, line))
    return Result([c.finding() for c in curves], rows(*curves), _draw(curves, N))


def _minutes(ages: Sequence[int]) -> list[float]:
    return [age * _INTERVAL / 60 for age in ages]


def leak_snr(tau: float, age: int, memories: int = _MEMORIES) -> float:
    """SNR per square root of N, after so many memories."""
    decay = math.exp(-_INTERVAL / tau)
    return decay**age * math.sqrt((1 - decay**2) / (1 - decay ** (2 * memories)))


def binary_snr(q: float, age: int) -> float:
    return q * (1 - q) ** age


def bounded_snr(n: int, age: int) -> float:
    """SNR per square root of N for n levels one apart.

    >>> round(bounded_snr(3, 0), 4)  # (2/3) over the standard deviation of (-1, 0, 1)
    0.8165
    """
    signal = 2 / n**2 * sum(math.cos(math.pi * j / n) ** age / math.tan(math.pi * j / (2 * n)) ** 2 for j in range(1, n, 2))
    return signal / math.sqrt((n * n - 1) / 12)


def _recognise(write: Callable[..., Tensor], parameter: float, N: int, draws: int, seed: int) -> list[float]:
    """SNR at every age."""
    draw = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (draws, _MEMORIES + _NEW, 1, N), generator=draw, dtype=torch.int8).float() * 2 - 1
    stored, new = signs[:, :_MEMORIES], signs[:, _MEMORIES:, 0]
    w = write(stored, parameter, draw)[:, 0, 0]
    signal = torch.einsum("btk,bk->bt", stored[:, [-1 - age for age in _AGES], 0], w).double().mean(0)
    noise = torch.einsum("btk,bk->bt", new, w).double().std()
    return (signal / noise).tolist()


def _leak(stored: Tensor, tau: float, draw: torch.Generator) -> Tensor:
    one = torch.ones(*stored.shape[:3])
    g = log_decay(tau=tau, dt=_INTERVAL) * one
    return scan(rules.decayed_hebb, q=stored, k=stored, v=one.unsqueeze(-1), g=g).state


def _bounded(stored: Tensor, levels: int, draw: torch.Generator) -> Tensor:
    one = torch.ones(*stored.shape[:3])
    bound = (levels - 1) // 2
    start = torch.randint(-bound, bound + 1, (len(stored), 1, 1, stored.shape[3]), generator=draw).float()
    return scan(rules.clip, q=stored, k=stored, v=one.unsqueeze(-1), bound=bound * one, state=start).state


def _binary(stored: Tensor, q: float, draw: torch.Generator) -> Tensor:
    takes_part = (torch.rand(stored.shape, generator=draw) < q).float()
    start = torch.randint(2, (len(stored), 1, 1, stored.shape[3]), generator=draw).float() * 2 - 1
    v = torch.ones(*stored.shape[:3], 1)
    return scan(rules.decayed_hebb, q=stored, k=takes_part * stored, v=v, g=torch.log1p(-takes_part), state=start).state


def _draw(curves: list[Curve], N: int):
    made, panels = figure(3, width=3.7)
    titles = "leak", "bounded", "binary, stochastic"
    for axes, title, group in zip(panels, titles, (curves[:3], curves[3:6], curves[6:]), strict=True):
        for colour, curve in enumerate(group):
            name = curve.label.split(", ")[1].replace("tau", r"$\tau$")
            curve.draw(axes, colour, label=name)
        axes.set_yscale("log")
        axes.set_ylim(0.1, 20)
        axes.set_yticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("age of the memory (min)")
        axes.legend(frameon=False)
    panels[0].set_ylabel(f"signal to noise ratio, N = {N}")
    return made
