"""Formal languages: the rows and findings say what is claimed, a construction solves what a sum cannot."""

from __future__ import annotations

import torch

from fastweights import rules
from fastweights.engine.scan import scan
from fastweights.experiments import formal_languages as fl
from fastweights.experiments.experiment import Setting, Size
from fastweights.tasks.languages import GRAMMARS, Language
from fastweights.tasks.source import IGNORED

QUICK = Setting("quick", 1)


def test_rows():
    assert set(fl._SAID) == set(GRAMMARS)
    for row in fl.ROWS:
        assert row.entrant.known
        assert {*row.solves, *row.fails} <= set(GRAMMARS)
        assert not set(row.solves) & set(row.fails)


def findings(name: str, language: str, inside: float, far: float, size: Size = "quick"):
    row = next(r for r in fl.ROWS if r.entrant.name == name)
    sums = {("linear attention", language): [0.2]}
    return fl._findings(row, language, {(name, language): [inside]}, sums | {(name, language): [far]}, Setting(size, 1))


def test_findings():
    assert not findings("linear attention", "parity", 0.9, 0.6)[0].passed
    assert findings("linear attention", "parity", 0.9, 0.4)[0].passed
    assert [f.passed for f in findings("DeltaNet", "reset_dyck1", 0.96, 0.3)] == [True, True]
    assert [f.passed for f in findings("DeltaNet", "reset_dyck1", 0.94, 0.1)] == [False, False]
    assert [f.passed for f in findings("DeltaNet", "reset_dyck1", 0.96, 0.9, "full")] == [False]
    assert [f.passed for f in findings("RDN", "aa", 0.0, 1.0)] == [True]
    assert findings("RDN", "dyck1", 0.0, 0.0) == []


def test_a_memory_that_erases_resets_without_training():
    """W of one number: brackets add 1 and -1 without erasing, # erases all; the depth says what may come next."""
    task = Language(language="reset_dyck1", lengths=(51, 100))
    inputs, targets = task.batch(0, 0, 32)
    v = torch.tensor([1.0, -1.0, 0.0])[inputs][..., None, None]
    erased = -(inputs == 2).float()[..., None, None]
    one = torch.ones_like(v)
    depth = scan(rules.generalised_delta, q=one, k=one, v=v, x=erased, y=one, g=torch.zeros_like(v)).y[..., 0, 0]
    told = len(task.grammar.symbols) + (depth > 0).long()
    assert bool(((told == targets) | (targets == IGNORED)).all())
