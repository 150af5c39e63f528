"""Rules that cannot be taken apart in time: the compiled machine beside the body run by torch, forward and backward, in one run.

``python benchmarks/recurrent_cells.py [--threads N] [--batch B] [--tokens T] [--model D] [--heads H]`` prints medians and ratios: against
the reference (the body under vmap, a token at a time) and a plain Python loop over batched torch operations, written by hand.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

import fastweights as fw
from fastweights.engine.check import example


def srwm_by_hand(s: dict[str, Tensor]) -> Tensor:
    """SRWM as one would write it: batched products, one matrix for all parts."""
    M = torch.cat([s["W_0"], s["Q_0"], s["P_0"], s["B_0"]], 1).expand(s["x"].shape[0], -1, -1, -1)
    dv, dk = s["W_0"].shape[1:]
    parts = [dv, dk, dk, 4]
    out = []
    for x in s["x"].softmax(-1).unbind(1):
        y, q, k, rate = (M @ x.unsqueeze(-1)).squeeze(-1).split(parts, -1)
        q, k = q.softmax(-1), k.softmax(-1)
        rates = torch.cat([r.expand(*r.shape[:-1], n) for r, n in zip(rate.sigmoid().split(1, -1), parts, strict=True)], -1)
        M = M + (rates * (M @ (q - k).unsqueeze(-1)).squeeze(-1)).unsqueeze(-1) * k.unsqueeze(-2)
        out.append(y)
    return torch.stack(out, 1)


def rdn_by_hand(s: dict[str, Tensor]) -> Tensor:
    (B, _, H, K), V = s["q"].shape, s["v"].shape[-1]
    W, y = s["q"].new_zeros(B, H, V, K), s["q"].new_zeros(B, H, V)
    out = []
    for q, k, v, b in zip(*(s[n].unbind(1) for n in ("q", "k", "v", "b")), strict=True):
        h = y.tanh().unsqueeze(-2)
        q = (q + (h @ s["R_q"]).squeeze(-2)).softmax(-1)
        k = (k + (h @ s["R_k"]).squeeze(-2)).softmax(-1)
        v = v + (h @ s["R_v"].mT).squeeze(-2)
        rate = (b + (h.squeeze(-2) * s["r_b"]).sum(-1)).sigmoid()
        error = v - (W @ k.unsqueeze(-1)).squeeze(-1)
        W = W + (rate.unsqueeze(-1) * error).unsqueeze(-1) * k.unsqueeze(-2)
        y = (W @ q.unsqueeze(-1)).squeeze(-1)
        out.append(y)
    return torch.stack(out, 1)


BY_HAND = {"srwm": srwm_by_hand, "rdn": rdn_by_hand}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("threads", torch.get_num_threads()), ("batch", 8), ("tokens", 256), ("model", 128), ("heads", 4), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rules", default="srwm,rdn,delta_rnn,delta_lstm,delta_delta,momentum,backpropamine,mpn")
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    d = o.model // o.heads
    print(f"B{o.batch} T{o.tokens} d{o.model} H{o.heads}, {o.threads} threads, float32, forward and backward, milliseconds")
    print(f"{'rule':24}{'machine':>9}{'loop':>9}{'ratio':>7}{'body':>9}{'ratio':>7}")
    for name in o.rules.split(","):
        rule = fw.rules.get(name)
        signals = example(rule, o.batch, o.tokens, o.heads, d, d, per_channel=rule.shapes[0] == -1, dtype=torch.float32)
        times = {}
        ways = {"machine": lambda s, rule=rule: fw.scan(rule, **s).y}
        if name in BY_HAND:
            ways["loop"] = BY_HAND[name]
        ways["body"] = lambda s, rule=rule: fw.scan(rule, **s, form="recurrent", backend="torch").y
        for way, run in ways.items():
            times[way] = []
            for _ in range(o.repeat if way != "body" else 2):
                leaves = {n: x.clone().requires_grad_() for n, x in signals.items()}
                begun = time.perf_counter()
                run(leaves).square().sum().backward()
                times[way].append(time.perf_counter() - begun)
        ms = {way: 1000 * statistics.median(found) for way, found in times.items()}
        loop = f"{ms['loop']:9.1f}{ms['loop'] / ms['machine']:6.1f}x" if "loop" in ms else " " * 16
        print(f"{name:24}{ms['machine']:9.1f}{loop}{ms['body']:9.1f}{ms['body'] / ms['machine']:6.1f}x", flush=True)


if __name__ == "__main__":
    main()
