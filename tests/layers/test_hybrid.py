"""Hybrids of attention and fast weights against their definition, token by token."""

import numpy as np
import pytest
import torch

import fastweights as fw
from fastweights.layers.hybrid import KINDS, MIXES, HybridAttention
from fastweights.models import LanguageModel, ModelConfig

X = torch.randn(1, 15, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def by_hand(layer, rule):
    S = layer.window
    raw, _ = layer.programmer(X)
    raw = {n: z[0].detach().numpy() for n, z in raw.items()}
    shares = None if layer.shares is None else layer.shares(X)[0].sigmoid().detach().numpy()
    out = []
    for t in range(15):
        heads = []
        for h in range(2):
            first = {"delayed_chunk": t // S * S}.get(layer.kind, max(t - S + 1, 0))
            written = {"synchronous": t + 1, "delayed_stream": max(t - S + 1, 0), "delayed_chunk": t // S * S}[layer.kind]
            W = np.zeros((4, 4))
            for s in range(written):
                k, v = phi(raw["k"][s, h]), raw["v"][s, h]
                W = W * np.exp(raw["g"][s, h]) if "g" in raw else W
                W = W + raw["beta"][s, h] * np.outer(v - W @ k, k)
            q = raw["q"][t, h]
            scores = np.array([turn(q, t) @ turn(raw["k"][s, h], s) / 2 for s in range(first, t + 1)])
            weights = np.exp(scores - scores.max())
            attended = weights @ raw["v"][first : t + 1, h] / weights.sum()
            read = W @ phi(q)
            if shares is None:
                heads.append(attended + read)
            else:
                a, b = shares[t].reshape(2, 2, -1)[:, h]
                heads.append(a * attended + b * read)
        out.append(layer.out.weight.detach().numpy() @ np.concatenate(heads))
    return np.array(out)


def phi(x):
    z = x / (1 + np.exp(-x))
    return z / np.sqrt((z**2).sum() + 1e-6)


def turn(x, t):
    z = (x[:2] + 1j * x[2:]) * np.exp(1j * t / 10000 ** (np.arange(2) / 2))
    return np.concatenate([z.real, z.imag])


@pytest.mark.parametrize("rule", ["delta", "gated_delta"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_hybrid_is_its_definition(kind, mix, rule):
    torch.manual_seed(0)
    layer = HybridAttention(fw.rules.get(rule), 8, heads=2, window=4, kind=kind, mix=mix).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    assert np.allclose(layer(X)[0][0].detach().numpy(), by_hand(layer, rule), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_and_packing_with_a_small_window(kind):
    torch.manual_seed(0)
    layer = HybridAttention(fw.rules.gated_delta, 8, heads=2, window=3, kind=kind).double()
    x = torch.randn(2, 17, 8, dtype=torch.float64)
    whole, last = layer(x)
    for cuts in ([0, 1, 2, 7, 7, 17], list(range(18))):
        state, parts = None, []
        for a, b in zip(cuts, cuts[1:], strict=False):
            y, state = layer(x[:, a:b], state)
            parts.append(y)
        assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-11)
        assert torch.allclose(state["W"], last["W"], rtol=1e-9, atol=1e-11)
    reset = torch.zeros(2, 17, dtype=torch.bool)
    reset[0, [4, 5, 12]] = reset[1, 8] = True
    packed, _ = layer(x, None, reset)
    for row, cuts in ((0, [0, 4, 5, 12, 17]), (1, [0, 8, 17])):
        for a, b in zip(cuts, cuts[1:], strict=False):
            assert torch.allclose(packed[row, a:b], layer(x[row : row + 1, a:b])[0][0], rtol=1e-9, atol=1e-11)
    state, parts = None, []
    for a, b in ((0, 5), (5, 6), (6, 10), (10, 17)):
        y, state = layer(x[:, a:b], state, reset[:, a:b])
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), packed, rtol=1e-9, atol=1e-11)


def test_bad_options_are_refused():
    for options, match in (
        ({"kind": "late"}, "known: synchronous"), ({"mix": "max"}, "known: sum"), ({"window": 0}, "at least 1"), ({"heads": 3}, "multiple"),
    ):  # fmt: skip
        with pytest.raises(fw.SignalError, match=match):
            HybridAttention(fw.rules.delta, 8, **{"heads": 2, **options})
    with pytest.raises(fw.SignalError, match="one key a token"):
        HybridAttention(fw.rules.delta * 2, 8, heads=2)
    with pytest.raises(fw.SignalError, match="one state"):
        HybridAttention(fw.rules.normalised_hebb, 8, heads=2)


def test_a_config_doubles_the_rates_of_hybrids_and_presets():
    for name in ("hybrid_synchronous", "deltanet"):
        for doubled in (False, True):
            config = ModelConfig(layers=(name,), d_model=16, heads=2, negative_eigenvalues=doubled)
            programmer = LanguageModel(config).blocks[0].layer.programmer
            assert programmer.negative_eigenvalues is doubled
