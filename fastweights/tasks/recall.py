"""Multi-query associative recall: pairs of key and value, then keys again, whose values are to be told.

Source: Arora et al. 2023 (Zoology).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .source import IGNORED
from .text import hash_numbers

_VALIDATION_SEED = 2**40


@dataclass(frozen=True)
class Recall:
    """``pairs`` keys and values, then queries: half of the vocabulary is keys, half is values.

    A sequence is k1 v1 k2 v2 ... then queried keys, each followed by its value; only the value after a query counts.

    >>> inputs, targets = Recall(pairs=2, vocabulary=8).batch(seed=0, step=0, size=1, length=8)
    >>> (targets != -100).sum().item()
    2
    """

    pairs: int = 8
    vocabulary: int = 128

    @property
    def identity(self) -> str:
        return f"recall of {self.pairs} pairs, vocabulary {self.vocabulary}"

    def batch(self, seed: int, step: int, size: int, length: int) -> tuple[Tensor, Tensor]:
        del length  # a sequence is as long as its pairs and queries
        draw = torch.Generator().manual_seed(hash_numbers(seed, step))
        half = self.vocabulary // 2
        keys = torch.rand(size, half, generator=draw).argsort(-1)[:, : self.pairs]
        values = torch.randint(half, self.vocabulary, (size, self.pairs), generator=draw)
        order = torch.rand(size, self.pairs, generator=draw).argsort(-1)
        asked = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
        whole = torch.cat([torch.stack([keys, values], -1).flatten(1), asked], 1)
        inputs, targets = whole[:, :-1], whole[:, 1:].clone()
        targets[:, : 2 * self.pairs] = IGNORED
        targets[:, 1::2] = IGNORED
        return inputs, targets

    def validation(self, size: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(4):
            yield self.batch(_VALIDATION_SEED, step, size, length)
