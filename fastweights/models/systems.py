"""Sequence layers that are more than one rule run by ``scan``: by name, as data. ``LanguageModel`` takes their names as layers.

Every one is a module ``y, state = layer(x, state, reset)`` with x and y (B, T, d_model), a state of named tensors with the batch first
(``None`` before the first token), and ``state_bytes(tokens)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .presets import Place


@dataclass(frozen=True)
class System:
    """A layer: how it is built at a place of a model, its equation in one line, the forms it runs in, and its source."""

    build: Callable[[Place], nn.Module]
    equation: str
    cite: str
    forms: tuple[str, ...] = ("recurrent",)


SYSTEMS: dict[str, System] = {}
