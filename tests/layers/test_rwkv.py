"""RWKV-6 and RWKV-7 against their papers, token by token in numpy."""

import numpy as np
import pytest
import torch

from fastweights.layers.rwkv import RWKV6, RWKV7

X = torch.randn(1, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def made(kind, **options):
    torch.manual_seed(0)
    layer = kind(12, heads=2, **options).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return layer, {n: p.detach().numpy() for n, p in layer.named_parameters()}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def group_norm(y, weight, bias, eps):
    z = y.reshape(2, 6)
    z = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + eps)
    return z.reshape(12) * weight + bias


@pytest.mark.parametrize("first", [False, True])
def test_rwkv7_token_by_token(first):
    layer, p = made(RWKV7, value_rank=3 if first else None, decay_rank=4, rate_rank=5, gate_rank=3)
    v_first = torch.randn(1, 9, 12, dtype=torch.float64) if first else None
    S, last, out = np.zeros((2, 6, 6)), np.zeros(12), []
    for t in range(9):
        x = X[0, t].numpy()
        m = {c: x + (last - x) * p[f"x_{c}"][0, 0] for c in "rwkvag"}
        last = x
        low = {c: p[f"{c}_lora.lora.0.weight"] for c in "wag"}
        w = np.exp(-np.exp(-0.5) * sigmoid(p["w_lora.lora.2.weight"] @ np.tanh(low["w"] @ m["w"]) + p["w_lora.lora.2.bias"]))
        a = sigmoid(p["a_lora.lora.2.weight"] @ (low["a"] @ m["a"]) + p["a_lora.lora.2.bias"])
        g = p["g_lora.lora.2.weight"] @ sigmoid(low["g"] @ m["g"])
        r, k, v = (p[f"{c}_proj.weight"] @ m[c] for c in "rkv")
        if first:
            mix = sigmoid(p["v_lora.lora.2.weight"] @ (p["v_lora.lora.0.weight"] @ m["v"]) + p["v_lora.lora.2.bias"])
            v = v + (v_first[0, t].numpy() - v) * mix
        kk = (k * p["k_k"]).reshape(2, 6)
        kk = kk / np.linalg.norm(kk, axis=1, keepdims=True)
        k = k * (1 + (a - 1) * p["k_a"])
        y = np.zeros((2, 6))
        for h in range(2):
            cut = slice(6 * h, 6 * h + 6)
            S[h] = S[h] @ (np.diag(w[cut]) - np.outer(kk[h], kk[h] * a[cut])) + np.outer(v[cut], k[cut])
            y[h] = S[h] @ r[cut]
        bonus = np.repeat([(r[c] * k[c] * p["r_k"][h]).sum() for h, c in enumerate((slice(0, 6), slice(6, 12)))], 6) * v
        y = group_norm(y, p["g_norm.weight"], p["g_norm.bias"], 6e-5) + bonus
        out.append(p["o_proj.weight"] @ (y * g))
    y, state = layer(X, v_first=v_first)
    assert np.allclose(y[0].detach().numpy(), out, rtol=1e-10, atol=1e-12)
    assert np.allclose(state["W"][0].detach().numpy(), S, rtol=1e-10, atol=1e-12)


def test_rwkv6_token_by_token():
    layer, p = made(RWKV6, mix_rank=3, decay_rank=4)
    S, last, out = np.zeros((2, 6, 6)), np.zeros(12), []
    for t in range(9):
        x = X[0, t].numpy()
        inner = np.tanh(p["mix_in.weight"] @ (x + (last - x) * p["mix_x"])).reshape(5, 3)
        m = [x + (last - x) * (inner[i] @ p["mix_out"][i] + p["mix"][i]) for i in range(5)]
        last = x
        r, k, v = (p[f"{c}_proj.weight"] @ m[i] for c, i in (("r", 0), ("k", 2), ("v", 3)))
        w = np.exp(-np.exp(p["w_lora.lora.2.weight"] @ np.tanh(p["w_lora.lora.0.weight"] @ m[1]) + p["w_lora.lora.2.bias"]))
        g = p["g_proj.weight"] @ m[4]
        y = np.zeros((2, 6))
        for h in range(2):
            cut = slice(6 * h, 6 * h + 6)
            y[h] = (S[h] + np.outer(v[cut], p["bonus"][h] * k[cut])) @ r[cut]
            S[h] = S[h] * w[cut] + np.outer(v[cut], k[cut])
        out.append(p["out.weight"] @ (group_norm(y, p["g_norm.weight"], p["g_norm.bias"], 6e-5) * g * sigmoid(g)))
    y, state = layer(X)
    assert np.allclose(y[0].detach().numpy(), out, rtol=1e-10, atol=1e-12)
    assert np.allclose(state["W"][0].detach().numpy(), S, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layer", [RWKV6, RWKV7])
def test_autocast(layer):
    torch.manual_seed(0)
    made, x = layer(12, heads=2), torch.randn(2, 9, 12)
    whole, _ = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = made(x)
    assert (y - whole).norm() < 0.05 * whole.norm()
    y.float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())
