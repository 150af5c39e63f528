"""How much one matrix holds, written to in one pass: Hebb's rule, with decay, and the delta rule, against their closed forms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import rules
from ..engine.scan import scan
from ..plots import COLOURS, figure
from .experiment import Finding, Result, Setting, experiment

_VALUES = 32  # numbers a pair


@experiment(
    section="memory",
    claim="One pass of N random unit keys: Hebb reads with SNR sqrt(d/(N-1)); decay and the delta rule forget exponentially, as predicted",
    cite="Hopfield 1982; Fusi and Abbott 2007; Schlag, Irie and Schmidhuber 2021",
    quick=2, default=8, full=60,
)  # fmt: skip
def capacity(setting: Setting) -> Result:
    """Random keys of length 1 in d dimensions, values of +1 and -1, one write each, read after the last write.

    SNR is the mean of v times what is read over its standard deviation, over draws of keys and values. Hebb: SNR = sqrt(d / (N - 1)),
    and a bit is wrong with probability erfc(SNR / sqrt 2) / 2. Decay lambda: SNR(age) = lambda^age sqrt(d) / sqrt(1/(1 - lambda^2) -
    lambda^(2 age)).
    Delta, beta = 1: SNR(age) = rho^age / sqrt(1 - rho^(2 age)), rho = 1 - 1/d. Age 0 is the pair written last; reads come after writes.
    Many passes of the delta rule end at the pseudo-inverse V K^+; Hebb's only grow, crosstalk and all.
    """
    d = setting.pick(quick=64, default=64, full=128)
    draws = setting.pick(quick=200, default=1000, full=4000)
    loads = [d // 8, d // 4, d // 2, d, 2 * d, 4 * d]
    decay, ages = 1 - 1 / d, [a for a in (0, 1, 2, 4, 8, 16, 32, 64) if a < 2 * d]
    curves: dict[str, list[list[float]]] = {"hebb": [], "bits": [], "decay": [], "delta": []}
    gap: list[float] = []
    for seed in setting.each_seed():
        setting.tell(f"seed {seed}: d = {d}")
        draw = torch.Generator().manual_seed(seed)
        stored = [_random(draws, n, d, draw) for n in loads]
        reads = [_read("hebb", k, v) * v for k, v in stored]
        curves["hebb"].append([float(r.mean() / r.std()) for r in reads])
        curves["bits"].append([float((r < 0).double().mean()) for r in reads])
        k, v = _random(draws, 4 * d, d, draw)
        by_age = [-1 - a for a in ages]
        for name in ("decay", "delta"):
            reads_by_age = (_read("decayed_hebb" if name == "decay" else name, k, v, g=math.log(decay)) * v)[:, by_age]
            curves[name].append((reads_by_age.mean((0, 2)) / reads_by_age.std((0, 2)).clamp(min=1e-12)).tolist())
        gap.append(_distance_to_pseudo_inverse(*_random(1, d // 2, d, draw)))
    expected = {
        "hebb": [math.sqrt(d / (n - 1)) for n in loads],
        "bits": [0.5 * math.erfc(math.sqrt(d / (n - 1) / 2)) for n in loads],
        "decay": [decay**a * math.sqrt(d) / math.sqrt(1 / (1 - decay**2) - decay ** (2 * a)) for a in ages],
        "delta": [math.inf if a == 0 else (r := (1 - 1 / d) ** a) / math.sqrt(1 - r * r) for a in ages],
    }
    named = {"hebb": "SNR of Hebb", "decay": f"SNR of Hebb with decay {decay:.3f}", "delta": "SNR of delta"}
    findings = [_largest(what, curves[name], expected[name]) for name, what in named.items()]
    off = [max(abs(a - b) for a, b in zip(run, expected["bits"], strict=True)) for run in curves["bits"]]
    findings.append(Finding("wrong bits of Hebb: largest deviation from erfc", off, "0", high=0.01))
    findings.append(Finding("delta after 2,000 passes: distance to V K^+, relative", gap, "0", high=1e-3))
    table = [
        {"rule": name, "at": x, "expected": e, "measured": sum(run[i] for run in curves[name]) / setting.seeds}
        for name, xs in (("hebb", loads), ("bits", loads), ("decay", ages), ("delta", ages))
        for i, (x, e) in enumerate(zip(xs, expected[name], strict=True))
    ]
    return Result(findings, table, _draw(d, loads, ages, curves, expected))


def _random(draws: int, n: int, d: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    k = torch.randn(draws, n, d, generator=draw)
    v = torch.randint(2, (draws, n, _VALUES), generator=draw).float() * 2 - 1
    return k / k.norm(dim=-1, keepdim=True), v


def _read(rule: str, k: Tensor, v: Tensor, g: float = 0.0) -> Tensor:
    """What the matrix reads for every key after all writes, (draws, N, values)."""
    given = {"q": k, "k": k, "v": v, "beta": torch.ones(k.shape[:2]), "g": torch.full(k.shape[:2], g)}
    found = rules.get(rule)
    W = scan(found, **{n: given[n].unsqueeze(2) for n in found.signals}).state[:, 0]
    return k @ W.mT


def _distance_to_pseudo_inverse(k: Tensor, v: Tensor, passes: int = 2000) -> float:
    k, v = k.double(), v.double()
    best = v[0].mT @ torch.linalg.pinv(k[0].mT)
    one = torch.ones(1, k.shape[1], 1, dtype=k.dtype)
    W = None
    for _ in range(passes):
        W = scan(rules.delta, q=k.unsqueeze(2), k=k.unsqueeze(2), v=v.unsqueeze(2), beta=one, state=W).state
    assert W is not None
    return float((W[0, 0] - best).norm() / best.norm())


def _largest(what: str, runs: list[list[float]], expected: list[float]) -> Finding:
    """The largest relative deviation from the curve, of which a tenth is allowed."""
    off = [max(abs(a / b - 1) for a, b in zip(run, expected, strict=True) if math.isfinite(b)) for run in runs]
    return Finding(f"{what}: largest relative deviation from its curve", off, "0", high=0.1)


def _draw(d: int, loads: list[int], ages: list[int], curves: dict, expected: dict):
    made, (left, right) = figure(2, width=4.6)
    left.loglog(loads, expected["hebb"], color=COLOURS[0], label=r"Hebb, $\sqrt{d/(N-1)}$")
    for run in curves["hebb"]:
        left.loglog(loads, run, "o", color=COLOURS[0], ms=4)
    left.set_xlabel(f"pairs stored, N (d = {d})")
    left.set_ylabel("signal to noise ratio")
    left.legend(frameon=False)
    for colour, name, label in ((1, "decay", "Hebb with decay"), (2, "delta", "delta")):
        shown = [i for i, e in enumerate(expected[name]) if math.isfinite(e)]
        right.semilogy([ages[i] for i in shown], [expected[name][i] for i in shown], color=COLOURS[colour], label=label)
        for run in curves[name]:
            right.semilogy([ages[i] for i in shown], [run[i] for i in shown], "o", color=COLOURS[colour], ms=4)
    right.set_xlabel("age of the pair (writes since)")
    right.set_ylabel("signal to noise ratio")
    right.legend(frameon=False)
    return made
