"""Norms of what the heads of a layer read."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GroupedNorm(nn.Module):
    """Each of ``groups`` equal parts of the last axis, divided by its root mean square, times a weight a channel.

    ``centred`` takes the mean away first (a layer norm of each part); ``bias`` adds a number a channel.

    >>> GroupedNorm(2, 6)(torch.ones(1, 6)).shape
    torch.Size([1, 6])
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, *, centred: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.groups, self.eps, self.centred = groups, eps, centred
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        z = x.unflatten(-1, (self.groups, -1)).to(torch.promote_types(x.dtype, torch.float32))
        z = z - z.mean(-1, keepdim=True) if self.centred else z
        y = (z * torch.rsqrt(z.square().mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight.to(z.dtype)
        return (y if self.bias is None else y + self.bias.to(z.dtype)).to(x.dtype)
