"""Losses and scores of targets: classes by cross entropy, numbers by squared error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..tasks.source import IGNORED, Source, VectorSource
from .processes import ALONE, Processes


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


def loss_of(outputs: Tensor, targets: Tensor, count: int | None = None) -> Tensor:
    """Mean over the targets that count: cross entropy in nats for classes (B, T), half the squared distance for numbers (B, T, d_out).

    With ``count`` the sum over them, divided by that number: the share of a part of a batch, in which that many count, in its mean.
    In float32 or better.

    >>> loss_of(torch.zeros(1, 2, 3), torch.tensor([[[float("nan")] * 3, [1.0, 1.0, 0.0]]]))
    tensor(1.)
    """
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if not targets.is_floating_point():
        reduction = "mean" if count is None else "sum"
        loss = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction)
        return loss if count is None else loss / count
    counted = counts(targets)
    squared = 0.5 * (outputs[counted] - targets[counted]).square().sum(-1)
    return squared.mean() if count is None else squared.sum() / count


def counts(targets: Tensor) -> Tensor:
    """Which targets count, bool (B, T)."""
    return ~targets.isnan().any(-1) if targets.is_floating_point() else targets != IGNORED


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], among: Processes = ALONE) -> Scores:
    """A model's scores over batches of inputs and targets, of whose rows every process takes its share."""
    total = right = whole = count = rows = 0.0
    numbers = False
    for all_inputs, all_targets in batches:
        numbers = all_targets.is_floating_point()
        inputs, targets = among.rows(all_inputs), among.rows(all_targets)
        if not len(targets):
            model(all_inputs[:1])  # a model in shares is only put together by all processes
            continue
        outputs, _ = model(inputs)
        counted = counts(targets)
        n = int(counted.sum())
        total += loss_of(outputs, targets).item() * n if n else 0.0
        count += n
        if not numbers:
            hit = outputs.argmax(-1) == targets
            right += int(hit[counted].sum())
            whole += int((hit | ~counted).all(-1).sum())
            rows += len(targets)
    total, right, whole, count, rows = among.total(total, right, whole, count, rows)
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
