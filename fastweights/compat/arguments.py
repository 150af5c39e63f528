"""Arguments of other libraries: those that only steer their kernels, gates that are made inside them, and their order."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..language.errors import SignalError

_WITHOUT_EFFECT = {
    "cu_seqlens_cpu", "chunk_indices", "chunk_size", "safe_gate", "disable_recompute", "lower_bound", "use_graph", "max_num_seqs",
    "head_first", "use_cache", "training",
}  # fmt: skip


def steering(name: str, more: dict[str, Any]) -> None:
    """Arguments beyond those that are served: harmless, not given, or an error."""
    for word, value in more.items():
        if word == "head_first" and value is True:
            raise SignalError(f"{name}: head_first is gone; pass (B, T, H, ...)")
        if word not in _WITHOUT_EFFECT and value is not None and value is not False:
            raise SignalError(f"{name}: {word} = {value!r} is not served here; leave it out")


def log_decay(name: str, g: Tensor, more: dict[str, Any]) -> Tensor:
    """The log decay that ``use_gate_in_kernel`` makes of what a projection gave."""
    A_log, dt_bias, bound = more.pop("A_log", None), more.pop("dt_bias", None), more.get("lower_bound")
    if not more.pop("use_gate_in_kernel", False):
        return g
    if A_log is None and bound is None:
        raise SignalError(f"{name}: use_gate_in_kernel needs A_log, or lower_bound")
    g = g.float()
    slope = torch.ones(1) if A_log is None else A_log.float().exp().reshape(-1, *(1,) * (g.ndim - 3))
    if dt_bias is not None:
        g = g + dt_bias.float().reshape(g.shape[2:])
    return -slope * F.softplus(g) if bound is None else bound * torch.sigmoid(slope * g)


def rate(name: str, beta: Tensor, more: dict[str, Any]) -> Tensor:
    inside, twice = more.pop("use_beta_sigmoid_in_kernel", False), more.pop("allow_neg_eigval", False)
    if twice and not inside:
        raise SignalError(f"{name}: allow_neg_eigval doubles what use_beta_sigmoid_in_kernel makes; set both, or double beta yourself")
    return beta.float().sigmoid() * (2 if twice else 1) if inside else beta


def variant(name: str, function: Callable[..., Any], order: str) -> Any:
    """A function under another name, or with its arguments in fla's order: the engine chooses the form."""
    names, known = order.split(), inspect.signature(function).parameters

    @functools.wraps(function)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if len(args) > len(names) or any(n in kwargs for n in names[: len(args)]):
            raise TypeError(f"{name}{signature}: got {len(args)} positional arguments and {', '.join(kwargs) or 'no others'}")
        return function(**dict(zip(names, args, strict=False)), **kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(n, kind, default=known[n].default if n in known else None) for n in names]
    signature = inspect.Signature([*parameters, inspect.Parameter("more", inspect.Parameter.VAR_KEYWORD)])
    renamed.__name__ = renamed.__qualname__ = name
    renamed.__signature__ = signature  # type: ignore[attr-defined]
    return renamed
