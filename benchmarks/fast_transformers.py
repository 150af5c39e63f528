"""Hebb (linear attention) beside the C++ of fast-transformers (idiap), forward, and forward with backward: medians of one interleaved run.

The package (pytorch-fast-transformers on PyPI) asks for a CUDA compiler at install where it thinks that there is one. This takes the one
source file that a CPU needs from its unpacked archive and compiles it with the flags that its setup gives, and others if asked for:

python benchmarks/fast_transformers.py --source pytorch-fast-transformers-0.4.0 [--flags=-march=native] [--shapes A C] [--seconds 2]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import load

import fastweights as fw
from fastweights.bench.measure import call, interleaved
from fastweights.bench.scans import SHAPES

FILE = "fast_transformers/causal_product/causal_product_cpu.cpp"


def attention(compiled: ModuleType) -> Any:
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            ctx.save_for_backward(q, k, v)
            y = q.new_zeros(*q.shape[:3], v.shape[3])
            compiled.causal_dot_product(q, k, v, y)
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            grads = [torch.zeros_like(x) for x in ctx.saved_tensors]
            compiled.causal_dot_backward(*ctx.saved_tensors, grad.contiguous(), *grads)
            return tuple(grads)

    return Attention.apply


def compare(theirs: Any, shape: str, seconds: float) -> None:
    B, H, T, D = SHAPES[shape]
    ours_given = {n: torch.randn(B, T, H, D) * D**-0.5 for n in ("q", "k", "v")}
    their_given = {n: x.transpose(1, 2).contiguous() for n, x in ours_given.items()}  # as each lays them out

    def ours(**given: Tensor) -> Tensor:
        return fw.scan(fw.rules.hebb, **given).y

    def of_them(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return theirs(q, k, v)

    torch.testing.assert_close(of_them(**their_given).transpose(1, 2), ours(**ours_given), rtol=1e-4, atol=1e-5)
    for backward in (False, True):
        t = interleaved({"ours": call(ours, ours_given, backward), "theirs": call(of_them, their_given, backward)}, seconds)
        what = "forward and backward" if backward else "forward"
        print(
            f"{shape} {what}: ours {1e3 * t['ours']:.2f} ms, theirs {1e3 * t['theirs']:.2f} ms, {t['theirs'] / t['ours']:.1f} times as long"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the unpacked archive of pytorch-fast-transformers")
    parser.add_argument("--flags", nargs="*", default=[], help="more flags for the compiler")
    parser.add_argument("--shapes", nargs="*", default=["A", "B", "C"], choices=sorted(SHAPES))
    parser.add_argument("--seconds", type=float, default=2.0, help="for each of the things compared")
    args = parser.parse_args()
    if not (args.source / FILE).is_file():
        parser.error(f"{args.source} has no {FILE}; give the folder that the archive of pytorch-fast-transformers unpacks to")
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-O3", "-fopenmp", "-ffast-math", *args.flags]
        compiled = load("causal_product_cpu", [str(args.source / FILE)], extra_cflags=flags, build_directory=folder)
        for shape in args.shapes:
            compare(attention(compiled), shape, args.seconds)


if __name__ == "__main__":
    main()
