"""Whole layers of transformers over this engine: those whose rule is written into their own code, so that nothing less can be exchanged.

Each has a twin that says whether a call is one that it serves, as in ``functions``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import rules as R
from ..engine.convolution import Part, short_convolution
from ..engine.gated_norm import with_share
from ..engine.scan import scan
from ..engine.step import step
from .functions import SWISH, beginnings, conv, is_float

# ---- lightning attention (MiniMax) -----------------------------------------------------------------------------------


def serves_lightning(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> bool:
    return hidden_states.ndim == 3 and is_float(hidden_states)


def lightning(
    self: Any, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Tensor | None = None, cache: Any = None,
    past_key_values: Any = None, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A fixed decay a head, and neither scale nor norm. The cache is ``past_key_values`` before transformers 5.15."""
    B, T, _d = hidden_states.shape
    mixed = self.act_fn(self.qkv_proj(hidden_states))
    if attention_mask is not None and attention_mask.shape == (B, T):
        mixed = mixed * attention_mask.unsqueeze(-1).to(mixed.dtype)
    q, k, v = mixed.view(B, T, self.num_attention_heads, 3, self.head_dim).float().unbind(3)
    cache = past_key_values if cache is None else cache
    state = None if cache is None else cache.get_linear_cache(self.layer_idx)
    W = None if state is None else state.float().transpose(-1, -2)
    g = -self.slope_rate.float().flatten().expand(B, T, -1)
    y, W = scan(R.decayed_hebb, q=q, k=k, v=v, g=g, state=W)
    state = W.transpose(-1, -2).to(hidden_states.dtype)
    if cache is not None:
        cache.set_linear_cache(self.layer_idx, state)
    y = self.norm(y.flatten(2).to(hidden_states.dtype))
    return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * y), state


# ---- Mamba-2 and its relatives before transformers 5.15 -----------------------------------------------------------------


def serves_mamba2(self: Any, x: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None) -> bool:
    knows = all(hasattr(cache_params, n) for n in ("has_previous_state", "update_conv_state", "update_recurrent_state", "layers"))
    return (
        x.ndim == 3
        and is_float(x)
        and self.activation in SWISH
        and (cache_params is None or knows)
        and (attention_mask is None or attention_mask.shape == x.shape[:2])
    )


def mamba2(
    self: Any, x: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, seq_idx: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The layer of Mamba-2, Bamba, Granite-hybrid and Falcon-H1. Padding counts where there is more than one sequence."""

    def masked(x: Tensor) -> Tensor:
        if attention_mask is None or 1 in attention_mask.shape:
            return x
        return (x * attention_mask.unsqueeze(-1)).to(x.dtype)

    return _mamba2(self, masked(x), cache_params, masked, self.time_step_limit, seq_idx)


def serves_packed(
    self: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, seq_idx: Tensor | None = None,
    **_: Any,
) -> bool:  # fmt: skip
    return seq_idx is not None and cache_params is None and serves_mamba2(self, hidden_states, None, attention_mask)


def packed(
    self: Any, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, seq_idx: Tensor | None = None,
    **_: Any,
) -> Tensor:  # fmt: skip
    """That layer for packed sequences, which theirs does not take: Bamba and Granite-hybrid."""
    return mamba2(self, hidden_states, None, attention_mask, seq_idx)


def zamba2(self: Any, x: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None) -> Tensor:
    """That of Zamba2 and Nemotron-H: time steps have no upper limit, and a token on top of a cache is none of the padding.

    Theirs adds up the states of its chunks wrongly, and differs from itself token by token; this one does not.
    """
    before = cache_params is not None and cache_params.has_previous_state(self.layer_idx)

    def masked(x: Tensor) -> Tensor:
        if attention_mask is None or (before and x.shape[1] == 1):
            return x
        return (x * attention_mask.unsqueeze(-1)).to(x.dtype)

    return _mamba2(self, x if before else masked(x), cache_params, masked, (self.time_step_min, float("inf")))


def _mamba2(
    self: Any, x: Tensor, cache: Any, masked: Callable[[Tensor], Tensor], limit: tuple[float, float], seq_idx: Tensor | None = None
) -> Tensor:  # fmt: skip
    """W <- exp(dt A) W + dt v k^T, y = W q + D v: v, k and q from a short convolution, dt from the input, the output gated."""
    before = cache.layers[self.layer_idx] if cache is not None and cache.has_previous_state(self.layer_idx) else None
    projected = self.in_proj(x * getattr(self, "ssm_in_multiplier", 1.0))
    if hasattr(self, "mup_vector"):  # Falcon-H1's multipliers
        projected = projected * self.mup_vector
    inner, groups, H = self.intermediate_size, self.n_groups * self.ssm_state_size, self.num_heads
    mlp = (projected.shape[-1] - 2 * inner - 2 * groups - H) // 2
    *_, gate, mixed, dt = projected.split([mlp, mlp, inner, self.conv_dim, H], -1)
    mixed = masked(_convolved(self, mixed, cache, before, seq_idx))
    v, k, q = (part.unflatten(-1, (-1, width)) for part, width in zip(
        mixed.split([inner, groups, groups], -1), (self.head_dim, self.ssm_state_size, self.ssm_state_size), strict=True
    ))  # fmt: skip
    dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*limit)
    reset = None if seq_idx is None else beginnings(seq_idx)
    y = _scanned(self, cache, before, reset, q=q.float(), k=k.float(), v=v.float(), dt=dt, g=-dt * self.A_log.float().exp())
    y = with_share(y, self.D.float(), v.float()).flatten(2)
    read = self.norm(y, gate) if getattr(self, "mamba_rms_norm", True) else y * F.silu(gate)
    return self.out_proj(read.to(x.dtype))


def _convolved(self: Any, mixed: Tensor, cache: Any, before: Any, seq_idx: Tensor | None) -> Tensor:
    """silu of the causal convolution of (B, T, C); the cache keeps the last inputs, (B, C, width)."""
    weight, bias, width = self.conv1d.weight.squeeze(1), self.conv1d.bias, self.conv_kernel_size
    columns = mixed.transpose(1, 2)
    if seq_idx is not None:
        return conv(columns, weight, bias, "silu", seq_idx).transpose(1, 2)
    if before is not None and mixed.shape[1] == 1:
        seen = cache.update_conv_state(columns, layer_idx=self.layer_idx)[..., -width:]
        y = (seen * weight).sum(-1)
        return F.silu(y if bias is None else y + bias).to(mixed.dtype).unsqueeze(1)
    seen = mixed.new_zeros(len(mixed), mixed.shape[2], width) if before is None else before.conv_states[0].to(mixed.dtype)
    left = seen[..., 1:].transpose(1, 2).clone()  # the cache writes where it has them
    if cache is not None:
        cache.update_conv_state(torch.cat([seen, columns], -1)[..., -width:], layer_idx=self.layer_idx)
    return short_convolution(mixed, weight, left, (Part(mixed.shape[2], True),), bias)


def _scanned(self: Any, cache: Any, before: Any, reset: Tensor | None, **signals: Tensor) -> Tensor:
    """What is read (B, T, H, P); the cache keeps the state (B, H, P, N), which a single token rewrites in place."""
    W = None if before is None else before.recurrent_states[0]
    if W is not None and signals["dt"].shape[1] == 1 and W.dtype == torch.float32 and not torch.is_grad_enabled():
        y, W = step(R.stepped_hebb, W, out=W, **{name: signal[:, 0] for name, signal in signals.items()})
        y = y.unsqueeze(1)
    else:
        y, W = scan(R.stepped_hebb, state=None if W is None else W.float(), reset=reset, **signals)
    if cache is not None:
        cache.update_recurrent_state(W, layer_idx=self.layer_idx)
    return y
