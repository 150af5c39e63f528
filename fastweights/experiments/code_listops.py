"""Programs and nested lists: tasks in which what is in memory has to be worked on, by memories with and without recurrence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..plots import COLOURS, figure
from ..tasks.code import Code
from ..tasks.listops import ListOps
from .entrants import Entrant
from .experiment import Finding, Result, Setting, experiment
from .training import accuracy, fit, parameters

_Right = Mapping[str, Sequence[float]]  # shares of answers that are right, a number a seed, by model

LSTM, DELTA_RNN, RDN = Entrant("LSTM", ("lstm",)), Entrant("Delta RNN", ("delta_rnn",)), Entrant("RDN", ("rdn",))
# as in the paper, the same layer without the recurrence: softmax of keys and queries, no gate
_PLAIN = {"feature_map": "softmax", "norm": "none", "values": "identity", "output_gate": False}
DELTANET, SUM = Entrant("DeltaNet", ("delta",), {"options": _PLAIN}), Entrant("linear attention", ("linear_transformer",))
CODE = (LSTM, DELTA_RNN, DELTANET, SUM)  # the best first
LISTOPS = (RDN, DELTANET, SUM, LSTM)
_COLOURS = {e.name: colour for e, colour in zip((LSTM, DELTA_RNN, DELTANET, SUM, RDN), COLOURS, strict=False)}


@experiment(
    section="expressivity",
    claim="Executing programs: LSTM, then the Delta RNN, then DeltaNet, then linear attention",
    cite="Irie, Schlag, Csordas and Schmidhuber 2021, NeurIPS (Going beyond linear transformers with recurrent fast weight programmers)",
    quick=25, default=160, full=40_000,
)  # fmt: skip
def code(setting: Setting) -> Result:
    """Programs of assignments, increments, decrements, conditions and prints over a few variables; what is printed is to be told, a number
    or that nothing is. To change a variable, what is stored at it has to be read, changed and written back; a sum only ever adds.

    The models are those of the paper: DeltaNet is the layer of the Delta RNN without its recurrence, with a softmax of keys and queries and
    no gate, and linear attention has elu + 1 and is normalised. (A DeltaNet with keys of length 1 and a gate at its output, as is usual
    now, is a better one: at the quick size it comes before the Delta RNN.) All have one layer without an MLP or a convolution; the same
    programs for the same number of steps, and the width that brings the parameters nearest to those of the others. The claim is the order,
    as measured by the share of answers that are right: every model has at least as many as the next. In the small sizes none is at its end:
    compared is what is learned in equally many steps. Published are larger models on 100 statements over 3 and 5 variables: with 5,
    LSTM 93.2, Delta RNN 85.1 and DeltaNet 61.4 per cent, and linear attention fails.
    """
    variables, statements = setting.pick(quick=(2, 6), default=(3, 8), full=(5, 100))
    steps, batch = setting.pick(quick=(800, 32), default=(1500, 32), full=(50_000, 64))
    right, table = _compared(CODE, Code(variables=variables, statements=statements), steps, batch, setting)
    findings = _order(CODE, right, f"{statements} statements over {variables}")
    return Result(findings, table, _draw(right, "printed values told right (share)"))


@experiment(
    section="expressivity",
    claim="Nested MIN, MAX and FIRST: a delta rule memory that sees its last read has more right than one without recurrence",
    cite="Irie, Schlag, Csordas and Schmidhuber 2021, NeurIPS; Nangia and Bowman 2018 (ListOps)",
    quick=14, default=100, full=40_000,
)  # fmt: skip
def listops(setting: Setting) -> Result:
    """Trees of MIN, MAX and FIRST of digits and of further such trees, exactly so many operators deep; the value of the whole is to be told
    at the last bracket. What is open has to be kept while what is inside is worked out.

    The models are those of the experiment code, with one layer without an MLP or a convolution; the same trees for the same number of
    steps, and the width that brings the parameters nearest to those of the others. The claim is that recurrence helps a memory: the
    Recurrent DeltaNet (RDN) has at least as many trees right as DeltaNet and as linear attention. Of these two no order is claimed: nothing
    that is kept has to be rewritten. Beside them stands an LSTM: at depth 15, where RDN has 79.2 per cent in the paper and the LSTM 24.4,
    it falls behind for want of memory. In the shallow trees of the small sizes there is little to keep, so that RDN against LSTM is claimed
    for the full size alone.
    """
    depth, arguments = setting.pick(quick=(2, 3), default=(3, 3), full=(15, 5))
    steps, batch = setting.pick(quick=(800, 32), default=(1500, 32), full=(50_000, 64))
    task = ListOps(depth=depth, deeper=depth, arguments=arguments)
    right, table = _compared(LISTOPS, task, steps, batch, setting)
    others = (DELTANET, SUM, LSTM) if setting.size == "full" else (DELTANET, SUM)
    findings = [f for other in others for f in _order((RDN, other), right, f"depth {depth}")]
    return Result(findings, table, _draw(right, "trees told right (share)"))


def _compared(
    entrants: Sequence[Entrant], task: Code | ListOps, steps: int, batch: int, setting: Setting
) -> tuple[dict[str, list[float]], list[dict]]:
    """Shares of answers that are right, by model, and the table."""
    right: dict[str, list[float]] = {}
    table: list[dict] = []
    width, depth, hidden = setting.pick(quick=(32, 1, 0), default=(32, 1, 0), full=(256, 4, None))
    lr = setting.pick(quick=1e-2, default=1e-2, full=1e-3)
    source: Any = task  # whose vocabulary is the class's in ListOps, which the protocol does not know
    for entrant in entrants:
        size = 0
        for seed in setting.each_seed():
            model = entrant.build(source, width, depth, seed, heads=2, conv=1, d_hidden=hidden)
            fit(model, source, steps, batch=batch, lr=lr, seed=seed, cosine=True, until=0.01, setting=setting, name=entrant.name)
            right.setdefault(entrant.name, []).append(accuracy(model, source.validation(256)))
            size = parameters(model)
        mean = sum(right[entrant.name]) / setting.seeds
        table.append({"model": entrant.name, "parameters": size, "task": task.identity, "right": mean})
    return right, table


def _order(entrants: Sequence[Entrant], right: _Right, said: str) -> list[Finding]:
    """One finding a pair of neighbours: what the first has right more than the second."""
    found = []
    for a, b in zip(entrants, entrants[1:], strict=False):
        more = [x - y for x, y in zip(right[a.name], right[b.name], strict=True)]
        found.append(Finding(f"{said}: share right, {a.name} - {b.name}", more, "0 or more", low=0.0, source="order"))
    return found


def _draw(right: _Right, said: str) -> Any:
    made, (axes,) = figure()
    for i, (name, runs) in enumerate(right.items()):
        axes.bar(i, sum(runs) / len(runs), 0.6, color=_COLOURS[name])
        axes.plot([i] * len(runs), runs, "o", color="black", ms=4, label="" if i else "a seed")
    axes.set_xticks(range(len(right)), list(right))
    axes.set_ylim(0, 1.05)
    axes.set_ylabel(said)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0))
    return made
