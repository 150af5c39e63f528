"""Rules that run token by token: each against its paper in numpy, on the compiled machine and as its own body, gradients included."""

import numpy as np
import pytest
import torch
from rows import name

import fastweights as fw
from fastweights.engine.check import descent_error, distance, example
from fastweights.engine.kernels import library

R = fw.rules
MACHINE = pytest.mark.skipif(library().lib is None, reason="no compiled kernels")


def soft(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sig(x):
    return 1 / (1 + np.exp(-x))


def delta(W, k, v, beta):
    return W + beta * np.outer(v - W @ k, k)


def norm(x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5)


def momentum(W, M, q, k, v, beta, eta, mu, g):
    M = mu * M + eta * np.outer(W @ k - v, k)
    W = np.exp(g) * W - beta * M
    return W, M, W @ q


def eligibility(W, E, q, k, v, r, g):
    E = np.exp(g) * E + np.outer(v, k)
    W = W + r * E
    return W, E, W @ q


def cascade(W, U, q, k, v, dt):
    """Benna and Fusi's chain as one matrix of rates."""
    C, g = 2.0 ** np.arange(4), 2.0 ** -(np.arange(4) + 3)
    A = np.zeros((4, 4))
    for i in range(4):
        for j, flow in ((i + 1, g[i]), (i - 1, g[i - 1] if i else 0)):
            A[i, i] -= flow / C[i]
            if 0 <= j < 4:
                A[i, j] += flow / C[i]
    u = np.stack([W, *U])
    u = u + dt * np.einsum("ij,jvk->ivk", A, u)
    u[0] += np.outer(v, k)
    return u[0], u[1:], u[0] @ q


def rls(W, D, q, k, v, g, r):
    P = np.eye(len(k)) + D
    P = P * min(np.exp(-g), max(1000 * len(k) / P.trace(), 1))
    gain = P @ k / (r + k @ P @ k)
    W = W + np.outer(v - W @ k, gain)
    return W, P - np.outer(gain, P @ k) - np.eye(len(k)), W @ q


def bcm(W, theta, q, k, beta, a):
    y = W @ k
    theta = a * theta + (1 - a) * y**2
    W = W + beta * np.outer(y * (y - theta), k)
    return W, theta, W @ q


def plain(update):
    def token(W, q, **s):
        W = update(W, **s)
        return W, W @ q

    return token


def cosine(W, k, v, beta):
    y = W @ k
    n, m = np.sqrt(v @ v), np.sqrt(y @ y + 1e-6)
    b = n * m + 1e-6
    return W - beta * np.outer(-v / b + (v @ y) * n / b**2 * y / m, k)


def delta_rnn(W, R, y, q, k, v, beta, k_r, v_r, beta_r):
    W, R = delta(W, k, v, beta), delta(R, soft(k_r), v_r, beta_r)
    y = W @ q + R @ soft(y)
    return W, R, y, y


def delta_mlp(W, U, q, k, v, beta, k_u, v_u, beta_u):
    W, U = delta(W, k, v, beta), delta(U, soft(k_u), v_u, beta_u)
    return W, U, U @ soft(W @ q)


def delta_delta(W, U_q, U_k, U_v, q, k, v, beta, x, u_q, u_k, u_v, beta_u):
    x = soft(x)
    U_q, U_k, U_v = (delta(U, x, u, beta_u) for U, u in ((U_q, u_q), (U_k, u_k), (U_v, u_v)))
    W = delta(W, soft(k + U_k @ x), v + U_v @ x, beta)
    return W, U_q, U_k, U_v, W @ soft(q + U_q @ x)


def delta_lstm(W, R, c, y, q, k, v, beta, k_r, v_r, beta_r):
    W = np.stack([delta(W[i], k[i], v[i], beta[i]) for i in range(3)])
    R = np.stack([delta(R[i], soft(k_r[i]), v_r[i], beta_r[i]) for i in range(3)])
    f, u, o = (W[i] @ q + R[i] @ soft(y) for i in range(3))
    c = sig(f) * c + (1 - sig(f)) * np.tanh(u)
    y = sig(o) * np.tanh(c)
    return W, R, c, y, y


def rdn(W, y, q, k, v, b, R_q, R_k, R_v, r_b):
    h = np.tanh(y)
    W = delta(W, soft(k + R_k.T @ h), v + R_v @ h, sig(b + r_b @ h))
    y = W @ soft(q + R_q.T @ h)
    return W, y, y


def srwm(W, Q, P, B, x, W_0, Q_0, P_0, B_0):
    """The matrix as one, of rows y, q, k and rates, with a rate for each part."""
    whole, start = np.concatenate([W, Q, P, B]), np.concatenate([W_0, Q_0, P_0, B_0])
    dv, dk = W.shape
    M = whole + start
    out = M @ soft(x)
    y, q, k, rate = out[:dv], out[dv : dv + dk], out[dv + dk : dv + 2 * dk], sig(out[dv + 2 * dk :])
    rates = np.repeat(rate, [dv, dk, dk, 4])
    M = M + rates[:, None] * np.outer(M @ soft(q) - M @ soft(k), soft(k)) - start
    return M[:dv], M[dv : dv + dk], M[dv + dk : dv + 2 * dk], M[dv + 2 * dk :], y


def srwm_delta(W, x, W_0, Q_0, P_0, b_0):
    phi = soft(x)
    k, q = soft(P_0 @ phi), soft(Q_0 @ phi)
    M = W + W_0
    return delta(M, k, M @ q, sig(b_0 @ phi)) - W_0, M @ phi


def attend_to_the_past(A, h, v, C, eta, g):
    A = np.exp(g) * A + eta * np.outer(h, h)
    z = C @ h + v
    h = np.maximum(norm(z + A @ np.maximum(z, 0)), 0)
    return A, h, h


def gated_fast_weights(W, k, v, a, b):
    T = sig(np.outer(b, a))
    return T * W + (1 - T) * np.outer(v, k)


def fwm(F, s, r, v, beta, n, e):
    s, r, v = np.tanh(s), np.tanh(r), np.tanh(v)
    F = F + beta * np.einsum("i,j,k->ijk", v - np.einsum("ijk,j,k->i", F, s, r), s, r)
    F = F / max(np.sqrt((F**2).sum()), 1)
    n = np.tanh(n)
    for i in range(3):
        n = norm(np.einsum("ijk,j,k->i", F, n, np.tanh(e[i])))
    return F, n


def differentiable_plasticity(H, y, v, w, alpha, eta):
    new = np.tanh((w + alpha * H) @ y + v)
    return (1 - eta) * H + eta * np.outer(new, y), new, new


def backpropamine(H, E, y, v, w, alpha, m, eta):
    new = np.tanh((w + alpha * H) @ y + v)
    H = np.clip(H + np.tanh(m @ new) * E, -1, 1)
    return H, (1 - eta) * E + eta * np.outer(new, y), new, new


def mpn(M, k, W_0, b, eta, g):
    h = np.tanh(W_0 * (1 + M) @ k + b)
    return np.exp(g) * M + eta * np.outer(h, k), h


TOKENS = {
    "momentum": momentum, "eligibility": eligibility, "cascade": cascade, "rls": rls, "bcm": bcm,
    "clip": plain(lambda W, k, v, bound: np.maximum(np.minimum(W + np.outer(v, k), bound), -bound)),
    "tanh": plain(lambda W, k, v, g: np.tanh(np.exp(g) * W + np.outer(v, k))),
    "willshaw": plain(lambda W, k, v: np.maximum(W, np.outer(v, k))),
    "huber": plain(lambda W, k, v, beta: W + beta * np.outer(np.clip(v - W @ k, -1, 1), k)),
    "lp": plain(lambda W, k, v, beta: W + beta * np.outer((v - W @ k) ** 2 * np.sign(v - W @ k), k)),
    "cosine": plain(cosine),
    "softmax_delta": plain(lambda W, k, v, beta: W + beta * np.outer(v - soft(W @ k), k)),
    "delta_rnn": delta_rnn, "delta_mlp": delta_mlp, "delta_delta": delta_delta, "delta_lstm": delta_lstm, "rdn": rdn, "srwm": srwm,
    "srwm_delta": srwm_delta, "srwm_fixed": lambda W, x, W_0: (W, W_0 @ soft(x)), "attend_to_the_past": attend_to_the_past,
    "gated_fast_weights": plain(gated_fast_weights), "fwm": fwm, "differentiable_plasticity": differentiable_plasticity,
    "backpropamine": backpropamine, "mpn": mpn,
}  # fmt: skip


def case(rule, B=2, T=7, H=2, K=5, V=4):
    signals = example(rule, B, T, H, K, V, per_channel=rule.shapes[0] == -1)
    draw = torch.Generator().manual_seed(1)
    states = tuple(0.3 * torch.randn(B, H, *s.shapes(K, V)[0], generator=draw, dtype=torch.float64) for s in rule.states.values())
    if rule.name == "rls":  # a covariance
        states = (states[0], states[1] @ states[1].mT)
    return signals, states


def run(rule, signals, states, **how):
    out = fw.scan(rule, **signals, state=states if len(states) > 1 else states[0], **how)
    return [out.y, *(out.state if isinstance(out.state, tuple) else (out.state,))]


def test_every_recurrent_rule_is_here_and_documented():
    assert set(TOKENS) == {r.name for r in R.RECURRENT}
    for rule in R.RECURRENT:
        assert rule.doc
        assert rule.cite
        assert R.get(rule.name) is rule


@pytest.mark.parametrize("rule", R.RECURRENT, ids=name)
def test_a_rule_is_the_recurrence_of_its_paper(rule):
    signals, states = case(rule)
    y, *after = run(rule, signals, states, form="recurrent", backend="torch")
    s = {n: x.numpy() for n, x in signals.items()}
    slow = {n for n, sig_ in rule.signals.items() if sig_.role.slow}
    for b in range(2):
        for h in range(2):
            mine = [x[b, h].numpy() for x in states]
            for t in range(7):
                token = {n: x[h] if n in slow else x[b, t, h] for n, x in s.items()}
                *mine, out = TOKENS[rule.name](*mine, **token)
                assert np.allclose(y[b, t, h].numpy(), out, rtol=1e-10, atol=1e-11)
            for found, wanted in zip(after, mine, strict=True):
                assert np.allclose(found[b, h].numpy(), wanted, rtol=1e-10, atol=1e-11)


@MACHINE
@pytest.mark.parametrize("rule", R.RECURRENT, ids=name)
def test_the_machine_is_the_body_gradients_included(rule):
    signals, states = case(rule, B=3)
    reset = torch.zeros(3, 7, dtype=torch.bool)
    reset[1, [2, 3]] = reset[2, 0] = True
    for dtype, most in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        found = []
        for kind, how in ((torch.float64, {"backend": "torch"}), (dtype, {"backend": "cpu"})):
            leaves = {n: x.to(kind).requires_grad_() for n, x in signals.items()}
            first = tuple(x.to(kind).requires_grad_() for x in states)
            parts = run(rule, leaves, first, form="recurrent", reset=reset, **how)
            loss = sum((x * torch.arange(x.numel(), dtype=kind).sin().reshape(x.shape)).sum() for x in parts)
            grads = torch.autograd.grad(loss, [*leaves.values(), *first], materialize_grads=True)
            found.append([*parts, *grads])
        for a, b in zip(*found, strict=True):
            assert (b.double() - a).norm() <= most * (a.norm() + 1e-3)


@MACHINE
@pytest.mark.parametrize("rule", R.RECURRENT, ids=name)
def test_gradcheck(rule):
    signals, states = case(rule, B=1, T=3, H=1, K=3, V=2)
    if rule.name in ("clip", "willshaw", "lp", "huber", "backpropamine"):
        signals = {n: x * 0.9 for n, x in signals.items()}
    if "g" in signals:
        signals["g"] = signals["g"] - 0.01  # inside its range
    names, leaves = list(signals), [x.requires_grad_() for x in (*signals.values(), *states)]

    def f(*tensors):
        given = dict(zip(names, tensors, strict=False))
        return tuple(run(rule, given, tensors[len(names) :]))

    assert torch.autograd.gradcheck(f, leaves, atol=1e-6)


@pytest.mark.parametrize("rule", R.RECURRENT, ids=name)
def test_a_sequence_may_be_cut_anywhere(rule):
    signals, states = case(rule)
    whole = run(rule, signals, states)
    slow = {n for n, s in rule.signals.items() if s.role.slow}
    for cuts in ([0, 3, 7], [0, 0, 1, 7]):
        at, parts = states, []
        for a, b in zip(cuts, cuts[1:], strict=False):
            y, *at = run(rule, {n: x if n in slow else x[:, a:b] for n, x in signals.items()}, tuple(at))
            parts.append(y)
        assert distance(torch.cat(parts, 1), whole[0]) < 1e-10
        for found, wanted in zip(at, whole[1:], strict=True):
            assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("rule", [r for r in R.RECURRENT if r.objective is not None], ids=name)
def test_rules_descend_their_objectives(rule):
    assert descent_error(rule, rule.objective) < 1e-12


@MACHINE
def test_results_do_not_depend_on_threads_or_on_the_batch():
    signals, states = case(R.srwm, B=9, T=11, H=3)
    low = {n: x.float() for n, x in signals.items()}, tuple(s.float() for s in states)
    threads = torch.get_num_threads()
    whole = run(R.srwm, *low)
    try:
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(run(R.srwm, *low), whole, strict=True))
    finally:
        torch.set_num_threads(threads)
    slow = {n for n, s in R.srwm.signals.items() if s.role.slow}
    some = run(R.srwm, {n: x if n in slow else x[4:5] for n, x in low[0].items()}, tuple(s[4:5] for s in low[1]))
    assert all(torch.equal(a, b[4:5]) for a, b in zip(some, whole, strict=True))


# ---- matrices that are affine together ---------------------------------------------------------------------------------------------------


@fw.rule
def two_momenta(W, M: fw.Matrix, N: fw.Matrix, k: fw.Key, v: fw.Value, beta: fw.Rate, mu: fw.Gate, nu: fw.Gate):
    error = (W + 0.3 * N) @ k - v / 2
    M = mu * M + fw.outer(error, k)
    N = nu * N - (M - W) * beta
    return 0.9 * W - beta * (M + N) / 2, M, N


JOINT = [R.momentum, R.eligibility, two_momenta]


@pytest.mark.parametrize("rule", JOINT, ids=name)
def test_matrices_that_are_affine_together_have_a_chunk_form(rule):
    assert rule.forms == ("recurrent", "chunk")
    signals = example(rule, 2, 23, 2, 5, 4)
    draw = torch.Generator().manual_seed(1)
    states = tuple(torch.randn(2, 2, 4, 5, generator=draw, dtype=torch.float64) for _ in rule.states)
    reset = torch.zeros(2, 23, dtype=torch.bool)
    reset[0, [3, 9]] = reset[1, 0] = True
    shared = {n: x[:, :, :1] if n in ("k", "beta") else x for n, x in signals.items()}
    strong = {n: torch.full_like(x, -50.0) if n == "g" else x for n, x in signals.items()}
    for given in (signals, shared, strong):
        for marks in (None, reset):
            want = run(rule, given, states, form="recurrent", backend="torch", reset=marks)
            for size in (1, 7, 16, 40):
                found = run(rule, given, states, form="chunk", chunk_size=size, reset=marks)
                assert all(distance(a, b) < 1e-10 for a, b in zip(found, want, strict=True))
    assert fw.check(rule).passed
    assert fw.plan(rule, **signals, form="chunk").form == "chunk"
    empty = {n: x[:, :0] for n, x in signals.items()}
    assert run(rule, empty, states, form="chunk")[0].shape[1] == 0
    with pytest.raises(fw.FormError, match="parallel"):
        run(rule, signals, states, form="parallel")


def test_what_is_not_affine_together_has_none():
    """Each weight of a cascade relaxes by itself but its chain is a stack; BCM squares; P of least squares multiplies itself."""
    for rule in (R.cascade, R.bcm, R.rls, R.delta_rnn, R.srwm):
        assert rule.forms == ("recurrent",)


# ---- least squares -----------------------------------------------------------------------------------------------------------------------


def test_recursive_least_squares_is_ridge_regression():
    draw = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 40, 1, d, generator=draw, dtype=torch.float64) for d in (6, 3))
    for penalty in (1.0, 1e-6):
        r = torch.full((1, 40, 1), penalty, dtype=torch.float64)
        W = fw.scan(R.rls, q=k, k=k, v=v, g=0 * r, r=r).state[0][0, 0]
        K, V = k[0, :, 0], v[0, :, 0]
        ridge = torch.linalg.solve(K.T @ K + penalty * torch.eye(6, dtype=torch.float64), K.T @ V).T
        assert distance(W, ridge) < 1e-8


@pytest.mark.parametrize("forgetting", [-0.5, -5.0, -50.0])
def test_what_fades_does_not_leave_more_variance_than_it_says(forgetting):
    draw = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 50, 1, d, generator=draw) for d in (6, 3))
    k[..., 3:] = 0
    r = torch.full((1, 50, 1), 0.1)
    _, D = fw.scan(R.rls, q=k, k=k, v=v, g=r * 0 + forgetting, r=r).state
    assert 900 < 1 + D[0, 0].trace() / 6 <= 1000 * (1 + 1e-5)


@MACHINE
@pytest.mark.parametrize("forgetting", [0.0, -1e-3, -5.0])
def test_recursive_least_squares_is_safe_for_a_hundred_thousand_tokens(forgetting):
    draw = torch.Generator().manual_seed(0)
    T = 100_000
    k = torch.randn(1, T, 1, 4, generator=draw)
    k[..., 3] = 0  # a direction that is never seen
    v = k @ torch.tensor([[1.0, 2, 0, 0], [0, -1, 1, 0]]).T + 0.01 * torch.randn(1, T, 1, 2, generator=draw)
    r = torch.full((1, T, 1), 0.1)
    with torch.no_grad():
        W = fw.scan(R.rls, q=k, k=k, v=v, g=r * 0 + forgetting, r=r).state[0][0, 0]
    assert torch.allclose(W, torch.tensor([[1.0, 2, 0, 0], [0, -1, 1, 0]]), atol=0.2 if forgetting == -5.0 else 0.02)
