"""Which mixing of a softmax window with fast weights adds modulo 3 beyond the lengths it was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..layers.hybrid import KINDS
from ..plots import COLOURS, figure
from .entrants import SOLVED, scaled
from .experiment import Finding, Result, Setting, experiment
from .hybrid import Mixed
from .modular import SHORT, TESTED, TRAINED, expressions
from .training import ShortFirst, accuracy, fit, parameters

_PRINTED = {"delayed_stream": "0.28", "delayed_chunk": "0.01"}


@experiment(
    section="expressivity",
    claim="A softmax window with fast weights adds modulo 3 at untrained lengths where tokens enter the fast weights at once, else not",
    cite="Irie, Yau and Gershman 2025 (Blending complementary memory systems in hybrid quadratic-linear transformers)",
    quick=30, default=500, full=20_000,
)  # fmt: skip
def hybrid_modular(setting: Setting) -> Result:
    """The three hybrids of the experiment hybrid on the task of the experiment modular without brackets: sums and differences modulo 3.

    Two layers without MLPs behind a causal convolution of 3 tokens: one step of the delta rule reflects, and a sum modulo 3 is a rotation,
    which is two reflections. The window is 4 tokens, so that the delayed memories are in use. Expressions of up to 9 symbols for the first
    half of training and of up to 40 for the second; tested on 41 to 80. The same batches for the same number of steps; parameters are the
    same. Accuracy is scaled, 0 at chance (1/3) and 1 where all is right; "adds" is 0.95 or more, "does not" less than 0.5. In the paper,
    whose models are larger, it is 0.97 with synchronous mixing, 0.28 with a delayed stream and 0.01 with delayed chunks.

    The quick size has expressions of up to 9 symbols alone, of which the window sees nearly half, and claims the order.
    """
    quick = setting.size == "quick"
    kinds = KINDS[:2] if quick else KINDS
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in kinds}
    table: list[dict[str, Any]] = []
    for kind in kinds:
        size = 0
        for seed in setting.each_seed():
            by_length, size = _modular(kind, setting, seed)
            for said, value in by_length.items():
                found[kind].setdefault(said, []).append(value)
        table += [{"model": kind, "parameters": size, "symbols": s, "scaled accuracy": sum(z) / len(z)} for s, z in found[kind].items()]
    first, *delayed = ([*by_length.values()][-1] for by_length in found.values())
    where = f"scaled accuracy at {[*found[KINDS[0]]][-1]} symbols"
    findings = [Finding(f"synchronous: {where}", first, "0.97", low=SOLVED, source="paper")]
    for kind, values in zip(kinds[1:], delayed, strict=True):
        said = kind.replace("_", " ")
        if quick:
            more = [a - b for a, b in zip(first, values, strict=True)]
            findings.append(Finding(f"synchronous - {said}: {where}", more, "above 0", low=0.0, source="order"))
        else:
            findings.append(Finding(f"{said}: {where}", values, _PRINTED[kind], high=0.5, source="paper"))
    return Result(findings, table, _draw_modular(found))


def _modular(kind: str, setting: Setting, seed: int) -> tuple[dict[str, float], int]:
    """Scaled accuracy by the symbols of an expression, trained lengths first, and the number of parameters."""
    steps, batch = setting.pick(quick=(1000, 32), default=(3000, 32), full=(20_000, 128))
    short, long = expressions(SHORT), expressions(TRAINED)
    source = short if setting.size == "quick" else ShortFirst(short, long, steps)
    width = setting.pick(quick=64, default=64, full=128)
    model = Mixed((kind, kind), vocabulary=long.vocabulary, width=width, window=4, heads=4, seed=seed)
    lr = setting.pick(quick=5e-3, default=5e-3, full=1e-3)
    fit(model, source, steps, batch=batch, lr=lr, seed=seed, cosine=True, setting=setting, name=f"modular, {kind}")
    lengths = (SHORT,) if setting.size == "quick" else (TRAINED, TESTED)
    told = {f"{a} to {b}": accuracy(model, expressions((a, b)).validation(128)) for a, b in lengths}
    return {said: scaled(right, 1 / 3) for said, right in told.items()}, parameters(model)


def _draw_modular(found: Mapping[str, Mapping[str, Sequence[float]]]) -> Any:
    made, (axes,) = figure(width=5.4, height=3.0)
    for y, by_length in enumerate(found.values()):
        for i, (said, values) in enumerate(by_length.items()):
            axes.plot(
                values, [-y + 0.1 - 0.2 * i] * len(values), "os"[i], color=COLOURS[i], ms=7, alpha=0.8, label="" if y else f"{said} symbols"
            )
    axes.set_yticks([-y for y in range(len(found))], [kind.replace("_", " ") for kind in found])
    axes.set_ylim(-len(found) + 0.5, 0.5)
    axes.set_xlim(-0.12, 1.08)
    axes.set_xlabel("scaled accuracy of sums modulo 3 (a mark a seed)")
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return made
