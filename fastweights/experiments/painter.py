"""An image as a weight matrix: how near it comes with every rank-one write of the delta rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import rules
from ..engine.scan import unroll
from ..plots import COLOURS, figure
from .experiment import Finding, Result, Setting, experiment


@experiment(
    section="sequences",
    claim="An image is the weight matrix after T rank-one delta writes: the error falls as predicted and is zero at the rank",
    cite="Irie and Schmidhuber 2023, ICLR (Images as weight matrices); Eckart and Young 1936",
    quick=1, default=2, full=20,
)  # fmt: skip
def painter(setting: Setting) -> Result:
    """The image A is painted by ``fw.rules.delta`` with beta = 1 from an empty canvas W_0 = 0; the value of a key is what A makes of it.

    Best keys: the right singular vectors of A, the largest first. W_T is then the best matrix of rank T, with |A - W_T| / |A| =
    sqrt(sum_{i > T} s_i^2) / |A|, and A itself at its rank. Random keys of length 1: every write takes away the part of the error along
    its key, E |A - W_T|^2 = |A|^2 (1 - 1/d)^T for d columns, whatever the image. The image: rings and a gradient of n x n pixels.
    """
    n = setting.pick(quick=48, default=96, full=256)
    A = _image(n)
    _, s, right = torch.linalg.svd(A)
    rank = int((s > 1e-10 * s[0]).sum())
    best = _errors(A, right[:rank])
    predicted = [math.sqrt(float((s[t + 1 :] ** 2).sum())) / float(A.norm()) for t in range(rank)]
    T = 4 * n
    random = []
    for seed in setting.each_seed():
        draw = torch.Generator().manual_seed(seed)
        every = []
        for _ in range(setting.pick(quick=8, default=16, full=16)):
            k = torch.randn(T, n, generator=draw, dtype=torch.float64)
            every.append(torch.tensor(_errors(A, k / k.norm(dim=-1, keepdim=True))) ** 2)
        random.append(torch.stack(every).mean(0).sqrt().tolist())
    expected = [(1 - 1 / n) ** ((t + 1) / 2) for t in range(T)]
    off = [max(abs(a / b - 1) for a, b in zip(run, expected, strict=True)) for run in random]
    findings = [
        Finding(
            "best keys: largest deviation from the tail of the spectrum",
            [max(abs(a - b) for a, b in zip(best, predicted, strict=True))],
            "0",
            high=1e-10,
        ),
        Finding(f"best keys: error at the rank, {rank}", [best[-1]], "0", high=1e-10),
        Finding("random keys: largest relative deviation from (1 - 1/d)^(T/2)", off, "0", high=0.1),
    ]
    table = [
        {"writes": t + 1, "best keys": best[t] if t < rank else 0.0, "random keys": random[0][t], "expected": expected[t]} for t in range(T)
    ]
    return Result(findings, table, _draw(A, right, best, random, expected))


def _image(n: int) -> Tensor:
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64),) * 2, indexing="ij")
    rings = torch.cos(9 * (x**2 + (y - 0.2) ** 2))
    return rings * torch.exp(-((x - 0.3) ** 2) - y**2) + 0.3 * x + (((x + 0.4) ** 2 + (y + 0.4) ** 2) < 0.08).double()


def _canvases(A: Tensor, keys: Tensor) -> Tensor:
    k = keys[None, :, None]
    return unroll(rules.delta, k=k, v=k @ A.mT, beta=k.new_ones(1, len(keys), 1))[0, :, 0]


def _errors(A: Tensor, keys: Tensor) -> list[float]:
    return ((_canvases(A, keys) - A).flatten(1).norm(dim=1) / A.norm()).tolist()


def _draw(A: Tensor, right: Tensor, best: list[float], random: list[list[float]], expected: list[float]):
    made, axes = figure(5, width=2.2, height=2.6)
    pictures = _canvases(A, right[:24])
    shown = [("1 write", pictures[0]), ("4 writes", pictures[3]), ("16 writes", pictures[15]), ("the image", A)]
    for ax, (title, picture) in zip(axes, shown, strict=False):
        ax.imshow(picture.numpy(), cmap="gray", vmin=float(A.min()), vmax=float(A.max()))
        ax.set_title(title, fontsize=9)
        ax.axis("off")
    ax = axes[4]
    t = range(1, len(expected) + 1)
    ax.semilogy(t, expected, color=COLOURS[0], label="random keys")
    for run in random:
        ax.semilogy(list(t)[:: len(t) // 12], run[:: len(t) // 12], "o", color=COLOURS[0], ms=3)
    ax.semilogy(range(1, len(best)), best[:-1], color=COLOURS[1], label="best keys")
    ax.set_ylim(1e-4, 1.2)
    ax.set_xlabel("writes")
    ax.set_title("error / |image|", fontsize=9)
    ax.legend(frameon=False, fontsize=7, loc="lower left")
    return made
