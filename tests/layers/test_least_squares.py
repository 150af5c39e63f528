"""Mesa is ridge regression, by whatever solver."""

import pytest
import torch

import fastweights as fw
from fastweights.engine.check import distance
from fastweights.layers.least_squares import mesa

DRAW = torch.Generator().manual_seed(0)


def signals(T=21, decay=True, B=2, H=2, K=5, V=3):
    q, k, v = (torch.randn(B, T, H, d, generator=DRAW, dtype=torch.float64) for d in (K, K, V))
    beta = torch.rand(B, T, H, generator=DRAW, dtype=torch.float64)
    g = -0.3 * torch.rand(B, T, H, generator=DRAW, dtype=torch.float64) * decay
    return {"q": q, "k": k, "v": v, "beta": beta, "g": g, "ridge": torch.rand(H, K, generator=DRAW, dtype=torch.float64) + 0.1}


def by_hand(s):
    y = torch.zeros_like(s["v"])
    B, T, H, V = s["v"].shape
    for b in range(B):
        for h in range(H):
            for t in range(T):
                weight = [s["beta"][b, i, h] * s["g"][b, i + 1 : t + 1, h].sum().exp() for i in range(t + 1)]
                K, V = s["k"][b, : t + 1, h], s["v"][b, : t + 1, h]
                D = torch.diag(torch.stack(weight))
                A = K.T @ D @ K + torch.diag(s["ridge"][h])
                y[b, t, h] = V.T @ D @ K @ torch.linalg.solve(A, s["q"][b, t, h])
    return y


@pytest.mark.parametrize("solver", ["conjugate_gradient", "solve"])
@pytest.mark.parametrize("decay", [False, True])
def test_mesa_is_ridge_regression(solver, decay):
    s = signals(decay=decay)
    assert distance(mesa(**s, solver=solver)[0], by_hand(s)) < 1e-8


def test_solvers_agree_with_the_recursion():
    s = signals(decay=False)
    s["beta"], s["ridge"] = torch.ones_like(s["beta"]), torch.full_like(s["ridge"], 0.5)
    r = torch.full_like(s["beta"], 0.5)
    recursion = fw.scan(fw.rules.rls, q=s["q"], k=s["k"], v=s["v"], g=s["g"], r=r).y
    assert distance(mesa(**s)[0], recursion) < 1e-8
    assert distance(mesa(**s, solver="solve")[0], recursion) < 1e-8


def test_gradients_agree_and_cutting_changes_nothing():
    s = {n: x.requires_grad_() for n, x in signals(T=9).items()}
    grads = [torch.autograd.grad(mesa(**s, solver=solver)[0].sin().sum(), list(s.values())) for solver in ("conjugate_gradient", "solve")]
    for a, b in zip(*grads, strict=True):
        assert distance(a, b) < 1e-7
    whole, last = mesa(**s)
    first, state = mesa(**{n: x if n == "ridge" else x[:, :4] for n, x in s.items()})
    rest, state = mesa(**{n: x if n == "ridge" else x[:, 4:] for n, x in s.items()}, state=state)
    assert distance(torch.cat([first, rest], 1), whole) < 1e-9
    assert distance(state[1], last[1]) < 1e-12


def test_a_small_ridge_and_a_long_past_are_safe():
    k = torch.randn(1, 20_000, 1, 4, generator=DRAW)
    v = k @ torch.randn(4, 2, generator=DRAW)
    one = torch.ones(1, 20_000, 1)
    with torch.no_grad():
        y, _ = mesa(q=k, k=k, v=v, beta=one, g=0 * one - 1e-3, ridge=torch.full((1, 4), 1e-6))
    assert y.isfinite().all()
    assert (y[:, 100:] - v[:, 100:]).abs().max() < 1e-2
    with pytest.raises(fw.SignalError, match="above 0"):
        mesa(q=k, k=k, v=v, beta=one, g=0 * one, ridge=torch.zeros(1, 4))
