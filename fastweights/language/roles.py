"""Roles: what a rule's arguments are. A role fixes the shape of a signal for one token and one head.

A role is used as an annotation, ``k: Key``. To a type checker it is a ``torch.Tensor``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias, get_args

import torch

Space = Literal["scalar", "key", "value", "matrix"]
_AXES = {"scalar": "", "key": "K", "value": "V", "matrix": "VK"}


@dataclass(frozen=True)
class Role:
    """The part a signal plays: ``spaces`` lists the shapes it may have, the usual one first.

    ``scalar`` is a 0-d tensor, ``key`` is (dk,), ``value`` is (dv,), ``matrix`` is (dv, dk). A ``state`` is not
    given at every token but rewritten by the rule; a ``log_decay`` must be <= 0. ``mirror`` is the role that
    takes over in the transposed rule, where keys and values change places. A gate is between 0 and 1.
    """

    name: str
    spaces: tuple[Space, ...]
    mirror: str
    state: bool = False
    log_decay: bool = False

    def __str__(self) -> str:
        return self.name


Key: TypeAlias = Annotated[torch.Tensor, Role("Key", ("key",), "Value")]
Value: TypeAlias = Annotated[torch.Tensor, Role("Value", ("value",), "Key")]
Query: TypeAlias = Annotated[torch.Tensor, Role("Query", ("key",), "Query")]
Rate: TypeAlias = Annotated[torch.Tensor, Role("Rate", ("scalar",), "Rate")]
Gate: TypeAlias = Annotated[torch.Tensor, Role("Gate", ("scalar",), "Gate")]
Scalar: TypeAlias = Annotated[torch.Tensor, Role("Scalar", ("scalar",), "Scalar")]
LogDecay: TypeAlias = Annotated[torch.Tensor, Role("LogDecay", ("scalar", "key"), "ValueLogDecay", log_decay=True)]
ValueLogDecay: TypeAlias = Annotated[torch.Tensor, Role("ValueLogDecay", ("scalar", "value"), "LogDecay", log_decay=True)]
PositiveKey: TypeAlias = Annotated[torch.Tensor, Role("PositiveKey", ("key",), "Value")]
PositiveQuery: TypeAlias = Annotated[torch.Tensor, Role("PositiveQuery", ("key",), "Query")]
KeyGate: TypeAlias = Annotated[torch.Tensor, Role("KeyGate", ("key",), "ValueGate")]
ValueGate: TypeAlias = Annotated[torch.Tensor, Role("ValueGate", ("value",), "KeyGate")]
KeyVector: TypeAlias = Annotated[torch.Tensor, Role("KeyVector", ("key",), "ValueVector")]
ValueVector: TypeAlias = Annotated[torch.Tensor, Role("ValueVector", ("value",), "KeyVector")]
Matrix: TypeAlias = Annotated[torch.Tensor, Role("Matrix", ("matrix",), "Matrix", state=True)]
KeyState: TypeAlias = Annotated[torch.Tensor, Role("KeyState", ("key",), "ValueState", state=True)]
ValueState: TypeAlias = Annotated[torch.Tensor, Role("ValueState", ("value",), "KeyState", state=True)]
ScalarState: TypeAlias = Annotated[torch.Tensor, Role("ScalarState", ("scalar",), "ScalarState", state=True)]

_ALL = (
    Key, Value, Query, Rate, Gate, Scalar, LogDecay, ValueLogDecay, PositiveKey, PositiveQuery, KeyGate, ValueGate,
    KeyVector, ValueVector, Matrix, KeyState, ValueState, ScalarState,
)  # fmt: skip
ROLES: dict[str, Role] = {role.name: role for _, role in map(get_args, _ALL)}


@dataclass(frozen=True)
class Signal:
    """One argument of a rule: its name, its role, and how many sets of it a token carries (None: one, no axis)."""

    name: str
    role: Role
    sets: int | None = None

    def shapes(self, dk: int, dv: int) -> list[tuple[int, ...]]:
        """The shapes this signal may have for one token and one head."""
        size = {"K": dk, "V": dv}
        return [self._stack + tuple(size[axis] for axis in _AXES[space]) for space in self.role.spaces]

    def letters(self, picks: Sequence[int] = (0, -1)) -> str:
        """The full shape in letters, such as ``(B, T, H, K)``; ``picks`` are those of a rule's ``shapes``."""
        spaces = dict.fromkeys(self.role.spaces[pick] for pick in picks)
        return " or ".join(f"({', '.join(['B', 'T', 'H', *map(str, self._stack), *_AXES[space]])})" for space in spaces)

    @property
    def _stack(self) -> tuple[int, ...]:
        return () if self.sets is None else (self.sets,)
