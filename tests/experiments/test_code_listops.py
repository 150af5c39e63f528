"""Programs and nested lists: what is compared and how findings read it; the answers of programs by plain Python."""

from __future__ import annotations

import operator
from typing import Any

from fastweights.experiments import code_listops as both
from fastweights.experiments.experiment import Setting
from fastweights.experiments.training import parameters
from fastweights.tasks.code import Code
from fastweights.tasks.listops import ListOps

QUICK = Setting("quick", 1)
NAMES = ("code", "listops")


def test_parameters_agree():
    compared: Any = ((Code(variables=2, statements=6), both.CODE), (ListOps(depth=2, deeper=2, arguments=3), both.LISTOPS))
    for task, entrants in compared:
        assert all(e.known for e in entrants)
        sizes = [parameters(e.build(task, 32, 1, heads=2, conv=1, d_hidden=0)) for e in entrants]
        assert max(sizes) < 1.2 * min(sizes)


def test_deltanet_is_the_delta_rnn_without_recurrence():
    task = Code(variables=2, statements=6)
    models: list[Any] = [e.build(task, 32, 1, heads=2, conv=1, d_hidden=0) for e in (both.DELTANET, both.DELTA_RNN)]
    plain, recurrent = (model.blocks[0].layer for model in models)
    assert plain.rule.name == "delta"
    for layer in (plain, recurrent):
        assert layer.gate is None
        assert layer.programmer.feature_map == "softmax"
        assert (layer.programmer.norm, layer.programmer.values) == ("none", "identity")


def test_order():
    right = {"LSTM": [0.9, 0.8], "Delta RNN": [0.5, 0.8], "DeltaNet": [0.6, 0.7], "linear attention": [0.7, 0.9]}
    found = both._order(both.CODE, right, "it")
    assert [round(f.mean, 3) for f in found] == [0.2, 0.0, -0.15]
    assert [f.passed for f in found] == [True, True, False]


def test_programs_print_what_python_prints():
    """Every line is run as Python: what was assigned, changed and compared."""
    task = Code(variables=2, statements=6)
    inputs, targets = task.batch(0, 0, 64)
    for row, wanted in zip(inputs, targets, strict=True):
        known: dict[str, int] = {}
        expected = [answer for line in task.text(row).split(";")[:-1] if (answer := _run(line.split(), known)) is not None]
        assert task.text(wanted).split() == expected


def _run(words: list[str], known: dict[str, int]) -> str | None:
    if words[0] == "if":
        holds = {"<": operator.lt, ">": operator.gt}[words[2]](known[words[1]], int(words[3]))
        if not holds:
            return "_" if words[5] == "print" else None
        words = words[5:]
    if words[0] == "print":
        return str(known[words[1]])
    name, sign = words[:2]
    known[name] = int(words[2]) if sign == "=" else known[name] + (1 if sign == "++" else -1)
    return None
