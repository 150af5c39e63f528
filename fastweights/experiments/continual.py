"""Continual learning in one stream: old tasks are kept where the objective asks for them, and given up where it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..plots import COLOURS, figure
from ..tasks.continual import Continual, Query
from ..tasks.source import VectorSource
from .entrants import CHANCE, Entrant, present, right_by_token, scaled
from .experiment import Finding, Result, Setting, experiment
from .fewshot import available, begin
from .training import fit, parameters

_KEPT = 0.5  # scaled accuracy of a task that was learned, and is not forgotten


class _Row(NamedTuple):
    entrant: Entrant
    claimed: bool
    quick: bool = False


ROWS = (
    _Row(Entrant("DeltaNet", ("delta",)), True, True),
    _Row(Entrant("Hebb", ("hebb",)), False),
)
OBJECTIVES = {"with": True, "without": False}  # the backward-transfer term


@experiment(
    section="learning to learn",
    claim="A memory that learns one task after the other keeps the first where its objective asks for it, and falls to chance where not",
    cite="Irie, Csordas and Schmidhuber 2025 (Metalearning continual learning algorithms); split digits: Zenke et al. 2017",
    quick=42, default=270, full=20_000,
)  # fmt: skip
def continual(setting: Setting) -> Result:
    """A stream is five tasks (four at the quick size), one after the other. A task shows 3 images of each of 2 new classes, whose labels
    are 0 and 1 in every task, at random; then an image without its label is asked for every task so far. No gradient is taken while a
    stream is read: what is learned of a task is what is written to fast weights, and it can be overwritten by the next. Training is over
    streams, of classes of which none is in the streams of the test. Images are 8 by 8.

    The objective counts the questions about the task just shown (forward), and about those before it (the backward-transfer term), or
    leaves the latter out. Then nothing asks a model to keep a task, and it is an advantage to be rid of it: labels of old images are noise
    to the new ones. Both see the same streams for the same number of steps, and are the same model at the beginning: two layers with MLPs.

    The claim is of the delta rule, which can erase what it wrote: right after it was shown, and at the end with the term, the first task
    has a scaled accuracy (0 at chance, 1 where all is right) of 0.5 or more, and at the end without the term, one of at most 0.1. A sum
    (Hebb) stands beside it at larger sizes, without a claim: what it wrote stays, and only its queries can look past it. To give up a
    task takes training too: after 300 steps, of 64 streams of three tasks, the first was still at 0.26 without the term. In the paper the
    model is a self-referential weight matrix with a convolutional network for larger images, trained far longer, and questions are
    answered by a copy of the memory. Test images are scikit-learn's digits where that package is installed (at five tasks: 0 and 1, 2 and
    3, ..., split digits), else made-up characters that were not trained on.
    """
    found, absent = available("digits")
    parts = setting.pick(quick=4, default=5, full=5)
    rows = [r for r in ROWS if r.quick or setting.size != "quick"]
    known, note = present([r.entrant for r in rows])
    queries = _task(parts, True, found).queries()
    right: dict[tuple[str, str], list[Tensor]] = {}
    sizes: dict[str, int] = {}
    for row in (r for r in rows if r.entrant in known):
        for objective in OBJECTIVES:
            right[row.entrant.name, objective] = []
            for seed in setting.each_seed():
                task = _task(parts, OBJECTIVES[objective], found)
                now, sizes[row.entrant.name] = _trained(row.entrant, task, setting, seed, objective)
                right[row.entrant.name, objective].append(now)
    findings = [f for row in rows if row.claimed and row.entrant in known for f in _findings(row.entrant.name, right, queries)]
    table = [
        {
            "model": name, "backward-transfer term": objective, "parameters": sizes[name], "after tasks": query.after,
            "about task": query.about + 1, "accuracy": float(torch.stack(runs)[:, i].mean()),
        }
        for (name, objective), runs in right.items()
        for i, query in enumerate(queries)
    ]  # fmt: skip
    return Result(findings, table, _draw(right, queries), " ".join(n for n in (note, absent) if n))


def _task(parts: int, backward: bool, test: str = "") -> Continual:
    return Continual(parts=parts, shots=3, side=8, backward=backward, test=test)


def _trained(entrant: Entrant, task: Continual, setting: Setting, seed: int, objective: str) -> tuple[Tensor, int]:
    """The accuracy of every question, (questions,), and the number of parameters."""
    steps, batch, lr = setting.pick(quick=(1000, 32, 5e-3), default=(600, 32, 5e-3), full=(50_000, 128, 1e-3))
    model = entrant.build(cast(VectorSource, task), setting.pick(quick=64, default=64, full=256), 2, seed, heads=4, conv=1)
    begin(model, task.ways, seed)
    told, source = f"{entrant.name} {objective} the term", cast(VectorSource, task)
    fit(model, source, steps, batch=batch, lr=lr, seed=seed, cosine=True, setting=setting, name=told)
    asked = [query.at for query in task.queries()]
    return torch.stack([right_by_token(model, x, y)[asked] for x, y in task.validation(512)]).mean(0), parameters(model)


def first(runs: Sequence[Tensor], queries: Sequence[Query], after: int) -> list[float]:
    """The scaled accuracy of the first task after that many tasks, a number a seed, of accuracies (questions,) and two labels.

    >>> first([torch.tensor([1.0, 0.5, 0.75])], Continual(parts=2).queries(), after=2)
    [0.0]
    """
    at = next(i for i, query in enumerate(queries) if (query.after, query.about) == (after, 0))
    return [scaled(float(run[at]), 0.5) for run in runs]


def _findings(name: str, right: Mapping[tuple[str, str], Sequence[Tensor]], queries: Sequence[Query]) -> list[Finding]:
    last, made = queries[-1].after, []
    for objective, backward in OBJECTIVES.items():
        runs, said = right[name, objective], f"{name}, {objective} the backward-transfer term: first task"
        made.append(Finding(f"{said} after it was shown", first(runs, queries, 1), "learned", low=_KEPT, source="order"))
        bounds = {"low": _KEPT} if backward else {"high": CHANCE}
        expected = "kept" if backward else "about 0, chance"
        made.append(Finding(f"{said} after {last} tasks", first(runs, queries, last), expected, source="order", **bounds))
    return made


def _draw(right: Mapping[tuple[str, str], Sequence[Tensor]], queries: Sequence[Query]) -> Any:
    made, (left, right_hand) = figure(2, width=4.8)
    last = queries[-1].after
    for i, ((name, objective), runs) in enumerate(right.items()):
        mean = torch.stack(list(runs)).mean(0)
        with_term = objective == "with"
        style: dict[str, Any] = {"color": COLOURS[i // 2], "ls": "-" if with_term else "--", "marker": "o" if with_term else "s"}
        old = [float(mean[j]) for j, q in enumerate(queries) if q.about == 0]
        end = [float(mean[j]) for j, q in enumerate(queries) if q.after == last]
        left.plot(range(1, last + 1), old, label=f"{name}, {objective} the term", **style)
        right_hand.plot(range(1, last + 1), end, **style)
    left.set_xlabel("tasks shown so far")
    left.set_ylabel("accuracy of the first task")
    right_hand.set_xlabel(f"task, in the order shown (asked after all {last})")
    right_hand.set_ylabel("accuracy")
    for axes in (left, right_hand):
        axes.axhline(0.5, color="0.5", lw=1, ls=":")
        axes.set_xticks(range(1, last + 1))
        axes.set_ylim(0.2, 1.03)
    left.legend(frameon=False, fontsize=8, loc="lower left", title="dotted: chance", title_fontsize=8)
    return made
