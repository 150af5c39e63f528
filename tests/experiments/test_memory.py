"""Experiments about memory and sequences, and the loop that experiments share: their helpers do what they say."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from fastweights.experiments import carry_over, mqar, overwrite, retrieval, timeseries
from fastweights.experiments.experiment import Setting
from fastweights.experiments.training import accuracy, fit, parameters, scores
from fastweights.language.errors import FastWeightError
from fastweights.models.language_model import LanguageModel, ModelConfig
from fastweights.models.sequence_model import SequenceModel
from fastweights.tasks import InContextRegression, Overwrite, Retrieval

QUICK = Setting("quick", 1)


# ---- the loop


def small(seed=0):
    task = InContextRegression(d=2, examples=4)
    return SequenceModel(ModelConfig(layers=("delta",), d_model=16, heads=1), d_in=task.d_in, d_out=1, seed=seed), task


def test_fit_repeats_itself_and_learns():
    runs = []
    for _ in range(2):
        model, task = small()
        before = scores(model, task.validation(32)).error
        runs.append(fit(model, task, 60, lr=1e-2, cosine=True))
        assert scores(model, task.validation(32)).error < before
    assert runs[0] == runs[1]


def test_fit_stops_early_and_tells():
    model, task = small()
    told, lines = [], []
    setting = Setting("quick", 1, told.append, lines.append)
    assert len(fit(model, task, 500, until=1e9, setting=setting, name="it")) == 50
    assert [line["step"] for line in lines] == [50]
    assert told[0].startswith("it, seed 0: step 50/500")


def test_fit_refuses_a_loss_that_is_not_finite():
    model, task = small()
    with torch.no_grad():
        model.enter.weight.fill_(math.nan)
    with pytest.raises(FastWeightError, match="the loss of it is nan at step 1"):
        fit(model, task, 3, name="it")


def test_parameters_are_those_that_are_trained():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert parameters(model) == 6


# ---- retrieval and overwriting


@pytest.mark.parametrize("name", ["sum", "delta"])
def test_memory_reads_as_published(name):
    task = Overwrite(pairs=4, d_key=7)
    rule, norm = overwrite._RULES[name]
    model = retrieval.Memory(task, rule, d=5, features="dpfp:1", norm=norm, seed=3).double()
    x = task.batch(0, 0, 3)[0].double()
    got = model(x)[0][:, -1].detach().numpy()

    def linear(part, z):
        return z @ part.weight.detach().numpy().T + part.bias.detach().numpy()

    def phi(z):
        r = np.maximum(np.concatenate([z, -z], -1), 0)
        return r * np.roll(r, -1, -1) + 1e-6

    for row, y in zip(x.numpy(), got, strict=True):
        writes, question = row[: task.writes], row[-1]
        k, q = phi(linear(model.key, writes)), phi(linear(model.query, question[:7]))
        beta = 1 / (1 + np.exp(-linear(model.rate, writes)))
        if name == "sum":
            weights = k @ q
            expected = weights @ writes[:, 7:] / weights.sum()
        else:
            W = np.zeros((4, k.shape[1]))
            for key, value, rate in zip(k, writes[:, 7:], beta, strict=True):
                key = key / (key.sum() + 1e-6)
                W += rate * np.outer(value - W @ key, key)
            expected = W @ q / (q.sum() + 1e-6)
        np.testing.assert_allclose(y, expected, atol=1e-12)


def test_no_matrix_of_low_rank_errs_less_than_the_bound():
    n, rank, draw = 12, 5, torch.Generator().manual_seed(0)
    best = torch.diag((torch.arange(n) < rank).double())
    for A in (best, *(torch.linalg.pinv(B) @ B for B in torch.randn(20, rank, n, generator=draw, dtype=torch.float64))):
        error = float((A - torch.eye(n, dtype=A.dtype)).square().sum()) / (2 * n)
        assert error == pytest.approx(retrieval.least(rank, n))
        assert float((1.1 * A - torch.eye(n, dtype=A.dtype)).square().sum()) / (2 * n) > error
    assert retrieval.least(rank, rank) == 0


def test_floor_of_a_sum_by_enumeration():
    """All sequences of 2n writes of n = 2 keys and values: the error of the average of the values of the key that is asked for."""
    n, total, count = 2, 0.0, 0
    for keys in itertools.product(range(n), repeat=2 * n):
        for values in itertools.product(range(n), repeat=2 * n):
            for asked in keys:
                mine = [np.eye(n)[v] for k, v in zip(keys, values, strict=True) if k == asked]
                total += 0.5 * float(((np.mean(mine, 0) - mine[-1]) ** 2).sum())
                count += 1
    assert overwrite.floor(n) == pytest.approx(total / count, abs=1e-12)


def test_rewritten_keys_without_training():
    assert 0.44 < overwrite._rewritten("hebb", 300, 0) <= 0.53
    assert overwrite._rewritten("delta", 300, 0) > 0.99


def test_error_of_a_memory_that_knows_nothing():
    task = Retrieval(pairs=5, d_key=4)

    class Zero(torch.nn.Module):
        def forward(self, x):
            return x.new_zeros(*x.shape[:2], task.d_out), None

    assert retrieval.error_of(Zero(), task) == pytest.approx(0.5)


# ---- carried state, recall, continuous time


def test_pairs_of_the_segment_before():
    found, expected = carry_over._segments(QUICK)
    for name, runs in found.items():
        assert len(runs[0]) == len(expected[name])
        assert max(abs(a - b) for a, b in zip(runs[0], expected[name], strict=True)) < 0.01
    assert expected["hebb"][-1] > 0.3 > expected["delta"][-1]


def test_what_a_key_was_last_given():
    values = [{} for _ in range(3)]
    for inputs, targets in carry_over._writes(0, 3, 5):
        for row, known in enumerate(values):
            for key, value, target in zip(inputs[row, ::2].tolist(), inputs[row, 1::2].tolist(), targets[row, ::2].tolist(), strict=True):
                assert target == known.get(key, -100)
                known[key] = value
        assert (targets[:, 1::2] == -100).all()


def test_what_is_carried():
    model = LanguageModel(ModelConfig(layers=("delta",), d_model=16, heads=2))
    memory = model(torch.arange(9).unsqueeze(0))[1]
    for keep, kept in ((carry_over._detached, True), (carry_over._only_inputs, False)):
        (state,) = keep(memory)
        assert torch.equal(state["conv"], memory[0]["conv"])
        assert bool(state["W"].any()) is kept
        assert not any(z.requires_grad for z in state.values())


def test_streams_go_on_where_they_were():
    data = torch.arange(100, dtype=torch.uint8)
    (x, y), (later, _) = carry_over._streams(data, 0, 3, 8, 2)
    assert torch.equal(y, (x + 1) % 100)
    assert torch.equal(later[:, 0], y[:, -1])


def test_a_recaller_is_causal_and_counts_its_state():
    for name in ("softmax", "delta", "hebb"):
        model = mqar.Recaller(name, 16, seed=0)
        ids = torch.randint(128, (2, 12), generator=torch.Generator().manual_seed(0))
        changed = ids.clone()
        changed[:, 7:] = 1
        torch.testing.assert_close(model(ids)[0][:, :7], model(changed)[0][:, :7])
        assert model.numbers(64) == (2 * 64 * 16 + 2 if name == "softmax" else 2 * 8 * 8)
    assert accuracy(model, [(ids, model(ids)[0].argmax(-1))]) == 1.0


def test_continuous_time_without_data(monkeypatch):
    def absent(**_):
        raise FastWeightError("this needs aeon")

    monkeypatch.setattr(timeseries, "TimeSeries", absent)
    result = timeseries.timeseries.run(QUICK)
    assert result.passed
    assert result.notes == "The exact part alone: this needs aeon"
