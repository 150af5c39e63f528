"""RNN, GRU, LSTM and sLSTM against loops written from their papers."""

import numpy as np
import pytest
import torch

import fastweights as fw
from fastweights.layers.baselines import SLSTM, RecurrentNetwork

X = torch.randn(2, 19, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def parameters(layer):
    return {n: p.detach().numpy() for n, p in layer.named_parameters()}


def rnn(given, mixed, h, c):
    return np.tanh(given + mixed), c


def gru(given, mixed, h, c):
    (r, z, n), (r2, z2, n2) = np.split(given, 3), np.split(mixed, 3)
    z = sigmoid(z + z2)
    return (1 - z) * np.tanh(n + sigmoid(r + r2) * n2) + z * h, c


def lstm(given, mixed, h, c):
    i, f, g, o = np.split(given + mixed, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


@pytest.mark.parametrize("cell", [rnn, gru, lstm], ids=lambda f: f.__name__)
def test_networks_of_torch_are_those_of_their_papers(cell):
    torch.manual_seed(0)
    layer = RecurrentNetwork(6, cell=cell.__name__, d_hidden=5).double()
    p = parameters(layer)
    reset = torch.zeros(2, 19, dtype=torch.bool)
    reset[0, [0, 4]] = reset[1, 11] = True
    y, state = layer(X, None, reset)
    for b in range(2):
        h, c = np.zeros(5), np.zeros(5)
        for t in range(19):
            h, c = (0 * h, 0 * c) if reset[b, t] else (h, c)
            given = p["cell.weight_ih_l0"] @ X[b, t].numpy() + p["cell.bias_ih_l0"]
            h, c = cell(given, p["cell.weight_hh_l0"] @ h + p["cell.bias_hh_l0"], h, c)
            assert np.allclose(y[b, t].detach().numpy(), p["out.weight"] @ h, rtol=1e-10, atol=1e-12)
        assert np.allclose(state["h"][b].detach().numpy(), h, rtol=1e-10)
        if "c" in state:
            assert np.allclose(state["c"][b].detach().numpy(), c, rtol=1e-10)


def slstm(exponential=False, scale=1.0):
    torch.manual_seed(0)
    layer = SLSTM(6, heads=2, d_hidden=8, exponential_forget=exponential).double()
    for p in layer.parameters():  # nothing zero: recurrent weights start so
        p.data = p.data + scale * torch.randn_like(p) / 3
    return layer


def slstm_loop(layer, x):
    """c / n as sums over the past with weights exp(i_s + sum of log f), without a stabiliser."""
    p = parameters(layer)
    h, past, ys = np.zeros(8), [np.zeros(6)] * 4, []
    c, n = np.zeros(8), np.zeros(8)
    for token in x:
        past = [*past[1:], token]
        short = sum(w * s for w, s in zip(p["conv.weight"][:, 0].T, past, strict=True))
        raw = np.concatenate([p["gates.weight"] @ (short * sigmoid(short)), p["inputs.weight"] @ token]) + p["bias"]
        raw = raw.reshape(4, 2, 4)
        for head in range(2):
            R = p["recurrent"][head].reshape(4, 4, 4)  # from, gate, to
            raw[:, head] += np.einsum("i,igo->go", h.reshape(2, 4)[head], R)
        i, f, z, o = raw.reshape(4, 8)
        f = np.exp(f) if layer.exponential_forget else sigmoid(f)
        c, n = f * c + np.exp(i) * np.tanh(z), f * n + np.exp(i)
        h = sigmoid(o) * c / n
        groups = h.reshape(2, 4)
        normed = (groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + 1e-5)
        ys.append(p["out.weight"] @ (normed.reshape(8) * p["norm.weight"] + p["norm.bias"]))
    return np.stack(ys), h, c, n


@pytest.mark.parametrize("exponential", [False, True])
def test_slstm_is_the_recurrence_of_the_paper(exponential):
    layer = slstm(exponential)
    y, state = layer(X)
    for row in range(2):
        want, h, c, n = slstm_loop(layer, X[row].numpy())
        assert np.allclose(y[row].detach().numpy(), want, rtol=1e-10, atol=1e-12)
        found = {name: state[name][row].detach().numpy().reshape(8) for name in "hcnm"}
        assert np.allclose(found["h"], h, rtol=1e-10)
        assert np.allclose(found["c"] * np.exp(found["m"]), c, rtol=1e-10)  # m is the log of what was taken out
        assert np.allclose(found["n"] * np.exp(found["m"]), n, rtol=1e-10)


def test_the_stabiliser_keeps_slstm_finite_where_the_gates_are_not():
    layer = slstm()
    with torch.no_grad():
        layer.gates.weight *= 1000
    x = torch.cat([X, -X], 1).requires_grad_()
    y, state = layer(x)
    assert y.isfinite().all()
    assert state["m"].abs().max() > 100
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    _, early = layer.float()(X[:, :1].float())
    assert (early["n"] >= 1).all()


@pytest.mark.parametrize("layer", [slstm(), slstm(True)], ids=["sigmoid", "exponential"])
def test_derivatives(layer):
    x = X[:1, :5].clone().requires_grad_()
    reset = torch.tensor([[False, False, True, False, False]])
    assert torch.autograd.gradcheck(lambda x: layer(x, None, reset)[0], (x,))


def test_slstm_starts_as_published():
    layer = SLSTM(8, heads=2, depth=0.5)
    assert (layer.recurrent == 0).all()
    i, f, z, o = layer.bias.reshape(4, 2, 4)
    assert not torch.cat([i, z, o]).any()
    want = 5 - 12 * (torch.arange(4) / 3) ** 0.95
    assert torch.allclose(f, want.expand(2, 4))


@pytest.mark.parametrize(
    "layer", [slstm(), RecurrentNetwork(6, cell="lstm").double(), RecurrentNetwork(6, cell="gru").double()], ids=["slstm", "lstm", "gru"]
)
def test_nothing_of_what_came_before_a_reset_is_left(layer):
    """Not even what is not finite."""
    _, spoilt = layer(X * torch.nan)
    reset = torch.zeros(2, 19, dtype=torch.bool)
    reset[:, 0] = True
    assert torch.allclose(layer(X, spoilt, reset)[0], layer(X)[0], rtol=1e-9, atol=1e-12)
    first = torch.cat([X[:, :5] * torch.nan, X[:, 5:]], 1)
    assert torch.allclose(layer(first, None, reset.roll(5, 1))[0][:, 5:], layer(X[:, 5:])[0], rtol=1e-9, atol=1e-12)


BAD = {
    "cell is 'elman'": lambda: RecurrentNetwork(6, cell="elman"),
    "not a multiple of heads = 4": lambda: SLSTM(6),
    "depth is 2": lambda: SLSTM(8, depth=2),
    "conv is 1, expected at least 2": lambda: SLSTM(8, conv=1),
    "expected a tensor (B, T, d_model = 6)": lambda: RecurrentNetwork(6)(torch.zeros(3, 6)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_refused(message):
    with pytest.raises(fw.FastWeightError) as refused:
        BAD[message]()
    assert message in str(refused.value)
