"""RWKV-6 and RWKV-7: rules of the catalogue whose programmers mix every token with the one before it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import rules
from ..engine.scan import scan
from ..language.errors import SignalError
from .norms import GroupedNorm

State = dict[str, Tensor]
_SLOWEST = -math.exp(-0.5)  # the log of RWKV-7's strongest decay


def token_shift(x: Tensor, last: Tensor | None, reset: Tensor | None = None) -> Tensor:
    """The token before each token of x (B, T, D): ``last`` (B, D) before the first, zeros before a sequence begins."""
    first = torch.zeros_like(x[:, :1]) if last is None else last.to(x.dtype).unsqueeze(1)
    before = torch.cat([first, x], 1)[:, :-1]
    return before if reset is None else before * ~reset.unsqueeze(-1)


class LowRank(nn.Module):
    """B f(A x) + b, with f tanh, sigmoid or nothing."""

    def __init__(self, d_in: int, d_out: int, rank: int, activation: nn.Module | None = None, bias: bool = True) -> None:
        super().__init__()
        between = nn.Identity() if activation is None else activation
        self.lora = nn.Sequential(nn.Linear(d_in, rank, bias=False), between, nn.Linear(rank, d_out, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)


class _TokenMixer(nn.Module):
    """What both have: heads, the state W and the last token."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or d_model % heads:
            raise SignalError(f"d_model = {d_model} is not a multiple of heads = {heads}")
        self.d_model, self.heads, self.size = d_model, heads, d_model // heads
        self.ramp = torch.arange(d_model) / d_model

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.size))

    def after(self, x: Tensor, state: Mapping[str, Tensor] | None, W: Tensor) -> State:
        if x.shape[1]:
            return {"W": W, "last": x[:, -1]}
        return {"W": W, "last": x.new_zeros(x.shape[0], self.d_model) if state is None else state["last"]}

    def state_bytes(self, tokens: int) -> int:
        """Bytes of state for one sequence: the same for any number of tokens."""
        del tokens
        return 4 * (self.heads * self.size**2 + self.d_model)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, heads={self.heads}"


class RWKV7(_TokenMixer):
    """Time mixing of RWKV-7 (Goose), the rule ``generalised_delta``.

    With x_c a mixture of every token and the one before it, for c in r, w, k, v, a, g: receptance r, key k and value v are projections;
    log decay w = -exp(-1/2) sigmoid(tanh of low rank), rates a = sigmoid(low rank), gate g. The key that is erased is kk = k k_k / |.|,
    the one that is written k (1 + (a - 1) k_a): W <- W exp(w) - (W kk) (kk a)^T + v k^T, y = W r. A layer norm of each head, the bonus
    (r . r_k k) v, the gate, a projection. ``v_first``, the values of a model's first layer, is mixed into v where given.

    ``y, state = layer(x, state, reset)``, x and y (B, T, d_model); the state is W (B, H, V, K) and the last token. Parameters have the
    names that flash-linear-attention gives them: ``load_state_dict`` reads its checkpoints' ``model.layers.N.attn``.
    Source: Peng et al. 2025 (RWKV-7).

    >>> layer = RWKV7(32, heads=2)
    >>> y, state = layer(torch.randn(1, 5, 32))
    >>> y.shape, state["W"].shape
    (torch.Size([1, 5, 32]), torch.Size([1, 2, 16, 16]))
    """

    def __init__(
        self, d_model: int, *, heads: int = 4, decay_rank: int = 32, rate_rank: int = 32, value_rank: int | None = None, gate_rank: int = 32
    ) -> None:
        super().__init__(d_model, heads)
        for c in "rwkvag":
            self.register_parameter(f"x_{c}", nn.Parameter((1 - self.ramp ** (0.2 if c in "rg" else 0.8)).view(1, 1, -1)))
        self.k_k, self.k_a = nn.Parameter(torch.full((d_model,), 0.71)), nn.Parameter(torch.full((d_model,), 1.02))
        self.r_k = nn.Parameter(torch.full((heads, self.size), -0.04))
        self.r_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model, bias=False) for _ in range(3))
        self.w_lora = LowRank(d_model, d_model, decay_rank, nn.Tanh())
        self.a_lora = LowRank(d_model, d_model, rate_rank)
        self.v_lora = LowRank(d_model, d_model, value_rank) if value_rank else None
        self.g_lora = LowRank(d_model, d_model, gate_rank, nn.Sigmoid(), bias=False)
        self.g_norm = GroupedNorm(heads, d_model, 1e-5 * self.size, centred=True, bias=True)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        with torch.no_grad():
            self.w_lora.lora[2].bias.copy_(6 * self.ramp - 5.5)

    def forward(
        self, x: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None, v_first: Tensor | None = None
    ) -> tuple[Tensor, State]:
        change = token_shift(x, None if state is None else state["last"], reset) - x
        xr, xw, xk, xv, xa, xg = (x + change * getattr(self, f"x_{c}") for c in "rwkvag")
        r, k, v, a = self.r_proj(xr), self.k_proj(xk), self.v_proj(xv), self.a_lora(xa).sigmoid()
        if self.v_lora is not None and v_first is not None:
            v = torch.lerp(v, v_first, self.v_lora(xv).sigmoid())
        kk = F.normalize(self.split(k * self.k_k), dim=-1)
        k, r, v, a = (self.split(z).to(v.dtype) for z in (k * (1 + (a - 1) * self.k_a), r, v, a))  # autocast leaves them unlike
        g = self.split(_SLOWEST * self.w_lora(xw).to(torch.promote_types(x.dtype, torch.float32)).sigmoid())
        W = None if state is None else state["W"]
        y, W = scan(rules.generalised_delta, q=r, k=k, v=v, x=-kk.to(v.dtype), y=(kk * a).to(v.dtype), g=g, state=W, reset=reset)
        y = self.g_norm(y.flatten(2)) + ((r * k * self.r_k).sum(-1, keepdim=True) * v).flatten(2)
        return self.o_proj(y * self.g_lora(xg)), self.after(x, state, W)


class RWKV6(_TokenMixer):
    """Time mixing of RWKV-6 (Finch), the rule ``bonus_hebb``.

    How much of the token before is mixed in for r, w, k, v and g depends on both tokens, through a low rank. Log decay
    -exp(low rank of x_w), bonus u, y = (W + v (u k)^T) r before W <- W exp(-exp(w)) + v k^T; a layer norm of each head, a silu gate, a
    projection. ``y, state = layer(x, state, reset)``; the state is W (B, H, V, K) and the last token. Source: Peng et al. 2024.

    >>> layer = RWKV6(32, heads=2)
    >>> layer(torch.randn(1, 5, 32))[0].shape
    torch.Size([1, 5, 32])
    """

    def __init__(self, d_model: int, *, heads: int = 4, mix_rank: int = 32, decay_rank: int = 64) -> None:
        super().__init__(d_model, heads)
        self.mix_x = nn.Parameter(1 - self.ramp)
        self.mix = nn.Parameter((1 - self.ramp).repeat(5, 1))
        self.mix_in = nn.Linear(d_model, 5 * mix_rank, bias=False)
        self.mix_out = nn.Parameter(torch.empty(5, mix_rank, d_model).uniform_(-0.01, 0.01))
        self.r_proj, self.k_proj, self.v_proj, self.g_proj = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.w_lora = LowRank(d_model, d_model, decay_rank, nn.Tanh())
        self.bonus = nn.Parameter(torch.linspace(1, 0, d_model).view(heads, self.size).clone())
        self.g_norm = GroupedNorm(heads, d_model, 1e-5 * self.size, centred=True, bias=True)
        self.out = nn.Linear(d_model, d_model, bias=False)
        with torch.no_grad():
            self.w_lora.lora[2].bias.copy_(5 * self.ramp - 6)

    def forward(self, x: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        change = token_shift(x, None if state is None else state["last"], reset) - x
        inner = self.mix_in(x + change * self.mix_x).tanh().unflatten(-1, (5, -1))
        mix = torch.einsum("btnr,nrd->nbtd", inner, self.mix_out) + self.mix[:, None, None]
        xr, xw, xk, xv, xg = (x + change * m for m in mix)
        r, k, v = (self.split(z) for z in (self.r_proj(xr), self.k_proj(xk), self.v_proj(xv)))
        g = -self.split(self.w_lora(xw).to(torch.promote_types(x.dtype, torch.float32))).exp()
        u = self.bonus.to(r.dtype).expand(*r.shape)
        y, W = scan(rules.bonus_hebb, q=r, k=k, v=v, u=u, g=g, state=None if state is None else state["W"], reset=reset)
        return self.out(self.g_norm(y.flatten(2), self.g_proj(xg))), self.after(x, state, W)
