"""Published layers as data: each streams, learns, is stored, and makes its signals as its paper says."""

import numpy as np
import pytest
import torch

import fastweights as fw
from fastweights.models import PRESETS, LanguageModel, ModelConfig, layer_of, load, save


def made(name, **options):
    torch.manual_seed(0)
    return layer_of(name, 24, heads=2, index=1, depth=4, **options).double()


X = torch.randn(2, 11, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_streams_and_every_parameter_learns(name):
    layer = made(name)
    whole, _ = layer(X)
    state, parts = None, []
    for part in X.split([1, 3, 7], 1):
        y, state = layer(part, state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-11)
    whole.square().sum().backward()
    for n, p in layer.named_parameters():
        assert p.grad is not None, n
        assert p.grad.isfinite().all(), n


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_knows_the_size_of_its_state_and_runs_under_autocast(name):
    layer = made(name).float()
    _, state = layer(X[:1].float())
    kept = sum(x.numel() * 4 for n, x in state.items() if n != "position")
    assert layer.state_bytes(11) == kept
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(X.float())[0].isfinite().all()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_layer_of_a_model_that_is_stored(name, tmp_path):
    model = LanguageModel(ModelConfig(layers=(name, "softmax", name), d_model=24, heads=2, vocabulary=31))
    ids = torch.randint(31, (2, 9))
    logits, _ = model(ids)
    save(model, tmp_path / "it")
    again = load(tmp_path / "it")
    assert again.config.layers == (name, "softmax", name)
    assert torch.equal(again(ids)[0], logits)


def by_hand(name, token):
    """What the layer's matrix reads, token by token in numpy, from the signals of its programmer."""
    layer = made(name)
    signals, _ = layer.programmer(X)
    if layer.rotary:
        return layer, signals, None
    s = {n: x.detach().double().numpy() for n, x in signals.items()}
    y = np.zeros((2, 11, 2, layer.d_value))
    for b in range(2):
        for h in range(2):
            W = np.zeros((layer.d_value, layer.d_feature))
            for t in range(11):
                W, y[b, t, h] = token(W, {n: x[b, t, h] for n, x in s.items()})
    return layer, signals, y


TOKENS = {
    "lightning": lambda W, s: (lambda W: (W, W @ s["q"]))(W * np.exp(s["g"]) + np.outer(s["v"], s["k"])),
    "gla": lambda W, s: (lambda W: (W, W @ s["q"]))(W * np.exp(s["g"]) + np.outer(s["v"], s["k"])),
    "hgrn2": lambda W, s: (lambda W: (W, W @ s["q"]))(W * np.exp(s["g"]) + np.outer(s["v"], s["k"])),
    "deltanet": lambda W, s: (lambda W: (W, W @ s["q"]))(W + s["beta"] * np.outer(s["v"] - W @ s["k"], s["k"])),
    "kda": lambda W, s: (lambda W, d: (lambda W: (W, W @ s["q"]))(d + s["beta"] * np.outer(s["v"] - d @ s["k"], s["k"])))(
        W, W * np.exp(s["g"])
    ),
}


@pytest.mark.parametrize("name", TOKENS)
def test_what_is_read_is_the_recurrence_of_the_paper(name):
    layer, signals, y = by_hand(name, TOKENS[name])
    found = fw.scan(layer.rule, **signals).y
    assert np.allclose(found.detach().numpy(), y, rtol=1e-10, atol=1e-12)


def test_retention_turns_and_decays():
    """RetNet: what query n reads of key m is q_n . k_m gamma^(n - m), both turned by their positions."""
    layer = made("retnet")
    signals, _ = layer.programmer(X)
    gamma = 1 - 2.0 ** (-5.0 - torch.arange(2, dtype=torch.float64))
    speed = 10_000.0 ** (-torch.arange(6, dtype=torch.float64) / 6)
    angle = torch.arange(11, dtype=torch.float64)[:, None] * speed

    def turned(x):  # as complex numbers
        z = torch.complex(x[..., :6], x[..., 6:]) * torch.polar(torch.ones_like(angle), angle)[None, :, None]
        return z

    q, k = turned(signals["q"]), turned(signals["k"])
    A = torch.einsum("bthc,bshc->bhts", q, k.conj()).real
    back = torch.arange(11)[:, None] - torch.arange(11)[None, :]
    A = A * (gamma[:, None, None] ** back).tril()
    y = layer.norm(torch.einsum("bhts,bshv->bthv", A, signals["v"]))
    y = layer.out(y.flatten(2) * torch.nn.functional.silu(layer.gate(X)))
    assert torch.allclose(layer(X)[0], y, rtol=1e-6, atol=1e-8)  # gamma is kept in float32


def test_signals_of_their_own():
    gla = made("gla").programmer
    z = gla.custom["g"].up(gla.custom["g"].down(X)).unflatten(-1, (2, 12))
    assert torch.allclose(gla(X)[0]["g"], -torch.log1p(torch.exp(-z)) / 16)
    hgrn2, _ = made("hgrn2").programmer(X)
    assert torch.allclose(hgrn2["k"], 1 - hgrn2["g"].exp())
    assert hgrn2["g"].exp().min() >= 0.25  # the second of four layers
    slopes = made("lightning").programmer(X)[0]["g"][0, 0]
    assert torch.allclose(slopes, -(2.0 ** torch.tensor([-4.0, -8.0], dtype=torch.float64)))
    assert made("deltaproduct").programmer(X)[0]["k"].shape == (2, 11, 2, 2, 12)


def test_a_rule_of_ones_own_may_have_the_name_of_a_preset():
    @fw.rule
    def retnet(W, k: fw.Key, v: fw.Value):
        return 0.5 * W + fw.outer(v, k)

    model = LanguageModel(ModelConfig(layers=("retnet",), d_model=24, heads=2), {"retnet": retnet})
    assert model.blocks[0].layer.rule is retnet


def test_unknown_presets_are_refused_with_those_that_there_are():
    with pytest.raises(fw.RuleError, match="retnet"):
        layer_of("retnets", 24, heads=2)


PACKED = ["gated_delta", "retnet", "mlstm", "kda", "softmax", "window:4", "linear_transformer"]


@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_do_not_see_each_other(name):
    model = LanguageModel(ModelConfig(layers=(name, name), d_model=24, heads=2, vocabulary=31)).double()
    ids = torch.randint(31, (2, 23), generator=torch.Generator().manual_seed(0))
    reset = torch.zeros(2, 23, dtype=torch.bool)
    reset[0, [0, 5, 6]] = reset[1, [11]] = True
    packed, memory = model(ids, None, reset)
    for row, cuts in ((0, [0, 5, 6, 23]), (1, [0, 11, 23])):
        for a, b in zip(cuts, cuts[1:], strict=False):
            alone, last = model(ids[row : row + 1, a:b])
            assert torch.allclose(packed[row, a:b], alone[0], rtol=1e-9, atol=1e-11)
    more = torch.randint(31, (2, 3), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(more, memory)[0][1], model(more[1:], last)[0][0], rtol=1e-9, atol=1e-11)
    half, state = model(ids[:, :9], None, reset[:, :9])
    rest, _ = model(ids[:, 9:], state, reset[:, 9:])
    assert torch.allclose(torch.cat([half, rest], 1), packed, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["srwm", "srwm_delta"])
def test_keys_of_self_reference_begin_sharp(name):
    """Equal inputs have equal keys, and different ones different keys: of what is read, less than a third is read at another input."""
    torch.manual_seed(0)
    assert layer_of(name, 32, heads=4, feature_map="dpfp:1")(torch.randn(1, 3, 32))[0].isfinite().all()
    layer = layer_of(name, 32, heads=4)
    phi = torch.nn.functional.one_hot(torch.arange(8), 8).float()
    keys = torch.softmax(phi @ layer.programmer.slow["P_0"][1].mT, -1)
    overlap = keys @ keys.mT
    assert (overlap.diagonal() > 0.9).all()
    assert (overlap - torch.diag(overlap.diagonal())).max() < 0.3
