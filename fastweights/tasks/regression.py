"""In-context regression: examples of a linear function, then an input alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from .source import Task, generator


@dataclass(frozen=True)
class InContextRegression(Task):
    """``examples`` pairs (x, y) with y = w x + noise, then (x, 0), where w x is to be told.

    In every sequence w (outputs, d) and all x are drawn anew, standard normal; the last target alone counts, and has no noise.
    Without noise, the best single gradient step on the examples from w = 0 is at the rate 1/(examples + d + 1), and its risk
    E|w x - prediction|^2 is outputs d (d + 1)/(examples + d + 1); that of 0 is outputs d, and least squares have none from
    ``examples`` = d on. Source: von Oswald et al. 2023, who draw x uniformly; Garg et al. 2022.

    >>> x, y = InContextRegression(d=3, examples=5).batch(seed=0, step=0, size=2)
    >>> x.shape, y.shape, y.isfinite().sum().item()
    (torch.Size([2, 6, 4]), torch.Size([2, 6, 1]), 2)
    """

    name: ClassVar[str] = "icl-regression"
    kind: ClassVar[Literal["regression"]] = "regression"
    d: int = 10
    examples: int = 20
    outputs: int = 1
    noise: float = 0.0

    def __post_init__(self) -> None:
        self.expect(d=1, examples=1, outputs=1, noise=0)

    @property
    def d_in(self) -> int:
        return self.d + self.outputs

    @property
    def d_out(self) -> int:
        return self.outputs

    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]:
        draw = generator(seed, step)
        w = draw.standard_normal((size, self.outputs, self.d))
        x = draw.standard_normal((size, self.examples + 1, self.d))
        told = x @ w.swapaxes(1, 2)
        shown = told + self.noise * draw.standard_normal(told.shape)
        shown[:, -1] = 0
        told[:, :-1] = np.nan
        return torch.from_numpy(np.concatenate([x, shown], -1)).float(), torch.from_numpy(told).float()
