"""Modular arithmetic: the value of an expression, with and without brackets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from .source import IGNORED, LengthTask, generator, padded, tokens

SYMBOLS = "+-*()="  # the tokens behind the numbers


@dataclass(frozen=True)
class Modular(LengthTask):
    """An expression over the numbers 0 ... modulus - 1, then ``=``, where its value modulo ``modulus`` is to be told.

    Without brackets: numbers and operators in turn, * before + and -; an even length is made odd by leaving one symbol out.
    With ``brackets=true``: an expression of n symbols is x, -x, (x) or (-x) for n = 1 ... 4, and else (a + b) with a of m and b of
    n - m - 3 symbols, m uniform; published without multiplication, ``multiply=false``. Tokens are the numbers, then + - * ( ) =.
    Lengths count the symbols before =. Chance is about 1/modulus. Source: Deletang et al. 2023; lengths as in Grazzi et al. 2024.

    >>> source = Modular(lengths=(7, 7))
    >>> inputs, targets = source.batch(seed=0, step=0, size=1)
    >>> source.text(inputs[0]), targets[0, -1].item()
    ('4+0*0+2=', 1)
    """

    name: ClassVar[str] = "modular"
    modulus: int = 5
    brackets: bool = False
    multiply: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect(modulus=2)

    @property
    def vocabulary(self) -> int:
        return self.modulus + len(SYMBOLS)

    def text(self, row: Tensor) -> str:
        """A row of inputs as it is read, up to its =."""
        said = "".join(str(i) if i < self.modulus else SYMBOLS[i - self.modulus] for i in row.tolist())
        return said.partition("=")[0] + "="

    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]:
        draw = generator(seed, step)
        n = self.draw_lengths(draw, size)
        if self.brackets:
            inputs = padded(self._nested(draw, n), n)
            value = self._stack(inputs, n)
        else:
            n -= 1 - n % 2
            inputs = self._flat(draw, size, n.max())
            value = self._precedence(inputs, n)
        inputs = np.pad(inputs, ((0, 0), (0, 1)))
        at = np.arange(inputs.shape[1])
        inputs[at > n[:, None]] = 0
        inputs[np.arange(size), n] = self.modulus + SYMBOLS.index("=")
        return tokens(inputs), tokens(np.where(at == n[:, None], value[:, None] % self.modulus, IGNORED))

    def _operators(self, draw: np.random.Generator, shape: int | tuple[int, int]) -> np.ndarray:
        return self.modulus + draw.integers(3 if self.multiply else 2, size=shape)

    def _flat(self, draw: np.random.Generator, size: int, n: int) -> np.ndarray:
        out = draw.integers(self.modulus, size=(size, n))
        out[:, 1::2] = self._operators(draw, (size, n // 2))
        return out

    def _precedence(self, inputs: np.ndarray, n: np.ndarray) -> np.ndarray:
        """total + term, where term is the product that is still growing."""
        term, total = inputs[:, 0], np.zeros(len(inputs), np.int64)
        for t in range(2, inputs.shape[1], 2):
            operator, x = inputs[:, t - 1] - self.modulus, inputs[:, t]
            new_total = np.where(operator == 2, total, total + term)
            new_term = np.choose(operator, [x, -x, term * x]) % self.modulus
            total, term = np.where(t < n, new_total, total), np.where(t < n, new_term, term)
        return total + term

    def _nested(self, draw: np.random.Generator, n: np.ndarray) -> np.ndarray:
        """All expressions, one after the other: -l stands for an expression of l symbols that is still to be written out."""
        minus, opens, closes = (self.modulus + SYMBOLS.index(c) for c in "-()")
        flat = -n
        while (flat < 0).any():
            l = np.maximum(-flat, 0)  # noqa: E741
            large = l >= 5
            left = 1 + (draw.random(len(flat)) * (l - 4)).astype(np.int64)
            x, operator = draw.integers(self.modulus, size=len(flat)), self._operators(draw, len(flat))
            gone = np.full(len(flat), _NOTHING)
            signed, bracketed = np.isin(l, (2, 4)), l >= 3
            middle = np.where(large, operator, gone)
            parts = np.stack([
                np.where(bracketed, opens, gone), np.where(signed, minus, gone),
                np.where(large, -left, np.where(l > 0, x, flat)),
                middle, np.where(large, -(l - 3 - left), gone), np.where(bracketed, closes, gone),
            ], 1)  # fmt: skip
            flat = parts[parts != _NOTHING]
        return flat

    def _stack(self, inputs: np.ndarray, n: np.ndarray) -> np.ndarray:
        """A machine with a stack of frames: the value so far, the operator that waits (-1: none yet), and the sign of what comes."""
        size, length = inputs.shape
        rows, depth = np.arange(size), np.zeros(size, np.int64)
        value, waits, sign = np.zeros((size, length), np.int64), np.full((size, length), _FRESH), np.ones((size, length), np.int64)
        for t in range(length):
            now = t < n
            token = inputs[:, t] - self.modulus
            opens, closes, operator = now & (token == 3), now & (token == 4), now & (token >= 0) & (token < 3)
            unary = operator & (waits[rows, depth] != _DONE)
            sign[rows[unary], depth[unary]] = -1
            binary = operator & ~unary
            waits[rows[binary], depth[binary]] = token[binary]
            depth = depth + opens
            value[rows[opens], depth[opens]], waits[rows[opens], depth[opens]], sign[rows[opens], depth[opens]] = 0, _FRESH, 1
            x = np.where(closes, value[rows, depth], inputs[:, t])
            depth = depth - closes
            told = closes | (now & (token < 0))
            r, d = rows[told], depth[told]
            old, x = value[r, d], x[told] * sign[r, d]
            value[r, d] = np.choose(waits[r, d] + 1, [x, old + x, old - x, old * x]) % self.modulus
            waits[r, d], sign[r, d] = _DONE, 1
        return value[:, 0]


_NOTHING = -(2**40)
_FRESH, _DONE = -1, 3  # a frame without a value; a frame with one, and no operator waiting
