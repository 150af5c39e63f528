"""Classification of real time series, with samples left out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..language.errors import FastWeightError
from . import data
from .source import IGNORED, VALIDATION_SEED, Task, generator, tokens


@lru_cache(maxsize=8)
def _parts(name: str, folder: str) -> tuple[data.Series, data.Series, np.ndarray, np.ndarray, str]:
    """Training and test series, mean and deviation of the channels in training, and a fingerprint of all."""
    train, test = (data.series(name, part, folder) for part in ("TRAIN", "TEST"))
    every = np.concatenate(train.values)
    fingerprint = hashlib.sha256(b"".join(v.tobytes() for s in (train, test) for v in s.values)).hexdigest()[:16]
    return train, test, every.mean(0), np.maximum(every.std(0), 1e-6), fingerprint


@dataclass(frozen=True)
class TimeSeries(Task):
    """A series a sequence, to be told apart at its last step: JapaneseVowels (9 speakers) or BasicMotions (4 motions).

    A token is a step: the channels, which have mean 0 and deviation 1 in the training part, then a 1. Of each series the share ``dropped``
    of the steps, drawn at random, is not observed: there all numbers are 0. Training draws among the training part of the archive,
    validation is its test part, once through. The files come from the package aeon, or from ``folder``.
    Source: Irie et al. 2022 (continuous-time fast weight programmers); Kidger et al. 2020.

    TimeSeries(series="JapaneseVowels").batch(seed=0, step=0, size=2) is x (2, T, 13) and y (2, T), T that of the longer series.

    >>> TimeSeries.kind
    'classification'
    """

    name: ClassVar[str] = "timeseries"
    kind: ClassVar[Literal["classification"]] = "classification"
    series: str = "JapaneseVowels"
    dropped: float = 0.0
    folder: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.dropped < 1:
            raise FastWeightError(f"dropped of task timeseries is {self.dropped}, expected a share from 0 up to less than 1")
        _parts(self.series, self.folder)

    @property
    def identity(self) -> str:
        return f"{super().identity}; sha256 {_parts(self.series, self.folder)[-1]}"

    @property
    def d_in(self) -> int:
        return _parts(self.series, self.folder)[0].values[0].shape[1] + 1

    @property
    def d_out(self) -> int:
        return len(_parts(self.series, self.folder)[0].classes)

    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]:
        draw = generator(seed, step)
        train = _parts(self.series, self.folder)[0]
        return self._made(train, draw.integers(len(train.labels), size=size), draw)

    def validation(self, size: int, length: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        test = _parts(self.series, self.folder)[1]
        for step, start in enumerate(range(0, len(test.labels), max(size, 32))):
            yield self._made(test, np.arange(len(test.labels))[start : start + max(size, 32)], generator(VALIDATION_SEED, step))

    def _made(self, part: data.Series, which: np.ndarray, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
        _, _, mean, deviation, _ = _parts(self.series, self.folder)
        counts = np.array([len(part.values[i]) for i in which])
        x = np.zeros((len(which), counts.max(), self.d_in), np.float32)
        y = np.full(x.shape[:2], IGNORED)
        for row, (i, n) in enumerate(zip(which, counts, strict=True)):
            x[row, :n, :-1], x[row, :n, -1] = (part.values[i] - mean) / deviation, 1
            x[row, draw.permutation(n)[: round(self.dropped * n)]] = 0
            y[row, n - 1] = part.labels[i]
        return torch.from_numpy(x), tokens(y)
