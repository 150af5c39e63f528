"""Continuous time: closed forms, orders of convergence, the discrete rule as Euler's step, gradients, streaming."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

import fastweights as fw
from fastweights.layers.continuous import ContinuousLayer
from fastweights.layers.flow import METHODS, driver, runge_kutta
from fastweights.layers.interpolation import interpolate
from fastweights.rules import delta, hebb_rate, oja

RULES = {"hebb": hebb_rate, "oja": oja, "delta": delta}
KINDS = ("ode", "cde")
CAUSAL = ("linear", "hermite", "rectilinear")
NAN = float("nan")


def drawn(B=2, T=7, d=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    times = (torch.rand(B, T, dtype=torch.float64, generator=g) + 0.2).cumsum(1)
    return torch.randn(B, T, d, dtype=torch.float64, generator=g), times


def layer(rule=delta, seed=0, **options):
    torch.manual_seed(seed)
    return ContinuousLayer(rule, 8, heads=2, **{"d_key": 4, "d_value": 3, **options}).double()


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def follow(rule, method, W, h, steps, **signals):
    """W after steps of h seconds with constant signals."""
    stages = len(METHODS[method].weights)
    flow = runge_kutta(rule, method)
    many = {n: x.expand(1, steps, 1, *((stages,) if stages > 1 else ()), *x.shape) for n, x in signals.items()}
    q, step = torch.zeros(1, steps, 1, W.shape[1], dtype=W.dtype), f64(h).expand(1, steps, 1)
    form = "recurrent" if method == "rk4" else "auto"
    return fw.scan(flow, state=W[None, None], q=q, step=step, form=form, **many).state[0, 0]


# ---- closed forms -----------------------------------------------------------------------------------------------------------


def test_the_delta_flow_forgets_its_error_exponentially():
    """With a unit key, W(t) k = v + (W_0 k - v) exp(-beta t), and what W says of other keys does not change."""
    W0 = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k, other, v, beta, t = f64(0.6, 0.8), f64(-0.8, 0.6), f64(1.0, -2.0, 0.5), 0.7, 2.0
    given = {"k": k, "v": v, "beta": f64(beta)[0]}
    W = follow(delta, "rk4", W0, t / 500, 500, **given)
    assert torch.allclose(W @ k, v + (W0 @ k - v) * np.exp(-beta * t), rtol=0, atol=1e-10)
    assert torch.allclose(W @ other, W0 @ other, rtol=0, atol=1e-12)
    z, orders = -beta * 0.5, {"euler": 1, "midpoint": 2, "rk4": 4}
    for method, order in orders.items():  # a step multiplies the error by the first terms of exp(z)
        W = follow(delta, method, W0, 0.5, 6, **given)
        factor = sum(z**n / math.factorial(n) for n in range(order + 1))
        assert torch.allclose(W @ k, v + (W0 @ k - v) * factor**6, rtol=0, atol=1e-12)


def test_the_oja_flow_with_constant_signals():
    """W(t) = k / v + (W_0 - k / v) exp(-beta v^2 t) for one output unit."""
    W0, k, v, beta, t = f64(0.3, -0.5)[None], f64(1.0, 2.0), 0.8, 0.9, 3.0
    W = follow(oja, "rk4", W0, t / 500, 500, k=k, v=f64(v), beta=f64(beta)[0])
    assert torch.allclose(W, k / v + (W0 - k / v) * np.exp(-beta * v**2 * t), rtol=0, atol=1e-10)


@fw.rule
def principal(W, k1: fw.Key, k2: fw.Key):
    """Oja's own neuron, v = W k, for two patterns at once: dw = C w - (w^T C w) w with C = k1 k1^T + k2 k2^T."""
    return W + fw.outer(W @ k1, k1 - W.mT @ (W @ k1)) + fw.outer(W @ k2, k2 - W.mT @ (W @ k2))


def test_ojas_neuron_finds_the_principal_direction():
    """w(t) = e^{Ct} w_0 / sqrt(1 + w_0^T (e^{2Ct} - 1) w_0): a unit vector along the first eigenvector in the end."""
    k1, k2, w0 = f64(1.0, 0.5, 0.0), f64(-0.2, 0.4, 0.3), f64(0.1, -0.3, 0.4)
    C = torch.outer(k1, k1) + torch.outer(k2, k2)
    for t in (0.5, 2.0):
        grown = torch.linalg.matrix_exp(C * t)
        want = grown @ w0 / (1 + w0 @ (grown @ grown @ w0) - w0 @ w0).sqrt()
        assert torch.allclose(follow(principal, "rk4", w0[None], t / 200, 200, k1=k1, k2=k2)[0], want, rtol=0, atol=1e-9)
    w = follow(principal, "rk4", w0[None], 0.2, 200, k1=k1, k2=k2)[0]
    first = torch.linalg.eigh(C).eigenvectors[:, -1]
    assert abs(w.norm() - 1) < 1e-8
    assert abs(abs(w @ first) - 1) < 1e-8


def test_an_euler_step_of_one_second_is_the_rule():
    """W(t_i) is what the discrete rule makes of the samples before x_i."""
    x, _ = drawn(T=11)
    for rule in (*RULES.values(), fw.rules.gated_delta, fw.rules.implicit_delta, fw.rules.decayed_hebb, delta * 2):
        made = layer(rule, method="euler", output_norm=False, output_gate=False)
        signals, _ = made.programmer(x)
        y, state = made(x)
        q = signals["q"]
        Ws = fw.unroll(rule, **signals)
        assert torch.allclose(state["W"], Ws[:, -2], rtol=1e-10, atol=1e-10)
        before = torch.cat([torch.zeros_like(Ws[:, :1]), Ws[:, :-1]], 1)
        assert torch.allclose(y, made.out(torch.einsum("bthvk,bthk->bthv", before, q).flatten(2)), rtol=1e-10, atol=1e-10)
        read, last = fw.scan(rule, **{n: s[:, :-1] for n, s in signals.items()} | {"q": q[:, 1:]})
        assert torch.allclose(y[:, 1:], made.out(read.flatten(2)), rtol=1e-10, atol=1e-10)
        assert torch.allclose(state["W"], last, rtol=1e-10, atol=1e-10)


# ---- against loops written from the papers ------------------------------------------------------------------------------------


def slope_of(rule, W, k, v, beta):
    return {
        "hebb": lambda: beta * np.outer(v, k),
        "oja": lambda: beta * np.outer(v, k - W.T @ v),
        "delta": lambda: beta * np.outer(v - W @ k, k),
    }[rule]()


def stepped(f, W, t, h, method):
    if method == "euler":
        return W + h * f(t, W)
    if method == "midpoint":
        return W + h * f(t + h / 2, W + h / 2 * f(t, W))
    k1 = f(t, W)
    k2 = f(t + h / 3, W + h * k1 / 3)
    k3 = f(t + 2 * h / 3, W + h * (k2 - k1 / 3))
    k4 = f(t + h, W + h * (k1 - k2 + k3))
    return W + h * (k1 + 3 * k2 + 3 * k3 + k4) / 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", RULES)
def test_the_layer_is_a_loop_over_straight_pieces(name, method, kind):
    """dW/dt = beta {v k^T, v (k - W^T v)^T, (v - W k) k^T}; CDE: v of dx/dt for Hebb and Oja, k of dx/dt for delta."""
    x, times = drawn()
    made = layer(RULES[name], kind=kind, method=method, step=0.5, output_norm=False, output_gate=False)
    assert made.derivative == (() if kind == "ode" else ("k",) if name == "delta" else ("v",))
    y, state = made(x, times=times)
    with torch.no_grad():
        q = made.programmer(x)[0]["q"]
    for b in range(2):
        for head in range(2):
            W, reads = np.zeros((3, 4)), [np.zeros(3)]
            for i in range(6):
                dt = (times[b, i + 1] - times[b, i]).item()
                rise = (x[b, i + 1] - x[b, i]) / dt

                def f(s, W, i=i, b=b, head=head, rise=rise):
                    with torch.no_grad():
                        of_x, of_rise = (made.programmer(z[None, None])[0] for z in (x[b, i] + s * rise, rise))
                    k, v, beta = ((of_rise if n in made.derivative else of_x)[n][0, 0, head].numpy() for n in ("k", "v", "beta"))
                    return slope_of(name, W, k, v, beta)

                steps = int(np.ceil(dt / 0.5))
                for j in range(steps):
                    W = stepped(f, W, j * dt / steps, dt / steps, method)
                reads.append(W @ q[b, i + 1, head].numpy())
            assert np.allclose(state["W"][b, head].detach(), W, rtol=0, atol=1e-10)
            mine = torch.linalg.lstsq(made.out.weight, (y[b] - 0).mT).solution  # y = out(reads)
            assert np.allclose(mine.mT.unflatten(1, (2, 3))[:, head].detach(), np.stack(reads), rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", [*CAUSAL, "natural"])
def test_the_layer_follows_its_path(path):
    """A midpoint step of Oja's CDE on every piece of the path that ``interpolate`` makes."""
    x, times = drawn(1)
    x[0, [0, 3, 4], 1] = NAN
    made, way = layer(oja, kind="cde", path=path), interpolate(x, times, path)
    W = np.zeros((2, 3, 4))
    with torch.no_grad():
        for a, b in zip(way.knots[0].tolist(), way.knots[0].tolist()[1:], strict=False):
            half = (b - a) / 2

            def f(t, W):
                of_x, of_slope = made.programmer(way(t)[None])[0], made.programmer(way.derivative(t)[None])[0]
                k, v, beta = (s[0, 0].numpy() for s in (of_x["k"], of_slope["v"], of_x["beta"]))
                return np.stack([slope_of("oja", W[h], k[h], v[h], beta[h]) for h in range(2)])

            W = W + 2 * half * f(a + half, W + half * f(a, W))
        assert np.allclose(made(x, times=times)[1]["W"][0], W, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", RULES)
def test_order_of_convergence(name):
    x, _ = drawn(T=2)

    def last(method, steps):
        with torch.no_grad():
            made = layer(RULES[name], kind="ode" if name == "hebb" else "cde", method=method, step=1 / steps, norm="none")
            return made(x)[1]["W"]

    exact = last("rk4", 256)
    for method, order, sizes in (("euler", 1, [32, 64, 128]), ("midpoint", 2, [32, 64, 128]), ("rk4", 4, [8, 16, 32])):
        errors = [(last(method, n) - exact).norm().item() for n in sizes]
        assert abs(np.polyfit(np.log(sizes), np.log(errors), 1)[0] + order) < 0.15


# ---- samples ----------------------------------------------------------------------------------------------------------------


def cut(made, x, cuts, times=None, reset=None):
    state, parts = None, []
    for a, b in zip(cuts, cuts[1:], strict=False):
        y, state = made(x[:, a:b], state, None if reset is None else reset[:, a:b], times=None if times is None else times[:, a:b])
        parts.append(y)
    return torch.cat(parts, 1), state


@pytest.mark.parametrize("path", CAUSAL)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RULES)
def test_cutting_a_sequence_changes_nothing(name, kind, path):
    x, times = drawn(T=11)
    reset = torch.zeros(2, 11, dtype=torch.bool)
    reset[0, [4, 5, 9]] = reset[1, 0] = True
    times[0, 4:] -= 1.5  # clocks of documents are their own
    if path == "rectilinear":
        x[0, [2, 5], 1] = x[1, 7, :] = NAN
    made = layer(RULES[name], kind=kind, path=path, step=0.4)
    whole, last = made(x, None, reset, times=times)
    for cuts in ([0, 0, 1, 11], [0, 5, 6, 11], list(range(12))):
        y, state = cut(made, x, cuts, times, reset)
        assert torch.allclose(y, whole, rtol=1e-10, atol=1e-12)
        assert all(torch.allclose(state[n].double(), last[n].double(), rtol=1e-12) for n in last)
    for a, b in ((0, 4), (4, 5), (5, 9), (9, 11)):
        alone = made(x[:1, a:b], times=times[:1, a:b])[0]
        assert torch.allclose(alone, whole[:1, a:b], rtol=1e-10, atol=1e-12)
    regular, _ = made(x)
    assert torch.allclose(cut(made, x, [0, 3, 11])[0], regular, rtol=1e-10, atol=1e-12)
    assert torch.allclose(made(x, times=torch.arange(11) + 5)[0], regular, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", [*CAUSAL, "natural"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_see_each_other(kind, path):
    x, times = drawn()
    x[0, 3, 1] = NAN
    times[1] *= 5  # rows take other numbers of steps
    made = layer(kind=kind, path=path, step=0.3)
    whole = made(x, times=times)[0]
    for b in range(2):
        assert torch.allclose(made(x[b : b + 1], times=times[b])[0][0], whole[b], rtol=1e-10, atol=1e-12)


def test_dropping_samples_of_a_smooth_path_changes_little():
    """The error of straight pieces falls with the square of the gaps; splines do better."""
    t = torch.linspace(0, 6, 97, dtype=torch.float64)
    x = torch.stack([(w * t + p).sin() for w, p in zip(np.linspace(0.3, 1.5, 8), range(8), strict=True)], -1)[None]

    def last(path, every):
        with torch.no_grad():
            return layer(kind="cde", path=path, method="rk4", step=0.0625)(x[:, ::every], times=t[::every])[1]["W"]

    exact = last("natural", 1)
    error = {path: [((last(path, n) - exact).norm() / exact.norm()).item() for n in (4, 8)] for path in ("linear", "natural")}
    assert error["linear"][0] < 0.02
    assert 3 < error["linear"][1] / error["linear"][0] < 5
    assert error["natural"][0] < error["linear"][0] / 2


def test_missing_values_are_those_of_the_path():
    x, times = drawn()
    x[0, 2:4, 1] = x[1, 0, 2] = NAN
    for path in ("linear", "hermite", "natural"):
        filled = interpolate(x, times, path)(times)
        if path != "natural":  # whose spline through the filled samples is another one
            assert torch.allclose(layer(path=path)(x, times=times)[0], layer(path=path)(filled, times=times)[0], rtol=1e-12)
        y, state = layer(path=path)(x, times=times)
        assert y.isfinite().all()
        assert state.keys() == {"W"}
        assert layer(path=path)(x[:, :1])[0].isfinite().all()


def test_the_clock_of_a_hebbian_cde_does_not_matter():
    """dW = beta v(dx) k(x)^T knows the way of x and not its speed; the others do."""
    x, times = drawn()
    for method in METHODS:
        made = layer(hebb_rate, kind="cde", method=method)
        assert torch.allclose(made(x, times=times)[1]["W"], made(x)[1]["W"], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(layer(hebb_rate)(x, times=times)[1]["W"], layer(hebb_rate)(x)[1]["W"])


@pytest.mark.parametrize("name", RULES)
def test_in_a_cde_W_rests_where_x_does(name):
    x, _ = drawn(T=4)
    x[:, 2:] = x[:, 1:2]
    made = layer(RULES[name], kind="cde")
    assert torch.equal(made(x)[1]["W"], made(x[:, :2])[1]["W"])
    assert not torch.equal(layer(RULES[name])(x)[1]["W"], layer(RULES[name])(x[:, :2])[1]["W"])


def test_which_signal_moves_a_rule():
    found = {r.name: driver(r) for r in fw.rules.CATALOGUE if "k" in r.signals and list(r.states) == ["W"] and not r.reads_itself}
    assert found == {
        "hebb": "v", "hebb_rate": "v", "decayed_hebb": None, "stepped_hebb": None, "delta": "k", "gated_delta": None, "implicit_delta": "k",
        "erase_write": None, "generalised_delta": None, "td": "k", "oja": "v", "gated_oja": None, "erase": "k", "write": "v",
    }  # fmt: skip


# ---- gradients --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "path", "method"),
    [
        ("ode", "linear", "rk4"),
        ("cde", "linear", "midpoint"),
        ("cde", "hermite", "midpoint"),
        ("cde", "rectilinear", "euler"),
        ("cde", "natural", "midpoint"),
    ],
)
def test_gradients(kind, path, method):
    x, times = drawn(1, 3)
    made = layer(kind=kind, path=path, method=method, norm="none", feature_map="identity")
    _, state = layer(path="linear" if path == "natural" else path)(drawn(1, 3, seed=1)[0])
    state = {n: s.detach() for n, s in state.items()}

    def run(x, W):
        y, new = made(x, None if path == "natural" else {**state, "W": W}, times=times + 3)
        return y, new["W"]

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), state["W"].clone().requires_grad_()))


def gradients(made, x, times, **call):
    x = x.clone().requires_grad_()
    y, state = made(x, times=times, **call)
    (y.square().sum() + state["W"].sin().sum()).backward()
    return y.detach(), {"x": x.grad, **{n: p.grad for n, p in made.named_parameters()}}


def same(a, b, tolerance):
    return all(torch.allclose(a[n], b[n], rtol=tolerance, atol=tolerance) for n in a)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_gradients_are_the_direct_ones(kind, method):
    x, times = drawn(T=11)
    reset = torch.zeros(2, 11, dtype=torch.bool)
    reset[0, 5] = True
    y, direct = gradients(layer(kind=kind, method=method, step=0.5), x, times, reset=reset)
    y2, again = gradients(layer(kind=kind, method=method, step=0.5, gradient="checkpoint"), x, times, reset=reset)
    assert torch.allclose(y, y2, rtol=1e-12)
    assert same(direct, again, 1e-10)


def test_torchdiffeq_takes_the_same_steps():
    pytest.importorskip("torchdiffeq")
    x, times = drawn(1)
    for method in METHODS:
        for path in (*CAUSAL, "natural"):
            with torch.no_grad():
                mine, theirs = (
                    layer(oja, kind="cde", path=path, method=method, step=0.4, gradient=g)(x, times=times) for g in ("direct", "adjoint")
                )
            assert torch.allclose(mine[0], theirs[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "kind"), [("hebb", "cde"), ("oja", "ode"), ("delta", "ode"), ("delta", "cde")])
def test_the_adaptive_solution_and_its_adjoint_are_the_limit_of_small_steps(name, kind):
    pytest.importorskip("torchdiffeq")
    x, times = drawn(1, 3)
    given, options = (x[:, 1:] / 2, times[:, 1:] / 2), {"kind": kind, "path": "hermite", "norm": "none"}
    y, direct = gradients(layer(RULES[name], method="rk4", step=0.01, **options), *given)
    for solver in (
        {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9},
        {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9, "gradient": "checkpoint"},
        {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9, "gradient": "adjoint"},
        {"method": "rk4", "step": 0.01, "gradient": "adjoint"},
    ):
        y2, found = gradients(layer(RULES[name], **solver, **options), *given)
        assert torch.allclose(y, y2, rtol=1e-6, atol=1e-6)
        assert same(direct, found, 1e-6)


# ---- the module ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*CAUSAL, "natural"])
def test_the_state_knows_its_size_and_short_sequences_are_sequences(path):
    made = layer(path=path).float()
    for T in (0, 1, 7):
        y, state = made(drawn(1, T)[0].float())
        assert y.shape == (1, T, 8)
        assert made.state_bytes(T) == sum(s.numel() * s.element_size() for s in state.values())
    half, state = made.bfloat16()(drawn()[0].bfloat16())
    assert half.dtype == torch.bfloat16
    assert state["W"].dtype == torch.float32


def test_options_of_the_programmer():
    x, times = drawn()
    for rule, options in (
        (hebb_rate, {"feature_map": "elu1", "norm": "sum"}),
        (delta * 2, {"key_heads": 1}),
        (fw.rules.gated_delta, {"decay": "channel"}),
    ):
        made = layer(rule, method="rk4", **options)
        y, state = made(x, times=times)
        assert torch.allclose(cut(made, x, [0, 3, 7], times)[0], y, rtol=1e-10, atol=1e-12)
        assert state["W"].shape == (2, 2, 3, 4)
    assert layer(kind="cde", derivative=("v", "beta")).derivative == ("v", "beta")


def test_a_programmer_of_ones_own_and_the_closed_form_through_the_layer():
    class Constant(nn.Module):
        def forward(self, x, conv):
            ones = torch.ones(*x.shape[:2], 1, 2, dtype=x.dtype)
            k = ones * torch.tensor([0.6, 0.8], dtype=x.dtype)
            return {"q": k, "k": k, "v": 3 * ones, "beta": 0.5 * ones[..., 0]}, None

    made = ContinuousLayer(delta, 8, heads=1, d_key=2, d_value=2, method="rk4", step=0.02, programmer=Constant()).double()
    x, times = drawn()
    _, state = made(x, times=times)
    for b in range(2):
        learned = 3 * (1 - torch.exp(-0.5 * (times[b, -1] - times[b, 0])))
        assert torch.allclose(state["W"][b, 0] @ f64(0.6, 0.8), learned.expand(2), rtol=0, atol=1e-9)


def test_without_torchdiffeq_the_way_out_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"method='dopri5'.* pip install 'fastweights\[continuous\]'"):
        layer(method="dopri5")(drawn()[0])


X, TIMES = drawn()
HOLE = torch.where(torch.arange(7)[:, None] == 3, NAN, X)
RESET = torch.zeros(2, 7, dtype=torch.bool)
BAD = {
    "is a str, expected a Rule": lambda: ContinuousLayer("delta", 8),
    "has W, z, and reads y by itself": lambda: ContinuousLayer(fw.rules.normalised_hebb, 8),
    "not a multiple of heads": lambda: ContinuousLayer(delta, 9),
    "kind is 'sde'; known: ode, cde": lambda: layer(kind="sde"),
    "path is 'cubic'": lambda: layer(path="cubic"),
    "method is 'heun'": lambda: layer(method="heun"),
    "known: euler, midpoint, rk4": lambda: runge_kutta(delta, "heun"),
    "gradient is 'none'": lambda: layer(gradient="none"),
    "step is 0 s": lambda: layer(step=0),
    "take rtol and atol": lambda: layer(step=0.1, method="dopri5"),
    "conv is 4, but in continuous time": lambda: layer(conv=4),
    "another programmer was given": lambda: layer(programmer=nn.Identity(), norm="none"),
    "in an ode all are made of x": lambda: layer(derivative=("v",)),
    "no signal 'z'": lambda: layer(kind="cde", derivative=("z",)),
    "moves W even without a key or a value": lambda: layer(fw.rules.gated_delta, kind="cde"),
    "expected a tensor (B, T, d_model = 8)": lambda: layer()(X[0]),
    "path='natural' depends on all samples, so state has no meaning": lambda: layer(path="natural")(X, layer(path="natural")(X)[1]),
    "path='natural' depends on all samples, so reset has no meaning": lambda: layer(path="natural")(X, None, RESET),
    "path='linear' fills the missing values of x from later samples": lambda: layer()(HOLE, layer()(X)[1]),
    "the state holds W alone": lambda: layer()(X, layer()(HOLE)[1]),
    "the state is of 1 rows": lambda: layer()(X, layer()(X[:1])[1]),
    "reset is torch.int64": lambda: layer()(X, None, RESET.long()),
    "a sample at 0 s is not later": lambda: layer()(X, layer()(X)[1], times=torch.arange(7)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(message):
    with pytest.raises(fw.FastWeightError) as refused:
        BAD[message]()
    assert message in str(refused.value)
