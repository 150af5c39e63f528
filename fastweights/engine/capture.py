"""Functions that torch.compile takes into its graph whole, told to it when it captures: to import it takes a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
_whole: list[Callable[..., Any]] = []


def whole(function: F) -> F:
    """As ``torch.compiler.allow_in_graph``, for functions that are called after ``capturing()``."""
    _whole.append(function)
    return function


def capturing() -> bool:
    """Whether a graph is being captured, which then knows of the functions above."""
    return torch.compiler.is_compiling() and _told()


def _told() -> bool:
    for function in _whole:
        torch.compiler.allow_in_graph(function)
    return True


_told._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # as torch.compiler.assume_constant_result does: called, not captured
