"""Copying: say a sequence of symbols again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from .source import IGNORED, LengthTask, generator, tokens


@dataclass(frozen=True)
class Copying(LengthTask):
    """s_1 ... s_n, a separator, then s_1 ... s_(n-1); from the separator on the target is the symbol that comes next, s_1 ... s_n.

    Symbols are drawn from ``symbols``; the separator is the token behind them. Lengths count n. Chance is 1/symbols.
    Source: Graves, Wayne and Danihelka 2014; Jelassi et al. 2024.

    >>> inputs, targets = Copying(symbols=4, lengths=(3, 3)).batch(seed=0, step=0, size=1)
    >>> inputs[0, 3].item(), (targets[0, 3:] == inputs[0, :3]).all().item()
    (4, True)
    """

    name: ClassVar[str] = "copying"
    lengths: tuple[int, int] = (5, 20)
    longer: tuple[int, int] = (21, 40)
    symbols: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(symbols=2)

    @property
    def vocabulary(self) -> int:
        return self.symbols + 1

    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]:
        draw = generator(seed, step)
        n = self.draw_lengths(draw, size)[:, None]
        symbols = draw.integers(self.symbols, size=(size, n.max()))
        at = np.arange(2 * n.max())
        first = np.take_along_axis(symbols, np.clip(np.where(at < n, at, at - n - 1), 0, n - 1), 1)
        answer = np.take_along_axis(symbols, np.clip(at - n, 0, n - 1), 1)
        inside = at < 2 * n
        inputs = np.where(at == n, self.symbols, first) * inside
        return tokens(inputs), tokens(np.where(inside & (at >= n), answer, IGNORED))
