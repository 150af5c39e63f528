"""Complex synapses: a chain of variables in each, slower and slower, forgets as a power of time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import rules
from ...engine.scan import scan, unroll
from ...experiments.experiment import Finding, Result, Setting, experiment
from ...plots import COLOURS, figure
from ..curves import Curve, rows, slope
from ..rules import chain_modes, synaptic_chain
from .palimpsest import binary_snr

_MINUTES = 1.0  # from memory to memory
_SYNAPSES, _VARIABLES, _NEW = 200, 8, 20
_DECADES = (1.0, 5.0)  # log10 of the minutes between which the slope is fitted


@experiment(
    section="neuroscience",
    claim="Synapses with a chain of coupled variables forget as t^(-1/2) over decades; a chain is a gated fast weight memory in its modes",
    cite="Benna and Fusi 2016",
    quick=2, default=4, full=30,
)  # fmt: skip
def benna_fusi(setting: Setting) -> Result:
    """Each weight is the first of m variables: C_k du_k/dt = g_{k-1}(u_{k-1} - u_k) - g_k(u_k - u_{k+1}), C_k = 2^(k-1), g_k = 2^-(k+2).

    W has a row for each synapse and a column for each variable. A memory writes v = xi, +1 or -1 for each synapse, to the first variable,
    k = (1, 0, ...); q = k reads it. Plasticity of the synapse by pre- and postsynaptic activity is in xi; there is no rate, neuromodulator
    or eligibility; the exchange between variables, which no activity drives, is what consolidates. Time is in minutes, in which g is given.
    ``synaptic_chain`` relaxes the chain exactly over any dt, where the catalogue's ``cascade`` takes a step of Euler. In the modes of the
    chain it is the catalogue's ``decayed_hebb`` with a log decay for each key channel, g_j = -rate_j dt, and k = q the first row of the
    matrix of modes: so, by ``fw.scan``, the right panel is run.

    Convention: relax, write, then read; age 0 is what was just written. A memory decays as S(t) = [exp(A t)]_11, which falls as t^(-1/2)
    from about C_1/g_1 = 8 min to about C_m/g_m = 2 4^m min. With memories one a minute SNR(age) = sqrt(N) S(age) / sqrt(sum of S^2 over
    all memories so far); the overlap of a memory of that age, over its standard deviation for patterns never stored. Ages are pooled in
    windows; what is expected is averaged likewise.
    """
    traces = [_trace(m) for m in (4, 8, 12)]
    T = setting.pick(quick=1000, default=4000, full=16000)
    draws = setting.pick(quick=40, default=100, full=200)
    S = [float(x) for x in trace_of(_VARIABLES, torch.arange(T, dtype=torch.float64) * _MINUTES)]
    scale = math.sqrt(_SYNAPSES / sum(s * s for s in S))
    windows = _windows(T)
    expected = [scale * sum(S[a:b]) / (b - a) for a, b in windows]
    runs = []
    for seed in setting.each_seed():
        setting.tell(f"seed {seed}: {draws} neurons of {_SYNAPSES} synapses, {T} memories")
        runs.append(_recognise(T, draws, windows, seed))
    error = [math.sqrt((1 / (b - a) + e * e / (2 * _NEW)) / draws) for (a, b), e in zip(windows, expected, strict=True)]
    middle = [(a + b - 1) / 2 * _MINUTES for a, b in windows]
    snr = Curve(f"SNR, {_VARIABLES} variables", middle, expected, runs, error)
    decades, fallen = ([math.log10(x) for x in side[1:]] for side in (traces[-1].x, traces[-1].measured[0]))
    exponent = slope(decades, fallen, *_DECADES)
    findings = [c.finding() for c in traces]
    findings.append(Finding("log-log slope of forgetting, 12 variables, 10 to 100,000 min", [exponent], "-0.50", -0.53, -0.47))
    findings.append(snr.finding())
    return Result(findings, rows(*traces, snr), _draw(traces, snr))


def trace_of(m: int, times: Tensor) -> Tensor:
    """S(t) = [exp(A t)]_11 by the matrix exponential, for times in minutes."""
    k = torch.arange(1, m + 1, dtype=torch.float64)
    C, g = 2 ** (k - 1), 2 ** -(k + 2)
    A = torch.diag(g[:-1], 1) + torch.diag(g[:-1], -1) - torch.diag(g + torch.cat([g.new_zeros(1), g[:-1]]))
    A = A / C[:, None]
    return torch.stack([torch.linalg.matrix_exp(A * t)[0, 0] for t in times])


def _trace(m: int) -> Curve:
    """The first variable after one memory, read at times a tenth of a decade apart: one token for each, by ``synaptic_chain``."""
    times = torch.cat([torch.zeros(1, dtype=torch.float64), 10 ** torch.arange(0, 6.01, 0.1, dtype=torch.float64)])
    dt = torch.diff(times, prepend=times[:1])[None, :, None]
    first = torch.eye(m, dtype=torch.float64)[:1]
    v = torch.zeros(1, len(times), 1, 1, dtype=torch.float64)
    v[:, 0] = 1.0
    W = unroll(synaptic_chain, k=first.expand(1, len(times), 1, m), v=v, dt=dt)
    return Curve(f"trace of one memory, {m} variables", times.tolist(), trace_of(m, times).tolist(), [W[0, :, 0, 0, 0].tolist()])


def _windows(T: int) -> list[tuple[int, int]]:
    """Ages pooled: [0, 1), [1, 2), ... wider and wider, up to half of T."""
    edges = [0]
    while edges[-1] < T // 2:
        edges.append(max(edges[-1] + 1, round(edges[-1] * 1.4)))
    return list(zip(edges, edges[1:], strict=False))


def _recognise(T: int, draws: int, windows: list[tuple[int, int]], seed: int) -> list[float]:
    """SNR in every window of ages, after T memories."""
    draw = torch.Generator().manual_seed(seed)
    rates, modes = chain_modes(_VARIABLES)
    k = modes[0].float().expand(1, T, 1, _VARIABLES)
    g = (-rates * _MINUTES).float().expand(1, T, 1, _VARIABLES)
    overlaps, new = [], []
    group = min(draws, max(1, 2**23 // (T * _SYNAPSES)))  # neurons side by side, as memory allows
    for first in range(0, draws, group):
        count = min(group, draws - first)
        xi = torch.randint(2, (T + _NEW, count, _SYNAPSES), generator=draw, dtype=torch.int8).float() * 2 - 1
        W = scan(rules.decayed_hebb, q=k, k=k, v=xi[None, :T].flatten(2).unsqueeze(2), g=g).state[0, 0]
        w = (W @ modes[0].float()).view(count, _SYNAPSES)
        overlap = torch.einsum("tns,ns->tn", xi, w).double()
        overlaps.append(overlap[:T].flip(0))
        new.append(overlap[T:])
    mean = torch.cat(overlaps, 1).mean(1)
    noise = torch.cat(new, 1).std()
    return [float(mean[a:b].mean() / noise) for a, b in windows]


def _draw(traces: list[Curve], snr: Curve):
    made, (left, right) = figure(2, width=4.8)
    for colour, curve in enumerate(traces):
        shown = Curve(curve.label, curve.x[1:], curve.expected[1:], [run[1:] for run in curve.measured])
        shown.draw(left, colour, every=2, label=curve.label.split(", ")[1])
    left.plot([10, 1e6], [0.8, 0.8 * 1e5**-0.5], ":", color=COLOURS[-1], label=r"$t^{-1/2}$")
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_ylim(1e-4, 1.5)
    left.set_xlabel("time since the memory (min)")
    left.set_ylabel(r"trace in the first variable, $u_1$")
    left.legend(frameon=False)
    snr.draw(right, 1, label=snr.label)
    ages = range(int(snr.x[-1]))
    for colour, q in ((3, 0.5), (4, math.e / math.sqrt(_SYNAPSES))):
        right.plot(ages, [math.sqrt(_SYNAPSES) * binary_snr(q, a) for a in ages], "--", color=COLOURS[colour], label=f"binary, q = {q:.2g}")
    right.set_xscale("symlog", linthresh=1)
    right.set_yscale("log")
    right.set_ylim(0.02, 20)
    right.set_xlabel("age of the memory (min)")
    right.set_ylabel(f"signal to noise ratio, N = {_SYNAPSES}")
    right.legend(frameon=False)
    return made
