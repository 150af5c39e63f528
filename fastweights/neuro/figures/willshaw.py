"""Willshaw's network: binary synapses that are switched on once, and how many bits each of them holds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import rules
from ...engine.scan import scan
from ...experiments.experiment import Finding, Result, Setting, experiment
from ...plots import COLOURS, figure
from ..curves import Curve, rows

_FILLED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # fractions of synapses that are on, at which the memory is tested


@experiment(
    section="neuroscience",
    claim="Binary synapses written by OR hold as many bits as finite-size theory says, which tends to ln 2 a synapse with half of them on",
    cite="Willshaw, Buneman and Longuet-Higgins 1969; Palm 1980; Knoblauch 2008",
    quick=3, default=10, full=170,
)  # fmt: skip
def willshaw(setting: Setting) -> Result:
    """P pairs of random patterns, M = log2 N of N units on in each, are stored and then retrieved from their keys.

    The rule is W <- max(W, v k^T), ``willshaw``, run by ``fw.scan`` in the recurrent form, for OR is not affine: presynaptic activity k
    and postsynaptic activity v are 0 or 1; there is no rate, eligibility, neuromodulator or heterosynaptic term. It is the catalogue's
    ``hebb`` with its counts cut at 1. Convention: reads come after all writes; a unit is on in the answer when all M synapses from the
    key are on, W k >= M. Units that should be on always are.

    With f = M/N a synapse is on with probability p1 = 1 - (1 - f^2)^P. A unit that should be off is on with probability
    p01 = sum_s (-1)^s C(M, s) (1 - f (1 - B_s))^(P-1), B_s the chance that s given units are all off in a key. The bits a synapse are
    P/N times the information through one unit's channel, H(f + (1 - f) p01) - (1 - f) H(p01). As N grows
    they tend to ln(1 - p1) log2 p1, at most ln 2 = 0.693 at p1 = 1/2. If errors do not matter (M small) they are there for N = 2^20; with
    M = log2 N, where an answer has one wrong unit at p1 = 1/2, the approach is slow, of order (log log N) / log N.
    """
    sizes = setting.pick(quick=(128, 256), default=(128, 256, 512), full=(256, 512, 1024))
    curves, filled = [], []
    for N in sizes:
        M = round(math.log2(N))
        counts = [round(math.log1p(-p1) / math.log1p(-((M / N) ** 2))) for p1 in _FILLED]
        runs = []
        for seed in setting.each_seed():
            setting.tell(f"seed {seed}: {N} x {N} synapses, {counts[-1]} pairs")
            runs.append(_fill(N, M, counts, seed))
        x = [_on(N, M, P) for P in counts]
        more = [round(counts[-1] * i / 60) + 1 for i in range(61)]
        line = [_on(N, M, P) for P in more], [bits_a_synapse(N, M, P, wrong_on(N, M, P)) for P in more]
        bits = [bits_a_synapse(N, M, P, wrong_on(N, M, P)) for P in counts]
        measured = [[bits_a_synapse(N, M, P, p01) for P, (_, p01) in zip(counts, run, strict=True)] for run in runs]
        curves.append(Curve(f"bits a synapse, N = {N}", x, bits, measured, line=line))
        error = [math.sqrt(p1 * (1 - p1)) / N for p1 in x]
        filled.append(Curve(f"synapses on, N = {N}", counts, x, [[p1 for p1, _ in run] for run in runs], error))
    limits = {n: (optimum(n)[0], classical(n)) for n in (*range(6, 61, 3), 100, 200, 500)}
    findings = [c.finding(0.03, relative=True) for c in curves] + [c.finding() for c in filled]
    best, usual = limits[500]
    findings.append(Finding("bits a synapse at the optimum, N = 2^500", [best], "ln 2 = 0.6931", 0.693, 0.6932))
    findings.append(Finding("bits a synapse with one wrong unit an answer, N = 2^500", [usual], "ln 2 = 0.6931", 0.67, 0.6932))
    findings.append(Finding("synapses on at the optimum, N = 2^60", [optimum(60)[1]], "1/2", 0.49, 0.51))
    return Result(findings, rows(*curves, *filled), _draw(curves, limits))


def _patterns(P: int, N: int, M: int, draw: torch.Generator) -> Tensor:
    """P patterns of N units, M of them on."""
    return torch.zeros(P, N).scatter_(1, torch.rand(P, N, generator=draw).topk(M, 1).indices, 1.0)


def _fill(N: int, M: int, counts: list[int], seed: int) -> list[tuple[float, float]]:
    """Store pairs up to each of the counts: the fraction of synapses on, and how often a unit is on that should be off."""
    draw = torch.Generator().manual_seed(seed)
    k, v = (_patterns(counts[-1], N, M, draw) for _ in range(2))
    found, state, done = [], None, 0
    for P in counts:
        new_k, new_v = (x[None, done:P, None] for x in (k, v))
        state, done = scan(rules.willshaw, q=new_k, k=new_k, v=new_v, state=state).state, P
        W = state[0, 0]
        on = k[:P] @ W.mT > M - 0.5
        found.append((float(W.mean()), float((on & (v[:P] == 0)).double().sum() / (P * (N - M)))))
    return found


def _on(N: int, M: int, P: int) -> float:
    """The fraction of synapses that are on after P pairs."""
    return -math.expm1(P * math.log1p(-((M / N) ** 2)))


def wrong_on(N: int, M: int, P: int) -> float:
    """How often a unit that should be off is on: all M synapses from the key were switched on by the P - 1 other pairs.

    >>> wrong_on(8, 2, 1)
    0.0
    """
    total, log_off = 0.0, 0.0
    for s in range(M + 1):
        total += (-1) ** s * math.comb(M, s) * math.exp((P - 1) * math.log1p(M / N * math.expm1(log_off)))
        log_off = log_off + math.log1p(-M / (N - s)) if N - s > M else -math.inf
    return max(total, 0.0)


def bits_a_synapse(N: int, M: int, P: float, p01: float) -> float:
    """What P answers tell, with errors at rate p01, over N^2 synapses: written so that nothing cancels where f and p01 are tiny."""
    f = M / N
    on = f + (1 - f) * p01
    wrong = p01 * math.log1p(f * (1 - p01) / p01) if p01 else 0.0
    return P / N * (-f * math.log(on) - (1 - f) * (wrong + (1 - p01) * math.log1p(-f))) / math.log(2)


def classical(log2_N: int) -> float:
    """Bits a synapse with M = log2 N and half of the synapses on, where an answer has about one wrong unit.

    Beyond N = 2^20 synapses are as good as independent, p01 = p1^M, and the alternating sum would lose its figures.
    """
    N, M = 2**log2_N, log2_N
    P = math.log(0.5) / math.log1p(-((M / N) ** 2))
    return bits_a_synapse(N, M, P, wrong_on(N, M, round(P)) if log2_N <= 20 else 0.5**M)


def optimum(log2_N: int) -> tuple[float, float]:
    """The most bits a synapse over M and P, whatever the errors, and the fraction of synapses on there; taken as independent.

    >>> classical(20) < optimum(20)[0] < math.log(2)
    True
    """
    N = 2**log2_N
    best = (0.0, 0.0)
    for M in range(2, 2 * log2_N + 2):
        for p1 in (i / 100 for i in range(5, 96)):
            best = max(best, (bits_a_synapse(N, M, math.log1p(-p1) / math.log1p(-((M / N) ** 2)), p1**M), p1))
    return best


def _draw(curves: list[Curve], limits: dict[int, tuple[float, float]]):
    made, (left, right) = figure(2, width=4.6)
    for colour, curve in enumerate(curves):
        curve.draw(left, colour, label=curve.label.split(", ")[1])
    x = [i / 100 for i in range(1, 100)]
    left.plot(x, [math.log1p(-p) * math.log2(p) for p in x], ":", color=COLOURS[-1], label=r"N $\to\infty$: $\ln(1-p_1)\,\log_2 p_1$")
    left.set_xlabel(r"fraction of synapses on, $p_1$")
    left.set_ylabel("bits a synapse")
    left.set_ylim(0, 1.05)
    left.legend(frameon=False)
    for i, (label, style) in enumerate((("optimum over M and P", "-"), (r"M = log$_2$ N, half of the synapses on", "--"))):
        right.plot([math.log2(n) for n in limits], [pair[i] for pair in limits.values()], style, color=COLOURS[3], label=label)
    half = _FILLED.index(0.5)
    for colour, curve in enumerate(curves):
        at = math.log2(math.log2(int(curve.label.rsplit(" ", 1)[1])))
        right.plot([at] * len(curve.measured), [run[half] for run in curve.measured], "o", color=COLOURS[colour], ms=5, mec="white")
    right.axhline(math.log(2), color=COLOURS[-1], ls=":", label="ln 2")
    right.set_xticks([3, 4, 5, 6, 7, 8, 9], [rf"$2^{{{2**i}}}$" for i in range(3, 10)])
    right.set_xlabel("units, N")
    right.set_ylabel("bits a synapse")
    right.set_ylim(0, 0.75)
    right.legend(frameon=False, loc="lower right")
    return made
