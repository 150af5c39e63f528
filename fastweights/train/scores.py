"""Losses and scores of targets: classes by cross entropy, numbers by squared error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..tasks.source import IGNORED, Source, VectorSource


class Scores(NamedTuple):
    """Over all targets that count: ``bits`` a target, the share told right, the share of sequences with all of them right; or ``error``,
    the mean squared distance, where targets are numbers. What does not apply is NaN.
    """

    bits: float = math.nan
    accuracy: float = math.nan
    sequences: float = math.nan
    error: float = math.nan

    def known(self) -> dict[str, float]:
        return {n: x for n, x in self._asdict().items() if not math.isnan(x)}


def kind_of(source: Source | VectorSource) -> str:
    """tokens, classification or regression."""
    return getattr(source, "kind", "tokens")


def unit(task: str, kind: str) -> str:
    """What a loss is measured in."""
    return "mean squared distance" if kind == "regression" else "bits per byte" if task == "text" else "bits per answer"


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that count: cross entropy in nats for classes (B, T), half the squared distance for numbers (B, T, d_out).

    >>> loss_of(torch.zeros(1, 2, 3), torch.tensor([[[float("nan")] * 3, [1.0, 1.0, 0.0]]]))
    tensor(1.)
    """
    if not targets.is_floating_point():
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    counted = counts(targets)
    return 0.5 * (outputs[counted] - targets[counted]).square().sum(-1).mean()


def counts(targets: Tensor) -> Tensor:
    """Which targets count, bool (B, T)."""
    return ~targets.isnan().any(-1) if targets.is_floating_point() else targets != IGNORED


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Scores:
    """A model's scores over batches of inputs and targets."""
    total = right = whole = count = rows = 0.0
    numbers = False
    for inputs, targets in batches:
        outputs, _ = model(inputs)
        counted = counts(targets)
        n = int(counted.sum())
        total += loss_of(outputs, targets).item() * n if n else 0.0
        count += n
        numbers = targets.is_floating_point()
        if not numbers:
            hit = outputs.argmax(-1) == targets
            right += int(hit[counted].sum())
            whole += int((hit | ~counted).all(-1).sum())
            rows += len(targets)
    if not count:
        return Scores()
    if numbers:
        return Scores(error=2 * total / count)
    return Scores(total / count / math.log(2), right / count, whole / rows)


def told(scores: Scores, task: str) -> str:
    """Scores in a line."""
    if math.isnan(scores.bits):
        return f"error {scores.error:.4g}"
    sequences = f" ({scores.sequences:.1%} of sequences)" if task != "text" and scores.sequences != scores.accuracy else ""
    return f"{scores.bits:.3f} {unit(task, 'tokens')}, {scores.accuracy:.1%} right{sequences}"
