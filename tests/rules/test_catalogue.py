"""Objectives, identities and eigenvalues of the catalogue."""

import pytest
import torch
from rows import R, name

import fastweights as fw
from fastweights.engine.check import descent_error, distance, example

WITH_OBJECTIVE = [r for r in R.CATALOGUE if r.objective is not None]


@pytest.mark.parametrize("rule", WITH_OBJECTIVE, ids=name)
def test_rules_descend_their_objectives(rule):
    for seed in range(3):
        assert descent_error(rule, rule.objective, seed) < 1e-12


def test_a_wrong_objective_is_noticed():
    assert descent_error(R.hebb_rate, R.delta.objective) > 1e-3


def test_every_rule_has_an_objective_or_a_reason_not_to():
    without = {r.name for r in R.CATALOGUE if r.objective is None}
    assert without == {
        "normalised_hebb", "exp_gated_hebb", "bonus_hebb", "erase_write", "comba", "generalised_delta",
        "preconditioned_delta", "td", "decay", "erase", "write",
    }  # fmt: skip


@pytest.mark.parametrize("rule", R.CATALOGUE, ids=name)
def test_every_rule_is_documented(rule):
    assert rule.doc
    assert rule.cite or rule in (R.decay, R.erase, R.write)
    assert rule.latex()
    assert R.get(rule.name) is rule


def same(a, b):
    return distance(a.y, b.y) < 1e-12 and distance(a.state, b.state) < 1e-12


def test_gated_delta_contains_its_relatives():
    s = example(R.gated_delta, 2, 9, 2, 4, 3)
    no_decay, no_write = s | {"g": torch.zeros_like(s["g"])}, s | {"beta": torch.zeros_like(s["beta"])}
    plain = {n: x for n, x in s.items() if n != "g"}
    assert same(fw.scan(R.gated_delta, **no_decay), fw.scan(R.delta, **plain))
    state = torch.rand(2, 2, 3, 4, dtype=torch.float64)
    assert same(fw.scan(R.gated_delta, **no_write, state=state), fw.scan(R.decay, q=s["q"], g=s["g"], state=state))


def test_one_decay_for_all_channels_is_a_decay_per_head():
    for rule in (R.gated_delta, R.decayed_hebb, R.generalised_delta, R.erase_write):
        s = example(rule, 2, 9, 2, 4, 3)
        per_channel = s | {"g": s["g"].unsqueeze(-1).expand(2, 9, 2, 4)}
        assert same(fw.scan(rule, **s), fw.scan(rule, **per_channel))


def test_gated_deltanet_2_with_equal_gates_is_kda():
    s = example(R.gated_delta, 2, 9, 2, 4, 3, per_channel=True)
    beta = s.pop("beta").unsqueeze(-1)
    gates = {"b": beta.expand(2, 9, 2, 4), "w": beta.expand(2, 9, 2, 3)}
    assert same(fw.scan(R.erase_write, **s, **gates), fw.scan(R.gated_delta, **s, beta=beta.squeeze(-1)))


def test_a_rate_of_one_stores_and_a_rate_of_two_reflects():
    W, v = torch.rand(3, 4, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    k = torch.nn.functional.normalize(torch.rand(4, dtype=torch.float64), dim=0)
    stored = R.delta(W, k, v, torch.tensor(1.0, dtype=torch.float64))
    assert torch.allclose(stored @ k, v)
    reflected = R.delta(W, k, torch.zeros_like(v), torch.tensor(2.0, dtype=torch.float64))
    assert torch.allclose(reflected @ k, -(W @ k))


@pytest.mark.parametrize(("beta", "a"), [(0.3, 1.0), (0.7, 0.5), (1.7, 0.9)])
def test_eigenvalues_of_the_transition(beta, a):
    """hebb 1; decay a; delta 1 and 1 - beta; gated delta a and a (1 - beta)."""
    k = torch.nn.functional.normalize(torch.rand(4, dtype=torch.float64), dim=0)
    numbers = {"beta": torch.tensor(beta, dtype=torch.float64), "g": torch.tensor(a, dtype=torch.float64).log()}

    def eigenvalues(rule):
        signals = {n: numbers.get(n, k if n == "k" else torch.zeros(4, dtype=torch.float64)) for n in rule.arguments.signals}
        M = rule(torch.eye(4, dtype=torch.float64), **signals)  # W M for W = 1
        return sorted(torch.linalg.eigvals(M).real.tolist())

    assert eigenvalues(R.hebb) == pytest.approx([1] * 4)
    assert eigenvalues(R.decayed_hebb) == pytest.approx([a] * 4)
    assert eigenvalues(R.delta) == pytest.approx([1 - beta, 1, 1, 1])
    assert eigenvalues(R.gated_delta) == pytest.approx(sorted([a * (1 - beta), a, a, a]))


def test_normalised_linear_attention_is_a_weighted_mean():
    s = example(R.normalised_hebb, 1, 9, 1, 4, 3)
    constant = s | {"v": torch.ones_like(s["v"])}
    assert torch.allclose(fw.scan(R.normalised_hebb, **constant).y, torch.ones(1, 9, 1, 3, dtype=torch.float64))
    stacked = fw.scan(R.hebb, q=s["q"], k=s["k"], v=torch.cat([s["v"], torch.ones_like(s["v"][..., :1])], -1)).y
    assert torch.allclose(fw.scan(R.normalised_hebb, **s).y, stacked[..., :-1] / stacked[..., -1:])


def test_mlstm_is_its_unstabilised_definition():
    """C = sum of products of exp(g) and exp(i), y = C q / max(|n q|, 1), where nothing overflows."""
    s = example(R.exp_gated_hebb, 1, 9, 1, 4, 3)
    C, n, ys = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), []
    for t in range(9):
        q, k, v, i, g = (s[x][0, t, 0] for x in ("q", "k", "v", "i", "g"))
        C, n = g.exp() * C + i.exp() * torch.outer(v, k), g.exp() * n + i.exp() * k
        ys.append(C @ q / torch.clamp((n @ q).abs(), min=1))
    assert torch.allclose(fw.scan(R.exp_gated_hebb, **s).y[0, :, 0], torch.stack(ys))
    huge = s | {"i": s["i"] + 1000}
    assert fw.scan(R.exp_gated_hebb, **huge).y.isfinite().all()


def test_the_implicit_step_never_overshoots():
    s = example(R.implicit_delta, 1, 50, 1, 4, 4)
    s = {n: x * 30 if n in ("k", "beta") else x for n, x in s.items()}
    assert fw.scan(R.implicit_delta, **s).state.abs().max() < 10


def test_successor_representation_of_a_ring():
    """td learns the discounted occupancy gamma^((j - i) mod n) / (1 - gamma^n) of a ring of states."""
    n, gamma, laps = 5, 0.8, 400
    phi = torch.eye(n, dtype=torch.float64)
    at = torch.arange(n * laps) % n
    k, nxt = phi[at].view(1, -1, 1, n), phi[(at + 1) % n].view(1, -1, 1, n)
    numbers = {
        "beta": torch.full((1, n * laps, 1), 0.3, dtype=torch.float64),
        "gamma": torch.full((1, n * laps, 1), gamma, dtype=torch.float64),
    }
    W = fw.scan(R.td, q=k, k=k, k_next=nxt, v=k, **numbers).state[0, 0]
    want = torch.tensor([[gamma ** ((j - i) % n) / (1 - gamma**n) for i in range(n)] for j in range(n)], dtype=torch.float64)
    assert torch.allclose(W, want, atol=1e-6)


def test_overwriting_delta_forgets_the_old_value_and_hebb_does_not():
    """Every key is written twice with different values; one step of delta at rate 1 keeps the last."""
    keys = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    v = torch.randn(32, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    s = {"q": keys.repeat(2, 1).view(1, 32, 1, 16), "k": keys.repeat(2, 1).view(1, 32, 1, 16), "v": v.view(1, 32, 1, 16)}
    delta = fw.scan(R.delta, **s, beta=torch.ones(1, 32, 1, dtype=torch.float64)).state[0, 0]
    hebb = fw.scan(R.hebb, **s).state[0, 0]
    assert torch.allclose(delta @ keys.T, v[16:].T)
    assert torch.allclose(hebb @ keys.T, (v[:16] + v[16:]).T)


def test_parity_is_exact_at_any_length_with_reflections():
    """A start token writes 1; each one-token reflects it (beta = 2, v = 0); zeros leave it (beta = 0)."""
    bits = torch.randint(0, 2, (1000,), generator=torch.Generator().manual_seed(0))
    beta = torch.cat([torch.ones(1), 2.0 * bits]).view(1, -1, 1)
    k = torch.ones(1, 1001, 1, 1)
    v = torch.cat([torch.ones(1), torch.zeros(1000)]).view(1, -1, 1, 1)
    y = fw.scan(R.delta, q=k, k=k, v=v, beta=beta).y.flatten()
    assert torch.equal(y[1:], 1.0 - 2 * (bits.cumsum(0) % 2))
