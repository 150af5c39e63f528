"""Code execution: a program of assignments, increments, conditionals and prints, and what it prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from ..language.errors import FastWeightError
from .source import IGNORED, Task, generator, padded, tokens

_LEAST, _MOST = -8, 16  # values that ++ and -- may reach
_VALUES = tuple(str(v) for v in range(_LEAST, _MOST + 1))
_SIGNS = ("=", "++", "--", ";", "print", "if", "<", ">", ":", "_")
_NAMES = ("x", "y", "z", "a", "b")
WORDS = (*_VALUES, *_SIGNS, *_NAMES)
_WORD = {w: i for i, w in enumerate(WORDS)}
_ASSIGN, _CHANGE, _PRINT, _IF = range(4)


@dataclass(frozen=True)
class Code(Task):
    """A program of ``statements`` over 3 to 5 variables: ``x = 3 ;``, ``x ++ ;``, ``x -- ;``, ``print x ;``, ``if x < 4 : print x ;``.

    The first assigns, the last prints, the others are each of the four kinds with equal probability, and a conditional has one of the
    other three behind it. Constants are 0 to 9. Only variables that have a value are used, and values stay within -8 ... 16, where ++
    becomes -- and the other way round. The target stands at the ``;`` of a print: the value, or ``_`` where the condition did not hold;
    the published one also has ``_`` at all other tokens, which do not count here. A condition that holds lets an assignment act whether
    or not the variable had a value before. Source: Irie et al. 2021, after Fan et al. 2020; 100 statements with 3 or 5 variables.

    >>> source = Code(statements=4)
    >>> inputs, targets = source.batch(seed=0, step=0, size=1)
    >>> source.text(inputs[0])
    'x = 8 ; z = 5 ; z ++ ; print z ;'
    >>> source.text(targets[0, -1:])
    '6'
    """

    name: ClassVar[str] = "code"
    variables: int = 3
    statements: int = 100

    def __post_init__(self) -> None:
        self.expect(variables=1, statements=2)
        if self.variables > len(_NAMES):
            raise FastWeightError(f"variables of task code is {self.variables}, expected at most {len(_NAMES)}")

    @property
    def vocabulary(self) -> int:
        return len(WORDS) - len(_NAMES) + self.variables

    def text(self, row: Tensor) -> str:
        """Tokens as they are read; behind a program, up to its last ``;``."""
        said = " ".join(WORDS[i] for i in row.tolist() if i != IGNORED)
        return said[: said.rindex(";") + 1] if ";" in said else said

    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]:
        draw = generator(seed, step)
        value, defined = np.zeros((size, self.variables), np.int64), np.zeros((size, self.variables), bool)
        lines, answers = [], []
        for i in range(self.statements):
            kind = draw.integers(4, size=size)
            kind = np.full(size, _ASSIGN) if i == 0 else np.full(size, _PRINT) if i == self.statements - 1 else kind
            line, holds, act = self._condition(draw, kind == _IF, value, defined)
            act = np.where(kind == _IF, act, kind)
            body, answer = self._act(draw, act, holds, value, defined)
            lines.append(np.concatenate([line, body], 1))
            answers.append(np.pad(answer, ((0, 0), (line.shape[1], 0)), constant_values=IGNORED))
        program, answers = np.concatenate(lines, 1), np.concatenate(answers, 1)
        said = program >= 0
        inputs, targets = padded(program[said], said.sum(1)), padded(answers[said], said.sum(1))
        targets[np.arange(inputs.shape[1]) >= said.sum(1)[:, None]] = IGNORED
        return tokens(inputs), tokens(targets)

    def _condition(self, draw: np.random.Generator, wanted: np.ndarray, value: np.ndarray, defined: np.ndarray) -> tuple[np.ndarray, ...]:
        """The words ``if x < 4 :``, or -1s; whether what stands behind them is done; and which kind that is."""
        rows, size = np.arange(len(wanted)), len(wanted)
        variable, less, bound = _any(draw, defined), draw.integers(2, size=size) == 0, draw.integers(10, size=size)
        told = value[rows, variable]
        holds = ~wanted | np.where(less, told < bound, told > bound)
        sign = np.where(less, _WORD["<"], _WORD[">"])
        words = [np.full(size, _WORD["if"]), _WORD["x"] + variable, sign, bound - _LEAST, np.full(size, _WORD[":"])]
        return np.where(wanted[:, None], np.stack(words, 1), -1), holds, draw.integers(3, size=size)

    def _act(
        self, draw: np.random.Generator, kind: np.ndarray, holds: np.ndarray, value: np.ndarray, defined: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The words of a statement without a condition, and its answer at ``;``; changes ``value`` and ``defined`` where it holds."""
        rows, size = np.arange(len(kind)), len(kind)
        assigns, changes, prints = (kind == k for k in (_ASSIGN, _CHANGE, _PRINT))
        variable = np.where(assigns, draw.integers(self.variables, size=size), _any(draw, defined))
        constant, up = draw.integers(10, size=size), draw.integers(2, size=size) == 0
        told = value[rows, variable]
        up = np.where(told == _MOST, False, np.where(told == _LEAST, True, up))
        value[rows, variable] = np.where(holds & assigns, constant, np.where(holds & changes, told + np.where(up, 1, -1), told))
        defined[rows, variable] |= holds & assigns
        sign = np.select([assigns, changes], [_WORD["="], np.where(up, _WORD["++"], _WORD["--"])], -1)
        words = [np.where(prints, _WORD["print"], -1), _WORD["x"] + variable, sign, np.where(assigns, constant - _LEAST, -1)]
        answer = np.full((size, 5), IGNORED)
        answer[:, 4] = np.where(prints, np.where(holds, told - _LEAST, _WORD["_"]), IGNORED)
        return np.stack([*words, np.full(size, _WORD[";"])], 1), answer


def _any(draw: np.random.Generator, allowed: np.ndarray) -> np.ndarray:
    """One of the columns allowed, in every row; column 0 where there is none."""
    return (draw.random(allowed.shape) * allowed).argmax(1)
