"""Mechanisms of synapses against sums over pairs of spikes and loops written from their papers, and their export to Brian2."""

import math

import numpy as np
import pytest
import torch

import fastweights as fw
from fastweights.language.errors import FormError, SignalError
from fastweights.neuro import brian
from fastweights.neuro.spikes import log_decay, regular, render, steady
from fastweights.neuro.synapses import (
    Gain,
    bounded_btsp,
    btsp,
    dendritic_error,
    nearest_stdp,
    rewarded_stdp,
    short_term,
    stdp,
)
from fastweights.rules import eligibility

DT, TAU_PRE, TAU_POST, A_PLUS, A_MINUS = 0.001, 0.017, 0.034, 0.7, 0.3
K, V = 4, 3
BOUNDED = bounded_btsp(Gain(0.4, 10.0), Gain(0.1, 20.0))
RULES = (stdp, nearest_stdp, short_term, btsp, BOUNDED, eligibility, rewarded_stdp, dendritic_error)


def spikes(length, channels, seed, rate=0.15):
    return (torch.rand(1, length, 1, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) < rate).double()


def numbers(length, **more):
    decays = {"g_pre": log_decay(TAU_PRE, DT), "g_post": log_decay(TAU_POST, DT)}
    return steady(1, length, a_plus=A_PLUS, a_minus=A_MINUS, **decays, **more)


def signals(rule, length, seed=0):
    """Signals of a rule: spikes, and numbers that suit it."""
    given = {"q": spikes(length, K, seed), "k": spikes(length, K, seed + 1), "v": spikes(length, V, seed + 2)}
    scalars = dict.fromkeys(rule.signals, 0.3) | {
        "r": 0.5,
        "g": -0.1,
        "g_e": -0.05,
        "g_i": -0.1,
        "g_f": -0.01,
        "g_d": -0.1,
        "g_pre": -0.06,
        "g_post": -0.03,
    }
    return {n: given[n] if n in given else steady(1, length, x=scalars[n])["x"] for n in rule.signals}


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_forms_and_gradients_agree(rule):
    assert fw.check(rule).passed


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_mechanisms_of_one_matrix_have_every_form(rule):
    assert ("parallel" not in rule.forms) == (rule in (eligibility, rewarded_stdp))
    assert rule.doc
    assert rule.cite
    assert rule.latex()


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_cutting_a_sequence_changes_nothing(rule):
    s = signals(rule, 13)
    draw = torch.Generator().manual_seed(0)
    start = tuple(torch.rand(1, 1, *state.shapes(K, V)[0], generator=draw, dtype=torch.float64) for state in rule.states.values())
    whole = fw.scan(rule, state=start, **s)
    for cuts in ([0, 5, 13], [0, 0, 12, 13], list(range(14))):
        state, parts = start, []
        for a, b in zip(cuts, cuts[1:], strict=False):
            y, state = fw.scan(rule, state=state, **{n: x[:, a:b] for n, x in s.items()})
            parts.append(y)
        assert torch.allclose(torch.cat(parts, 1), whole.y, rtol=0, atol=1e-12)
        for new, last in zip(*(x if isinstance(x, tuple) else (x,) for x in (state, whole.state)), strict=True):
            assert torch.allclose(new, last, rtol=0, atol=1e-12)


# ---- STDP ------------------------------------------------------------------------------------------------------------


def pairs(k, v, nearest):
    """The weight (V, K) by the definition: sums over pairs of spikes, of which those of one step do nothing."""
    W = np.zeros((V, K))
    for i in range(V):
        for j in range(K):
            pre, post = (np.flatnonzero(x) for x in (k[:, j], v[:, i]))
            for t in post:
                earlier = pre[pre < t]
                W[i, j] += sum(A_PLUS * math.exp(-(t - s) * DT / TAU_PRE) for s in (earlier[-1:] if nearest else earlier))
            for s in pre:
                earlier = post[post < s]
                W[i, j] -= sum(A_MINUS * math.exp(-(s - t) * DT / TAU_POST) for t in (earlier[-1:] if nearest else earlier))
    return W


@pytest.mark.parametrize("rule", [stdp, nearest_stdp], ids=lambda r: r.name)
@pytest.mark.parametrize("length", [0, 1, 2, 97])
def test_stdp_is_the_sum_over_pairs(rule, length):
    k, v = spikes(length, K, 1), spikes(length, V, 2)
    W = fw.scan(rule, q=k, k=k, v=v, **numbers(length)).state[0][0, 0]
    assert np.allclose(W.numpy(), pairs(k[0, :, 0].numpy(), v[0, :, 0].numpy(), rule is nearest_stdp), rtol=0, atol=1e-10)


def test_a_pair_in_one_step_does_nothing_and_neighbours_differ_from_all_pairs():
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for rule in (stdp, nearest_stdp):
        assert float(fw.scan(rule, q=one, k=one, v=one, **numbers(1)).state[0]) == 0
    k, v = spikes(97, K, 1), spikes(97, V, 2)
    all_pairs, nearest = (fw.scan(rule, q=k, k=k, v=v, **numbers(97)).state[0] for rule in (stdp, nearest_stdp))
    assert (all_pairs - nearest).abs().max() > 0.1


def test_stdp_reversed_in_time_and_side_is_the_transpose():
    k, v = spikes(31, K, 1), spikes(31, V, 2)
    W = fw.scan(stdp, q=k, k=k, v=v, **numbers(31)).state[0]
    swapped = numbers(31)
    swapped = {"a_plus": -swapped["a_minus"], "a_minus": -swapped["a_plus"], "g_pre": swapped["g_post"], "g_post": swapped["g_pre"]}
    assert torch.allclose(fw.scan(stdp, q=v, k=v, v=k, **swapped).state[0], W.mT, rtol=0, atol=1e-12)


# ---- short-term plasticity -------------------------------------------------------------------------------------------


def mongillo(q, U, tau_f, tau_d):
    """u relaxes to U; a spike releases u x with the u and x it finds, then lowers x and raises u."""
    u, x, out = U, 1.0, []
    for now in q:
        u, x = U + (u - U) * math.exp(-DT / tau_f), 1 + (x - 1) * math.exp(-DT / tau_d)
        out.append(u * x * now)
        u, x = u + U * (1 - u) * now, x - u * x * now
    return out


def tsodyks(q, U, tau_f, tau_d):
    """u relaxes to 0; a spike raises u before it releases u x."""
    u, x, out = 0.0, 1.0, []
    for now in q:
        u, x = u * math.exp(-DT / tau_f), 1 + (x - 1) * math.exp(-DT / tau_d)
        if now:
            u = u + U * (1 - u)
        out.append(u * x * now)
        x -= u * x * now
    return out


@pytest.mark.parametrize("length", [0, 1, 101])
def test_the_two_orders_of_u_and_x_are_one_model_and_it_is_this_rule(length):
    q, W = spikes(length, K, 3), torch.randn(1, 1, V, K, dtype=torch.float64)
    zero = torch.zeros(1, 1, K, dtype=torch.float64)
    U, tau_f, tau_d = 0.2, 0.05, 0.02
    given = steady(1, length, U=U, g_f=log_decay(tau_f, DT), g_d=log_decay(tau_d, DT))
    y, (after, *_) = fw.scan(short_term, state=(W, zero, zero), q=q, **given)
    for order in (mongillo, tsodyks):
        released = torch.tensor([order(q[0, :, 0, j].tolist(), U, tau_f, tau_d) for j in range(K)], dtype=torch.float64)
        assert torch.allclose(y[0, :, 0], (W[0, 0] @ released).mT.reshape(length, V), rtol=0, atol=1e-12)
    assert torch.equal(after, W)


def test_u_and_x_of_a_synapse_stay_between_their_bounds():
    q = spikes(500, K, 4, rate=0.9)
    given = steady(1, 500, U=0.4, g_f=log_decay(1.5, DT), g_d=log_decay(0.2, DT))
    W, zero = torch.zeros(1, 1, 1, K, dtype=torch.float64), torch.zeros(1, 1, K, dtype=torch.float64)
    _, f, d = fw.scan(short_term, state=(W, zero, zero), q=q, **given).state
    assert ((f >= 0) & (f <= 1) & (d >= 0) & (d <= 1)).all()


# ---- BTSP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 53])
def test_btsp_is_hebb_on_traces(length):
    s = signals(btsp, length)
    e, i, W = np.zeros(K), np.zeros(V), np.zeros((V, K))
    for k, v in zip(s["k"][0, :, 0].numpy(), s["v"][0, :, 0].numpy(), strict=True):
        e, i = math.exp(-0.05) * e + k, math.exp(-0.1) * i + v
        W = W + 0.3 * np.outer(i, e)
    assert np.allclose(fw.scan(btsp, **s).state[0][0, 0].numpy(), W, rtol=0, atol=1e-10)


def test_bounded_btsp_is_its_equation_and_stays_within_bounds():
    def gain(s, half, slope):
        sigmoid = lambda x: 1 / (1 + np.exp(-slope * (x - half)))  # noqa: E731
        return (sigmoid(s) - sigmoid(0)) / (sigmoid(1) - sigmoid(0))

    length, top = 60, 1.5
    draw = np.random.default_rng(0)
    k, p = draw.random((length, K)) * 0.05, (draw.random(length) < 0.1) * 0.5
    W, e, i = np.full((1, K), 0.5), np.zeros(K), np.zeros(K)
    given = steady(1, length, r_up=0.2, r_down=0.1, g_e=-0.05, g_i=-0.1)
    state = (torch.full((1, 1, 1, K), 0.5, dtype=torch.float64), *(torch.zeros(1, 1, K, dtype=torch.float64) for _ in range(2)))
    tensor = lambda x, *shape: torch.tensor(x, dtype=torch.float64).reshape(1, length, 1, *shape)  # noqa: E731
    found = fw.scan(
        BOUNDED, state=state, q=tensor(k, K), k=tensor(k, K), v=torch.full((1, length, 1, 1), top).double(), p=tensor(p), **given
    )
    for now, plateau in zip(k, p, strict=True):
        e, i = math.exp(-0.05) * e + now, math.exp(-0.1) * i + plateau
        W = W + 0.2 * gain(e * i, 0.4, 10.0) * (top - W) - 0.1 * gain(e * i, 0.1, 20.0) * W
    assert np.allclose(found.state[0][0, 0].numpy(), W, rtol=0, atol=1e-10)
    assert ((W > 0) & (top > W)).all()
    assert abs(W - 0.5).max() > 0.01


def test_a_gain_without_a_slope_is_refused():
    with pytest.raises(SignalError, match="slope > 0"):
        Gain(0.1, 0.0)


# ---- three factors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 23])
def test_eligibility_backwards_in_time_is_credit(length):
    """The forward view: W is Hebb's with the rate of a step the reward that is to come, each step sooner worth more."""
    draw = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, length, 1, n, generator=draw, dtype=torch.float64) for n in (K, V))
    r, g = torch.randn(1, length, 1, generator=draw, dtype=torch.float64), -torch.rand(1, length, 1, generator=draw, dtype=torch.float64)
    credit, ahead = torch.zeros_like(r), 0.0
    for t in reversed(range(length)):
        ahead = float(r[0, t, 0]) + (math.exp(float(g[0, t + 1, 0])) * ahead if t + 1 < length else 0.0)
        credit[0, t, 0] = ahead
    W, _ = fw.scan(eligibility, q=k, k=k, v=v, r=r, g=g).state
    assert torch.allclose(W, fw.scan(fw.rules.hebb_rate, q=k, k=k, v=v, beta=credit).state, rtol=0, atol=1e-10)


def test_rewarded_stdp_is_stdp_if_reward_and_memory_are_constant():
    """With r = 1 at the end alone and no decay of E, the eligibility is the weight that STDP would have made."""
    k, v = spikes(41, K, 1), spikes(41, V, 2)
    given = numbers(41, g=0.0, r=0.0)
    given["r"] = given["r"].clone()
    given["r"][:, -1] = 1
    W, E, *_ = fw.scan(rewarded_stdp, q=k, k=k, v=v, **given).state
    wanted = fw.scan(stdp, q=k, k=k, v=v, **numbers(41)).state[0]
    assert torch.allclose(W, wanted, rtol=0, atol=1e-12)
    assert torch.allclose(E, wanted, rtol=0, atol=1e-12)


# ---- dendritic error -------------------------------------------------------------------------------------------------


def test_the_mismatch_of_soma_and_dendrite_is_the_delta_rule():
    draw = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 17, 1, n, generator=draw, dtype=torch.float64) for n in (K, V))
    a, n, beta = (torch.rand(2, 17, 1, generator=draw, dtype=torch.float64) * 0.5 + 0.3 for _ in range(3))
    one = fw.scan(dendritic_error, q=k, k=k, v=v, beta=beta, a=a, n=n)
    two = fw.scan(fw.rules.delta, q=k, k=k, v=v / a[..., None], beta=beta * n * a)
    assert torch.allclose(one.y, two.y, rtol=0, atol=1e-10)
    assert torch.allclose(one.state, two.state, rtol=0, atol=1e-10)


# ---- time ------------------------------------------------------------------------------------------------------------


def test_halving_the_step_changes_nothing_where_spikes_lie_on_the_grid():
    """Traces decay exactly: window, regular trains and releases are the same at any dt that divides all times."""
    found = []
    for dt in (0.002, 0.001, 0.0005):
        pre, post = (render(times, 0.4, dt).reshape(1, -1, 1, 1) for times in ([0.01, 0.05, 0.3], [0.02, 0.04, 0.31, 0.35]))
        length = pre.shape[1]
        both = [
            fw.scan(
                rule, q=pre, k=pre, v=post,
                **steady(1, length, a_plus=0.7, a_minus=0.3, g_pre=log_decay(TAU_PRE, dt), g_post=log_decay(TAU_POST, dt)),
            ).state[0].item()
            for rule in (stdp, nearest_stdp)
        ]  # fmt: skip
        q = render(regular(50.0, 0.4), 0.4, dt).reshape(1, -1, 1, 1)
        one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)
        y = fw.scan(short_term, state=(one, zero, zero), q=q, **steady(1, length, U=0.2, g_f=log_decay(1.5, dt), g_d=log_decay(0.2, dt))).y
        found.append([*both, *y[q > 0].tolist()])
    assert len(found[0]) == 22
    assert np.allclose(found[0], found[1], rtol=0, atol=1e-12)
    assert np.allclose(found[1], found[2], rtol=0, atol=1e-12)


# ---- Brian2 ----------------------------------------------------------------------------------------------------------

EXPORTED = {
    "stdp": (stdp, {"g_pre": TAU_PRE, "g_post": TAU_POST}, {"a_plus": A_PLUS, "a_minus": A_MINUS}),
    "nearest_stdp": (nearest_stdp, {"g_pre": TAU_PRE, "g_post": TAU_POST}, {"a_plus": A_PLUS, "a_minus": A_MINUS}),
    "short_term": (short_term, {"g_f": 0.05, "g_d": 0.02}, {"U": 0.2}),
}
PRE, POST = [0.002, 0.011, 0.013, 0.030, 0.051], [0.005, 0.012, 0.033, 0.034]  # no step has both


@fw.rule
def forgetful_stdp(
    W, x: fw.KeyState, z: fw.ValueState, k: fw.Key, v: fw.Value, a_plus: fw.Rate, a_minus: fw.Rate,
    g: fw.LogDecay, g_pre: fw.LogDecay, g_post: fw.ValueLogDecay,
):  # fmt: skip
    """STDP, the weight decays, and presynaptic spikes alone depress by a share of it."""
    W, x, z = stdp(g.exp() * W, x, z, k, v, a_plus, a_minus, g_pre, g_post)
    return W * (1 - 0.25 * k), x, z


EXPORTED["forgetful_stdp"] = (forgetful_stdp, {"g": 0.5, **EXPORTED["stdp"][1]}, EXPORTED["stdp"][2])


def by_scan(rule, tau, given):
    pre, post = (render(times, 0.06, DT).reshape(1, -1, 1, 1) for times in (PRE, POST))
    everything = {"q": pre, "k": pre, "v": post, **steady(1, 60, **{n: log_decay(t, DT) for n, t in tau.items()}, **given)}
    start = tuple(torch.full((1, 1, *s.shapes(1, 1)[0]), 0.5 * (i == 0), dtype=torch.float64) for i, s in enumerate(rule.states.values()))
    y, state = fw.scan(rule, state=start, **{n: x for n, x in everything.items() if n in rule.signals})
    return float(y.sum()), float(state[0])


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_equations_do_what_the_rule_does(name):
    """The strings of ``on_pre`` and ``on_post`` are executed at the spikes, and states decay exactly between them."""
    rule, tau, given = EXPORTED[name]
    made = brian.synapses(rule, tau=tau, read="v", **given)
    lines = [line.split(" : ")[0] for line in made.model.splitlines()]
    decays = {line[1 : line.index("/")]: line.split("(")[1].split("*")[0] for line in lines if "/dt" in line}
    values = {line.split("/")[0].removeprefix("d") if "/dt" in line else line: 0.0 for line in lines} | {"w": 0.5, "v_post": 0.0}
    now = -DT  # a step decays first: what it begins with is of a step before
    for t, event in sorted([*((t, made.on_pre) for t in PRE), *((t, made.on_post) for t in POST), (0.059, "")]):
        for state, constant in decays.items():
            values[state] *= math.exp(-(t - now) / made.namespace[constant])
        exec(event, dict(made.namespace), values)
        now = t
    read, weight = by_scan(rule, tau, given)
    assert values["w"] == pytest.approx(weight, abs=1e-12)
    assert values["v_post"] == pytest.approx(read if rule.reads_itself else 0.0, abs=1e-12)


@pytest.mark.parametrize("name", EXPORTED)
def test_brian_finds_the_same_weights(name):
    brian2 = pytest.importorskip("brian2")
    rule, tau, given = EXPORTED[name]
    made = brian.synapses(rule, tau=tau, **given)
    brian2.prefs.codegen.target = "numpy"
    brian2.start_scope()
    brian2.defaultclock.dt = DT * brian2.second
    pre = brian2.SpikeGeneratorGroup(1, [0] * len(PRE), np.array(PRE) * brian2.second)
    fires = brian2.TimedArray(render(POST, 0.06, DT).numpy(), dt=DT * brian2.second)
    post = brian2.NeuronGroup(1, "v : 1", threshold="fires(t) > 0.5", namespace={"fires": fires})
    made_synapses = brian2.Synapses(pre, post, model=made.model, on_pre=made.on_pre, on_post=made.on_post or None, namespace=made.namespace)
    made_synapses.connect()
    made_synapses.w = 0.5 * math.exp(-DT / tau.get("g", math.inf))  # a step decays first
    seen = brian2.SpikeMonitor(post)
    brian2.Network(pre, post, made_synapses, seen).run(0.06 * brian2.second)
    read, weight = by_scan(rule, tau, given)
    assert np.allclose(np.asarray(seen.t / brian2.second), POST, atol=1e-9)
    since = 0.059 - max(PRE + POST)  # an event-driven weight is as it was at its last spike
    assert float(made_synapses.w[0]) * math.exp(-since / tau.get("g", math.inf)) == pytest.approx(weight, abs=1e-10)
    assert float(post.v[0]) == pytest.approx(read if rule.reads_itself else 0.0, abs=1e-10)


@fw.rule
def named_i(W, i: fw.KeyState, k: fw.Key, v: fw.Value):
    return W + fw.outer(v, i), i + k


@fw.rule
def tangled(W, x: fw.KeyState, z: fw.KeyState, k: fw.Key, v: fw.Value):
    return W + fw.outer(v, x), x + k * z, z + k * x


@fw.rule
def both(W, k: fw.Key, v: fw.Value):
    return W + fw.outer(v, k) * W


@pytest.mark.parametrize(
    ("rule", "tau", "given", "says"),
    [
        (fw.rules.hebb, {}, {}, "where both sides spike in one step"),
        (fw.rules.delta, {}, {"beta": 0.1}, "sums over synapses"),
        (rewarded_stdp, {"g": 1.0, "g_pre": 1.0, "g_post": 1.0}, {"r": 1.0, "a_plus": 1.0, "a_minus": 1.0}, "between spikes w changes"),
        (btsp, {"g_e": 1.0, "g_i": 1.0}, {"beta": 1.0}, "the name of something else"),
        (both, {}, {}, "where both sides spike in one step"),
        (named_i, {}, {}, "the name of something else"),
        (tangled, {}, {}, "need each other"),
        (fw.rules.normalised_hebb, {}, {}, "no equations for Brian2"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_what_has_no_equations_is_refused(rule, tau, given, says):
    with pytest.raises(FormError, match=says):
        brian.synapses(rule, tau=tau, **given)


def test_numbers_of_an_export_are_checked():
    with pytest.raises(SignalError, match=r"missing \['g_post'\]"):
        brian.synapses(stdp, tau={"g_pre": 0.02}, a_plus=1.0, a_minus=1.0)
    with pytest.raises(SignalError, match=r"unknown \['b'\]"):
        brian.synapses(stdp, tau=EXPORTED["stdp"][1], a_plus=1.0, a_minus=1.0, b=1.0)
    with pytest.raises(SignalError, match="tau is -1"):
        brian.synapses(stdp, tau={"g_pre": -1.0, "g_post": 1.0}, a_plus=1.0, a_minus=1.0)
