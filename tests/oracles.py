"""One token of each rule of the catalogue in numpy, written from the papers; s holds the signals of one token and one head.

Each takes the states by name and returns them with the output.
"""

import numpy as np


def _outer(a, b):
    return np.outer(a, b)


def _plain(update):
    def token(states, s):
        W = update(states["W"], s)
        return {"W": W}, W @ s["q"]

    return token


def _delta(W, s):
    return W + s["beta"] * _outer(s["v"] - W @ s["k"], s["k"])


def _normalised(states, s):
    W, z = states["W"] + _outer(s["v"], s["k"]), states["z"] + s["k"]
    return {"W": W, "z": z}, W @ s["q"] / (z @ s["q"])


def _mlstm(states, s):
    m = max(s["g"] + states["m"], s["i"])
    f, i = np.exp(s["g"] + states["m"] - m), np.exp(s["i"] - m)
    C, n = f * states["W"] + i * _outer(s["v"], s["k"]), f * states["n"] + i * s["k"]
    return {"W": C, "n": n, "m": m}, C @ s["q"] / max(abs(n @ s["q"]), np.exp(-m))


def _rwkv6(states, s):
    W, kv = states["W"], _outer(s["v"], s["k"])
    return {"W": W * np.exp(s["g"]) + kv}, (W + _outer(s["v"], s["u"] * s["k"])) @ s["q"]


def _comba(states, s):
    W = states["W"]
    W = W * np.exp(s["g"]) - s["beta"] * _outer(W @ s["p"], s["k"]) + s["beta"] * _outer(s["v"], s["k"])
    return {"W": W}, W @ (s["q"] - s["d"] * s["k"])


def _preconditioned(states, s):
    A = s["a"] * states["A"] + s["b"] * s["k"] ** 2
    W = states["W"] * np.exp(s["g"])
    W = W + s["beta"] * _outer(s["v"] - W @ s["k"], s["k"] / (1 + A))
    return {"W": W, "A": A}, W @ s["q"]


def _matrix(W, s):
    """RWKV-7: the transition as a matrix."""
    return W @ (np.diag(np.broadcast_to(np.exp(s["g"]), s["k"].shape)) + _outer(s["x"], s["y"])) + _outer(s["v"], s["k"])


def _gdn2(W, s):
    n = len(s["k"])
    return (W * np.exp(s["g"])) @ (np.eye(n) - _outer(s["b"] * s["k"], s["k"])) + _outer(s["w"] * s["v"], s["k"])


def _rows(g):
    return np.exp(g)[:, None] if np.ndim(g) else np.exp(g)


TOKEN = {
    "hebb": _plain(lambda W, s: W + _outer(s["v"], s["k"])),
    "hebb_rate": _plain(lambda W, s: W + s["beta"] * _outer(s["v"], s["k"])),
    "stepped_hebb": _plain(lambda W, s: W * np.exp(s["g"]) + s["dt"] * _outer(s["v"], s["k"])),
    "decayed_hebb": _plain(lambda W, s: W * np.exp(s["g"]) + _outer(s["v"], s["k"])),
    "normalised_hebb": _normalised,
    "exp_gated_hebb": _mlstm,
    "bonus_hebb": _rwkv6,
    "delta": _plain(_delta),
    "gated_delta": _plain(lambda W, s: _delta(W * np.exp(s["g"]), s)),
    "implicit_delta": _plain(lambda W, s: W + s["beta"] / (1 + s["beta"] * (s["k"] @ s["k"])) * _outer(s["v"] - W @ s["k"], s["k"])),
    "erase_write": _plain(_gdn2),
    "comba": _comba,
    "generalised_delta": _plain(_matrix),
    "preconditioned_delta": _preconditioned,
    "td": _plain(lambda W, s: W + s["beta"] * _outer(s["v"] + s["gamma"] * (W @ s["k_next"]) - W @ s["k"], s["k"])),
    "oja": _plain(lambda W, s: W + s["beta"] * _outer(s["v"], s["k"] - W.T @ s["v"])),
    "gated_oja": _plain(lambda W, s: _rows(s["g"]) * W + s["beta"] * _outer(s["v"], s["k"] - (_rows(s["g"]) * W).T @ s["v"])),
    "decay": _plain(lambda W, s: W * np.exp(s["g"])),
    "erase": _plain(lambda W, s: W @ (np.eye(len(s["k"])) - s["beta"] * _outer(s["k"], s["k"]))),
    "write": _plain(lambda W, s: W + s["beta"] * _outer(s["v"], s["k"])),
}


def run(rule, signals, states):
    """A plain loop over batch, heads and time: outputs (B, T, H, V) and final states by name."""
    signals = {n: x.numpy() for n, x in signals.items()}
    B, T, H = next(iter(signals.values())).shape[:3]
    states = {n: x.numpy() for n, x in states.items()}
    final = {n: np.zeros_like(x) for n, x in states.items()}
    out = np.zeros((B, T, H, states["W"].shape[2]))
    for b in range(B):
        for h in range(H):
            mine = {n: x[b, h] for n, x in states.items()}
            for t in range(T):
                mine, out[b, t, h] = TOKEN[rule.name](mine, {n: x[b, t, h] for n, x in signals.items()})
            for n, x in mine.items():
                final[n][b, h] = x
    return out, final
