"""Word problems: the running product of elements of a finite group. Groups are built from permutations."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from ..language.errors import FastWeightError
from .source import IGNORED, LengthTask, generator, tokens


class Group(NamedTuple):
    """A finite group of permutations.

    ``elements`` (n, degree) has a permutation p a row, p(i) in column i, the identity first; ``table`` (n, n) has the index of the
    product p q, (p q)(i) = p(q(i)), in row p and column q; ``inverse`` (n,) the index of the inverse.
    """

    name: str
    elements: np.ndarray
    table: np.ndarray
    inverse: np.ndarray

    @property
    def order(self) -> int:
        return len(self.elements)


@lru_cache(maxsize=32)
def group(name: str) -> Group:
    """Z_n, the cycle of n; S_n, all permutations of n; A_n, the even ones; D_n, the 2n symmetries of a regular n-gon.

    >>> group("S_3").order, group("A_5").order, group("D_8").order
    (6, 60, 16)
    """
    family, _, size = name.partition("_")
    if family not in ("Z", "S", "A", "D") or not size.isdigit() or int(size) < 1:
        raise FastWeightError(f"there is no group {name!r}; write Z_n, S_n, A_n or D_n with a number n, such as S_3")
    n = int(size)
    if n > {"Z": 360, "D": 180, "S": 6, "A": 6}[family] or (family == "D" and n < 3):
        raise FastWeightError(f"the group {name} is out of range: Z_1 to Z_360, S_1 to S_6, A_1 to A_6, D_3 to D_180")
    elements = np.array(sorted(_permutations(family, n)))  # the identity is the first in the order of words
    told = elements[:, :6]  # which tell an element of these groups: two points do in Z_n and D_n
    weights = n ** np.arange(told.shape[1])[::-1]  # rows in the order of words are numbers in their order
    products = elements[np.arange(len(elements))[:, None, None], told[None]]  # p(q(i))
    table = np.searchsorted(told @ weights, products @ weights)
    return Group(name, elements, table, (table == 0).argmax(1))


def _permutations(family: str, n: int) -> list[tuple[int, ...]]:
    if family == "Z":
        return [tuple((i + turn) % n for i in range(n)) for turn in range(n)]
    if family == "D":
        return [tuple((way * i + turn) % n for i in range(n)) for turn in range(n) for way in (1, -1)]
    return [p for p in itertools.permutations(range(n)) if family == "S" or _even(p)]


def _even(p: tuple[int, ...]) -> bool:
    return sum(p[i] > p[j] for i, j in itertools.combinations(range(len(p)), 2)) % 2 == 0


@dataclass(frozen=True)
class Words(LengthTask):
    """Tokens are elements of a group, drawn uniformly; the label of token t is the product x_1 x_2 ... x_t.

    The newest element stands on the right, and is applied first when the product acts: (p q)(i) = p(q(i)). A token of its own, the last
    of the vocabulary, comes first unless ``start=false``, since a state that begins at zero has nothing to turn. Lengths count elements.
    Chance is 1/order. Source: Merrill et al. 2024; Siems et al. 2025.

    >>> inputs, targets = Words(group="Z_5", lengths=(4, 4)).batch(seed=0, step=0, size=1)
    >>> (targets[0, 1:] == inputs[0, 1:].cumsum(0) % 5).all().item()
    True
    """

    name: ClassVar[str] = "words"
    lengths: tuple[int, int] = (1, 32)
    longer: tuple[int, int] = (33, 128)
    group: str = "S_3"
    start: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        group(self.group)

    @property
    def vocabulary(self) -> int:
        return group(self.group).order + 1

    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]:
        draw = generator(seed, step)
        found = group(self.group)
        n = self.draw_lengths(draw, size)
        inputs = draw.integers(found.order, size=(size, n.max()))
        targets = np.empty_like(inputs)
        product = np.zeros(size, np.int64)
        for t in range(inputs.shape[1]):
            targets[:, t] = product = found.table[product, inputs[:, t]]
        outside = np.arange(inputs.shape[1]) >= n[:, None]
        inputs[outside], targets[outside] = 0, IGNORED
        if self.start:
            inputs = np.pad(inputs, ((0, 0), (1, 0)), constant_values=found.order)
            targets = np.pad(targets, ((0, 0), (1, 0)), constant_values=IGNORED)
        return tokens(inputs), tokens(targets)
