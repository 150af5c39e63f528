"""Mesa: the fast weights that minimise the squared error of all that was seen, exactly, at every token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import rules
from ..engine.scan import scan, unroll
from ..language.errors import SignalError
from .norms import RMSNorm
from .programmer import Programmer

State = dict[str, Tensor]
SOLVERS = ("conjugate_gradient", "solve")


def mesa(
    *, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, ridge: Tensor, state: tuple[Tensor, Tensor] | None = None,
    reset: Tensor | None = None, solver: str = "conjugate_gradient", iterations: int = 30,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """y_t = G_t (H_t + diag(ridge))^-1 q_t: what the ridge regression of past values on past keys predicts for the query.

    G <- exp(g) G + beta v k^T and H <- exp(g) H + beta k k^T are two scans of ``decayed_hebb``. By conjugate gradients, for all tokens at
    once: a product H_t x_t for every t is again a scan, with x as the query. ``solve`` factorises every H_t.

    Args:
        q, k, v, beta, g: (B, T, H, ...), as for ``gated_delta``; g a number a head.
        ridge: the penalty, (H, K), above 0.
        state: G (B, H, V, K) and H (B, H, K, K), zero if not given.
        iterations: of the conjugate gradients; K of them are exact but for rounding.

    Source: von Oswald et al. 2023; 2025 (MesaNet).

    >>> x = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    >>> one = x[..., 0]
    >>> y, _ = mesa(q=x, k=x, v=2 * x, beta=one, g=0 * one, ridge=torch.ones(1, 1, dtype=torch.float64))
    >>> y.flatten().tolist()  # 2 n / (n + 1)
    [1.0, 1.3333333333333333, 1.5]
    """
    if solver not in SOLVERS:
        raise SignalError(f"solver is {solver!r}; known: {', '.join(SOLVERS)}")
    if ridge.shape != (k.shape[2], k.shape[3]) or bool((ridge <= 0).any()):
        raise SignalError(f"ridge is {tuple(ridge.shape)}, expected numbers above 0 of shape (H, K) = {tuple(k.shape[2:])}")
    G, H = (None, None) if state is None else state
    rate = beta.unsqueeze(-1)

    def remembered(x: Tensor, what: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        return scan(rules.decayed_hebb, q=x, k=k, v=rate * what, g=g, state=first, reset=reset)

    if solver == "solve":
        every = unroll(rules.decayed_hebb, k=k, v=rate * k, g=g, state=H, reset=reset)
        x = torch.linalg.solve(every + torch.diag_embed(ridge).to(every.dtype), q.to(every.dtype)).to(q.dtype)
        last = every[:, -1] if every.shape[1] else H
    else:
        x = _conjugate_gradient(lambda p: remembered(p, k, H)[0] + ridge * p, q, min(iterations, 2 * k.shape[3]))
        last = remembered(x[:, :, :, :], k, H)[1]
    y, G = remembered(x, v, G)
    return y, (G, last if last is not None else G.new_zeros(k.shape[0], k.shape[2], k.shape[3], k.shape[3]))


def _conjugate_gradient(times, b: Tensor, iterations: int) -> Tensor:
    """x with A x = b, for a symmetric positive A of every token; a system that is solved stands still."""
    x, r = torch.zeros_like(b), b
    p, size = r, (r * r).sum(-1, keepdim=True)
    enough = size * torch.finfo(b.dtype).eps ** 2
    for _ in range(iterations):
        Ap = times(p)
        going = size > enough
        step = torch.where(going, size / torch.where(going, (p * Ap).sum(-1, keepdim=True), 1.0), 0.0)
        x, r = x + step * p, r - step * Ap
        new = (r * r).sum(-1, keepdim=True)
        p = r + torch.where(going, new / torch.where(going, size, 1.0), 0.0) * p
        size = new
    return x


class MesaLayer(nn.Module):
    """A layer that reads by ``mesa``: ``y, state = layer(x, state, reset)``, x and y (B, T, d_model).

    Keys, queries, values, rates and decays as in Gated DeltaNet; the ridge is a trained number a head and key channel, at least 0.25.
    The state has G, H and the last inputs of the short convolution. Source: von Oswald et al. 2025 (MesaNet).

    >>> layer = MesaLayer(32, heads=2)
    >>> layer(torch.randn(1, 5, 32))[0].shape
    torch.Size([1, 5, 32])
    """

    def __init__(self, d_model: int, *, heads: int = 4, d_key: int | None = None, d_value: int | None = None, iterations: int = 30) -> None:
        super().__init__()
        self.d_model, self.heads, self.iterations = d_model, heads, iterations
        self.d_key, self.d_value = d_key or d_model // heads, d_value or d_model // heads
        self.programmer = Programmer(rules.gated_delta, d_model, heads=heads, d_key=self.d_key, d_value=self.d_value)
        self.raw_ridge = nn.Parameter(torch.zeros(heads, self.d_key))
        self.norm = RMSNorm(self.d_value)
        self.out = nn.Linear(heads * self.d_value, d_model, bias=False)

    def forward(self, x: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        before = None if state is None else state["conv"]
        signals, conv = self.programmer(x, before, reset) if reset is not None else self.programmer(x, before)
        ridge = 0.25 + F.softplus(self.raw_ridge.to(signals["g"].dtype))
        signals = {n: z.to(ridge.dtype) for n, z in signals.items()}  # the solver needs all the precision there is
        memory = None if state is None else (state["G"], state["H"])
        y, (G, H) = mesa(**signals, ridge=ridge, state=memory, reset=reset, iterations=self.iterations)
        assert conv is not None
        return self.out(self.norm(y.to(x.dtype)).flatten(2)), {"G": G, "H": H, "conv": conv}

    def state_bytes(self, tokens: int) -> int:
        """Bytes of state for one sequence: the same for any number of tokens."""
        del tokens
        conv = self.programmer.conv
        assert conv is not None
        return 4 * (self.heads * self.d_key * (self.d_key + self.d_value) + (conv.width - 1) * conv.weight.shape[0])

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, heads={self.heads}, iterations={self.iterations}"
