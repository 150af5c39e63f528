"""What a sequence layer was given, checked before it is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..language.errors import SignalError, SignalTypeError


def check_sequence(x: Any, d_model: int, reset: Any = None) -> None:
    """Raise unless x is a floating-point (B, T, d_model), and reset None or bool (B, T) beside it.

    >>> check_sequence(torch.zeros(2, 32), 32)
    Traceback (most recent call last):
    ...
    fastweights.language.errors.SignalError: x is (2, 32), expected a tensor (B, T, d_model = 32)
    """
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[-1] != d_model:
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise SignalError(f"x is {found}, expected a tensor (B, T, d_model = {d_model})")
    if not x.is_floating_point():
        raise SignalTypeError(f"x has dtype {x.dtype}, expected a real floating-point dtype; pass x.float()")
    if reset is None:
        return
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        kind = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
        raise SignalTypeError(f"reset is {kind}, expected a bool tensor (B, T): True where the state is empty before the token")
    if reset.shape != x.shape[:2]:
        raise SignalError(f"reset has shape {tuple(reset.shape)}, expected (B, T) = {tuple(x.shape[:2])}")


def single(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def size(what: str, value: Any, least: int = 1) -> int:
    """An option that counts something, checked."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise SignalTypeError(f"{what} is {value!r}, expected a whole number")
    if value < least:
        raise SignalError(f"{what} is {value}, expected at least {least}")
    return value
