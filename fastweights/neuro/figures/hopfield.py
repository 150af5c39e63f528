"""Hopfield's network: auto-association by Hebb's rule, and the load at which it collapses."""

from __future__ import annotations

import math

import numpy as np
import torch

from ... import rules
from ...engine.scan import scan
from ...experiments.experiment import Finding, Result, Setting, experiment
from ...plots import COLOURS, figure
from ..curves import Curve, rows

_LOADS = (0.03, 0.06, 0.09, 0.12, 0.13, 0.14, 0.15, 0.16, 0.17, 0.18, 0.19, 0.20, 0.22, 0.24, 0.27, 0.30)
_RETRIEVED = 0.8  # the overlap above which a pattern counts as retrieved: the theory falls from 0.97 to 0 at once
Found = list[tuple[float, np.ndarray]]  # for every load: the fraction of wrong bits after one update, and all overlaps


@experiment(
    section="neuroscience",
    claim="Hebb's rule as an auto-associative memory retrieves as mean-field theory says, and collapses near 0.138 N patterns",
    cite="Hopfield 1982; Amit, Gutfreund and Sompolinsky 1985, 1987",
    quick=16, default=70, full=1200,
)  # fmt: skip
def hopfield(setting: Setting) -> Result:
    """N units store P = alpha N random patterns of +1 and -1 and, started at each of them, settle; m is the overlap with it afterwards.

    The rule is ``hebb``, W <- W + v k^T, run by ``fw.scan``: pre- and postsynaptic activity are the same pattern, k = v = xi; no rate, no
    eligibility, no neuromodulator, no heterosynaptic term. Then W is divided by N and its diagonal set to zero.

    Convention: units are updated one after the other, in an order drawn anew for every sweep (zero temperature), s_i <- sign(sum_j W_ij
    s_j), and stay where that is zero, until nothing changes, 100 sweeps at most. The first update is wrong with probability
    erfc(1 / sqrt(2 alpha)) / 2 a unit (with N - 1 and P - 1 in the place of N and P). After settling m = erf(y), where y > 0 is the largest
    solution of y (sqrt(2 alpha) + 2 exp(-y^2) / sqrt(pi)) = erf(y): up to alpha_c = 0.138 only.

    The load at which half of the patterns are retrieved (m > 0.8) lies above alpha_c in a small network: retrieval ends as a valley of the
    energy ends, at a fold, where N |alpha - alpha_c|^(3/2) measures how sharp the end is, so that the excess should fall as N^(-2/3), along
    which it is extrapolated. (The theory is that of replica symmetry; its breaking moves alpha_c to 0.144, and the first simulations were
    put at 0.145 +- 0.009.)
    """
    sizes: dict[int, int] = setting.pick(quick={125: 16, 250: 6, 500: 2}, default={250: 8, 500: 4, 1000: 2}, full={400: 8, 800: 4, 1600: 1})
    runs: dict[int, list[Found]] = {N: [] for N in sizes}
    for seed in setting.each_seed():
        draw = torch.Generator().manual_seed(seed)
        for N, networks in sizes.items():
            setting.tell(f"seed {seed}: {networks} networks of {N} units")
            runs[N].append([_networks(N, round(load * N), networks, draw) for load in _LOADS])
    collapse = {N: [_crossing([float((m > _RETRIEVED).mean()) for _, m in run]) for run in runs[N]] for N in sizes}
    largest = max(sizes)
    first = _one_update(largest, sizes[largest], runs[largest])
    stored = [load for load in _LOADS if load < 0.1]
    overlaps = [[float(m.mean()) for _, m in run] for run in runs[largest]]
    overlap = Curve("overlap after settling", stored, [overlap_of(a) for a in stored], [run[: len(stored)] for run in overlaps])
    limits = [_limit(list(sizes), [collapse[N][seed] for N in sizes]) for seed in range(setting.seeds)]
    findings = [
        first.finding(),
        overlap.finding(0.01),
        Finding("load at which half of the patterns are retrieved, N to infinity", limits, "0.138", 0.118, 0.158),
        Finding("load up to which the theory has a solution", [critical_load()], "0.138", 0.1375, 0.1385),
    ]
    table = rows(first, overlap) + [
        {"curve": f"overlap, N = {N}", "x": load, "measured": sum(float(run[i][1].mean()) for run in runs[N]) / setting.seeds}
        for N in sizes
        for i, load in enumerate(_LOADS)
    ]
    return Result(findings, table, _draw(first, runs, collapse, sum(limits) / len(limits)))


def _networks(N: int, P: int, networks: int, draw: torch.Generator) -> tuple[float, np.ndarray]:
    found = [_store_and_settle(N, P, draw) for _ in range(networks)]
    return sum(wrong for wrong, _ in found) / networks, np.concatenate([m for _, m in found])


def _store_and_settle(N: int, P: int, draw: torch.Generator) -> tuple[float, np.ndarray]:
    """The fraction of bits that are wrong after one update of all units, and the overlap of every pattern after settling, (P,)."""
    patterns = torch.randint(2, (P, N), generator=draw).float() * 2 - 1
    xi = patterns[None, :, None]
    state = scan(rules.hebb, q=xi, k=xi, v=xi).state[0, 0]
    state.fill_diagonal_(0)  # not yet divided by N: whole numbers, so that a sum of zero is zero
    wrong = float(((patterns @ state.mT) * patterns < 0).double().mean())
    W, s = state.numpy(), patterns.mT.contiguous().numpy()  # s (N, P): all patterns settle side by side
    xi = s.copy()
    for _ in range(100):
        before = s.copy()
        for i in torch.randperm(N, generator=draw).tolist():
            np.copysign(1.0, W[i] @ s + 0.5 * s[i], out=s[i])
        if np.array_equal(s, before):
            break
    return wrong, (s * xi).mean(0)


def _one_update(N: int, networks: int, runs: list[Found]) -> Curve:
    shown = [i / 1000 for i in range(45, 301)]
    bits = [0.5 * math.erfc(math.sqrt((N - 1) / (2 * (round(a * N) - 1)))) for a in _LOADS]
    line = [0.5 * math.erfc(math.sqrt((N - 1) / (2 * (a * N - 1)))) for a in shown]
    # the bits of one unit, and those of one pattern, share some of their noise: allowed for by a factor of 2
    error = [2 * math.sqrt(b * (1 - b) / (N * round(a * N) * networks)) for a, b in zip(_LOADS, bits, strict=True)]
    return Curve("wrong bits after one update", _LOADS, bits, [[wrong for wrong, _ in run] for run in runs], error, (shown, line))


def _right(y: float) -> float:
    """The load at which y solves the mean-field equation."""
    root = (math.erf(y) / y - 2 / math.sqrt(math.pi) * math.exp(-y * y)) / math.sqrt(2)
    return root * root


def critical_load() -> float:
    """The largest load at which the mean-field equation has a solution y > 0.

    >>> round(critical_load(), 4)
    0.1379
    """
    return max(_right(i / 1000) for i in range(1, 5000))


def overlap_of(load: float) -> float:
    """m = erf(y) of the mean-field equation at a load, 0 above the critical one: the branch of retrieval, where y is largest.

    >>> overlap_of(0.2), round(overlap_of(0.12), 3)
    (0.0, 0.993)
    """
    peak = max(range(1, 5000), key=lambda i: _right(i / 1000)) / 1000
    if load >= _right(peak):
        return 0.0
    low, high = peak, 100.0
    for _ in range(100):  # the load falls with y beyond the peak
        middle = (low + high) / 2
        low, high = (middle, high) if _right(middle) > load else (low, middle)
    return math.erf(low)


def _crossing(y: list[float], at: float = 0.5) -> float:
    """The load at which y falls below ``at``, by linear interpolation."""
    for x0, x1, y0, y1 in zip(_LOADS, _LOADS[1:], y, y[1:], strict=False):
        if y1 < at <= y0:
            return x0 + (x1 - x0) * (y0 - at) / (y0 - y1)
    return math.inf


def _limit(sizes: list[int], loads: list[float]) -> float:
    """Of the loads for N to infinity: the intercept of a straight line in N^(-2/3)."""
    return float(np.polyfit([N ** (-2 / 3) for N in sizes], loads, 1)[1])


def _draw(first: Curve, runs: dict[int, list[Found]], collapse: dict[int, list[float]], limit: float):
    made, (left, middle, right) = figure(3, width=3.9)
    first.draw(left, 1, label=r"$\frac{1}{2}\,$erfc$(1/\sqrt{2\alpha})$" + f", dots: N = {max(runs)}")
    left.set_yscale("log")
    left.set_ylim(3e-7, 0.1)
    left.set_ylabel("wrong bits after one update")
    loads = [i / 1000 for i in range(5, 138)]
    end = critical_load()
    middle.plot([*loads, end, end, max(_LOADS)], [*map(overlap_of, loads), 0.967, 0, 0], color=COLOURS[0], label=r"theory, N $\to\infty$")
    for colour, (N, each) in enumerate(runs.items(), start=2):
        for i, run in enumerate(each):
            label = f"N = {N}" if i == 0 else None
            middle.plot(_LOADS, [float(m.mean()) for _, m in run], "o-", color=COLOURS[colour], lw=0.5, ms=4, label=label)
    middle.set_ylim(-0.03, 1.05)
    middle.set_ylabel("overlap m after settling")
    for colour, (N, found) in enumerate(collapse.items(), start=2):
        right.plot([N ** (-2 / 3)] * len(found), found, "o", color=COLOURS[colour], ms=5, label=f"N = {N}")
    most = min(collapse) ** (-2 / 3)
    at = [sum(found) / len(found) for found in collapse.values()]
    right.plot([0, most], np.polyval(np.polyfit([N ** (-2 / 3) for N in collapse], at, 1), [0, most]), color="grey", lw=1)
    right.plot(0, end, "*", color=COLOURS[0], ms=11, label=r"$\alpha_c$ = 0.138")
    right.set_xlabel(r"$N^{-2/3}$")
    right.set_ylabel("load with half of the patterns retrieved")
    right.set_title(f"extrapolated: {limit:.3f}", fontsize=10)
    for axes in (left, middle):
        axes.set_xlabel(r"load $\alpha$ = P/N (patterns per unit)")
    for axes in (left, middle, right):
        axes.legend(frameon=False, fontsize=8)
    return made
