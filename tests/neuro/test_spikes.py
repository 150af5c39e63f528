"""Spike trains and protocols: what is drawn, what is rendered, and what is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastweights.language.errors import FastWeightError, SignalError
from fastweights.neuro.spikes import (
    BI_POO_1998,
    SJOSTROM_2001,
    Pairing,
    from_times,
    log_decay,
    poisson,
    regular,
    render,
    steady,
)


def test_a_decay_over_a_time_constant_is_one_e_th_in_any_number_of_steps():
    for n in (1, 7, 1000):
        assert math.exp(n * log_decay(tau=0.02, dt=0.02 / n)) == pytest.approx(math.exp(-1), abs=1e-12)
    assert log_decay(tau=math.inf, dt=0.1) == 0


@given(st.lists(st.integers(0, 999), max_size=50), st.sampled_from([0.001, 0.002, 0.0005]))
def test_spikes_on_the_grid_are_rendered_where_they_are(at, dt):
    train = render([n * 0.001 for n in at], 1.0, dt)
    assert train.sum() == len(at)
    for n in set(at):
        assert train[int((n * 0.001 + 1e-9) / dt)] >= at.count(n)


def test_spikes_of_one_step_are_counted_and_intervals_are_off_by_less_than_a_step():
    assert render([0.0031, 0.0039], 0.005, 0.001).tolist() == [0, 0, 0, 2, 0]
    draw = torch.Generator().manual_seed(0)
    times = poisson(50.0, 10.0, draw)
    for dt in (0.01, 0.001):
        steps = render(times, 10.0, dt)
        rendered = torch.repeat_interleave(torch.arange(len(steps)), steps.long()) * dt
        assert (times.diff() - rendered.diff()).abs().max() < dt


def test_a_poisson_train_is_one():
    draw = torch.Generator().manual_seed(0)
    train = poisson(20.0, 2000.0, draw)
    n = 20 * 2000
    assert abs(len(train) - n) < 5 * math.sqrt(n)
    gaps = train.diff()
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 20, rel=5 / math.sqrt(n))
    assert gaps.std() == pytest.approx(1 / 20, rel=10 / math.sqrt(n))
    counts = render(train, 2000.0, 0.5)  # as variable as large
    assert counts.var() / counts.mean() == pytest.approx(1, abs=5 * math.sqrt(2 / len(counts)))
    again = poisson(20.0, 2000.0, torch.Generator().manual_seed(0))
    assert torch.equal(train, again)


def test_a_regular_train_is_one():
    assert regular(40.0, 1.0).tolist() == [i / 40 for i in range(40)]
    assert regular(3.0, 1.0).tolist() == [0, 1 / 3, 2 / 3]  # not the spike at 1 s
    assert regular(10.0, 0.3, start=0.05).tolist() == pytest.approx([0.05, 0.15, 0.25])
    assert len(regular(0.0, 1.0)) == len(regular(5.0, 0.0)) == len(poisson(0.0, 1.0, torch.Generator())) == 0


@pytest.mark.parametrize(
    "p", [*BI_POO_1998, *SJOSTROM_2001, Pairing(0.0, 10.0, 3), Pairing(0.01, 1.0, 0), Pairing(-0.02, 7.0, 5, rest=0.5)]
)
def test_a_pairing_has_its_pairs_at_its_interval(p):
    assert len(p.pre) == len(p.post) == p.count
    assert torch.allclose(p.post - p.pre, torch.full((p.count,), p.interval, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(p.pre.diff(), torch.full((max(p.count - 1, 0),), 1 / p.frequency, dtype=torch.float64), atol=1e-9)
    if p.count:
        assert min(p.pre[0], p.post[0]) == p.rest
        assert max(p.pre[-1], p.post[-1]) < p.duration
    pre, post = p.render(0.001)
    assert pre.shape == post.shape
    assert pre.sum() == post.sum() == p.count
    assert torch.equal(pre.flip(0), post.flip(0)) == (p.interval == 0 or not p.count)


def test_numbers_as_signals():
    signals = steady(2, 3, beta=0.5, g=torch.tensor([-1.0, -2.0]))
    assert signals["beta"].tolist() == [[[0.5]] * 3] * 2
    assert signals["g"].tolist() == [[[-1.0]] * 3, [[-2.0]] * 3]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: from_times([0.1, -0.2]), "from 0 on, got -0.2"),
        (lambda: from_times([math.nan]), "from 0 on"),
        (lambda: from_times(torch.zeros(2, 2)), r"shape \(2, 2\)"),
        (lambda: render([0.5], 0.5, 0.1), "make duration longer"),
        (lambda: render([0.1], 0.5, 0.0), "dt"),
        (lambda: render([0.1], 0.55, 0.1), "whole number of steps"),
        (lambda: regular(-1.0, 1.0), "rate is -1"),
        (lambda: regular(1.0, 1.0, start=-1.0), "start"),
        (lambda: poisson(math.nan, 1.0, torch.Generator()), "rate is nan"),
        (lambda: poisson(1.0, -1.0, torch.Generator()), "duration is -1"),
        (lambda: log_decay(0.0, 0.1), "tau is 0"),
        (lambda: log_decay(0.1, math.inf), "dt is inf"),
        (lambda: Pairing(math.nan), "interval of a pairing is nan"),
        (lambda: Pairing(0.01, frequency=0.0), "frequency is 0"),
        (lambda: Pairing(0.01, count=-1), "count"),
        (lambda: Pairing(0.01, count=1.5), "count"),
        (lambda: Pairing(0.01, rest=-1.0), "rest"),
        (lambda: Pairing(0.01).render(-0.001), "dt is -0.001"),
    ],
)
def test_what_makes_no_sense_is_refused(call, says):
    with pytest.raises(FastWeightError, match=says) as caught:
        call()
    assert isinstance(caught.value, SignalError) or "steps of" in str(caught.value)
