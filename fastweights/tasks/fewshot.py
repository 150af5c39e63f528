"""Few-shot learning: images with labels in one sequence, whose meaning is new in every sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..language.errors import FastWeightError
from .images import images
from .source import IGNORED, VALIDATION_SEED, Task, distinct, generator, one_hot, tokens


@dataclass(frozen=True)
class FewShot(Task):
    """``ways`` classes of images get the labels 0 ... ways - 1 at random, ``shots`` images of each are shown, and then one more.

    A token is an image of side^2 numbers beside a one-hot label. Synchronous labels: the label is that of the image, except that the last
    image has none (zeros), and its target alone counts. ``delayed=true``: the label is that of the image before, and every target
    counts; the first image of a class can only be guessed. Images come in random order. Validation is on classes that are never trained
    on. Images: glyphs, which need no package, kanji or digits (``fastweights.tasks.images``). Chance is 1/ways.
    Source: Irie et al. 2022 (self-referential weight matrix), sections 4.2 and 4.3, there on Omniglot and Mini-ImageNet.

    >>> x, y = FewShot(side=8).batch(seed=0, step=0, size=2)
    >>> x.shape, y[:, :-1].unique().tolist()
    (torch.Size([2, 6, 69]), [-100])
    """

    name: ClassVar[str] = "fewshot"
    kind: ClassVar[Literal["classification"]] = "classification"
    ways: int = 5
    shots: int = 1
    delayed: bool = False
    images: str = "glyphs"
    folder: str = ""
    side: int = 14

    def __post_init__(self) -> None:
        self.expect(ways=2, shots=1, side=4)
        for training in (True, False):
            if (n := len(images(self.images, self.folder).part(training))) < self.ways:
                raise FastWeightError(f"ways of task fewshot is {self.ways}, but {self.images} has {n} classes for one of its parts")

    @property
    def identity(self) -> str:
        return f"{super().identity}; {images(self.images, self.folder).identity}"

    @property
    def d_in(self) -> int:
        return self.side**2 + self.ways

    @property
    def d_out(self) -> int:
        return self.ways

    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]:
        return self._batch(seed, step, size, training=True)

    def validation(self, size: int, length: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(4):
            yield self._batch(VALIDATION_SEED, step, max(size, 32), training=False)

    def _batch(self, seed: int, step: int, size: int, training: bool) -> tuple[Tensor, Tensor]:
        draw = generator(seed, step)
        found = images(self.images, self.folder)
        part = found.part(training)
        classes = part[distinct(draw, size, len(part), self.ways)]
        shown = np.arange(self.ways * self.shots) % self.ways
        shown = shown[draw.random((size, len(shown))).argsort(-1)]
        labels = np.concatenate([shown, draw.integers(self.ways, size=(size, 1))], 1)
        pictures = found.draw(np.take_along_axis(classes, labels, 1), self.side, draw)
        targets = labels.copy()
        if self.delayed:
            told = np.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        else:
            told = np.pad(labels[:, :-1], ((0, 0), (0, 1)), constant_values=-1)
            targets[:, :-1] = IGNORED
        return torch.from_numpy(np.concatenate([pictures, one_hot(told, self.ways)], -1)), tokens(targets)
