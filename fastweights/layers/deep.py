"""``DeepLayer``: a layer whose memory is a network a head, programmed by descent while it reads. TTT and Titans are such layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.func import stack_module_state

from ..language.errors import SignalError
from .descent import LINEAR, deep_scan
from .fast_network import Loss
from .programmer import Programmer

State = dict[str, Tensor]


def squared_error(y: Tensor, v: Tensor) -> Tensor:
    """|y - v|^2, the surprise of Titans.

    >>> import torch
    >>> squared_error(torch.tensor([1.0, 2.0]), torch.zeros(2)).item()
    5.0
    """
    return (y - v).square().sum()


def half_squared_error(y: Tensor, v: Tensor) -> Tensor:
    """1/2 |y - v|^2, the loss of TTT and of the delta rule.

    >>> import torch
    >>> half_squared_error(torch.tensor([1.0, 2.0]), torch.zeros(2)).item()
    2.5
    """
    return 0.5 * squared_error(y, v)


def mlp(d_key: int, d_value: int, expand: int = 4) -> nn.Module:
    """The two-layer network of TTT-MLP, W2 gelu(W1 x + b1) + b2, with ``expand`` d_key hidden units.

    >>> import torch
    >>> mlp(8, 6)(torch.zeros(8)).shape
    torch.Size([6])
    """
    return nn.Sequential(nn.Linear(d_key, expand * d_key), nn.GELU(approximate="tanh"), nn.Linear(expand * d_key, d_value))


class Normalised(nn.Module):
    """x + LN(f(x)): in TTT the layer norm, whose scale and shift are slow, and the residual are a part of the objective.

    >>> import torch
    >>> Normalised(nn.Linear(4, 4), 4)(torch.zeros(4)).shape
    torch.Size([4])
    """

    def __init__(self, network: nn.Module, d: int) -> None:
        super().__init__()
        self.network, self.norm = network, nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.network(x))


class DeepLayer(nn.Module):
    """A layer whose fast weights are those of a network f, a head each, that descends a loss on what the layer reads.

    ``y, state = layer(x, state, reset)`` with x and y (B, T, d_model). With f(x; W) the network, or x + LN(f(x; W)) if ``normalised``,

        S_t = momentum_t S_{t-1} - rate sigmoid(w x_t) grad loss(f(k_t; W'), v_t),  W_t = exp(g_t) W_{t-1} + S_t,  out(norm(f(q_t; W_t))),

    where W' are the weights at the beginning of the mini-batch of ``every`` tokens (see ``deep_scan``, also for the state). The
    weights before the first token, W_0, are learned, as all that makes the signals.

    Args:
        network: makes a network from the sizes of a key and of a value: ``torch.nn.Linear``, ``mlp``, or a function of your own.
        d_model: size of x.
        heads, d_key, d_value: heads, and the sizes of a head; by default d_model is shared out among the heads.
        every: tokens a mini-batch.
        rate: the largest rate of descent. Mini-batches add up their gradients: for keys of unit length, about 1 / every does not
            overshoot on half a squared error, less where the loss, the momentum or the network multiply.
        loss: of an output and a value, both (d_value,): a number.
        momentum, forget: whether descent has momentum, and whether W decays, by numbers made from x_t.
        normalised: layer norm (scale and shift slow, a head each) and residual around the network, as in TTT; needs d_key = d_value.
        options: passed to ``Programmer``: ``key_heads, conv, feature_map, values, norm, custom``.

    Raises:
        SignalError: sizes that do not fit; a network with buffers; fast weights that leave the range of their dtype.

    Source: Sun et al. 2024 (TTT-Linear, TTT-MLP); Behrouz, Zhong and Mirrokni 2025 (Titans).

    >>> import torch
    >>> layer = DeepLayer(mlp, 32, heads=2, every=4, rate=0.05, momentum=True, forget=True)
    >>> y, state = layer(torch.randn(1, 10, 32))
    >>> y.shape, state["W.0.weight"].shape, state["count"].item()
    (torch.Size([1, 10, 32]), torch.Size([1, 2, 64, 16]), 2)
    """

    def __init__(
        self,
        network: Callable[[int, int], nn.Module],
        d_model: int,
        *,
        heads: int = 4,
        d_key: int | None = None,
        d_value: int | None = None,
        every: int = 16,
        rate: float = 0.1,
        loss: Loss = half_squared_error,
        momentum: bool = False,
        forget: bool = False,
        normalised: bool = False,
        **options: object,
    ) -> None:
        super().__init__()
        if heads < 1:
            raise SignalError(f"heads is {heads}, expected at least 1")
        if (d_key is None or d_value is None) and d_model % heads:
            raise SignalError(f"d_model = {d_model} is not a multiple of heads = {heads}; give d_key and d_value, or other heads")
        if every < 1:
            raise SignalError(f"every is {every}, expected at least 1 token a mini-batch")
        if not 0 < rate < math.inf:
            raise SignalError(f"rate is {rate}, expected a positive number")
        self.d_model, self.heads, self.every, self.rate, self.loss, self.momentum = d_model, heads, every, rate, loss, momentum
        self.d_key, self.d_value = d_key or d_model // heads, d_value or d_model // heads
        if normalised and self.d_key != self.d_value:
            raise SignalError(f"normalised adds a key to a value; d_key = {self.d_key} is not d_value = {self.d_value}")
        rule = LINEAR[momentum, forget]
        self.programmer = Programmer(rule, d_model, heads=heads, d_key=self.d_key, d_value=self.d_value, **options)  # type: ignore[arg-type]
        copies = [network(self.d_key, self.d_value) for _ in range(heads)]
        copies = [Normalised(f, self.d_value) for f in copies] if normalised else copies
        weights, buffers = stack_module_state(copies)
        if buffers:
            raise SignalError(f"the network has buffers ({', '.join(buffers)}), which are neither fast nor slow weights; leave them out")
        self.network = (copies[0].requires_grad_(False),)  # a pattern: its own parameters are never used
        self.initial = nn.ParameterDict({_key(n): nn.Parameter(w.detach().clone()) for n, w in weights.items()})
        self.slow = tuple(n for n in weights if normalised and n.startswith("norm."))
        self.fast = tuple(n for n in weights if n not in self.slow)
        self.norm = nn.LayerNorm(heads * self.d_value)
        self.out = nn.Linear(heads * self.d_value, d_model, bias=False)

    def forward(self, x: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[-1] != self.d_model:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise SignalError(f"x is {found}, expected a tensor (B, T, d_model = {self.d_model})")
        signals, conv = self.programmer(x, None if state is None else state.get("conv"), reset)
        signals["beta"] = self.rate * signals["beta"]
        params, fixed = ({n: self.initial[_key(n)] for n in names} for names in (self.fast, self.slow))
        memory = None if state is None else {n: s for n, s in state.items() if n != "conv"}
        y, new = deep_scan(
            self.network[0], self.loss, params=params, fixed=fixed, every=self.every, state=memory, reset=reset, **signals
        )  # fmt: skip
        new = new if conv is None else new | {"conv": conv}
        return self.out(self.norm(y.flatten(2).to(x.dtype))), new

    def state_bytes(self, tokens: int) -> int:
        """Bytes of state for one sequence of that many tokens, in float32: the same for any number."""
        del tokens
        weights = sum(self.initial[_key(n)].numel() for n in self.fast)
        conv = self.programmer.conv
        short = 0 if conv is None else (conv.width - 1) * conv.weight.shape[0]
        half_full = self.every > 1
        return 4 * (weights * (1 + self.momentum + half_full) + short) + 8 * half_full

    def extra_repr(self) -> str:
        sizes = f"d_model={self.d_model}, heads={self.heads}, d_key={self.d_key}, d_value={self.d_value}"
        return f"{sizes}, every={self.every}, rate={self.rate:g}\n{self.network[0]}"


def _key(name: str) -> str:
    return name.replace(".", "/")  # names of parameters hold no point
