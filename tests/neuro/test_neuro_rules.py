"""Rules of synapses: each against a plain loop written from its paper, its exact limits, and time that is physical."""

import math

import numpy as np
import pytest
import torch

import fastweights as fw
from fastweights.neuro.figures.benna_fusi import trace_of
from fastweights.neuro.rules import chain_modes, oja_neurons, synaptic_chain, tripartite

CLOSE = {"rtol": 0, "atol": 1e-10}
RULES = (oja_neurons, synaptic_chain, tripartite)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(rule, B=2, T=11, H=2, K=4, V=3):
    shapes = {"q": (K,), "k": (K,), "v": (V,), "beta": (), "dt": (), "g": ()}
    signals = {n: draw(B, T, H, *shapes[n], seed=i) for i, n in enumerate(rule.signals)}
    for n in {"beta", "dt"} & signals.keys():
        signals[n] = 0.1 * signals[n].abs()
    if rule is oja_neurons:
        signals["k"] *= 0.5
    if rule is tripartite:
        signals |= {"q": signals["q"].exp(), "k": signals["k"].exp(), "g": -signals["g"].abs()}
    return signals


def states(rule, B=2, H=2, K=4, V=3):
    size = {"Matrix": (V, K), "KeyState": (K,), "ScalarState": ()}
    return tuple(0.5 + 0.1 * draw(B, H, *size[s.role.name], seed=9) for s in rule.states.values())


TOKENS = {
    "oja_neurons": lambda s, x: [s[0] + x["beta"] * np.outer(s[0] @ x["k"], x["k"] - s[0].T @ (s[0] @ x["k"]))],
    "synaptic_chain": lambda s, x: [s[0] @ exponential(chain(4).numpy() * x["dt"]).T + np.outer(x["v"], x["k"])],
    "tripartite": lambda s, x: [
        s[0] + np.outer(x["v"], x["k"]),
        s[1] + x["k"],
        np.exp(x["g"]) * s[2] + (1 - np.exp(x["g"])) * (s[1] + x["k"]) @ x["q"],
    ],
}


def exponential(A):
    """By its series; A is small."""
    total = term = np.eye(len(A))
    for n in range(1, 25):
        term = term @ A / n
        total = total + term
    return total


def chain(m):
    """The matrix A of du/dt = A u."""
    A, C, g = torch.zeros(m, m, dtype=torch.float64), [2.0**i for i in range(m)], [2.0 ** -(i + 3) for i in range(m)]
    for i in range(m):
        A[i, i] -= g[i] / C[i]
        if i + 1 < m:
            A[i, i + 1] += g[i] / C[i]
            A[i + 1, i] += g[i] / C[i + 1]
            A[i + 1, i + 1] -= g[i] / C[i + 1]
    return A


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_a_rule_is_a_plain_loop_over_tokens(rule):
    signals, state = given(rule), states(rule)
    y, new = fw.scan(rule, state=state, **signals)
    new = new if isinstance(new, tuple) else (new,)
    for b in range(2):
        for h in range(2):
            now = [s[b, h].numpy() for s in state]
            for t in range(11):
                x = {n: s[b, t, h].numpy() for n, s in signals.items()}
                now = TOKENS[rule.name](now, x)
                read = now[0] @ x["q"] / (now[2] if rule is tripartite else 1)
                np.testing.assert_allclose(y[b, t, h], read, **CLOSE)
            for found, expected in zip(new, now, strict=True):
                np.testing.assert_allclose(found[b, h], expected, **CLOSE)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("cut", [0, 1, 7, 11])
def test_cutting_a_sequence_changes_nothing(rule, cut):
    signals, state = given(rule), states(rule)
    y, last = fw.scan(rule, state=state, **signals)
    first, middle = fw.scan(rule, state=state, **{n: x[:, :cut] for n, x in signals.items()})
    rest, end = fw.scan(rule, state=middle, **{n: x[:, cut:] for n, x in signals.items()})
    np.testing.assert_allclose(torch.cat([first, rest], 1), y, **CLOSE)
    for a, b in zip(*(s if isinstance(s, tuple) else (s,) for s in (end, last)), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


@pytest.mark.parametrize("rule", [oja_neurons, synaptic_chain, tripartite], ids=lambda r: r.name)
def test_gradients(rule):
    signals, state = given(rule, B=1, T=3, H=1), states(rule, B=1, H=1)
    names = list(signals)

    def run(*tensors):
        return fw.scan(rule, state=tensors[: len(state)], **dict(zip(names, tensors[len(state) :], strict=True))).y

    assert torch.autograd.gradcheck(run, [x.clone().requires_grad_() for x in (*state, *signals.values())])


def test_only_the_astrocyte_is_affine_in_w():
    assert {r.name for r in RULES if "chunk" in r.forms} == {"tripartite"}


def test_an_or_is_a_count_cut_at_one():
    k, v = (draw(2, 13, 1, n, seed=n).gt(0.5).double() for n in (9, 8))
    counted = fw.scan(fw.rules.hebb, q=k, k=k, v=v).state
    assert torch.equal(fw.scan(fw.rules.willshaw, q=k, k=k, v=v).state, counted.clamp(max=1.0))


# ---- Oja -----------------------------------------------------------------------------------------------------------------------


def flow_error(dt, tau=1.0, seconds=2.0):
    """How far the rule is from the mean flow when the principal axes are shown in turn, at a rate that gives C = diag(variances)."""
    variances = torch.tensor([1.0, 0.5], dtype=torch.float64)
    shown = torch.diag((2 * variances).sqrt())
    T = round(seconds / dt)
    k = shown.repeat(T // 2, 1)[None, :, None]
    w0 = torch.tensor([[0.2, 0.4]], dtype=torch.float64)
    W = fw.scan(oja_neurons, q=k, k=k, beta=k.new_full((1, T, 1), dt / tau), state=w0[None, None]).state[0, 0]
    grown = w0 * (variances * seconds / tau).exp()
    return float((W - grown / (1 + grown.square().sum() - w0.square().sum()).sqrt()).norm())


def test_ojas_neuron_follows_the_mean_flow_to_first_order_in_dt():
    errors = [flow_error(dt) for dt in (0.01, 0.005, 0.0025)]
    assert errors[0] < 0.01
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 1.9 < coarse / fine < 2.1


def test_orthonormal_rows_that_span_the_input_stay():
    W = torch.linalg.qr(draw(4, 4))[0][:2]
    k = (draw(1, 9, 1, 2) @ W.unsqueeze(0)).contiguous()
    last = fw.scan(oja_neurons, q=k, k=k, beta=k.new_full((1, 9, 1), 0.3), state=W[None, None]).state
    np.testing.assert_allclose(last[0, 0], W, **CLOSE)


# ---- the chain ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 7, 12])
def test_modes_are_those_of_the_chain(m):
    rates, E = chain_modes(m)
    assert (rates > 0).all()
    C = torch.diag(2.0 ** torch.arange(m, dtype=torch.float64))
    np.testing.assert_allclose(E @ torch.diag(-rates) @ E.T @ C, chain(m), **CLOSE)
    np.testing.assert_allclose(E @ E.T @ C, np.eye(m), **CLOSE)


def test_a_chain_of_no_variables_is_refused():
    with pytest.raises(fw.FastWeightError, match="at least 1"):
        chain_modes(0)


def test_the_chain_is_decayed_hebb_in_the_modes_of_its_chain():
    T, V, m = 17, 5, 6
    v, dt = draw(1, T, 1, V), draw(1, T, 1, seed=1).abs() * 10
    first = torch.eye(m, dtype=torch.float64)[0].expand(1, T, 1, m)
    chain_of_synapses = fw.scan(synaptic_chain, q=first, k=first, v=v, dt=dt).y
    rates, E = chain_modes(m)
    k = E[0].expand(1, T, 1, m)
    np.testing.assert_allclose(fw.scan(fw.rules.decayed_hebb, q=k, k=k, v=v, g=-rates * dt.unsqueeze(-1)).y, chain_of_synapses, **CLOSE)


def test_a_silent_step_in_the_middle_does_not_change_the_chain():
    """Halving dt: every interval as two, nothing written in between."""
    signals = given(synaptic_chain)
    split = {n: torch.stack([torch.zeros_like(x), x], 2).flatten(1, 2) for n, x in signals.items()}
    split["dt"] = signals["dt"].repeat_interleave(2, 1) / 2
    split["q"] = signals["q"].repeat_interleave(2, 1)
    np.testing.assert_allclose(fw.scan(synaptic_chain, **split).y[:, 1::2], fw.scan(synaptic_chain, **signals).y, **CLOSE)


def test_the_cascade_of_the_catalogue_tends_to_the_chain_as_its_steps_do():
    errors = []
    for n in (64, 128, 256):
        v = torch.zeros(1, n + 1, 1, 1, dtype=torch.float64)
        v[:, 0] = 1.0
        k, dt = torch.ones_like(v), torch.full((1, n + 1, 1), 30.0 / n, dtype=torch.float64)
        found = fw.scan(fw.rules.cascade, q=k, k=k, v=v, dt=dt).y[0, -1, 0, 0]
        errors.append(abs(float(found - trace_of(4, torch.tensor([30.0], dtype=torch.float64))[0])))
    assert errors[0] < 0.01
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 1.9 < coarse / fine < 2.1


def test_the_trace_of_a_long_chain_falls_as_the_square_root_of_time():
    trace = trace_of(14, torch.tensor([1e2, 1e4, 1e6], dtype=torch.float64))
    for a, b in zip(trace, trace[1:], strict=False):
        assert math.log10(a / b) / 2 == pytest.approx(0.5, abs=0.01)


# ---- the astrocyte -------------------------------------------------------------------------------------------------------------


def test_the_forms_of_the_astrocyte_agree():
    signals, state = given(tripartite, T=37), states(tripartite)
    each = [fw.scan(tripartite, state=state, form=form, **signals) for form in ("recurrent", "parallel", "chunk")]
    for other in each[1:]:
        np.testing.assert_allclose(other.y, each[0].y, **CLOSE)
        for a, b in zip(other.state, each[0].state, strict=True):
            np.testing.assert_allclose(a, b, **CLOSE)


def test_an_astrocyte_without_delay_is_normalised_linear_attention():
    signals = given(tripartite)
    expected = fw.scan(fw.rules.normalised_hebb, **{n: signals[n] for n in "qkv"}).y
    signals["g"] = torch.full_like(signals["g"], -math.inf)
    np.testing.assert_allclose(fw.scan(tripartite, **signals).y, expected, **CLOSE)


def test_a_finer_step_does_not_change_the_calcium():
    """A query that is held: twice as many steps of half the length."""
    state = states(tripartite)
    q, T = draw(2, 1, 2, 4).exp(), 10
    silent = torch.zeros(2, 2 * T, 2, 4, dtype=q.dtype), torch.zeros(2, 2 * T, 2, 3, dtype=q.dtype)
    fine, coarse = (
        fw.scan(
            tripartite, state=state, q=q.expand(2, n, 2, 4), k=silent[0][:, :n], v=silent[1][:, :n], g=q.new_full((2, n, 2), -2.0 / n)
        ).y
        for n in (2 * T, T)
    )
    np.testing.assert_allclose(fine[:, 1::2], coarse, **CLOSE)


# ---- Kalman --------------------------------------------------------------------------------------------------------------------


def test_the_kalman_rule_is_two_affine_rules_in_turn():
    """The precision grows by Hebb's rule; W moves by the generalised delta rule along the gain, P k / r for the new P."""
    k, v, r = draw(1, 13, 2, 4), draw(1, 13, 2, 3, seed=1), 0.7
    number = torch.ones(1, 13, 2, dtype=k.dtype)
    found = fw.unroll(fw.rules.rls, k=k, v=v, g=0 * number, r=r * number)
    start = torch.eye(4, dtype=k.dtype).expand(1, 2, 4, 4)
    gain = torch.linalg.solve(fw.unroll(fw.rules.hebb_rate, k=k, v=k, beta=number / r, state=start), k) / r
    np.testing.assert_allclose(found, fw.unroll(fw.rules.generalised_delta, k=gain, v=v, x=-k, y=gain, g=0 * number), **CLOSE)
