"""Two memories in one layer: what the fast weights have seen is told by changing tokens; models are causal."""

from __future__ import annotations

import pytest
import torch

from fastweights.experiments import hybrid
from fastweights.experiments.experiment import Setting
from fastweights.experiments.training import parameters
from fastweights.layers.hybrid import KINDS

QUICK = Setting("quick", 1)


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_fast_weights_have_seen(kind, window):
    """By hand: a token is there one step after it, ``window`` steps after it, or from the first token behind its chunk."""
    tokens = 20
    since = {
        "synchronous": lambda s, t: s < t,
        "delayed_stream": lambda s, t: s + window <= t,
        "delayed_chunk": lambda s, t: (s // window + 1) * window <= t,
    }[kind]
    expected = [min((t - s for s in range(t) if since(s, t)), default=-1) for t in range(tokens)]
    assert hybrid.newest(kind, window, tokens) == expected
    assert hybrid.due(kind, window, tokens) == expected


def test_exact_part():
    findings, table, ages = hybrid._untrained(QUICK)
    assert all(f.passed for f in findings)
    assert len(findings) == len(table) == len(ages) == 3


@pytest.mark.parametrize("row", hybrid.ROWS, ids=lambda row: row.name)
def test_models_are_causal_and_repeat_themselves(row):
    given = {"vocabulary": 9, "width": 16, "window": 4, "heads": 2}
    a, b = (hybrid.Mixed(row.layers, **given, seed=3) for _ in range(2))
    ids = torch.randint(9, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, 7:] = 1
    assert torch.equal(a(ids)[0], b(ids)[0])
    torch.testing.assert_close(a(ids)[0][:, :7], a(changed)[0][:, :7])


def test_parameters_agree():
    for vocabulary in (3, 128):
        given = {"vocabulary": vocabulary, "window": 16, "heads": 4, "seed": 0}
        sizes = [parameters(hybrid.Mixed(r.layers, width=int(32 * r.narrower), **given)) for r in hybrid.ROWS]
        wanted = sizes[0]
        assert all(abs(n / wanted - 1) < 0.17 for n in sizes)
