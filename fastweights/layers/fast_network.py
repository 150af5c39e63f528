"""A network as fast weights, for one token and one head: its slopes, and its outputs at weights that are sums of slopes.

Two ways to say the same. ``Direct`` holds the gradients of C tokens as they are. ``Dual`` holds, for every linear map z = A x + b of
the network, the inputs x_i and the slopes d_i of the loss in z: the gradient is d_i x_i^T, and the map of a token is attention,
A_t x = A x + sum_i c_ti d_i (x_i . x).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Weights = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
FORMS = ("dual", "direct")


class Method(Protocol):
    """The slopes of C tokens, in a shape of its own, and what is made of them."""

    def slopes(self, start: Weights, slow: Weights, k: Tensor, v: Tensor) -> Any:
        """Of one token, at the weights ``start``."""
        ...

    def total(self, slopes: Any, c: Tensor) -> Weights:
        """sum_i c_i G_i over C tokens, c (C,)."""
        ...

    def read(
        self, now: Weights, speed: Weights, slow: Weights, slopes: Any, q: Tensor, keep: Tensor, push: Tensor, steps: Tensor
    ) -> Tensor:
        """f(q; keep W + push S + sum_i steps_i G_i), of one token; ``speed`` S is empty without momentum."""
        ...


def added(now: Weights, speed: Weights, total: Weights, keep: Tensor, push: Tensor) -> Weights:
    """keep W + push S + total."""
    return {n: keep * w + total[n] + (push * speed[n] if speed else 0) for n, w in now.items()}


@dataclass(frozen=True)
class Direct:
    """The gradients of C tokens, by the names of the weights, each (C, ...)."""

    network: nn.Module
    loss: Loss

    def slopes(self, start: Weights, slow: Weights, k: Tensor, v: Tensor) -> Weights:
        return grad(lambda weights: self.loss(functional_call(self.network, weights | slow, (k,)), v))(start)

    def total(self, slopes: Weights, c: Tensor) -> Weights:
        return {n: torch.tensordot(c, s, 1) for n, s in slopes.items()}

    def read(
        self, now: Weights, speed: Weights, slow: Weights, slopes: Weights, q: Tensor, keep: Tensor, push: Tensor, steps: Tensor
    ) -> Tensor:
        return functional_call(self.network, added(now, speed, self.total(slopes, steps), keep, push) | slow, (q,))


class Slope(NamedTuple):
    """Of one linear map: its inputs (C, in) and the slopes of the loss in its outputs (C, out)."""

    x: Tensor
    d: Tensor


class Call(NamedTuple):
    """A linear map of the network: the names of its weight and its bias, None where they are not fast, and its size."""

    weight: str | None
    bias: str | None
    size: int


@dataclass(frozen=True)
class Dual:
    """Linear maps of one vector each, in the order in which the network calls them."""

    network: nn.Module
    loss: Loss
    calls: tuple[Call, ...]

    def slopes(self, start: Weights, slow: Weights, k: Tensor, v: Tensor) -> list[Slope]:
        def shifted(shifts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            seen: list[Tensor] = []

            def each(i: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                seen.append(x)
                return F.linear(x, weight, bias) + shifts[i]

            with LinearMaps(start, each):
                y = functional_call(self.network, start | slow, (k,))
            return self.loss(y, v), seen

        slopes, inputs = grad(shifted, has_aux=True)([k.new_zeros(call.size) for call in self.calls])
        return [Slope(x, d) for x, d in zip(inputs, slopes, strict=True)]

    def total(self, slopes: list[Slope], c: Tensor) -> Weights:
        sums: Weights = {}
        for call, s in zip(self.calls, slopes, strict=True):
            d = c.unsqueeze(-1) * s.d
            if call.weight is not None:
                sums[call.weight] = sums.get(call.weight, 0) + d.mT @ s.x
            if call.bias is not None:
                sums[call.bias] = sums.get(call.bias, 0) + d.sum(0)
        return sums

    def read(
        self, now: Weights, speed: Weights, slow: Weights, slopes: list[Slope], q: Tensor, keep: Tensor, push: Tensor, steps: Tensor
    ) -> Tensor:
        def each(i: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            call = self.calls[i]
            z = F.linear(x, weight) if call.weight is None else keep * F.linear(x, weight)
            if bias is not None:
                z = z + (bias if call.bias is None else keep * bias)
            if speed and call.weight is not None:
                z = z + push * F.linear(x, speed[call.weight])
            if speed and call.bias is not None:
                z = z + push * speed[call.bias]
            for other, s in zip(self.calls, slopes, strict=True):  # a weight may be used several times
                if call.weight is not None and other.weight == call.weight:
                    z = z + (steps * (s.x @ x)) @ s.d
                if call.bias is not None and other.bias == call.bias:
                    z = z + steps @ s.d
            return z

        with LinearMaps(now, each):
            return functional_call(self.network, now | slow, (q,))


class LinearMaps(TorchFunctionMode):
    """While it is entered, ``each(i, x, weight, bias)`` stands for the i-th call of F.linear with fast weights.

    ``others`` is told of any other use of a fast weight: the name of the weight, and of the function that it is given to.
    """

    def __init__(self, fast: Weights, each: Callable[..., Tensor], others: Callable[[str, str], None] | None = None) -> None:
        super().__init__()
        self.names, self.each, self.others, self.calls = {id(w): n for n, w in fast.items()}, each, others, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = _arguments(*args, **kwargs)
            if id(x) not in self.names and (id(weight) in self.names or id(bias) in self.names):
                self.calls += 1
                return self.each(self.calls - 1, x, weight, bias)
        if self.others is not None:
            for a in pytree.tree_leaves((args, kwargs)):
                if id(a) in self.names:
                    self.others(self.names[id(a)], getattr(func, "__name__", str(func)))
        return func(*args, **kwargs)


def _arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def uses(network: nn.Module, fast: Weights, slow: Weights, x: Tensor) -> tuple[Tensor, tuple[Call, ...], list[str]]:
    """The output at one key, the linear maps with fast weights, and what else the network does with them: only ``Direct`` can."""
    names = {id(w): n for n, w in fast.items()}
    calls: list[Call] = []
    others: list[str] = []

    def each(_: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(Call(names.get(id(weight)), names.get(id(bias)), weight.shape[0]))
        if x.ndim != 1:
            others.append(f"a linear map is given a matrix {tuple(x.shape)}")
        return F.linear(x, weight, bias)

    with torch.no_grad(), LinearMaps(fast, each, lambda n, function: others.append(f"{n} is given to {function}")):
        y = functional_call(network, fast | slow, (x,))
    met = {n for call in calls for n in (call.weight, call.bias)}
    others += [f"{n} is in no linear map" for n in fast if n not in met]
    return y, tuple(calls), list(dict.fromkeys(others))
