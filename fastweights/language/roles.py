"""Roles: what a rule's arguments are. A role fixes the shape of a signal for one token and one head.

A role is used as an annotation, ``k: Key``. To a type checker it is a ``torch.Tensor``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias, get_args

import torch

Space = Literal["scalar", "key", "value", "matrix", "key matrix", "value matrix", "reverse matrix", "value cube"]
_AXES = {
    "scalar": "", "key": "K", "value": "V", "matrix": "VK", "key matrix": "KK", "value matrix": "VV", "reverse matrix": "KV",
    "value cube": "VVV",
}  # fmt: skip


@dataclass(frozen=True)
class Role:
    """The part a signal plays: ``spaces`` lists the shapes it may have, the usual one first.

    ``scalar`` is a 0-d tensor, ``key`` is (dk,), ``value`` is (dv,), ``matrix`` is (dv, dk), ``key matrix`` (dk, dk), ``value matrix``
    (dv, dv), ``reverse matrix`` (dk, dv), ``value cube`` (dv, dv, dv).

    A ``state`` is not given at every token but rewritten by the rule; what is ``slow`` is the same
    at all tokens of a sequence, and of all sequences: a trained weight of each head. A ``log_decay`` must be <= 0. ``mirror`` is the
    role that takes over in the transposed rule, where keys and values change places. A gate is between 0 and 1.
    """

    name: str
    spaces: tuple[Space, ...]
    mirror: str
    state: bool = False
    log_decay: bool = False
    slow: bool = False

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
KeyMatrix: TypeAlias = Annotated[torch.Tensor, Role("KeyMatrix", ("key matrix",), "ValueMatrix", state=True)]
ValueMatrix: TypeAlias = Annotated[torch.Tensor, Role("ValueMatrix", ("value matrix",), "KeyMatrix", state=True)]
ValueCube: TypeAlias = Annotated[torch.Tensor, Role("ValueCube", ("value cube",), "ValueCube", state=True)]
SlowMatrix: TypeAlias = Annotated[torch.Tensor, Role("SlowMatrix", ("matrix",), "SlowReverseMatrix", slow=True)]
SlowReverseMatrix: TypeAlias = Annotated[torch.Tensor, Role("SlowReverseMatrix", ("reverse matrix",), "SlowMatrix", slow=True)]
SlowKeyMatrix: TypeAlias = Annotated[torch.Tensor, Role("SlowKeyMatrix", ("key matrix",), "SlowValueMatrix", slow=True)]
SlowValueMatrix: TypeAlias = Annotated[torch.Tensor, Role("SlowValueMatrix", ("value matrix",), "SlowKeyMatrix", slow=True)]
SlowKey: TypeAlias = Annotated[torch.Tensor, Role("SlowKey", ("key",), "SlowValue", slow=True)]
SlowValue: TypeAlias = Annotated[torch.Tensor, Role("SlowValue", ("value",), "SlowKey", slow=True)]
SlowScalar: TypeAlias = Annotated[torch.Tensor, Role("SlowScalar", ("scalar",), "SlowScalar", slow=True)]


@dataclass(frozen=True)
class several:
    """Marks an argument that is a stack of so many of its role: ``Annotated[KeyState, several(4)]`` is a state (4, dk).

    >>> import torch, fastweights as fw
    >>> from typing import Annotated
    >>> @fw.rule
    ... def two_speeds(W, F: Annotated[fw.Matrix, fw.several(2)], k: fw.Key, v: fw.Value):
    ...     F = torch.stack([0.5 * F[0] + fw.outer(v, k), 0.9 * F[1] + fw.outer(v, k)])
    ...     return F.sum(0), F
    >>> two_speeds.states["F"].shapes(3, 4)
    [(2, 4, 3)]
    """

    sets: int


_ALL = (
    Key, Value, Query, Rate, Gate, Scalar, LogDecay, ValueLogDecay, PositiveKey, PositiveQuery, KeyGate, ValueGate,
    KeyVector, ValueVector, Matrix, KeyState, ValueState, ScalarState, KeyMatrix, ValueMatrix, ValueCube, SlowMatrix, SlowReverseMatrix,
    SlowKeyMatrix, SlowValueMatrix, SlowKey, SlowValue, SlowScalar,
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
        """The full shape in letters: ``(B, T, H, K)``, ``(H, K)`` of what is slow; ``picks`` are those of a rule's ``shapes``."""
        spaces = dict.fromkeys(self.role.spaces[pick] for pick in picks)
        lead = ["H"] if self.role.slow else ["B", "T", "H"]
        return " or ".join(f"({', '.join([*lead, *map(str, self._stack), *_AXES[space]])})" for space in spaces)

    def axes(self) -> str:
        """The letters of its last axes where they are always the same, such as VK."""
        return _AXES[self.role.spaces[0]] if len(self.role.spaces) == 1 else ""

    @property
    def _stack(self) -> tuple[int, ...]:
        return () if self.sets is None else (self.sets,)
