"""Formal languages: which symbols may come next in a word of a language."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from ..language.errors import FastWeightError
from .source import IGNORED, LengthTask, generator, tokens

Words = tuple[np.ndarray, np.ndarray, np.ndarray]  # symbols and classes (B, T), how many of them count (B,)


class Grammar(NamedTuple):
    """A language: its symbols, and the sets of next symbols that tell its prefixes apart; ``$`` is that the word may end."""

    symbols: str
    sets: tuple[str, ...]
    draw: Callable[[np.random.Generator, np.ndarray], Words]
    step: int = 1  # lengths are multiples of it
    least: int = 1


def _aa(draw: np.random.Generator, n: np.ndarray) -> Words:
    at = np.broadcast_to(np.arange(n.max()), (len(n), n.max()))
    return np.zeros_like(at), at % 2, n


def _abab(draw: np.random.Generator, n: np.ndarray) -> Words:
    at = np.broadcast_to(np.arange(n.max()), (len(n), n.max()))
    return at % 2, np.array([1, 0, 1, 2])[at % 4], n


def _parity(draw: np.random.Generator, n: np.ndarray) -> Words:
    bits = draw.integers(2, size=(len(n), n.max()))
    rows, last = np.arange(len(n)), n - 1
    before = bits.cumsum(1)[rows, last] - bits[rows, last]
    bits[rows, last] = before % 2
    return bits, 1 - bits.cumsum(1) % 2, n


def dyck(draw: np.random.Generator, n: np.ndarray) -> np.ndarray:
    """Words of Dyck-1 of lengths n, all of a length alike likely: 0 opens and 1 closes, (B, max n). Source: Arnold and Sleep 1980."""
    out = np.zeros((len(n), max(n.max(), 1)), np.int64)
    depth, left = np.zeros(len(n), np.int64), n.copy()
    for t in range(n.max()):
        opens = draw.random(len(n)) * 2 * left * (depth + 1) < (depth + 2) * (left - depth)
        out[:, t] = ~opens
        depth = np.where(left > 0, depth + np.where(opens, 1, -1), depth)
        left = np.maximum(left - 1, 0)
    return out


def _dyck1(draw: np.random.Generator, n: np.ndarray) -> Words:
    word = dyck(draw, n)
    return word, ((1 - 2 * word).cumsum(1) > 0).astype(np.int64), n


def _reset_dyck1(draw: np.random.Generator, n: np.ndarray) -> Words:
    """The beginning of a word, a reset, a word."""
    reset = n - 1 - 2 * (draw.random(len(n)) * ((n + 1) // 2)).astype(np.int64)
    first, second = dyck(draw, n + n % 2), dyck(draw, n - 1 - reset)
    at, reset = np.arange(n.max()), reset[:, None]
    behind = np.take_along_axis(second, np.clip(at - reset - 1, 0, second.shape[1] - 1), 1)
    word = np.where(at < reset, first[:, : n.max()], np.where(at == reset, 2, behind))
    change = np.array([1, -1, 0])[word]
    depth = change.cumsum(1)
    depth = depth - np.where(at >= reset, np.take_along_axis(depth, reset, 1), 0)
    return word, (depth > 0).astype(np.int64), n


def _shuffle2(draw: np.random.Generator, n: np.ndarray) -> Words:
    """Two words with brackets of their own, interleaved: a pair is of either kind with equal chance."""
    length = np.stack([2 * draw.binomial(n // 2, 0.5)] * 2, 1)
    length[:, 1] = n - length[:, 0]
    words = np.stack([np.pad(w := dyck(draw, m), ((0, 0), (0, n.max() - w.shape[1]))) for m in length.T], 1)
    at = np.arange(n.max())
    order = np.where(at < n[:, None], draw.random((len(n), n.max())), 2.0).argsort(1).argsort(1)
    which = (order >= length[:, :1]).astype(np.int64)  # the places that fall to the first word are a random subset of its size
    taken = np.where(which == 1, which.cumsum(1), (1 - which).cumsum(1)) - 1
    word = words[np.arange(len(n))[:, None], which, taken]
    depths = [((1 - 2 * word) * (which == i)).cumsum(1) > 0 for i in (0, 1)]
    return word + 2 * which, depths[0] + 2 * depths[1], n


def _counter(letters: int) -> Callable[[np.random.Generator, np.ndarray], Words]:
    def made(draw: np.random.Generator, n: np.ndarray) -> Words:
        at, n = np.arange(letters * n.max()), n[:, None]
        letter = np.minimum(at // n, letters - 1)
        following = np.minimum((at + 1) // n, letters)  # the letter that must come next; after the last one, the end
        return letter, np.where(letter == 0, 0, following), letters * n[:, 0]

    return made


GRAMMARS: dict[str, Grammar] = {
    "aa": Grammar("a", ("a", "a$"), _aa, 2, 2),
    "abab": Grammar("ab", ("a", "b", "a$"), _abab, 4, 4),
    "parity": Grammar("01", ("01", "01$"), _parity),
    "dyck1": Grammar("()", ("($", "()"), _dyck1, 2, 2),
    "reset_dyck1": Grammar("()#", ("(#$", "()#"), _reset_dyck1),
    "shuffle2": Grammar("()[]", ("([$", "()[", "([]", "()[]"), _shuffle2, 2, 2),
    "counter2": Grammar("ab", ("ab", "b", "$"), _counter(2)),
    "counter3": Grammar("abc", ("ab", "b", "c", "$"), _counter(3)),
}


@dataclass(frozen=True)
class Language(LengthTask):
    """At every symbol of a word: which symbols may come next, and may the word end?

    The published protocol (Bhattamishra et al. 2020, as one class a set, Irie et al. 2023): the target of a symbol is the set of the
    symbols that may follow the prefix that it ends; a word counts as right where all its sets are, which training reports as whole
    sequences. Tokens are the symbols, then a token a set (``grammar.sets``). Languages: aa, (aa)*; abab, (abab)*; parity, an even number
    of ones; dyck1; reset_dyck1, where # closes everything, here once a word; shuffle2, two kinds of brackets that need not nest;
    counter2 and counter3, a^n b^n and a^n b^n c^n, whose lengths count n. Lengths are drawn uniformly among those that the language has.
    Words of dyck1 of a length are drawn uniformly, the published ones from a grammar. ``start=true`` puts a token before the word.

    >>> source = Language(language="dyck1", lengths=(4, 4))
    >>> inputs, targets = source.batch(seed=0, step=0, size=1)
    >>> [source.tokens[i] for i in inputs[0]], [source.tokens[i] for i in targets[0]]
    (['(', '(', ')', ')'], ['{()}', '{()}', '{()}', '{($}'])
    """

    name: ClassVar[str] = "language"
    lengths: tuple[int, int] = (2, 50)
    longer: tuple[int, int] = (51, 100)
    language: str = "parity"
    start: bool = False

    def __post_init__(self) -> None:
        if self.language not in GRAMMARS:
            raise FastWeightError(f"there is no language {self.language!r}; there are {', '.join(GRAMMARS)}")
        super().__post_init__()
        for option in ("lengths", "longer"):
            low, high = getattr(self, option)
            if high < self.grammar.least or -(-low // self.grammar.step) * self.grammar.step > high:
                raise FastWeightError(f"{self.language} has words of lengths that are multiples of {self.grammar.step}, none in {option}")

    @property
    def grammar(self) -> Grammar:
        return GRAMMARS[self.language]

    @property
    def tokens(self) -> list[str]:
        """What every token stands for."""
        return [*self.grammar.symbols, *(f"{{{s}}}" for s in self.grammar.sets), *(["start"] if self.start else [])]

    @property
    def vocabulary(self) -> int:
        return len(self.tokens)

    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]:
        draw, step_ = generator(seed, step), self.grammar.step
        low, high = -(-self.lengths[0] // step_), self.lengths[1] // step_
        words, classes, n = self.grammar.draw(draw, step_ * draw.integers(max(low, 1), high, size, endpoint=True))
        inside = np.arange(n.max()) < n[:, None]
        inputs, targets = words * inside, np.where(inside, len(self.grammar.symbols) + classes, IGNORED)
        if self.start:
            inputs = np.pad(inputs, ((0, 0), (1, 0)), constant_values=self.vocabulary - 1)
            targets = np.pad(targets, ((0, 0), (1, 0)), constant_values=IGNORED)
        return tokens(inputs), tokens(targets)
