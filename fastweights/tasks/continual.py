"""Continual learning in one stream: one task of images after the other, and questions about all tasks so far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..language.errors import FastWeightError
from .images import images
from .source import IGNORED, VALIDATION_SEED, Task, distinct, generator, one_hot, tokens


class Query(NamedTuple):
    """A question of the stream: the token where it stands, after how many tasks, and which of them it is about."""

    at: int
    after: int
    about: int


@dataclass(frozen=True)
class Continual(Task):
    """``parts`` tasks of ``ways`` new classes each; after every task a question about every task so far.

    A task shows ``shots`` labelled images of its classes, in random order; a question is an image without a label. A token is an image of
    side^2 numbers beside a one-hot label. Labels are 0 ... ways - 1 in every task (domain-incremental). Questions stand in the stream
    itself; in the paper they are answered by a copy of the memory. ``backward=false`` leaves the questions about earlier tasks out of
    the targets of training, which is the objective without its backward-transfer term; validation always counts them, on classes
    that are never trained on. ``test`` names other images for validation; where the stream uses all their classes, they come in
    order: ``test=digits`` is 0 and 1, 2 and 3, ... 8 and 9, split digits. Chance is 1/ways.
    Source: Irie et al. 2025 (automated continual learning); split digits, Zenke et al. 2017.

    >>> source = Continual(parts=2, side=8)
    >>> x, y = source.batch(seed=0, step=0, size=3)
    >>> x.shape, source.queries()
    (torch.Size([3, 23, 66]), [Query(at=10, after=1, about=0), Query(at=21, after=2, about=0), Query(at=22, after=2, about=1)])
    """

    name: ClassVar[str] = "continual"
    kind: ClassVar[Literal["classification"]] = "classification"
    parts: int = 5
    ways: int = 2
    shots: int = 5
    backward: bool = True
    images: str = "glyphs"
    test: str = ""
    folder: str = ""
    side: int = 14

    def __post_init__(self) -> None:
        self.expect(parts=1, ways=2, shots=1, side=4)
        for training in (True, False):
            if (n := len(self._classes(training))) < self.parts * self.ways:
                where = self.images if training else self._tested
                raise FastWeightError(f"parts times ways of task continual is {self.parts * self.ways}, but {where} has {n} classes for it")

    @property
    def identity(self) -> str:
        both = dict.fromkeys((self.images, self._tested))
        return "; ".join([super().identity, *(images(name, self.folder).identity for name in both)])

    @property
    def _tested(self) -> str:
        return self.test or self.images

    @property
    def d_in(self) -> int:
        return self.side**2 + self.ways

    @property
    def d_out(self) -> int:
        return self.ways

    def queries(self) -> list[Query]:
        """Where the questions stand, the same in every sequence."""
        block = self.ways * self.shots
        return [
            Query((after + 1) * block + after * (after + 1) // 2 + about, after + 1, about)
            for after in range(self.parts)
            for about in range(after + 1)
        ]

    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]:
        x, y = self._batch(seed, step, size, training=True)
        if not self.backward:
            for query in self.queries():
                if query.about + 1 < query.after:
                    y[:, query.at] = IGNORED
        return x, y

    def validation(self, size: int, length: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(4):
            yield self._batch(VALIDATION_SEED, step, max(size, 32), training=False)

    def _classes(self, training: bool) -> np.ndarray:
        if not training and self._tested != self.images:
            return np.arange(images(self._tested, self.folder).classes)  # none of them is trained on
        return images(self.images, self.folder).part(training)

    def _batch(self, seed: int, step: int, size: int, training: bool) -> tuple[Tensor, Tensor]:
        draw = generator(seed, step)
        among = self._classes(training)
        fixed = not training and self._tested != self.images and self.parts * self.ways == len(among)
        classes = np.tile(among, (size, 1)) if fixed else among[distinct(draw, size, len(among), self.parts * self.ways)]
        task, labels, asked = [], [], []
        for part in range(self.parts):
            shown = np.arange(self.ways * self.shots) % self.ways
            labels += [shown[draw.random((size, len(shown))).argsort(-1)], draw.integers(self.ways, size=(size, part + 1))]
            task += [np.full(len(shown), part), np.arange(part + 1)]
            asked += [np.zeros(len(shown), bool), np.ones(part + 1, bool)]
        label, which, questions = np.concatenate(labels, 1), np.concatenate(task), np.concatenate(asked)
        found = images(self.images if training else self._tested, self.folder)
        pictures = found.draw(np.take_along_axis(classes, which * self.ways + label, 1), self.side, draw)
        told = one_hot(np.where(questions, -1, label), self.ways)
        return torch.from_numpy(np.concatenate([pictures, told], -1)), tokens(np.where(questions, label, IGNORED))
