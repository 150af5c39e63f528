"""S4D: discretisations and forms agree with numpy and each other. Mamba: the loop of the paper, and the published layer."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fastweights as fw
from fastweights.layers import state_space as module
from fastweights.layers.state_space import S4D, Mamba

X = torch.randn(2, 67, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CASES = [(i, d) for i in ("real", "lin", "inv") for d in ("zoh", "bilinear", "euler")]


def made(kind=S4D, **options):
    torch.manual_seed(0)
    return kind(6, **{"d_state": 4, **options}).double()


def numbers(layer):
    """a, b, c and D from the parameters, written from the paper."""
    p = {n: x.detach().numpy() for n, x in layer.named_parameters()}
    A = -np.exp(p["A_log"]) + (1j * p["A_imag"] if "A_imag" in p else 0)
    C = 2 * (p["C"][:, ::2] + 1j * p["C"][:, 1::2]) if "A_imag" in p else p["C"]
    z = np.exp(p["log_dt"])[:, None] * A
    if layer.discretisation == "zoh":
        a, b = np.exp(z), (np.exp(z) - 1) / A
    elif layer.discretisation == "bilinear":
        a, b = (2 + z) / (2 - z), 2 * z / A / (2 - z)
    else:
        a, b = 1 + z, z / A
    return a, b, C, p["skip"]


def s4d_loop(layer, x):
    a, b, C, D = numbers(layer)
    h, ys = np.zeros((len(x), *a.shape), dtype=a.dtype), []
    for t in range(x.shape[1]):
        h = a * h + b * x[:, t, :, None]
        ys.append((h * C).sum(-1).real + D * x[:, t])
    return np.stack(ys, 1), h


@pytest.mark.parametrize(("init", "discretisation"), CASES)
@pytest.mark.parametrize("form", ["convolution", "recurrence"])
def test_s4d_is_the_recurrence_of_the_paper_in_both_forms(init, discretisation, form):
    layer = made(init=init, discretisation=discretisation, form=form)
    y, state = layer(X)
    want, h = s4d_loop(layer, X.numpy())
    assert torch.allclose(F.glu(layer.out(F.gelu(torch.from_numpy(want))), -1), y, rtol=1e-9, atol=1e-11)
    kept = np.stack([h.real, h.imag], -1).reshape(2, 6, -1) if layer.complex else h
    assert np.allclose(state["W"][:, 0].detach().numpy(), kept, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", ["auto", "convolution", "recurrence"])
def test_forms_span_by_span_and_cut_anywhere(form, monkeypatch):
    monkeypatch.setattr(module, "_NUMBERS_A_SPAN", 24 * 6 * 2)  # a convolution of 24 tokens
    layer = made(form=form)
    want, _ = made(form="recurrence")(X)
    assert torch.allclose(layer(X)[0], want, rtol=1e-9, atol=1e-12)
    state, parts = None, []
    for part in X.split([1, 0, 30, 1, 35], 1):
        y, state = layer(part, state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), want, rtol=1e-9, atol=1e-12)


def test_initial_rates():
    n = torch.arange(4, dtype=torch.float64)
    assert torch.allclose(-made(init="real").A_log.exp(), -(n + 1).expand(6, 4))
    for init, imaginary in (("lin", math.pi * n[:2]), ("inv", 4 / math.pi * (4 / (2 * n[:2] + 1) - 1))):
        layer = made(init=init)
        assert torch.allclose(layer.A_log.exp(), torch.full((6, 2), 0.5, dtype=torch.float64))
        assert torch.allclose(layer.A_imag, imaginary.expand(6, 2), rtol=1e-6)
    dt = S4D(1000, d_state=2).log_dt.exp()
    assert 1e-3 <= dt.min() < 2e-3
    assert 0.05 < dt.max() <= 0.1


@pytest.mark.parametrize("init", ["real", "lin", "inv"])
def test_discretisations_are_of_their_order(init):
    """The state at time 1 under a constant input, (exp(A) - 1) / A exactly: zoh is exact, bilinear of order 2, Euler of order 1."""
    errors = {}
    for steps in (64, 128):
        for name in ("zoh", "bilinear", "euler"):
            layer = made(init=init, discretisation=name)
            torch.nn.init.constant_(layer.log_dt, math.log(1 / steps))
            a, b = (x.detach().numpy() for x in layer.discrete(torch.float64))
            A = np.array(-np.exp(layer.A_log.detach().numpy()) + (0 if layer.A_imag is None else 1j * layer.A_imag.detach().numpy()))
            errors[name, steps] = np.abs(b * (a**steps - 1) / (a - 1) - (np.exp(A) - 1) / A).max()
    assert errors["zoh", 64] < 1e-12
    for name, order in (("bilinear", 2), ("euler", 1)):
        assert math.log2(errors[name, 64] / errors[name, 128]) == pytest.approx(order, abs=0.15)


def test_s4d_real_is_hebb_with_fixed_decays_of_its_keys():
    """A head for each channel, one value, d_state keys: k = b, q = C, g = dt A at all tokens."""
    layer = made(init="real")
    a, b = layer.discrete(torch.float64)
    every = (2, 67, 6, 4)
    y, W = fw.scan(fw.rules.decayed_hebb, q=layer.C.expand(every), k=b.expand(every), v=X.unsqueeze(-1), g=a.log().expand(every))
    read = F.gelu(y.squeeze(-1) + layer.skip * X)
    assert torch.allclose(F.glu(layer.out(read), -1), layer(X)[0], rtol=1e-9, atol=1e-12)
    assert torch.allclose(W.squeeze(2), layer(X)[1]["W"].squeeze(1), rtol=1e-9, atol=1e-12)


def test_the_kernel_is_the_response_to_an_impulse():
    layer = made(init="lin")
    a, b, C, _ = numbers(layer)
    want = np.stack([(C * a**lag * b).sum(-1).real for lag in range(50)])
    assert np.allclose(layer.kernel(50).detach().numpy(), want, rtol=1e-10, atol=1e-13)


def test_float32_keeps_its_digits_over_long_sequences():
    torch.manual_seed(0)
    layer, x = S4D(4, d_state=16), torch.randn(1, 4000, 4)
    assert (layer(x)[0] - layer.double()(x.double())[0]).abs().max() < 1e-4


@pytest.mark.parametrize("layer", [made(), made(init="real"), made(Mamba)], ids=lambda m: type(m).__name__)
def test_derivatives(layer):
    x = X[:1, :5].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], (x,))


def mamba_loop(layer, x):
    p = {n: t.detach().numpy() for n, t in layer.named_parameters()}

    def silu(x):
        return x / (1 + np.exp(-x))

    A, W, past, ys = -np.exp(p["A_log"]), np.zeros((layer.d_inner, layer.d_state)), [np.zeros(layer.d_inner)] * 4, []
    for token in x:
        u, z = np.split(p["project.weight"] @ token, 2)
        past = [*past[1:], u]
        u = silu(sum(w * s for w, s in zip(p["conv.weight"][:, 0].T, past, strict=True)) + p["conv.bias"])
        r, B, C = np.split(p["select.weight"] @ u, [layer.rank, layer.rank + layer.d_state])
        dt = np.log1p(np.exp(p["step.weight"] @ r + p["step.bias"]))
        W = np.exp(dt[:, None] * A) * W + (dt * u)[:, None] * B
        ys.append(p["out.weight"] @ ((W @ C + p["skip"] * u) * silu(z)))
    return np.stack(ys)


def test_mamba_is_the_loop_of_the_paper():
    layer = made(Mamba, rank=3)
    y, _ = layer(X)
    for row in range(2):
        assert np.allclose(y[row].detach().numpy(), mamba_loop(layer, X[row].numpy()), rtol=1e-10, atol=1e-12)


def test_mamba_starts_as_published():
    layer = Mamba(64)
    assert layer.d_inner == 128
    assert layer.rank == 4
    assert torch.allclose(layer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    dt = F.softplus(layer.step.bias)
    assert dt.min() >= 1e-4
    assert dt.max() <= 0.1 + 1e-6
    assert layer.step.weight.abs().max() <= 0.5
    assert (layer.skip == 1).all()


def test_mamba_is_that_of_transformers(monkeypatch):
    """The same weights in both. Its mixer computes in float32; here its float() is double(), so that all digits can be compared."""
    transformers = pytest.importorskip("transformers")
    mixers = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = transformers.MambaConfig(
        vocab_size=7, hidden_size=24, state_size=5, num_hidden_layers=1, expand=2, conv_kernel=4, time_step_rank=3
    )
    torch.manual_seed(0)
    other = mixers.MambaMixer(config, 0).double().eval()
    for p in other.parameters():  # every weight matters: biases of the convolution start at zero, D at one
        p.data += 0.1 * torch.randn_like(p)
    layer = Mamba(24, d_state=5, rank=3).double()
    names = {"in_proj": "project", "conv1d": "conv", "x_proj": "select", "dt_proj": "step", "D": "skip", "out_proj": "out"}
    weights = {".".join(names.get(part, part) for part in n.split(".")): p for n, p in other.state_dict().items()}
    layer.load_state_dict(weights)
    x = torch.randn(2, 23, 24, dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    assert torch.allclose(other(x), layer(x)[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layer", [made(), made(init="real"), made(Mamba)], ids=["lin", "real", "mamba"])
def test_nothing_of_what_came_before_a_reset_is_left(layer):
    """Not even what is not finite."""
    _, spoilt = layer(X * torch.nan)
    reset = torch.zeros(2, 67, dtype=torch.bool)
    reset[:, 0] = True
    assert torch.allclose(layer(X, spoilt, reset)[0], layer(X)[0], rtol=1e-9, atol=1e-12)
    first = torch.cat([X[:, :5] * torch.nan, X[:, 5:]], 1)
    assert torch.allclose(layer(first, None, reset.roll(5, 1))[0][:, 5:], layer(X[:, 5:])[0], rtol=1e-9, atol=1e-12)


BAD = {
    "init is 'hippo'": lambda: S4D(6, init="hippo"),
    "come in pairs": lambda: S4D(6, d_state=5),
    "one kernel for all tokens": lambda: S4D(6, form="convolution").double()(X, None, torch.ones(2, 67, dtype=torch.bool)),
    "expected a tensor (B, T, d_model = 6)": lambda: Mamba(6)(torch.zeros(2, 6)),
    "expected a real floating-point dtype": lambda: Mamba(6)(torch.zeros(2, 3, 6, dtype=torch.int64)),
    "reset has shape (2, 3), expected (B, T) = (2, 67)": lambda: S4D(6).double()(X, None, torch.zeros(2, 3, dtype=torch.bool)),
    "reset is torch.int64": lambda: S4D(6).double()(X, None, torch.zeros(2, 67, dtype=torch.int64)),
    "d_state is 0": lambda: Mamba(6, d_state=0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_refused(message):
    with pytest.raises(fw.FastWeightError) as refused:
        BAD[message]()
    assert message in str(refused.value)
