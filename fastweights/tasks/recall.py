"""Associative recall in tokens: pairs of key and value, then keys again, whose values are to be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..language.errors import FastWeightError
from .source import IGNORED, Task, distinct, generator, tokens
from .text import hash_numbers


@dataclass(frozen=True)
class Recall(Task):
    """``pairs`` keys and values, then queries: half of the vocabulary is keys, half is values.

    A sequence is k1 v1 k2 v2 ... then queried keys, each followed by its value; only the value after a query counts.
    Source: after Arora et al. 2023 (Zoology), without gaps.

    >>> inputs, targets = Recall(pairs=2, vocabulary=8).batch(seed=0, step=0, size=1, length=8)
    >>> (targets != -100).sum().item()
    2
    """

    name: ClassVar[str] = "recall"
    pairs: int = 8
    vocabulary: int = 128

    def __post_init__(self) -> None:
        self.expect(pairs=1)
        if self.pairs > self.vocabulary // 2:
            raise FastWeightError(
                f"pairs is {self.pairs}, but the task has {self.vocabulary // 2} keys, half of its vocabulary {self.vocabulary}"
            )

    @property
    def identity(self) -> str:
        return f"recall of {self.pairs} pairs, vocabulary {self.vocabulary}"

    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]:
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


@dataclass(frozen=True)
class MQAR(Task):
    """Multi-query associative recall: every key is asked once more, and most of them soon.

    The first 2 ``pairs`` of the ``tokens`` of a sequence are k1 v1 k2 v2 ..., keys from 1 up to half of the vocabulary and values from
    there on, none twice. Of the S places for a query behind them, which are two apart, place i = 1 ... S is drawn without replacement
    with probability proportional to i^(power - 1), so that gaps follow a power law. The target stands at the query itself.
    Tokens between queries are drawn from the whole vocabulary, or are 0 without ``filler``. A guess among all values is right with
    probability 2/vocabulary. Source: Arora et al. 2023 (Zoology).

    >>> inputs, targets = MQAR(pairs=2, vocabulary=12, tokens=16, filler=False).batch(seed=0, step=0, size=1)
    >>> inputs.shape, (targets != -100).sum().item()
    (torch.Size([1, 16]), 2)
    """

    name: ClassVar[str] = "mqar"
    pairs: int = 4
    vocabulary: int = 8192
    tokens: int = 64
    power: float = 0.01
    filler: bool = True

    def __post_init__(self) -> None:
        self.expect(pairs=1)
        if not self.power > 0:
            raise FastWeightError(f"power of task mqar is {self.power}, expected a number above 0; 1 makes all gaps alike")
        if self.tokens % 2 or self.tokens < 4 * self.pairs:
            raise FastWeightError(f"tokens of task mqar is {self.tokens}, expected an even number of at least 4 pairs = {4 * self.pairs}")
        if self.vocabulary // 2 - 1 < self.pairs:
            raise FastWeightError(f"vocabulary of task mqar is {self.vocabulary}, expected at least {2 * self.pairs + 2}")

    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]:
        draw = generator(seed, step)
        half, context = self.vocabulary // 2, 2 * self.pairs
        keys = 1 + distinct(draw, size, half - 1, self.pairs)
        values = half + distinct(draw, size, self.vocabulary - half, self.pairs)
        places = np.arange(1, (self.tokens - context) // 2 + 1)
        # the smallest of exponential times with rates p are draws without replacement with probabilities p
        race = draw.exponential(size=(size, len(places))) / places ** (self.power - 1.0)
        at = context + 2 * race.argsort(-1)[:, : self.pairs]
        inputs = np.zeros((size, self.tokens), np.int64)
        inputs[:, 0:context:2], inputs[:, 1:context:2] = keys, values
        np.put_along_axis(inputs, at, keys, 1)
        targets = np.full_like(inputs, IGNORED)
        np.put_along_axis(targets, at, values, 1)
        if self.filler:
            inputs = np.where(inputs == 0, draw.integers(self.vocabulary, size=inputs.shape), inputs)
        return tokens(inputs), tokens(targets)
