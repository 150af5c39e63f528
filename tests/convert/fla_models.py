"""flash-linear-attention's models by their equations, token by token, from random weights under its names."""

import math

import torch
from torch.nn import functional as F

VOCABULARY, D, HIDDEN, LAYERS = 31, 24, 40, 2
COMMON = {"vocab_size": VOCABULARY, "hidden_size": D, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "norm_eps": 1e-6}
CONFIGS = {
    "gated_deltanet": {"num_heads": 2, "num_v_heads": 4, "head_dim": 6, "expand_v": 1.5, "allow_neg_eigval": True},
    "delta_net": {"num_heads": 3, "expand_k": 1.0, "expand_v": 1.0, "use_gate": False},
    "gated_deltaproduct": {"num_heads": 2, "head_dim": 6, "expand_v": 2.0, "num_householder": 2, "allow_neg_eigval": True},
    "kda": {"num_heads": 2, "head_dim": 6, "expand_v": 1.0},
    "gla": {"num_heads": 2, "expand_k": 0.5, "expand_v": 1.0},
    "retnet": {"num_heads": 2, "expand_k": 1.0, "expand_v": 2.0, "tie_word_embeddings": True},
    "hgrn2": {"expand_ratio": 12, "num_heads": 2},
}


def config(name):
    return {"model_type": name, **COMMON, **CONFIGS[name]}


def weights(name, seed=0):
    """Random weights of the shapes that the library's modules have."""
    c = config(name)
    heads = c.get("num_v_heads") or c["num_heads"]
    if "head_dim" in c:
        K, V, key_heads = c["head_dim"], int(c["head_dim"] * c["expand_v"]), c["num_heads"]
    elif name == "hgrn2":
        K, V, key_heads = c["expand_ratio"], D // heads, heads
    else:
        K, V, key_heads = round(D * c["expand_k"]) // heads, round(D * c["expand_v"]) // heads, heads
    n = c.get("num_householder", 1)
    layer = {"q_proj.weight": (key_heads * K, D), "o_proj.weight": (D, heads * V)}
    if name == "hgrn2":
        layer |= {"f_proj.weight": (D, D), "i_proj.weight": (D, D), "g_norm.weight": (D,)}
    else:
        layer |= {"k_proj.weight": (n * key_heads * K, D), "v_proj.weight": (n * heads * V, D)}
    if name in ("gated_deltanet", "delta_net", "gated_deltaproduct", "kda"):
        layer |= {"q_conv1d.weight": (key_heads * K, 1, 4), "k_conv1d.weight": (n * key_heads * K, 1, 4)}
        layer |= {"v_conv1d.weight": (n * heads * V, 1, 4), "b_proj.weight": (n * heads, D), "o_norm.weight": (V,)}
    if name in ("gated_deltanet", "gated_deltaproduct"):
        layer |= {"a_proj.weight": (heads, D), "A_log": (heads,), "dt_bias": (heads,), "g_proj.weight": (heads * V, D)}
    if name == "kda":
        layer |= {"f_proj.0.weight": (V, D), "f_proj.1.weight": (heads * K, V), "A_log": (heads,), "dt_bias": (heads * K,)}
        layer |= {"g_proj.0.weight": (V, D), "g_proj.1.weight": (heads * V, V), "g_proj.1.bias": (heads * V,)}
    if name in ("gla", "retnet"):
        layer |= {"g_proj.weight": (heads * V, D), "g_norm_swish_gate.weight": (V,)}
    if name == "gla":
        layer |= {"gk_proj.0.weight": (16, D), "gk_proj.1.weight": (heads * K, 16), "gk_proj.1.bias": (heads * K,)}
    shapes = {"model.embeddings.weight": (VOCABULARY, D), "model.norm.weight": (D,)}
    if not c.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (VOCABULARY, D)
    for i in range(LAYERS):
        block = f"model.layers.{i}."
        shapes |= {block + "attn_norm.weight": (D,), block + "mlp_norm.weight": (D,), block + "mlp.gate_proj.weight": (HIDDEN, D)}
        shapes |= {block + "mlp.up_proj.weight": (HIDDEN, D), block + "mlp.down_proj.weight": (D, HIDDEN)}
        shapes |= {block + "attn." + n: shape for n, shape in layer.items()}
    if name == "hgrn2":
        shapes["model.lower_bounds"] = (LAYERS, D)
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=draw) * (0.3 if len(shape) > 1 else 1) for n, shape in shapes.items()}


def logits(name, w, ids):
    w = {n: x.double() for n, x in w.items()}
    c = config(name)
    x = w["model.embeddings.weight"][ids]
    for i in range(LAYERS):
        p = {n.removeprefix(f"model.layers.{i}."): t for n, t in w.items() if n.startswith(f"model.layers.{i}.")}
        x = x + attention(name, c, p, rms(x, p["attn_norm.weight"]), i, w)
        h = rms(x, p["mlp_norm.weight"])
        x = x + (F.silu(h @ p["mlp.gate_proj.weight"].T) * (h @ p["mlp.up_proj.weight"].T)) @ p["mlp.down_proj.weight"].T
    return rms(x, w["model.norm.weight"]) @ w.get("lm_head.weight", w["model.embeddings.weight"]).T


def rms(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def attention(name, c, p, x, index, w):
    a = {n.removeprefix("attn."): t for n, t in p.items() if n.startswith("attn.")}
    heads, n = c.get("num_v_heads") or c["num_heads"], c.get("num_householder", 1)
    B, T, _ = x.shape

    def made(letter):
        z = x @ a[f"{letter}_proj.weight"].T
        if f"{letter}_conv1d.weight" in a:
            z = F.silu(F.conv1d(F.pad(z.mT, (3, 0)), a[f"{letter}_conv1d.weight"], groups=z.shape[-1]).mT)
        return z

    if name == "hgrn2":
        shares = w["model.lower_bounds"].softmax(0)
        low = (shares.cumsum(0) - shares[0])[index]
        f = low + (1 - low) * made("f").sigmoid()
        q, k, v = (z.view(B, T, heads, -1) for z in (F.silu(made("q")), 1 - f, made("i")))
        y = recurrence(q, k.unsqueeze(2), v.unsqueeze(2), f.view(B, T, heads, -1), None)
        return rms(y.flatten(2), a["g_norm.weight"]) @ a["o_proj.weight"].T
    q, k, v = made("q"), made("k"), made("v")
    key_heads = c["num_heads"]
    q = q.view(B, T, key_heads, -1)
    k, v = k.view(B, T, n, key_heads, -1), v.view(B, T, n, heads, -1)
    q, k = q.repeat_interleave(heads // key_heads, 2), k.repeat_interleave(heads // key_heads, 3)
    decay, beta = torch.ones(B, T, heads, 1, dtype=x.dtype), None
    if "b_proj.weight" in a:
        q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
        beta = (x @ a["b_proj.weight"].T).sigmoid().view(B, T, n, heads) * (2 if c.get("allow_neg_eigval") else 1)
    if "a_proj.weight" in a:
        decay = (-a["A_log"].exp() * F.softplus(x @ a["a_proj.weight"].T + a["dt_bias"])).exp().unsqueeze(-1)
    if name == "kda":
        z = (x @ a["f_proj.0.weight"].T @ a["f_proj.1.weight"].T + a["dt_bias"]).view(B, T, heads, -1)
        decay = (-a["A_log"].exp()[:, None] * F.softplus(z)).exp()
    if name == "gla":
        z = x @ a["gk_proj.0.weight"].T @ a["gk_proj.1.weight"].T + a["gk_proj.1.bias"]
        decay = (F.logsigmoid(z) / 16).exp().view(B, T, heads, -1)
    if name == "retnet":
        decay = (1 - 2.0 ** (-5 - torch.arange(heads, dtype=x.dtype)))[:, None].expand(B, T, heads, 1)
        q, k = turn(q), turn(k.squeeze(2)).unsqueeze(2)
    y = recurrence(q, k, v, decay, beta)
    y = rms(y, a["g_norm_swish_gate.weight"] if "g_norm_swish_gate.weight" in a else a["o_norm.weight"]).flatten(2)
    if name == "kda":
        y = y * (x @ a["g_proj.0.weight"].T @ a["g_proj.1.weight"].T + a["g_proj.1.bias"]).sigmoid()
    elif "g_proj.weight" in a:
        y = y * F.silu(x @ a["g_proj.weight"].T)
    return y @ a["o_proj.weight"].T


def turn(x):
    """Pairs (i, i + d/2) turned by position / 10000^(2i/d)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] / 10000 ** (torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def recurrence(q, k, v, decay, beta):
    """q (B, T, H, K), k and v (B, T, n, H, .), decay (B, T, H, K or 1), beta (B, T, n, H) or None for a sum; queries by root K."""
    B, T, n, H, K = k.shape
    S = torch.zeros(B, H, K, v.shape[-1], dtype=q.dtype)
    out = []
    for t in range(T):
        S = S * decay[:, t, :, :, None]
        for j in range(n):
            error = v[:, t, j]
            if beta is not None:
                error = beta[:, t, j, :, None] * (error - torch.einsum("bhkv,bhk->bhv", S, k[:, t, j]))
            S = S + k[:, t, j, :, :, None] * error[:, :, None]
        out.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t] / math.sqrt(K)))
    return torch.stack(out, 1)
