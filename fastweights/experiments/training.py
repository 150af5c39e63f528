"""The plain training loop that experiments share: batches by (seed, step), Adam, one line of metrics every so often."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..language.errors import FastWeightError
from ..tasks.source import Source, VectorSource
from ..train.scores import Scores, loss_of, score
from .experiment import Setting

_AVERAGED = 50  # steps, of the loss that ``until`` and the metrics look at


def fit(
    model: nn.Module,
    source: Source | VectorSource,
    steps: int,
    *,
    batch: int = 32,
    length: int = 0,
    lr: float = 1e-3,
    seed: int = 0,
    cosine: bool = False,
    clip: float = 1.0,
    until: float = -math.inf,
    loss: Callable[[Tensor, Tensor], Tensor] = loss_of,
    setting: Setting | None = None,
    name: str = "",
) -> list[float]:
    """Train a model, ``outputs, memory = model(inputs)``, in place with Adam, and return the loss of every step.

    Batches are ``source.batch(seed, step, batch, length)``, so that models compared with one seed see the same data in the same order.
    The rate is constant, or with ``cosine`` rises for a twentieth of the steps and then falls to nothing. ``clip`` bounds the norm of
    the gradient; training ends early once the mean loss of 50 steps is below ``until``. ``setting`` is told how far ``name`` is.

    >>> from fastweights.models import ModelConfig, SequenceModel
    >>> from fastweights.tasks import InContextRegression
    >>> task = InContextRegression(d=2, examples=4)
    >>> model = SequenceModel(ModelConfig(layers=("delta",), d_model=16, heads=1), d_in=task.d_in, d_out=task.d_out)
    >>> len(fit(model, task, 3))
    3
    """
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    losses: list[float] = []
    every = max(steps // 10, 1)
    model.train()
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * (_along(step, steps) if cosine else 1.0)
        inputs, targets = source.batch(seed, step, batch, length)
        now = loss(model(inputs)[0], targets)
        optimiser.zero_grad()
        now.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimiser.step()
        losses.append(now.item())
        if not math.isfinite(losses[-1]):
            raise FastWeightError(f"the loss of {name or 'the model'} is {losses[-1]} at step {step + 1}, with lr = {lr}")
        recent = sum(losses[-_AVERAGED:]) / len(losses[-_AVERAGED:])
        good = len(losses) >= _AVERAGED and recent < until
        if setting is not None and ((step + 1) % every == 0 or good):
            setting.tell(f"{name}, seed {seed}: step {step + 1}/{steps}, loss {recent:.4g}")
            setting.record({"model": name, "seed": seed, "step": step + 1, "loss": recent})
        if good:
            break
    model.eval()
    return losses


@dataclass(frozen=True)
class ShortFirst:
    """Tokens of ``short`` for the first half of so many steps of training, those of ``long`` for the second.

    >>> from fastweights.tasks import Parity
    >>> source = ShortFirst(Parity(lengths=(3, 5)), Parity(lengths=(30, 40)), steps=10)
    >>> [source.batch(0, step, 2)[0].shape[1] > 20 for step in (0, 4, 5, 9)]
    [False, False, True, True]
    """

    short: Source
    long: Source
    steps: int

    @property
    def vocabulary(self) -> int:
        return self.long.vocabulary

    @property
    def identity(self) -> str:
        return f"{self.short.identity}, then {self.long.identity}"

    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]:
        return (self.short if 2 * step < self.steps else self.long).batch(seed, step, size, length)

    def validation(self, size: int, length: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.long.validation(size, length)


def _along(step: int, steps: int) -> float:
    """The share of the learning rate: up in a twentieth of the steps, then down along a cosine."""
    warm = max(steps // 20, 1)
    return (step + 1) / warm if step < warm else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(steps - warm, 1))


def scores(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Scores:
    """Bits, share told right, share of sequences all right, and mean squared distance: see ``fastweights.train.scores``."""
    model.eval()
    return score(model, batches)


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The share of the targets that are told right.

    >>> class Parrot(nn.Module):
    ...     def forward(self, x):
    ...         return nn.functional.one_hot(x, 3).float(), None
    >>> accuracy(Parrot(), [(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 2, -100]]))])
    0.5
    """
    return scores(model, batches).accuracy


def parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
