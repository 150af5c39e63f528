"""Norms, of what the heads of a layer read and of a model's channels, with the gate beside them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..engine.gated_norm import gated_norm
from ..language.errors import SignalError


class RMSNorm(nn.RMSNorm):
    """Channels divided by their root mean square, times a weight a channel; if x has a multiple of them, in groups that share the weight.

    ``gate``, of the shape of x, multiplies the result through its ``activation`` (``"swish"`` or ``"sigmoid"``), or x where it comes
    first.

    >>> RMSNorm(3)(torch.ones(1, 6)).shape
    torch.Size([1, 6])
    """

    weight: nn.Parameter
    eps: float

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps)

    def forward(self, x: Tensor, gate: Tensor | None = None, activation: str = "swish", gate_first: bool = False) -> Tensor:
        if not x.ndim or x.shape[-1] % len(self.weight):
            raise SignalError(f"x is {tuple(x.shape)}, expected (..., {len(self.weight)}) or a multiple of {len(self.weight)} channels")
        how = {"size": len(self.weight), "eps": self.eps, "activation": activation}
        return gated_norm(x, gate, self.weight, gate_first=gate_first, **how)  # type: ignore[arg-type]


class GroupedNorm(nn.Module):
    """Each of ``groups`` equal parts of the last axis, divided by its root mean square, times a weight a channel.

    ``centred`` takes the mean away first (a layer norm of each part); ``bias`` adds a number a channel. ``gate`` as in ``RMSNorm``.

    >>> GroupedNorm(2, 6)(torch.ones(1, 6)).shape
    torch.Size([1, 6])
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, *, centred: bool = False, bias: bool = False) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise SignalError(f"groups is {groups}, expected a divisor of the {channels} channels")
        self.groups, self.eps, self.centred = groups, eps, centred
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor, gate: Tensor | None = None, activation: str = "swish", gate_first: bool = False) -> Tensor:
        if not x.ndim or x.shape[-1] != len(self.weight):
            raise SignalError(f"x is {tuple(x.shape)}, expected (..., {len(self.weight)})")
        size = x.shape[-1] // self.groups
        now, after = (gate, None) if gate_first or self.bias is None else (None, gate)
        y = gated_norm(x, now, self.weight, size=size, eps=self.eps, activation=activation, gate_first=gate_first, centred=self.centred)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y if after is None else gated_norm(y, after, activation=activation)
