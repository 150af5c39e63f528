"""Continual learning in a stream: what a question counts for, and that the objectives differ in nothing else."""

from __future__ import annotations

import pytest
import torch

from fastweights.experiments import continual as module
from fastweights.experiments.continual import OBJECTIVES, ROWS, _findings, _task, continual, first
from fastweights.experiments.experiment import Setting
from fastweights.tasks.images import SOURCES, glyphs, images
from fastweights.tasks.source import IGNORED


def test_rows():
    assert any(r.quick and r.claimed for r in ROWS)


def test_objectives_differ_in_the_old_questions_alone():
    (x, y), (same, fewer) = (_task(3, backward).batch(0, 0, 4) for backward in OBJECTIVES.values())
    assert torch.equal(x, same)
    # three tasks of 6 images, followed by 1, 2 and 3 questions: the last of each is about the new task
    assert (y[0] != IGNORED).nonzero().flatten().tolist() == [6, 13, 14, 21, 22, 23]
    assert (fewer[0] != IGNORED).nonzero().flatten().tolist() == [6, 14, 23]


def test_what_a_task_is_in_validation_does_not_depend_on_the_objective():
    for (x, y), (same, targets) in zip(_task(3, True).validation(32), _task(3, False).validation(32), strict=True):
        assert torch.equal(x, same)
        assert torch.equal(y, targets)


@pytest.mark.parametrize(("forgets", "passed"), [(True, [True, True, True, True]), (False, [True, True, True, False])])
def test_findings_of_models_that_are_known(forgets, passed):
    queries = _task(3, True).queries()
    keeps = torch.ones(len(queries))
    loses = torch.tensor([1.0 if q.about + 1 == q.after else 0.5 for q in queries])
    found = _findings("it", {("it", "with"): [keeps], ("it", "without"): [loses if forgets else keeps]}, queries)
    assert [f.passed for f in found] == passed
    assert first([loses, keeps], queries, 3) == [0.0, 1.0]


@pytest.mark.parametrize("size", ["quick", "default"])
def test_report_with_digits(monkeypatch, size):
    """Models that are not trained, and images under the name of digits."""
    seen = []

    def untrained(entrant, task, setting, seed, objective):
        seen.append((task.images, task.test, task.backward is (objective == "with")))
        queries = task.queries()
        return torch.tensor([1.0 if task.backward or q.about + 1 == q.after else 0.5 for q in queries]), 7

    monkeypatch.setattr(module, "_trained", untrained)
    monkeypatch.setattr(module, "available", lambda name: (name, ""))
    monkeypatch.setitem(SOURCES, "digits", glyphs)
    images.cache_clear()
    result = continual.run(Setting(size, 2))
    images.cache_clear()
    assert set(seen) == {("glyphs", "digits", True)}
    assert result.passed
    assert len(result.findings) == 4
    questions = {"quick": 10, "default": 15}[size]
    assert len(result.table) == 2 * questions * (1 if size == "quick" else 2)
