"""Small images of many classes, for tasks of few-shot and continual learning."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..language.errors import FastWeightError
from . import data
from .source import generator

_SIDE = 28  # of rendered images
_GLYPHS = 1200


@dataclass(frozen=True, eq=False)
class Images:
    """Images (N, S, S) in [0, 1], sorted by class, with the first of each class and their number.

    Classes below ``training`` are for training, the others for testing. ``varied``: there is one drawing a class, and an image of it is
    the drawing turned, sheared, stretched and moved at random.
    """

    name: str
    bank: Tensor
    first: np.ndarray
    count: np.ndarray
    training: int
    varied: bool

    @property
    def classes(self) -> int:
        return len(self.first)

    @property
    def identity(self) -> str:
        return f"{self.name} {len(self.bank)} images, sha256 {hashlib.sha256(self.bank.numpy().tobytes()).hexdigest()[:16]}"

    def part(self, training: bool) -> np.ndarray:
        """The classes for training, or those for testing."""
        return np.arange(self.training) if training else np.arange(self.training, self.classes)

    def draw(self, classes: np.ndarray, side: int, draw: np.random.Generator) -> np.ndarray:
        """Images of ``classes`` (...), drawn at random, as float32 (..., side^2)."""
        which = self.first[classes] + (draw.random(classes.shape) * self.count[classes]).astype(np.int64)
        drawings = self.bank[torch.from_numpy(which.reshape(-1)), None]
        maps = torch.from_numpy(_maps(draw, which.size, self.varied)).float()
        grid = F.affine_grid(maps, [which.size, 1, side, side], align_corners=False)
        return F.grid_sample(drawings, grid, align_corners=False).reshape(*classes.shape, side * side).numpy()


def _maps(draw: np.random.Generator, n: int, varied: bool) -> np.ndarray:
    """(n, 2, 3): a rotation of up to 0.2, a shear and stretches of up to 0.15, a shift of up to 0.1, or the identity."""
    r = draw.uniform(-1, 1, (n, 6)) * varied
    turn, shear, wide, high = 0.2 * r[:, 0], 0.15 * r[:, 1], 1 + 0.15 * r[:, 2], 1 + 0.15 * r[:, 3]
    cos, sin = np.cos(turn), np.sin(turn)
    rows = [wide * cos, high * (shear * cos - sin), 0.1 * r[:, 4], wide * sin, high * (shear * sin + cos), 0.1 * r[:, 5]]
    return np.stack(rows, 1).reshape(n, 2, 3)


def render(drawings: list[list[np.ndarray]], side: int = _SIDE) -> Tensor:
    """Strokes of points in [0, 1], y downwards, as images (N, side, side) with lines two pixels wide.

    >>> render([[np.array([[0.5, 0.5]])]], side=4).shape
    torch.Size([1, 4, 4])
    """
    image = np.repeat(np.arange(len(drawings)), [sum(len(s) for s in strokes) for strokes in drawings])
    points = np.concatenate([s for strokes in drawings for s in strokes]) * side - 0.5
    low = np.floor(points).astype(np.int64)
    part = points - low
    ink = np.zeros(len(drawings) * side * side)
    for dx in (0, 1):
        for dy in (0, 1):
            x, y = low[:, 0] + dx, low[:, 1] + dy
            inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
            weight = np.abs(1 - dx - part[:, 0]) * np.abs(1 - dy - part[:, 1])
            ink += np.bincount((image * side * side + y * side + x)[inside], weight[inside], len(ink))
    drawn = torch.from_numpy(ink).float().reshape(-1, 1, side, side).clamp(max=1)
    kernel = torch.tensor([[0.25, 0.5, 0.25]])
    return F.conv2d(drawn, (kernel.mT @ kernel)[None, None] * 1.5, padding=1)[:, 0].clamp(max=1)


def _one_each(name: str, drawings: list[list[np.ndarray]]) -> Images:
    n = len(drawings)
    return Images(name, render(drawings), np.arange(n), np.ones(n, np.int64), math.ceil(0.8 * n), varied=True)


def glyphs(folder: str = "") -> Images:
    """1,200 characters that nobody writes: three to five random curves each. They are made, not read."""
    del folder
    draw = generator(0, _GLYPHS)
    along = np.linspace(0, 1, 32)[:, None]
    weights = np.concatenate([(1 - along) ** 2, 2 * along * (1 - along), along**2], 1)
    counts = draw.integers(3, 6, _GLYPHS)
    curves = weights @ draw.uniform(0.12, 0.88, (counts.sum(), 3, 2))
    return _one_each("glyphs", [list(part) for part in np.split(curves, counts.cumsum()[:-1])])


def kanji(folder: str = "") -> Images:
    """6,703 characters, mostly Chinese ones as written in Japan, from their strokes (package kanjivg); in an order without meaning."""
    drawings = data.characters(folder)
    return _one_each("kanji", [drawings[i] for i in generator(1, len(drawings)).permutation(len(drawings))])


def digits(folder: str = "") -> Images:
    """1,797 handwritten digits (package scikit-learn); 0 to 4 are for training, 5 to 9 for testing."""
    bank, labels = data.digits(folder)
    order = labels.argsort(kind="stable")
    count = np.bincount(labels, minlength=10)
    return Images("digits", torch.from_numpy(bank[order]), count.cumsum() - count, count, 5, varied=False)


SOURCES: dict[str, Callable[[str], Images]] = {"glyphs": glyphs, "kanji": kanji, "digits": digits}


@lru_cache(maxsize=8)
def images(name: str, folder: str = "") -> Images:
    """Images by name: glyphs, kanji or digits; ``folder`` is where their files lie if the package is not installed.

    >>> images("glyphs").bank.shape
    torch.Size([1200, 28, 28])
    """
    if name not in SOURCES:
        raise FastWeightError(f"there are no images {name!r}; there are {', '.join(SOURCES)}")
    return SOURCES[name](folder)
