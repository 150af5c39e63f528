"""The compiled kernels beside what else runs on a CPU: medians of one interleaved run, with the multiply-add peak sampled beside each.

python benchmarks/kernels.py [--shapes A B C] [--seconds 2] [--out runs/bench]

Shapes: A = (B1 H4 T2048, 64 x 64), B = (B4 H8 T1024, 64 x 64), C = (B1 H8 T8192, 128 x 128). The percentage is the share of the peak that
the least possible work takes: 4 K V operations a token forward for rules that add, 6 K V for rules that erase, 10 and 14 K V more backward.
Compared are the torch chunk form, softmax attention and, where transformers is installed, its torch fallbacks. Writes JSON and a figure.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn import functional as F

import fastweights as fw
from fastweights.engine.kernels import library

SHAPES = {"A": (1, 4, 2048, 64), "B": (4, 8, 1024, 64), "C": (1, 8, 8192, 128)}
R = fw.rules


@fw.rule
def free_erase(W, k: fw.Key, v: fw.Value, x: fw.KeyVector, y: fw.KeyVector):
    return W + fw.outer(W @ x, y) + fw.outer(v, k)


CLASSES = {
    "decay none, erase none (Hebb)": (R.hebb, False),
    "decay scalar, erase none (RetNet, Mamba-2)": (R.decayed_hebb, False),
    "decay key, erase none (GLA)": (R.decayed_hebb, True),
    "decay none, erase tied (DeltaNet)": (R.delta, False),
    "decay scalar, erase tied (Gated DeltaNet)": (R.gated_delta, False),
    "decay key, erase tied (KDA)": (R.gated_delta, True),
    "decay none, erase free": (free_erase, False),
    "decay scalar, erase free": (R.generalised_delta, False),
    "decay key, erase free (RWKV-7)": (R.generalised_delta, True),
}


def peak() -> float:
    """Multiply-add operations a second of all threads that torch uses, from registers alone."""
    lib = library().lib
    if lib is None:
        raise SystemExit(f"no kernels to measure: {library().why}")
    lib.fastweights_multiply_add.restype = ctypes.c_float
    threads, rounds, times = torch.get_num_threads(), 4_000_000, []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(4):
            start = time.perf_counter()
            list(pool.map(lambda _: lib.fastweights_multiply_add(ctypes.c_int64(rounds)), range(threads)))
            times.append(time.perf_counter() - start)
    return threads * 2 * 16 * lib.fastweights_lanes() * rounds / min(times)


def signals(rule: fw.Rule, shape: tuple[int, int, int, int], per_channel: bool) -> dict[str, torch.Tensor]:
    B, H, T, D = shape
    draw = torch.Generator().manual_seed(0)
    out = {}
    for name, s in rule.signals.items():
        x = torch.randn(B, T, H, *s.shapes(D, D)[-1 if per_channel else 0], generator=draw)
        role = s.role.name
        out[name] = (
            -0.1 * F.softplus(x)
            if s.role.log_decay
            else x.sigmoid()
            if role == "Rate"
            else x
            if role == "Value"
            else F.normalize(x, dim=-1)
        )
    if "x" in out and "y" in out:
        out["y"] = -0.5 * out["x"]
    return out


def interleaved(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def calls(function: Callable[..., torch.Tensor], given: dict[str, torch.Tensor], backward: bool) -> Callable[[], object]:
    leaves = {n: x.detach().clone().requires_grad_(backward) for n, x in given.items()}

    def run() -> object:
        if not backward:
            with torch.no_grad():
                return function(**leaves)
        for x in leaves.values():
            x.grad = None
        return function(**leaves).sum().backward()

    return run


def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)


def fallbacks() -> dict[str, Callable[..., torch.Tensor]]:
    """The torch functions of transformers, by class."""
    try:
        from transformers.models.kimi_linear import modeling_kimi_linear as kimi
        from transformers.models.qwen3_next import modeling_qwen3_next as qwen
    except ImportError:
        return {}
    found = {
        "decay scalar, erase tied (Gated DeltaNet)": qwen.torch_chunk_gated_delta_rule,
        "decay key, erase tied (KDA)": kimi.chunk_kimi_delta_attention,
    }
    plain = {name: getattr(f, "__wrapped__", f) for name, f in found.items()}
    return {name: (lambda q, k, v, g, beta, f=f: f(q, k, v, g, beta)[0]) for name, f in plain.items()}


def measure(name: str, shape_name: str, backward: bool, seconds: float) -> dict[str, object]:
    rule, per_channel = CLASSES[name]
    shape = SHAPES[shape_name]
    given = signals(rule, shape, per_channel)
    runs = {"kernels": calls(lambda **x: fw.scan(rule, **x, backend="cpu").y, given, backward)}
    small = shape_name != "C" or not backward
    if small:
        runs["torch chunk"] = calls(lambda **x: fw.scan(rule, **x, backend="torch").y, given, backward)
        runs["softmax"] = calls(softmax, given, backward)
        if name in fallbacks():
            runs["transformers"] = calls(fallbacks()[name], given, backward)
    peaks = [peak()]
    times = {n: statistics.median(t) for n, t in interleaved(runs, seconds).items()}
    peaks.append(peak())
    B, H, T, D = shape
    adds = rule.program.erase == "none"
    work = ((4 if adds else 6) + (10 if adds else 14) * backward) * D * D * B * H * T
    share = work / times["kernels"] / statistics.mean(peaks)
    return {"class": name, "shape": shape_name, "backward": backward, "ms": {n: 1e3 * t for n, t in times.items()}, "share": share}


def decode() -> dict[str, object]:
    """One token, 16 heads of 128 x 128: as a function, and in place."""
    one = {n: x[:, 0] for n, x in signals(R.gated_delta, (1, 16, 1, 128), False).items()}
    W = torch.zeros(1, 16, 128, 128)
    with torch.no_grad():
        times = interleaved(
            {"step": lambda: fw.step(R.gated_delta, W, **one), "step in place": lambda: fw.step(R.gated_delta, W, out=W, **one)}, 1.0
        )
    return {"us": {n: 1e6 * statistics.median(t) for n, t in times.items()}}


def lengths(seconds: float) -> list[dict[str, float]]:
    """Gated delta, one head of 64 x 64, forward: time a token from a thousand to a million of them."""
    rows = []
    for T in (1_000, 10_000, 100_000, 1_000_000):
        run = calls(lambda **x: fw.scan(R.gated_delta, **x, backend="cpu").y, signals(R.gated_delta, (1, 2, T, 64), False), False)
        rows.append({"T": T, "ns_per_token": 1e9 * statistics.median(interleaved({"it": run}, seconds)["it"]) / T})
    return rows


def figure(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, backward in zip(axes, (False, True), strict=True):
        names = list(CLASSES)
        for i, shape in enumerate(s for s in SHAPES if any(r["shape"] == s for r in rows)):
            found = {r["class"]: r["share"] for r in rows if r["shape"] == shape and r["backward"] is backward}
            ax.barh([n + 0.27 * (i - 1) for n in range(len(names))], [100 * found.get(c, 0) for c in names], 0.25, label=f"shape {shape}")
        ax.set(title="forward and backward" if backward else "forward", xlabel="share of the multiply-add peak (%)", xlim=(0, 100))
        ax.set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each of the things compared")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, kernels for {library().isa}, float32")
    print(f"{'':44} {'shape':5} {'':8} {'ms':>8} {'of peak':>8} {'x torch':>8} {'x softmax':>9} {'x transformers':>14}")
    rows = []
    for shape in options.shapes:
        for name in CLASSES:
            for backward in (False, True):
                row = measure(name, shape, backward, options.seconds)
                ms = row["ms"]
                ratios = [f"{ms[n] / ms['kernels']:.1f}" if n in ms else "" for n in ("torch chunk", "softmax", "transformers")]
                print(
                    f"{name:44} {shape:5} {'+ backw.' if backward else 'forward':8} {ms['kernels']:>8.2f} {row['share']:>8.0%} "
                    f"{ratios[0]:>8} {ratios[1]:>9} {ratios[2]:>14}",
                    flush=True,
                )
                rows.append(row)
    found = {"rows": rows, "decode": decode(), "lengths": lengths(options.seconds)}
    print("one token, 16 heads of 128 x 128:", ", ".join(f"{n} {us:.0f} us" for n, us in found["decode"]["us"].items()))
    print("nanoseconds a token, 2 heads of 64 x 64:", ", ".join(f"{r['ns_per_token']:.0f} at T = {r['T']:,}" for r in found["lengths"]))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kernels.json").write_text(json.dumps(found, indent=2))
    figure(rows, options.out / "kernels.png")
    print(f"wrote {options.out}/kernels.json and kernels.png")


if __name__ == "__main__":
    main()
