"""Roles: what a rule's arguments are. A role fixes the shape of a signal for one token and one head.

A role is used as an annotation, ``k: Key``. To a type checker it is a ``torch.Tensor``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import torch

Space = Literal["scalar", "key", "value", "matrix"]


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


_ALL = [
    Role("Key", ("key",), "Value"),
    Role("Value", ("value",), "Key"),
    Role("Query", ("key",), "Query"),
    Role("Rate", ("scalar",), "Rate"),
    Role("Gate", ("scalar",), "Gate"),
    Role("Scalar", ("scalar",), "Scalar"),
    Role("LogDecay", ("scalar", "key"), "ValueLogDecay", log_decay=True),
    Role("ValueLogDecay", ("scalar", "value"), "LogDecay", log_decay=True),
    Role("PositiveKey", ("key",), "Value"),
    Role("PositiveQuery", ("key",), "Query"),
    Role("KeyGate", ("key",), "ValueGate"),
    Role("ValueGate", ("value",), "KeyGate"),
    Role("KeyVector", ("key",), "ValueVector"),
    Role("ValueVector", ("value",), "KeyVector"),
    Role("Matrix", ("matrix",), "Matrix", state=True),
    Role("KeyState", ("key",), "ValueState", state=True),
    Role("ValueState", ("value",), "KeyState", state=True),
    Role("ScalarState", ("scalar",), "ScalarState", state=True),
]
ROLES = {role.name: role for role in _ALL}

Key: TypeAlias = Annotated[torch.Tensor, ROLES["Key"]]
Value: TypeAlias = Annotated[torch.Tensor, ROLES["Value"]]
Query: TypeAlias = Annotated[torch.Tensor, ROLES["Query"]]
Rate: TypeAlias = Annotated[torch.Tensor, ROLES["Rate"]]
Gate: TypeAlias = Annotated[torch.Tensor, ROLES["Gate"]]
Scalar: TypeAlias = Annotated[torch.Tensor, ROLES["Scalar"]]
LogDecay: TypeAlias = Annotated[torch.Tensor, ROLES["LogDecay"]]
ValueLogDecay: TypeAlias = Annotated[torch.Tensor, ROLES["ValueLogDecay"]]
PositiveKey: TypeAlias = Annotated[torch.Tensor, ROLES["PositiveKey"]]
PositiveQuery: TypeAlias = Annotated[torch.Tensor, ROLES["PositiveQuery"]]
KeyGate: TypeAlias = Annotated[torch.Tensor, ROLES["KeyGate"]]
ValueGate: TypeAlias = Annotated[torch.Tensor, ROLES["ValueGate"]]
KeyVector: TypeAlias = Annotated[torch.Tensor, ROLES["KeyVector"]]
ValueVector: TypeAlias = Annotated[torch.Tensor, ROLES["ValueVector"]]
Matrix: TypeAlias = Annotated[torch.Tensor, ROLES["Matrix"]]
KeyState: TypeAlias = Annotated[torch.Tensor, ROLES["KeyState"]]
ValueState: TypeAlias = Annotated[torch.Tensor, ROLES["ValueState"]]
ScalarState: TypeAlias = Annotated[torch.Tensor, ROLES["ScalarState"]]


@dataclass(frozen=True)
class Signal:
    """One argument of a rule: its name, its role, and how many sets of it a token carries (None: one, no axis)."""

    name: str
    role: Role
    sets: int | None = None

    def shapes(self, dk: int, dv: int) -> list[tuple[int, ...]]:
        """The shapes this signal may have for one token and one head."""
        one = {"scalar": (), "key": (dk,), "value": (dv,), "matrix": (dv, dk)}
        stack = () if self.sets is None else (self.sets,)
        return [stack + one[space] for space in self.role.spaces]

    def letters(self, picks: Sequence[int] = (0, -1)) -> str:
        """The full shape in letters, such as ``(B, T, H, K)``; ``picks`` are those of a rule's ``shapes``."""
        one = {"scalar": "", "key": ", K", "value": ", V", "matrix": ", V, K"}
        stack = "" if self.sets is None else f", {self.sets}"
        return " or ".join(f"(B, T, H{stack}{one[space]})" for space in dict.fromkeys(self.role.spaces[pick] for pick in picks))
