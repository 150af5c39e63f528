"""Forward, and forward with backward, of rules in the torch chunk form beside softmax attention: medians of one interleaved run.

python benchmarks/forms.py [--tokens 1024 4096] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

import fastweights as fw
from fastweights.engine.check import example


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def cases(tokens: int, heads: int, size: int) -> dict[str, Callable[[bool], object]]:
    def rule_case(rule: fw.Rule, per_channel: bool) -> Callable[[bool], object]:
        signals = example(rule, 1, tokens, heads, size, size, per_channel=per_channel, dtype=torch.float32)

        def run(backward: bool) -> object:
            given = {n: x.detach().requires_grad_(backward) for n, x in signals.items()}
            y = fw.scan(rule, **given).y
            return y.sum().backward() if backward else y

        return run

    qkv = [torch.randn(1, heads, tokens, size) for _ in range(3)]

    def softmax(backward: bool) -> object:
        given = [x.detach().requires_grad_(backward) for x in qkv]
        y = F.scaled_dot_product_attention(*given, is_causal=True)
        return y.sum().backward() if backward else y

    R = fw.rules
    return {
        "softmax attention": softmax,
        "hebb": rule_case(R.hebb, False),
        "decayed_hebb, per head": rule_case(R.decayed_hebb, False),
        "decayed_hebb, per channel": rule_case(R.decayed_hebb, True),
        "delta": rule_case(R.delta, False),
        "gated_delta, per head": rule_case(R.gated_delta, False),
        "gated_delta, per channel": rule_case(R.gated_delta, True),
        "generalised_delta": rule_case(R.generalised_delta, True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; batch 1, 4 heads of 64 x 64, float32; milliseconds")
    for tokens in options.tokens:
        made = cases(tokens, 4, 64)
        with torch.no_grad():
            forward = interleaved({n: (lambda run=run: run(False)) for n, run in made.items()}, options.repeats)
        both = interleaved({n: (lambda run=run: run(True)) for n, run in made.items()}, options.repeats)
        print(f"\nT = {tokens:<8} {'forward':>10} {'x softmax':>10} {'+ backward':>11} {'x softmax':>10}")
        for name in made:
            ratios = forward["softmax attention"] / forward[name], both["softmax attention"] / both[name]
            print(f"{name:28} {forward[name]:>8.1f} {ratios[0]:>9.1f}x {both[name]:>11.1f} {ratios[1]:>9.1f}x")


if __name__ == "__main__":
    main()
