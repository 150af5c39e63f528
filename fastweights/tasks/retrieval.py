"""Associative retrieval in vectors: pairs of key and value are shown, then a key alone, whose value is to be told."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..language.errors import FastWeightError
from .source import Task, generator


@lru_cache(maxsize=64)
def _table(seed: int, rows: int, columns: int) -> np.ndarray:
    return generator(seed, rows).standard_normal((rows, columns)).astype(np.float32)


@dataclass(frozen=True)
class Retrieval(Task):
    """Setting 1: all of ``pairs`` keys and values, each once, in random order, and then ``queries`` of the keys.

    A token is a key beside its value, (d_key + d_out); a query is a key beside zeros, and only there a target counts. Keys are a fixed
    table of standard normal vectors, as is the published one before it is trained, drawn from the seed ``table``. Values are unit
    vectors, one a value, as published, or a table of normal vectors of ``d_value`` numbers. The loss of training, half the squared
    distance, is the published one. Source: Schlag, Irie and Schmidhuber 2021, section 6.1.

    >>> x, y = Retrieval(pairs=3, d_key=5).batch(seed=0, step=0, size=2)
    >>> x.shape, y.shape, y[:, :-1].isnan().all().item(), y[:, -1].sum().item()
    (torch.Size([2, 4, 8]), torch.Size([2, 4, 3]), True, 2.0)
    """

    name: ClassVar[str] = "retrieval"
    kind: ClassVar[Literal["regression"]] = "regression"
    pairs: int = 20
    d_key: int = 64
    d_value: int = 0
    queries: int = 1
    table: int = 0

    rewritten: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.expect(pairs=1, d_key=1, d_value=0, queries=1)
        if self.queries > self.writes:
            raise FastWeightError(f"queries of task {self.name} is {self.queries}, more than its {self.writes} writes")

    @property
    def writes(self) -> int:
        return 2 * self.pairs if self.rewritten else self.pairs

    @property
    def d_in(self) -> int:
        return self.d_key + self.d_out

    @property
    def d_out(self) -> int:
        return self.d_value or self.pairs

    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]:
        draw = generator(seed, step)
        shape = (size, self.writes)
        if self.rewritten:
            keys, values = draw.integers(self.pairs, size=shape), draw.integers(self.pairs, size=shape)
        else:
            keys, values = draw.random(shape).argsort(-1), draw.random(shape).argsort(-1)
        rows = np.arange(size)[:, None]
        asked = keys[rows, draw.random(shape).argsort(-1)[:, : self.queries]]
        last = self.writes - 1 - (keys[:, None, ::-1] == asked[..., None]).argmax(-1)  # the last write to the key asked for
        k = _table(2 * self.table, self.pairs, self.d_key)
        v = _table(2 * self.table + 1, self.pairs, self.d_value) if self.d_value else np.eye(self.pairs, dtype=np.float32)
        x = np.zeros((size, self.writes + self.queries, self.d_in), np.float32)
        x[..., : self.d_key] = k[np.concatenate([keys, asked], 1)]
        x[:, : self.writes, self.d_key :] = v[values]
        y = np.full((*x.shape[:2], self.d_out), np.nan, np.float32)
        y[:, self.writes :] = v[values[rows, last]]
        return torch.from_numpy(x), torch.from_numpy(y)


@dataclass(frozen=True)
class Overwrite(Retrieval):
    """Setting 2: twice ``pairs`` writes, whose keys and values are drawn with replacement; the last value of a key is the right one.

    Otherwise as ``Retrieval``; a query is drawn among the writes, so keys that were written more often are asked more often.
    Source: Schlag, Irie and Schmidhuber 2021, section 6.1.

    >>> x, y = Overwrite(pairs=3, d_key=5).batch(seed=0, step=0, size=2)
    >>> x.shape
    torch.Size([2, 7, 8])
    """

    name: ClassVar[str] = "overwrite"
    rewritten: ClassVar[bool] = True
