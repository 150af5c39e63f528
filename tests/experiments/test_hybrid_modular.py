"""Hybrids on sums modulo 3: what is claimed of measured numbers, in both sizes."""

from __future__ import annotations

import pytest

from fastweights.experiments import hybrid_modular as module
from fastweights.experiments.experiment import Setting

ADDS = {"synchronous": 1.0, "delayed_stream": 0.1, "delayed_chunk": 0.0}


@pytest.mark.parametrize("size", ["quick", "default"])
@pytest.mark.parametrize("turned", [False, True])
def test_claims(monkeypatch, size, turned):
    """They hold of hybrids that do as published, and not of those that do the opposite."""
    lengths = ("1 to 9",) if size == "quick" else ("1 to 40", "41 to 80")

    def measured(kind, setting, seed):
        return dict.fromkeys(lengths, 1 - ADDS[kind] if turned else ADDS[kind]), 100

    monkeypatch.setattr(module, "_modular", measured)
    result = module.hybrid_modular.run(Setting(size, 2))
    assert [f.passed for f in result.findings] == [not turned] * (2 if size == "quick" else 3)
    assert all(lengths[-1] in f.what and len(f.measured) == 2 for f in result.findings)
    kinds = [*ADDS][: 2 if size == "quick" else 3]
    assert [(row["model"], row["symbols"]) for row in result.table] == [(kind, said) for kind in kinds for said in lengths]
