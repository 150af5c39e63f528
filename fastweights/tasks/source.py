"""What training asks of data, and what the diagnostic tasks have in common."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ..language.errors import FastWeightError
from .text import hash_numbers

IGNORED = -100  # a target that does not count
VALIDATION_SEED = 2**40
_VALIDATION_BATCHES, _VALIDATION_SIZE = 4, 32


class Source(Protocol):
    """Batches of tokens as a function of (seed, step), so that training can be cut and continued anywhere.

    Inputs and targets are int64 (B, T); a target of -100 does not count. ``identity`` names the data exactly.
    """

    @property
    def vocabulary(self) -> int: ...

    @property
    def identity(self) -> str: ...

    def batch(self, seed: int, step: int, size: int, length: int) -> tuple[Tensor, Tensor]: ...

    def validation(self, size: int, length: int) -> Iterator[tuple[Tensor, Tensor]]: ...


class VectorSource(Protocol):
    """Batches of vectors as a function of (seed, step): inputs (B, T, d_in) of float32.

    ``kind`` says what the targets are: classes, int64 (B, T) below d_out, of which -100 does not count; or numbers, float32
    (B, T, d_out), where a token whose target is NaN does not count.
    """

    @property
    def d_in(self) -> int: ...

    @property
    def d_out(self) -> int: ...

    @property
    def kind(self) -> Literal["classification", "regression"]: ...

    @property
    def identity(self) -> str: ...

    def batch(self, seed: int, step: int, size: int, length: int) -> tuple[Tensor, Tensor]: ...

    def validation(self, size: int, length: int) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Task(ABC):
    """A diagnostic task: its options are its fields, and its examples are a function of (seed, step, size) alone.

    A task sets its own lengths, so ``length`` is not used. Validation draws from a seed that training does not use.
    """

    name: ClassVar[str]

    @property
    def identity(self) -> str:
        said = {f.name: show(getattr(self, f.name)) for f in fields(self) if f.name != "folder"}  # data are told by their content
        return f"{self.name}: " + ", ".join(f"{option} {value}" for option, value in said.items() if value)

    @abstractmethod
    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]: ...

    def validation(self, size: int, length: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Four batches of ``size`` sequences, or of 32 if that is more."""
        for step in range(_VALIDATION_BATCHES):
            yield self.batch(VALIDATION_SEED, step, max(size, _VALIDATION_SIZE), length)

    def extended(self) -> Task | None:
        """The same task at longer lengths than those that it trains on; None for a task of one length."""
        return None

    def expect(self, **least: float) -> None:
        """Refuse options below what makes sense."""
        for option, bound in least.items():
            if getattr(self, option) < bound:
                raise FastWeightError(f"{option} of task {self.name} is {getattr(self, option)}, expected at least {bound}")


@dataclass(frozen=True)
class LengthTask(Task):
    """A task with a range of lengths to train on, and one of longer ones to test on; both ends belong to it."""

    lengths: tuple[int, int] = (3, 40)
    longer: tuple[int, int] = (41, 256)

    shortest: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for option in ("lengths", "longer"):
            low, high = getattr(self, option)
            if not self.shortest <= low <= high:
                raise FastWeightError(
                    f"{option} of task {self.name} is {low}-{high}, expected two numbers from {self.shortest} up, the smaller one first"
                )

    def extended(self) -> Task | None:
        return None if self.lengths == self.longer else dataclasses.replace(self, lengths=self.longer)

    def draw_lengths(self, draw: np.random.Generator, size: int) -> np.ndarray:
        return draw.integers(*self.lengths, size, endpoint=True)


def generator(seed: int, step: int) -> np.random.Generator:
    """Random numbers that belong to one step of one seed."""
    return np.random.Generator(np.random.PCG64(hash_numbers(seed, step)))


def show(value: Any) -> str:
    """An option's value as it is written in ``--task``."""
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)


def tokens(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))


def one_hot(index: np.ndarray, size: int) -> np.ndarray:
    """float32 (..., size); an index of -1 is all zeros."""
    return (index[..., None] == np.arange(size)).astype(np.float32)


def padded(flat: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rows of different lengths, one after the other in ``flat``, as (B, T) with zeros behind them."""
    inside = np.arange(counts.max()) < counts[:, None]
    out = np.zeros(inside.shape, flat.dtype)
    out[inside] = flat
    return out


def distinct(draw: np.random.Generator, size: int, among: int, count: int) -> np.ndarray:
    """(size, count) different numbers below ``among``, in random order."""
    return draw.random((size, among)).argsort(-1)[:, :count]
