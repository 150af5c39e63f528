"""Feature maps: what their inner products are, their sizes, and layers that use them."""

import math

import numpy as np
import pytest
import torch
from rows import R

import fastweights as fw
from fastweights.layers.feature_maps import NAMES, dpfp, feature_map, is_positive, taylor2

NAMED = [n.replace("NU", "2").replace("FEATURES", "40") for n in NAMES]


@pytest.mark.parametrize("name", NAMED)
def test_the_size_is_what_comes_out_and_positive_is_positive(name):
    torch.manual_seed(0)
    made = feature_map(name, 6, heads=2)
    y = made(torch.randn(3, 5, 2, 6))
    assert y.shape == (3, 5, 2, made.size)
    if is_positive(name) and name != "taylor2":
        assert y.min() >= 0


def test_dpfp_is_its_definition():
    x = torch.randn(5, dtype=torch.float64)
    r = np.maximum(np.concatenate([x, -x]), 0)
    expected = [r[i] * r[(i + j) % 10] for j in (1, 2, 3) for i in range(10)]
    assert np.allclose(dpfp(x, 3), expected, atol=1e-15)


def test_taylor_is_the_exponential_to_second_order():
    q, k = torch.randn(2, 100, 8, dtype=torch.float64)
    s = (q * k).sum(-1) / math.sqrt(8)
    assert torch.allclose((taylor2(q) * taylor2(k)).sum(-1), 1 + s + s * s / 2, rtol=1e-12)


def softmax_attention(q, k, v):
    A = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshv->bthv", A.masked_fill(~torch.ones_like(A, dtype=torch.bool).tril(), -math.inf).softmax(-1), v)


def test_favor_tends_to_softmax_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 40, 2, 8, dtype=torch.float64) / 3 for _ in range(3))
    exact, errors = softmax_attention(q, k, v), []
    for features in (16, 256, 4096):
        found = []
        for seed in range(5):
            torch.manual_seed(seed)
            phi = feature_map(f"favor:{features}", 8)
            found.append((fw.scan(R.normalised_hebb, q=phi(q), k=phi(k), v=v).y - exact).norm() / exact.norm())
        errors.append(torch.stack(found).mean().item())
    assert errors[0] > 2.5 * errors[1] > 6.25 * errors[2]  # as the root of the number of features: a factor of four each
    assert errors[2] < 0.02


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("rule", [R.normalised_hebb, R.gated_delta, R.delta * 2], ids=lambda r: r.name)
def test_layers_use_them_and_stream(name, rule):
    torch.manual_seed(0)
    layer = fw.FastWeightLayer(rule, 24, heads=2, d_key=4, d_value=5, feature_map=name).double()
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    whole, state = layer(x)
    size = feature_map(name if rule is not R.normalised_hebb or is_positive(name) else "elu1", 4).size
    assert state["W"].shape == (2, 2, 5, size)
    before, parts = None, []
    for part in x.split([3, 1, 7], 1):
        y, before = layer(part, before)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-8, atol=1e-10)
    whole.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", ["dpfp:0", "dpfp:x", "relu:2", "gelu"])
def test_unknown_maps_are_refused(name):
    with pytest.raises(fw.SignalError, match="known: identity"):
        feature_map(name, 4)
