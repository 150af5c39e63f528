"""Parity: how many ones there were, modulo two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from .source import IGNORED, LengthTask, generator, tokens

START = 2


@dataclass(frozen=True)
class Parity(LengthTask):
    """Random bits; the label of a token is the parity of the ones up to it.

    The label stands at every bit, or at the last one alone with ``every=false``. A state that begins at zero has nothing to flip, so a
    token START = 2, whose target does not count, comes first unless ``start=false``. Lengths count bits. Chance is 1/2.
    Source: Grazzi et al. 2024, trained on 3 to 40 and tested on up to 256; Hahn 2020.

    >>> inputs, targets = Parity(lengths=(4, 4)).batch(seed=0, step=0, size=1)
    >>> inputs.tolist(), targets.tolist()
    ([[2, 1, 0, 0, 0]], [[-100, 1, 1, 1, 1]])
    """

    name: ClassVar[str] = "parity"
    vocabulary: ClassVar[int] = 3
    every: bool = True
    start: bool = True

    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]:
        draw = generator(seed, step)
        n = self.draw_lengths(draw, size)[:, None]
        at = np.arange(n.max())
        bits = draw.integers(2, size=(size, len(at))) * (at < n)
        counts = at < n if self.every else at == n - 1
        targets = np.where(counts, bits.cumsum(1) % 2, IGNORED)
        if self.start:
            bits = np.pad(bits, ((0, 0), (1, 0)), constant_values=START)
            targets = np.pad(targets, ((0, 0), (1, 0)), constant_values=IGNORED)
        return tokens(bits), tokens(targets)
