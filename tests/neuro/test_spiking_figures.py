"""The figures of spikes and traces: their closed forms against sums and limits, what halving dt does, and that they run and pass."""

import itertools
import math

import numpy as np
import pytest
import torch

import fastweights as fw
from fastweights.experiments.experiment import Experiment, Setting
from fastweights.neuro.figures import (
    btsp,
    dendritic_error,
    plastic_networks,
    short_term_plasticity,
    stdp,
    three_factor,
    working_memory,
)
from fastweights.neuro.spikes import Pairing
from fastweights.neuro.synapses import nearest_stdp
from fastweights.neuro.synapses import stdp as all_pairs

MODULES = (stdp, short_term_plasticity, working_memory, three_factor, btsp, dendritic_error, plastic_networks)
EXPERIMENTS = [getattr(module, module.__name__.rpartition(".")[2]) for module in MODULES]
LONG = {"working-memory", "dendritic-error", "plastic-networks"}


@pytest.mark.parametrize(
    "experiment", [pytest.param(e, marks=[pytest.mark.slow] if e.name in LONG else [], id=e.name) for e in EXPERIMENTS]
)
def test_a_figure_is_drawn_and_its_claim_holds(experiment):
    result = experiment.run(Setting("quick", seeds=1))
    assert result.passed, [f for f in result.findings if not f.passed]
    assert result.table
    assert all(axes.get_xlabel() and axes.get_ylabel() and axes.get_legend() for axes in result.figure.axes)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.name)
def test_the_page_tells_the_mapping_and_the_conventions(experiment: Experiment):
    page = " ".join(experiment.page.split())
    assert experiment.section == "neuroscience"
    assert experiment.cite
    for word in ("resynaptic", "eligibility", "neuromodulator", "heterosynaptic", "onvention"):
        assert word in page, word
    assert " s" in page or "step" in page  # time has a unit


# ---- STDP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("p", [Pairing(0.01, 20.0, 7), Pairing(-0.01, 20.0, 7), Pairing(0.004, 100.0, 12), Pairing(-0.02, 40.0, 1)])
def test_the_closed_form_of_regular_pairs_is_the_sum_over_pairs_of_spikes(p, nearest):
    window, total = stdp.Window(), 0.0
    for t, s in itertools.product(p.post.tolist(), p.pre.tolist()):
        between = [x for x in (p.pre if t > s else p.post).tolist() if min(s, t) < x < max(s, t)]
        total += 0.0 if nearest and between else window.change(t - s)
    assert stdp.pairs_in_closed_form(p, window, nearest) == pytest.approx(total, abs=1e-13)


def test_halving_the_step_does_not_change_the_window():
    protocols = [Pairing(0.01, 10.0, 5), Pairing(-0.02, 10.0, 5), Pairing(0.0, 10.0, 5)]
    for rule in (all_pairs, nearest_stdp):
        one, half, quarter = (stdp.measure(rule, protocols, stdp.Window(), dt) for dt in (0.002, 0.001, 0.0005))
        assert np.allclose(one, half, rtol=0, atol=1e-13)
        assert np.allclose(half, quarter, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rule", [all_pairs, nearest_stdp], ids=lambda r: r.name)
def test_halving_the_step_halves_what_drift_is_off_its_limit(rule):
    limit = stdp.expected_drift(rule, stdp.Window(), 20.0, 0)
    off = [stdp.expected_drift(rule, stdp.Window(), 20.0, dt) - limit for dt in (2e-4, 1e-4)]
    assert off[0] / off[1] == pytest.approx(2, abs=0.02)
    if rule is all_pairs:
        window = stdp.Window()
        assert limit == pytest.approx(400 * (window.a_plus * window.tau_plus - window.a_minus * window.tau_minus), rel=1e-12)


# ---- short-term plasticity and working memory -----------------------------------------------------------------------


def test_moments_under_poisson_trains_have_their_limits():
    for rate in (1.0, 20.0, 60.0):
        for synapse in (short_term_plasticity.FACILITATING, short_term_plasticity.DEPRESSING):
            u, x, both, _ = synapse.poisson(rate, 1e-7)
            assert u == pytest.approx(synapse.mean_field(rate)[0], rel=1e-4)
            assert x == pytest.approx(1 - synapse.tau_d * rate * both, abs=1e-5)  # of the equation of x, without neglecting anything
        fixed = short_term_plasticity.Synapse(0.5, 1e-6, 0.8)  # nothing to be correlated with: the mean field is exact
        u, x, both, square = fixed.poisson(rate, 1e-5)
        assert x == pytest.approx(fixed.mean_field(rate)[1], rel=2e-3)
        assert both == pytest.approx(u * x, rel=2e-3)
        assert square == pytest.approx(u * u, rel=2e-3)


def test_moments_are_those_of_a_simulation():
    synapse, rate, dt = short_term_plasticity.Synapse(0.3, 0.2, 0.1), 15.0, 0.01
    draw = np.random.default_rng(0)
    u, x = np.full(20000, 0.3), np.ones(20000)
    for _ in range(200):
        spike = draw.random(20000) < 1 - math.exp(-rate * dt)
        u, x = u + 0.3 * (1 - u) * spike, x * (1 - u * spike)
        u, x = 0.3 + (u - 0.3) * math.exp(-dt / 0.2), 1 + (x - 1) * math.exp(-dt / 0.1)
    for found, expected in zip((u, x, u * x, u * u), synapse.poisson(rate, dt), strict=True):
        assert abs(found.mean() - expected) < 5 * found.std() / math.sqrt(20000)


def test_halving_the_step_halves_the_error_of_the_mean_field():
    synapse, rate = short_term_plasticity.FACILITATING, 20.0
    u, x = synapse.mean_field(rate)
    off = []
    for dt in (0.002, 0.001):
        q = torch.full((1, round(10.0 / dt)), rate * dt, dtype=torch.float64)
        off.append(float(short_term_plasticity.released(synapse, q, dt)[0, -1]) / (rate * dt) - u * x)
    assert abs(off[1]) < 5e-3 * u * x
    assert off[0] / off[1] == pytest.approx(2, abs=0.1)


def test_halving_the_step_hardly_changes_the_working_memory():
    """Of first order: what a halving changes is half of what the halving before changed, and a few per cent."""
    ends = []
    for dt in (0.002, 0.001, 0.0005):
        found = working_memory.simulate(working_memory.Network(), [0.25], dt)
        ends.append(torch.stack([found.u[0, round(0.74 / dt)], found.x[0, round(0.74 / dt)]]))
    first, second = (float((a - b).abs().max()) for a, b in itertools.pairwise(ends))
    assert second < 0.02
    assert first / second == pytest.approx(2, abs=0.5)


def test_long_term_weights_of_the_network_are_hebbs():
    net = working_memory.Network(J=6.0)
    assert torch.equal(net.W, 6.0 * torch.eye(5, dtype=torch.float64))


# ---- three factors, BTSP, dendritic error ------------------------------------------------------------------------------


def test_halving_the_step_does_not_change_credit_or_the_kernel_of_btsp():
    delays = [0.0, 0.1, 0.5]
    for measure, dts in ((three_factor.credit, (0.02, 0.01)), (three_factor.spiking_credit, (0.010, 0.005))):
        one, half = (measure(delays, dt) for dt in dts)
        assert np.allclose(one, half, rtol=0, atol=1e-12)
    one, half = (btsp.kernel([-0.4, 0.0, 0.6], dt) for dt in (0.02, 0.01))
    assert np.allclose(one, half, rtol=0, atol=1e-9)


def test_halving_the_step_halves_the_error_of_the_bounded_rule():
    coarse, middle, fine = (btsp.fields(dt)[-1] for dt in (0.02, 0.01, 0.005))
    first, second = (coarse - middle).abs().max(), (middle - fine).abs().max()
    assert second < 0.01
    assert float(first / second) == pytest.approx(2, abs=0.4)


def test_the_neuron_of_two_compartments_is_its_differential_equation():
    """Against Euler steps so small that a halving changes nothing."""
    neuron, dt = dendritic_error.Neuron(), 5e-6
    k, v = dendritic_error._patterns()
    eta = 20.0
    W, U = np.zeros(10), 0.0
    for pattern, teacher in zip(k[:2].numpy(), v[:2].tolist(), strict=True):
        for _ in range(2000):
            potential = W @ pattern
            W, U = (
                W + dt * eta * (U - neuron.attenuation * potential) * pattern,
                U + dt * (-neuron.leak * U + neuron.dendrite * (potential - U) + neuron.teacher * (teacher - U)),
            )
    found = [dendritic_error.two_compartments(neuron, k[:3], v[:3], eta, 0.01, step)[2].numpy() for step in (0.001, 0.0005, 0.00025)]
    assert np.allclose(found[2], W, rtol=0, atol=1e-3)
    assert abs(found[0] - found[1]).max() / abs(found[1] - found[2]).max() == pytest.approx(2, abs=0.3)


# ---- plastic networks --------------------------------------------------------------------------------------------------


def test_the_binomial_tail_is_the_count_of_all_outcomes():
    for patterns, known in ((2, 5), (3, 4), (4, 3)):
        sums = [sum(coins) for coins in itertools.product((-1, 1), repeat=(patterns - 1) * known)]
        share = sum(1.0 if s < -known else 0.5 if s == -known else 0.0 for s in sums) / len(sums)
        assert plastic_networks.binomial_tail(patterns, known) == pytest.approx(share, abs=1e-12)


def cell_inputs(rule, length):
    draw = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    given = {"k": rand(1, length, 1, 4), "c": rand(1, length, 1, 3).sign() * (rand(1, length, 1, 3) > 0)}
    given["eta"] = torch.full((1, length, 1), 0.3, dtype=torch.float64)
    given |= {n: rand(1, *rule.signals[n].shapes(4, 3)[0]) for n in ("w", "alpha", "u", "b") if n in rule.signals}
    return 0.5 * rand(1, 1, 3, 4), {n: x for n, x in given.items() if n in rule.signals}


def by_hand(rule, state, given):
    """The cells with numpy, a token at a time."""
    H = state[0, 0].numpy()
    w, alpha, *rest = (given[n][0].numpy() for n in ("w", "alpha", "u", "b") if n in given)
    out = []
    for t in range(given["k"].shape[1]):
        k = given["k"][0, t, 0].numpy()
        y = np.tanh((w + alpha * H) @ k)
        if rule is plastic_networks.modulated:
            H = np.clip(H + np.tanh(rest[0] @ y + rest[1]) * np.outer(y, k), -1, 1)
        else:
            c = given["c"][0, t, 0].numpy()
            y = np.where(c == 0, y, c)
            H = 0.7 * H + 0.3 * np.outer(y, k)
        out.append(y)
    return np.array(out).reshape(-1, 3), H


CELLS = (plastic_networks.plastic, plastic_networks.modulated)


@pytest.mark.parametrize("rule", CELLS, ids=lambda r: r.name)
@pytest.mark.parametrize("length", [0, 1, 11])
def test_cells_are_those_of_their_papers(rule, length):
    state, given = cell_inputs(rule, length)
    y, H = fw.scan(rule, state=state, **given)
    expected, after = by_hand(rule, state, given)
    assert np.allclose(y[0, :, 0].numpy(), expected, rtol=0, atol=1e-10)
    assert np.allclose(H[0, 0].numpy(), after, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", CELLS, ids=lambda r: r.name)
def test_gradients_reach_slow_weights_through_plasticity(rule):
    state, given = cell_inputs(rule, 4)
    slow = {n: x.clone().requires_grad_() for n, x in given.items() if rule.signals[n].role.slow}
    read = lambda *s: fw.scan(rule, state=state, **{**given, **dict(zip(slow, s, strict=True))}).y[:, -1]  # noqa: E731
    assert torch.autograd.gradcheck(read, tuple(slow.values()), atol=1e-7)
