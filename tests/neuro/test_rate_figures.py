"""The figures of rate models: every claim comes out in its quick version, and the closed forms they are held against are right."""

import importlib
import itertools
import math

import numpy as np
import pytest
import torch

import fastweights as fw
from fastweights.experiments import EXPERIMENTS, Setting
from fastweights.neuro.curves import Curve, slope
from fastweights.neuro.figures import benna_fusi, hopfield, key_value_memory, palimpsest, willshaw
from fastweights.neuro.protocols import Conditioning, Laps, Phase

CLOSE = {"rtol": 0, "atol": 1e-10}
FIGURES = (
    "rescorla-wagner", "blocking", "cue-competition", "oja", "willshaw", "palimpsest", "benna-fusi", "successor-representation",
    "key-value-memory", "astrocyte", pytest.param("hopfield", marks=pytest.mark.slow),
)  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_comes_out(name):
    importlib.import_module(f"fastweights.neuro.figures.{name.replace('-', '_')}")
    experiment = EXPERIMENTS[name]
    assert experiment.section == "neuroscience"
    assert experiment.page
    result = experiment.run(Setting("quick", seeds=1))
    assert not [f for f in result.findings if not f.passed]
    assert all(axes.get_xlabel() for axes in result.figure.axes)
    assert {"curve", "x", "measured"} <= set(result.table[0])


def test_a_curve_that_is_off_does_not_pass():
    curve = Curve("V", [0, 1], [0.0, 0.5], [[0.0, 0.5], [0.1, 0.5]])
    assert curve.deviation() == [0.0, 0.1]
    assert not curve.finding().passed
    assert not Curve("V", [0], [1.0], [[1.6]], error=[0.1]).finding().passed
    assert Curve("V", [0], [1.0], [[1.4]], error=[0.1]).finding().passed
    assert Curve("V", [0], [2.0], [[2.2]]).deviation(relative=True) == pytest.approx([0.1])
    assert slope([0, 1, 2, 9], [1, 3, 5, 0], 0, 2) == pytest.approx(2)


# ---- conditioning --------------------------------------------------------------------------------------------------------------


def strengths(*phases, rate, salience=None):
    protocol = Conditioning(phases, salience)
    return (fw.unroll(fw.rules.delta, **protocol.signals(rate))[0, :, 0, 0] * protocol.scale())[-1].tolist()


@pytest.mark.parametrize(("rate", "n1", "n2"), [(0.05, 1, 1), (0.1, 17, 5), (0.4, 3, 29), (0.5, 2, 7)])
def test_blocking_in_closed_form(rate, n1, n2):
    V_A = 1 - (1 - rate) ** n1
    gained = (1 - V_A) * (1 - (1 - 2 * rate) ** n2) / 2
    np.testing.assert_allclose(strengths(Phase("A+", n1), Phase("AB+", n2), rate=rate), [V_A + gained, gained], **CLOSE)


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_overshadowing_shares_by_salience(rate):
    a, b, n = 0.9, 0.3, 11
    reached = 1 - (1 - rate * (a + b)) ** n
    found = strengths(Phase("AB+", n), rate=rate, salience={"A": a, "B": b})
    np.testing.assert_allclose(found, [a / (a + b) * reached, b / (a + b) * reached], **CLOSE)


def test_conditioned_inhibition_and_overexpectation_in_the_limit():
    np.testing.assert_allclose(strengths(Phase("A+ AB-", 400), rate=0.2), [1, -1], **CLOSE)
    np.testing.assert_allclose(strengths(Phase("A+ B+", 120), Phase("AB+", 60), rate=0.2), [0.5, 0.5], **CLOSE)


def test_a_trial_of_half_the_length_twice_is_one_trial():
    """With rate 1 - exp(-D / tau) the strength of a cue does not depend on the step, dt = D or D / 2."""
    whole, half = (strengths(Phase("A+", 6 * n), Phase("A-", 4 * n), rate=1 - math.exp(-1 / (3 * n))) for n in (1, 2))
    np.testing.assert_allclose(half, whole, **CLOSE)


# ---- memory --------------------------------------------------------------------------------------------------------------------


def test_the_critical_load():
    assert hopfield.critical_load() == pytest.approx(0.1379, abs=1e-4)
    for load in (0.02, 0.1, 0.13):
        m, r = hopfield.overlap_of(load), 1.0
        for _ in range(500):  # the paper's equations for the noise r that goes with m, iterated
            C = math.sqrt(2 / (math.pi * load * r)) * math.exp(-(m * m) / (2 * load * r))
            r = 1 / (1 - C) ** 2
        assert math.erf(m / math.sqrt(2 * load * r)) == pytest.approx(m, abs=1e-9)


@pytest.mark.parametrize(("N", "M", "P"), [(4, 1, 3), (4, 2, 2), (4, 2, 3), (5, 2, 2)])
def test_wrong_units_of_willshaw_by_enumeration(N, M, P):
    """Over all keys and values of the other pairs, how often a unit that should be off has all of its M synapses on."""
    sets = list(itertools.combinations(range(N), M))
    asked, wrong, total = set(sets[0]), 0, 0
    for others in itertools.product(itertools.product(sets, sets), repeat=P - 1):
        on = {j for key, value in others if 0 in value for j in key}  # synapses of unit 0
        wrong, total = wrong + (asked <= on), total + 1
    np.testing.assert_allclose(willshaw.wrong_on(N, M, P), wrong / total, **CLOSE)


def test_bits_without_errors_are_the_entropy_of_the_answers():
    f = 0.25
    entropy = -(f * math.log2(f) + (1 - f) * math.log2(1 - f))
    np.testing.assert_allclose(willshaw.bits_a_synapse(16, 4, 10, 0.0), 10 / 16 * entropy, **CLOSE)
    on = f + (1 - f) * 0.1
    channel = -sum(p * math.log2(p) for p in (on, 1 - on)) + (1 - f) * sum(p * math.log2(p) for p in (0.1, 0.9))
    np.testing.assert_allclose(willshaw.bits_a_synapse(16, 4, 10, 0.1), 10 / 16 * channel, **CLOSE)


@pytest.mark.parametrize("n", [3, 7, 15])
def test_bounded_synapses_are_a_random_walk_between_walls(n):
    up, w = np.eye(n, k=1), np.arange(n) - (n - 1) / 2
    up[-1, -1] = 1
    down, start = up[::-1, ::-1], np.full(n, 1 / n)
    for age in (0, 1, 4, 30):
        walk = np.linalg.matrix_power((up + down) / 2, age)
        signal = (start @ up @ walk @ w - start @ down @ walk @ w) / 2
        np.testing.assert_allclose(palimpsest.bounded_snr(n, age), signal / math.sqrt((w**2).mean()), **CLOSE)


def test_binary_synapses_are_a_decay_of_nought_or_one():
    draw = torch.Generator().manual_seed(0)
    xi = torch.randint(2, (1, 40, 1, 9), generator=draw).double() * 2 - 1
    chosen = (torch.rand(xi.shape, generator=draw) < 0.3).double()
    v = torch.ones(1, 40, 1, 1, dtype=torch.float64)
    found = fw.unroll(fw.rules.decayed_hebb, k=chosen * xi, v=v, g=torch.log1p(-chosen))[0, :, 0, 0]
    w = np.zeros(9)
    for t in range(40):
        w = np.where(chosen[0, t, 0] > 0, xi[0, t, 0], w)
        np.testing.assert_allclose(found[t], w, **CLOSE)


def test_a_leak_does_not_depend_on_the_step():
    draw = torch.Generator().manual_seed(0)
    k = torch.randn(1, 8, 1, 5, generator=draw, dtype=torch.float64)
    v = torch.ones(1, 8, 1, 1, dtype=torch.float64)
    whole = fw.unroll(fw.rules.decayed_hebb, k=k, v=v, g=v[..., 0] * -60 / 300)
    k, v = (torch.stack([torch.zeros_like(x), x], 2).flatten(1, 2) for x in (k, v))
    half = fw.unroll(fw.rules.decayed_hebb, k=k, v=v, g=torch.full((1, 16, 1), -30 / 300, dtype=torch.float64))
    np.testing.assert_allclose(half[:, 1::2], whole, **CLOSE)


def test_a_run_is_a_function_of_its_seed():
    windows = benna_fusi._windows(100)
    first, again, other = (benna_fusi._recognise(100, 3, windows, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_the_right_slot_of_two():
    for separation in (0.0, 0.5, 3.0):
        expected = 0.5 * (1 + math.erf(separation / 2))  # the difference of two scores has variance 2
        np.testing.assert_allclose(key_value_memory.found_right(separation, 2), expected, **CLOSE)


# ---- the successor representation ----------------------------------------------------------------------------------------------


def learned(dt, tau, laps):
    places = Laps(length=1.0, speed=0.5, count=laps).places(dt)[None, :, None]
    T = places.shape[1]
    rate, gamma = (torch.full((1, T, 1), x, dtype=torch.float64) for x in (1.0, math.exp(-dt / tau)))
    return fw.scan(fw.rules.td, q=places, k=places, k_next=places.roll(-1, 1), v=places, beta=rate, gamma=gamma).state[0, 0]


def test_the_successor_representation_of_a_ring():
    dt, tau, n = 0.25, 0.5, 8
    gamma = math.exp(-dt / tau)
    move = np.roll(np.eye(n), 1, 0)  # from column i to row i + 1
    closed = np.array([[gamma ** ((j - i) % n) / (1 - gamma**n) for i in range(n)] for j in range(n)])
    np.testing.assert_allclose(closed, np.linalg.inv(np.eye(n) - gamma * move), **CLOSE)
    np.testing.assert_allclose(learned(dt, tau, laps=60), closed, **CLOSE)


def test_fields_in_metres_do_not_depend_on_the_step():
    """Half the step, twice the places: the same shape, exp(-distance / (speed tau)), of the field of a cell."""
    tau = 0.5
    coarse, fine = (learned(dt, tau, laps=120)[0] for dt in (0.25, 0.125))
    np.testing.assert_allclose(fine[::2] / fine[0], coarse / coarse[0], **CLOSE)


def test_the_successor_representation_of_a_random_walk_on_a_ring():
    n, gamma = 20, 0.8
    walk = (np.roll(np.eye(n), 1, 0) + np.roll(np.eye(n), -1, 0)) / 2
    root = math.sqrt(1 - gamma**2)
    r = (1 - root) / gamma
    closed = [(r**d + r ** (n - d)) / ((1 - r**n) * root) for d in range(n)]
    np.testing.assert_allclose(closed, np.linalg.inv(np.eye(n) - gamma * walk)[0], **CLOSE)
