"""Feature maps phi of keys and queries: what linear attention has in the place of the exponential, phi(q) . phi(k) for exp(q . k)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..language.errors import SignalError


class FeatureMap(nn.Module):
    """phi: (..., d) -> (..., size). Those without parameters are a function of one name; ``feature_map`` makes any of them."""

    def __init__(self, name: str, d: int, size: int, function: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.name, self.d, self.size, self.function = name, d, size, function

    def forward(self, x: Tensor) -> Tensor:
        assert self.function is not None
        return self.function(x)

    def extra_repr(self) -> str:
        return f"{self.name}, {self.d} -> {self.size}"


def dpfp(x: Tensor, nu: int = 1) -> Tensor:
    """Deterministic parameter-free projection: r_i r_{i + j} with r = relu([x, -x]), j = 1 ... nu, (..., 2 d nu).

    Source: Schlag, Irie and Schmidhuber 2021, ICML.

    >>> dpfp(torch.tensor([1.0, -2.0])).tolist()
    [0.0, 0.0, 0.0, 2.0]
    """
    r = F.relu(torch.cat([x, -x], -1))
    return torch.cat([r * r.roll(-i, -1) for i in range(1, nu + 1)], -1)


def taylor2(x: Tensor) -> Tensor:
    """[1, x', x' x'^T / sqrt 2] with x' = x / d^(1/4): phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt d, (..., 1 + d + d^2).

    Source: Zhang et al. 2024 (The Hedgehog and the Porcupine); Arora et al. 2024 (Based).

    >>> taylor2(torch.zeros(3)).shape
    torch.Size([13])
    """
    x = x * x.shape[-1] ** -0.25
    pairs = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) * 0.5**0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, pairs], -1)


class Favor(FeatureMap):
    """Positive random features: exp(w_i . x' - |x'|^2 / 2) / sqrt m with x' = x / d^(1/4) and orthogonal rows w_i of m random ones.

    The expectation of phi(q) . phi(k) is exp(q . k / sqrt d), so normalised linear attention tends to softmax attention as m grows.
    Source: Choromanski et al. 2021, ICLR (Performer: FAVOR+).
    """

    projection: Tensor

    def __init__(self, d: int, features: int) -> None:
        super().__init__(f"favor:{features}", d, features)
        blocks = [_rotation(d) for _ in range(-(-features // d))]
        lengths = torch.randn(features, d).norm(dim=-1, keepdim=True)
        self.register_buffer("projection", torch.cat(blocks)[:features] * lengths)

    def forward(self, x: Tensor) -> Tensor:
        x = x * x.shape[-1] ** -0.25
        return torch.exp(x @ self.projection.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2) * self.size**-0.5


def _rotation(d: int) -> Tensor:
    """Orthonormal rows, every direction alike: those of a QR decomposition are so only once its R has a positive diagonal."""
    Q, R = torch.linalg.qr(torch.randn(d, d))
    return Q * R.diagonal().sign()


class Hedgehog(FeatureMap):
    """softmax([2 z, -2 z]) with z = A x + b learned for each head, first the identity: spiky and monotone, as softmax attention is.

    Source: Zhang et al. 2024, ICLR (The Hedgehog and the Porcupine).
    """

    def __init__(self, d: int, heads: int) -> None:
        super().__init__("hedgehog", d, 2 * d)
        self.weight = nn.Parameter(torch.eye(d).repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, d))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.einsum("...hd,hed->...he", x, self.weight.to(x.dtype)) + self.bias.to(x.dtype)
        return torch.cat([2 * z, -2 * z], -1).softmax(-1)


def _identity(x: Tensor) -> Tensor:
    return x


def _elu1(x: Tensor) -> Tensor:
    return F.elu(x) + 1


_SIMPLE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": _identity,
    "silu": F.silu,
    "relu": F.relu,
    "elu1": _elu1,
    "exp": torch.exp,
    "softmax": partial(torch.softmax, dim=-1),
    "taylor2": taylor2,
}
NAMES = (*_SIMPLE, "dpfp:NU", "favor:FEATURES", "hedgehog")


def feature_map(name: str, d: int, heads: int = 1) -> FeatureMap:
    """The map of that name for vectors of size d: ``dpfp:3`` and ``favor:64`` carry a number, 1 and 4 d if left out.

    >>> feature_map("dpfp:3", 8).size
    48
    """
    kind, _, number = name.partition(":")
    if number and (kind not in ("dpfp", "favor") or not (number.isascii() and number.isdigit()) or int(number) < 1):
        raise SignalError(f"feature_map is {name!r}; known: {', '.join(NAMES)}, with a whole number from 1")
    if kind == "dpfp":
        nu = int(number or 1)
        return FeatureMap(name, d, 2 * d * nu, partial(dpfp, nu=nu))
    if kind == "favor":
        return Favor(d, int(number or 4 * d))
    if kind == "hedgehog":
        return Hedgehog(d, heads)
    if kind not in _SIMPLE:
        raise SignalError(f"feature_map is {name!r}; known: {', '.join(NAMES)}")
    return FeatureMap(name, d, 1 + d + d * d if kind == "taylor2" else d, _SIMPLE[kind])


def is_positive(name: str) -> bool:
    """Whether phi(q) . phi(k) is at least zero for all q and k, as a normaliser asks."""
    return name.partition(":")[0] in ("relu", "elu1", "exp", "softmax", "dpfp", "favor", "hedgehog", "taylor2")


def may_vanish(name: str) -> bool:
    """Whether phi(q) . phi(k) may be zero for all k that there are."""
    return name.partition(":")[0] in ("relu", "dpfp")
