"""Where the log of a decay comes from: modules from x, or from what a projection made of it, to g <= 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SoftplusDecay(nn.Module):
    """The log of a decay as Mamba has it: g = -exp(A_log) softplus(z + dt_bias), in float32 or better.

    ``A`` starts uniform in (0, 16), the step softplus(dt_bias) log-uniform in [0.001, 0.1]. Neither has weight decay.
    Source: Gu and Dao 2023; Yang et al. 2025.
    """

    def __init__(self, heads: int, channels: int | None) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1e-4, 16).log())
        step = torch.empty(heads, *(() if channels is None else (channels,))).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        step = step.clamp(min=1e-4)
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus of this is the step

    def forward(self, z: Tensor) -> Tensor:
        dtype = torch.promote_types(z.dtype, torch.float32)
        rate = self.A_log.to(dtype).exp()
        rate = rate if self.dt_bias.ndim == 1 else rate.unsqueeze(-1)
        return -rate * F.softplus(z.to(dtype) + self.dt_bias.to(dtype))


class LowRankDecay(nn.Module):
    """g = logsigmoid(B A x + b) / divisor for each head and key channel, A and B of a low rank.

    Source: Yang et al. 2024, ICML (gated linear attention: rank 16, divisor 16).
    """

    def __init__(self, d_model: int, heads: int, d_key: int, rank: int = 16, divisor: float = 16.0) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(d_model, rank, bias=False), nn.Linear(rank, heads * d_key)
        self.heads, self.divisor = heads, divisor

    def forward(self, x: Tensor) -> Tensor:
        return F.logsigmoid(single(self.up(self.down(x))).unflatten(-1, (self.heads, -1))) / self.divisor


class LowRankSoftplusDecay(nn.Module):
    """``SoftplusDecay`` a key channel of B A x, A and B of a low rank. Source: Kimi Team 2025 (KDA)."""

    def __init__(self, d_model: int, heads: int, d_key: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(d_model, rank, bias=False), nn.Linear(rank, heads * d_key, bias=False)
        self.decay = SoftplusDecay(heads, d_key)

    def forward(self, x: Tensor) -> Tensor:
        return self.decay(self.up(self.down(x)).unflatten(-1, self.decay.dt_bias.shape))


class SafeDecay(nn.Module):
    """g = lowest sigmoid(exp(A_log) (w x + dt_bias)), a key channel: never below ``lowest``. Source: Ling Team 2026 (KDA's safe gate)."""

    def __init__(self, d_model: int, heads: int, d_key: int, lowest: float = -5.0) -> None:
        super().__init__()
        self.project, self.lowest = nn.Linear(d_model, heads * d_key, bias=False), lowest
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads, d_key))

    def forward(self, x: Tensor) -> Tensor:
        z = single(self.project(x)).unflatten(-1, self.dt_bias.shape)
        return self.lowest * torch.sigmoid(self.A_log.to(z.dtype).exp().unsqueeze(-1) * (z + self.dt_bias.to(z.dtype)))


class FixedDecay(nn.Module):
    """The same g for all tokens, a number a head."""

    log_decay: Tensor

    def __init__(self, g: Tensor) -> None:
        super().__init__()
        self.register_buffer("log_decay", g)

    def forward(self, x: Tensor) -> Tensor:
        return self.log_decay.to(torch.promote_types(x.dtype, torch.float32)).expand(*x.shape[:2], -1)


def retention(heads: int) -> FixedDecay:
    """log(1 - 2^(-5-h)). Source: Sun et al. 2023 (RetNet).

    >>> retention(2).log_decay.exp().tolist()
    [0.96875, 0.984375]
    """
    return FixedDecay(torch.log1p(-(2.0 ** (-5.0 - torch.arange(heads, dtype=torch.float64)))).float())


def lightning(heads: int) -> FixedDecay:
    """-2^(-8 (h + 1) / heads), the slopes of ALiBi. Source: Qin et al. 2024 (Lightning Attention-2); MiniMax 2025."""
    return FixedDecay(-(2.0 ** (-8.0 * (torch.arange(heads, dtype=torch.float64) + 1) / heads)).float())


class CappedGate(nn.Module):
    """c tanh((w x + b) / c), a number a head: the raw input gate of an mLSTM. Source: Beck et al. 2025 (xLSTM 7B: c = 15)."""

    def __init__(self, d_model: int, heads: int, cap: float = 15.0) -> None:
        super().__init__()
        self.project, self.cap = nn.Linear(d_model, heads), cap

    def forward(self, x: Tensor) -> Tensor:
        return self.cap * torch.tanh(single(self.project(x)) / self.cap)


class ForgetGate(nn.Module):
    """g = logsigmoid(c tanh((w x + b) / c)), a number a head, softly capped at c. Source: Beck et al. 2025 (xLSTM 7B: c = 15)."""

    def __init__(self, d_model: int, heads: int, cap: float = 15.0) -> None:
        super().__init__()
        self.gate = CappedGate(d_model, heads, cap)
        nn.init.constant_(self.gate.project.bias, 4.0)  # remember at first

    def forward(self, x: Tensor) -> Tensor:
        return F.logsigmoid(self.gate(x))


class LowerBoundedDecay(nn.Module):
    """g = log(bound + (1 - bound) sigmoid(w x)) for each head and key channel; its key is 1 - exp(g) (``complement``).

    Source: Qin et al. 2024 (HGRN2), whose bounds rise from layer to layer.
    """

    bound: Tensor

    def __init__(self, d_model: int, heads: int, d_key: int, bound: float) -> None:
        super().__init__()
        self.project = nn.Linear(d_model, heads * d_key, bias=False)
        self.register_buffer("bound", torch.full((heads, d_key), bound))

    def decay(self, x: Tensor) -> Tensor:
        open = single(self.project(x)).sigmoid().unflatten(-1, self.bound.shape)
        return self.bound.to(open.dtype) + (1 - self.bound.to(open.dtype)) * open

    def forward(self, x: Tensor) -> Tensor:
        return self.decay(x).clamp(min=1e-6).log()


class StepSize(nn.Module):
    """dt = softplus(w x + dt_bias), a number a head, within ``limits``. Source: Gu and Dao 2023; Dao and Gu 2024 (Mamba-2)."""

    def __init__(self, d_model: int, heads: int, limits: tuple[float, float] = (0.0, math.inf)) -> None:
        super().__init__()
        self.limits = limits
        self.project = nn.Linear(d_model, heads, bias=False)
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))

    def forward(self, x: Tensor) -> Tensor:
        z = single(self.project(x))
        return F.softplus(z + self.dt_bias.to(z.dtype)).clamp(*self.limits)


class SteppedDecay(nn.Module):
    """g = -exp(A_log) dt for the step size of the same layer, whose parameters belong to that."""

    def __init__(self, step: StepSize) -> None:
        super().__init__()
        self.of = (step,)
        self.A_log = nn.Parameter(torch.empty_like(step.dt_bias).uniform_(1, 16).log())

    def forward(self, x: Tensor) -> Tensor:
        dt = self.of[0](x)
        return -self.A_log.to(dt.dtype).exp() * dt


def single(z: Tensor) -> Tensor:
    """The same numbers in float32 at least: rates near 1 and decays have no room in 16 bits."""
    return z.to(torch.promote_types(z.dtype, torch.float32))
