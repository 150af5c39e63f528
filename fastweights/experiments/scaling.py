"""Time and memory against the length of a sequence: three forms of one rule, and softmax attention."""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable

import torch

from .. import rules
from ..engine.check import example
from ..engine.scan import plan, scan
from ..engine.step import step
from ..layers.attention import SoftmaxAttention
from ..layers.layer import FastWeightLayer
from ..plots import COLOURS, figure
from .experiment import Finding, Result, Setting, experiment


@experiment(
    section="sequences",
    claim="The parallel form takes about T^2, the chunk form and the recurrence about T; a decoded token costs the same at any length",
    cite="Katharopoulos et al. 2020, ICML; Yang et al. 2024, NeurIPS",
    quick=25, default=60, full=400,
)  # fmt: skip
def scaling(setting: Setting) -> Result:
    """``decayed_hebb`` with 2 heads of 16 x 16 in float32, forward, in torch: the least of a few measurements at each T.

    Exponents are slopes of log work against log T, of the multiplications and additions that ``fw.plan`` counts. Times are of this machine
    at this moment, and whoever shares it; they are drawn and in the table, and no verdict hangs on them but that of a decoded token, one
    ``step`` behind 100 and behind 10,000 others. State is counted too: W of a fast weight layer, and keys and values of softmax attention,
    which grow with every token.
    """
    more = setting.pick(quick=0, default=1, full=2)
    spans = {"parallel": range(8, 11 + more), "chunk": range(12, 16 + more), "recurrent": range(7, 11 + more)}
    times: dict[str, dict[int, float]] = {f: {} for f in spans}
    for seed in setting.each_seed():
        for form, powers in spans.items():
            for T in (2**i for i in powers):
                signals = example(rules.decayed_hebb, 1, T, 2, 16, 16, seed=seed, dtype=torch.float32)
                setting.tell(f"{form}, T = {T}")
                took = _least(lambda s=signals, f=form: scan(rules.decayed_hebb, **s, form=f, backend="torch"), 5)
                times[form][T] = min(took, times[form].get(T, math.inf))
    ratio = [_decode(10_000) / _decode(100) for _ in setting.each_seed()]
    fast, soft = FastWeightLayer(rules.decayed_hebb, 32, heads=2), SoftmaxAttention(32, heads=2)
    findings = [
        Finding("exponent of the work of the parallel form", [_exponent("parallel")], "2", low=1.95, high=2.0),
        Finding("exponent of the work of the chunk form", [_exponent("chunk")], "1", low=0.999, high=1.001),
        Finding("exponent of the work of the recurrence", [_exponent("recurrent")], "1", low=0.999, high=1.001),
        Finding("time of a decoded token behind 10,000 others, over that behind 100", ratio, "1", low=0.5, high=2.0),
        Finding(
            "bytes of state at T = 10,000 over T = 100, fast weights",
            [fast.state_bytes(10_000) / fast.state_bytes(100)],
            "1",
            low=1.0,
            high=1.0,
        ),
        Finding("the same, softmax", [soft.state_bytes(10_000) / soft.state_bytes(100)], "about 100", low=90, high=110),
    ]
    table = [{"form": f, "T": T, "seconds": s} for f, by_T in times.items() for T, s in by_T.items()]
    return Result(findings, table, _draw(times, fast, soft))


def _least(run: Callable[[], object], repeat: int) -> float:
    with torch.no_grad():
        run()
        return min(timeit.repeat(run, number=1, repeat=repeat))


def _exponent(form: str) -> float:
    """Of T in the operations of a form, between 8,192 and 65,536 tokens."""
    few, many = (plan(rules.decayed_hebb, **_of_length(T), form=form, backend="torch").flops for T in (8192, 65_536))
    return math.log(many / few) / math.log(8)


def _of_length(T: int) -> dict[str, torch.Tensor]:
    """Signals without memory, for a plan."""
    k = torch.zeros(1).expand(1, T, 2, 16)
    return {"q": k, "k": k, "v": k, "g": k[..., 0]}


def _decode(behind: int) -> float:
    signals = example(rules.decayed_hebb, 1, behind, 2, 16, 16, dtype=torch.float32)
    W = scan(rules.decayed_hebb, **signals).state
    token = {n: x[:, -1] for n, x in signals.items()}
    return _least(lambda: [step(rules.decayed_hebb, W, **token) for _ in range(100)], 7)


def _draw(times: dict[str, dict[int, float]], fast: FastWeightLayer, soft: SoftmaxAttention):
    made, (left, right) = figure(2, width=4.4)
    for i, (form, by_T) in enumerate(times.items()):
        left.loglog(list(by_T), [1000 * s for s in by_T.values()], "os^"[i] + "-", color=COLOURS[i], ms=4, label=form)
    left.set_xlabel("tokens")
    left.set_ylabel("time (ms)")
    left.legend(frameon=False)
    lengths = [10**i for i in range(1, 7)]
    for i, (layer, label) in enumerate(((fast, "fast weights"), (soft, "softmax attention"))):
        right.loglog(lengths, [layer.state_bytes(T) for T in lengths], "os"[i] + "-", color=COLOURS[i], ms=4, label=label)
    right.set_xlabel("tokens so far")
    right.set_ylabel("state of a layer of width 32 (bytes)")
    right.legend(frameon=False)
    return made
