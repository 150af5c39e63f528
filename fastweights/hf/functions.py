"""What transformers' linear-attention layers call, over this engine: the same names of arguments, layouts and results.

Each function has a twin that says whether a call is one that it serves; others go to the function of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import rules as R
from ..compat.sequences import run
from ..engine.convolution import Part, short_convolution
from ..engine.gated_norm import gated_norm as norm_and_gate
from ..engine.gated_norm import with_share
from ..engine.scan import scan
from ..engine.step import step
from ..rules.hebb import mlstm as mlstm_rule

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_float(*given: Any) -> bool:
    return all(x is None or (isinstance(x, Tensor) and x.dtype in _FLOATS) for x in given)


# ---- the gated delta rule, a decay a head or a key -------------------------------------------------------------------


def serves_delta(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **more: Any) -> bool:
    return query.ndim == 4 and is_float(query, key, value, g, beta, more.get("initial_state"))


def gated_delta(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, chunk_size: int = 64, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None, **_: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(output (B, T, H, V) in the dtype of the query, state (B, H, K, V) in float32 or None): g (B, T, H) or (B, T, H, K)."""
    state = initial_state
    cu_seqlens = cu_seq_lens_q if cu_seqlens is None else cu_seqlens  # Kimi's layers hand on the one name, Qwen's the other
    one = query.shape[1] == 1 and cu_seqlens is None and output_final_state and not torch.is_grad_enabled()
    if one and state is not None and state.dtype == torch.float32 and state.is_contiguous():
        return _delta_step(query, key, value, g, beta, state, use_qk_l2norm_in_kernel)
    y, state = run(
        R.gated_delta, {"q": query, "k": key, "v": value, "beta": beta, "g": g}, state=state, keep_state=output_final_state,
        cu_seqlens=cu_seqlens, l2norm=use_qk_l2norm_in_kernel,
    )  # fmt: skip
    return y.to(query.dtype), state


def _delta_step(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor, l2norm: bool) -> tuple[Tensor, Tensor]:
    """One token; the state is rewritten in place, so that the cache need not copy it."""
    q, k, v, b, g = (x[:, 0].float() for x in (query, key, value, beta, g))
    scale = q.shape[-1] ** -0.5
    if l2norm:
        q = q * (torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6) * scale)
        k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
    else:
        q = q * scale
    W = state.transpose(-1, -2)
    y, _ = step(R.gated_delta, W, out=W, q=q, k=k, v=v, beta=b, g=g)
    return y.unsqueeze(1).to(query.dtype), state


# ---- Mamba-2 ---------------------------------------------------------------------------------------------------------


def _dt(dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float]) -> Tensor:
    dt = dt.float()
    dt = dt if bias is None else dt + bias.float()
    return (F.softplus(dt) if softplus else dt).clamp(*limit)


def beginnings(seq_idx: Tensor) -> Tensor:
    """Where a sequence begins that is packed behind another, (B, T)."""
    reset = torch.zeros_like(seq_idx, dtype=torch.bool)
    reset[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return reset


def serves_ssd(hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int = 256, **more: Any) -> bool:
    packed = more.get("seq_idx")
    return (
        hidden_states.ndim == 4
        and is_float(hidden_states, dt, A, B, C, more.get("initial_states"))
        and more.get("z") is None
        and (packed is None or not more.get("return_final_states"))
    )


def ssd(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int = 256, D: Tensor | None = None,
    dt_bias: Tensor | None = None, initial_states: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False, seq_idx: Tensor | None = None, **_: Any,
) -> Any:  # fmt: skip
    """y (B, T, H, P) in float32, with the state (B, H, P, N) if asked: W <- exp(dt A) W + dt x B^T, y = W C + D x."""
    dt = _dt(dt, dt_bias, dt_softplus, dt_limit)
    x, key, query = hidden_states.float(), B.float(), C.float()
    reset = None if seq_idx is None else beginnings(seq_idx)
    state = None if initial_states is None else initial_states.float()
    y, W = scan(R.stepped_hebb, state=state, reset=reset, q=query, k=key, v=x, dt=dt, g=dt * A.float())
    if D is not None:
        y = with_share(y, D.float(), x)
    return (y, W) if return_final_states else y


def serves_ssd_step(state: Tensor, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any, **more: Any) -> bool:
    """One dt and one decay a head, which arrive spread over all its channels; the state is rewritten in place."""
    D, bias = rest[0] if rest else more.get("D"), more.get("dt_bias")
    a_head = [dt.stride(-1) == 0, A.ndim == 3 and A.stride(1) == A.stride(2) == 0]
    a_head += [x.ndim == 2 and x.stride(-1) == 0 for x in (D, bias) if x is not None]
    plain = len(rest) < 2 and not torch.is_grad_enabled() and state.dtype == torch.float32
    return plain and all(a_head) and is_float(state, hidden_states, dt, A, B, C)


def ssd_step(
    state: Tensor, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False, **_: Any,
) -> Tensor:  # fmt: skip
    step_size = _dt(dt[..., 0], None if dt_bias is None else dt_bias[:, 0], dt_softplus, (-float("inf"), float("inf")))
    x = hidden_states.float()
    y, _ = step(R.stepped_hebb, state, out=state, q=C.float(), k=B.float(), v=x, dt=step_size, g=step_size * A[:, 0, 0].float())
    if D is not None:
        y = y + D.float() * x
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(hidden_states.dtype)


# ---- mLSTM (xLSTM) ---------------------------------------------------------------------------------------------------


def serves_mlstm(self: Any, query: Tensor, key: Tensor, value: Tensor, igate: Tensor, fgate: Tensor, *_: Any, **__: Any) -> bool:
    return query.ndim == 4 and is_float(query, key, value, igate, fgate)


def mlstm(
    self: Any, query: Tensor, key: Tensor, value: Tensor, igate: Tensor, fgate: Tensor, c_initial: Tensor | None = None,
    n_initial: Tensor | None = None, m_initial: Tensor | None = None, return_last_states: bool | None = None, mode: str | None = None,
) -> Any:  # fmt: skip
    """h (B, H, T, V) and, in inference or if asked, the states C (B, H, K, V), n (B, H, K), m (B, H, 1): heads come before time."""
    mode = self.config.mode if mode is None else mode
    keep = "inference" in mode or (self.config.return_last_states if return_last_states is None else return_last_states)
    q, k, v, i, f = (x.transpose(1, 2).float() for x in (query, key, value, igate, fgate))
    state = None
    if c_initial is not None and n_initial is not None and m_initial is not None:
        state = c_initial.float().transpose(-1, -2), n_initial.float(), m_initial.float().squeeze(-1)
    y, (W, n, m) = scan(mlstm_rule(self.config.eps), q=q * q.shape[-1] ** -0.5, k=k, v=v, i=i, g=F.logsigmoid(f), state=state)
    h = y.transpose(1, 2).to(query.dtype)
    return (h, (W.transpose(-1, -2), n, m.unsqueeze(-1))) if keep else h


# ---- norms, and the gate of what is read ------------------------------------------------------------------------------

_GATES = {"silu": "swish", "swish": "swish", "sigmoid": "sigmoid"}


def serves_gated_norm(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> bool:
    like = gate is None or gate.shape == hidden_states.shape
    return like and getattr(self, "activation", "silu") in _GATES and is_float(gate) and serves_norm(self, hidden_states)


def gate_then_norm(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    """weight * RMS norm of what is gated, in groups of channels, as Mamba-2 and its relatives have it; Falcon-H1 may gate last."""
    channels, first = hidden_states.shape[-1], not getattr(self, "norm_before_gate", False)
    size = channels // self.n_groups if hasattr(self, "n_groups") else getattr(self, "group_size", channels)
    return norm_and_gate(hidden_states, gate, self.weight, size=size, eps=self.variance_epsilon, gate_first=first)


def norm_then_gate(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    """weight * RMS norm, then the gate, as the layers with a delta rule have it."""
    how = {"size": hidden_states.shape[-1], "eps": self.variance_epsilon, "activation": _GATES[getattr(self, "activation", "silu")]}
    return norm_and_gate(hidden_states, gate, self.weight, **how)


def serves_norm(self: Any, x: Tensor) -> bool:
    """What it gives has the type of x; theirs may have that of the weight."""
    return is_float(x) and x.numel() > 0 and torch.promote_types(self.weight.dtype, x.dtype) == x.dtype


def norm(self: Any, x: Tensor) -> Tensor:
    """weight * RMS norm, or (1 + weight) * RMS norm (Qwen3-Next, Qwen3.5)."""
    weight, eps = (self.weight, self.variance_epsilon) if hasattr(self, "variance_epsilon") else (1 + self.weight.float(), self.eps)
    return norm_and_gate(x, None, weight, size=x.shape[-1], eps=eps)


# ---- the short convolution -------------------------------------------------------------------------------------------

SWISH = ("silu", "swish")
_ACTIVATIONS = (None, *SWISH)


def serves_conv(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Any = None, **_: Any) -> bool:
    return hidden_states.ndim == 3 and activation in _ACTIVATIONS and is_float(hidden_states, weight, bias)


def conv(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    seq_idx: Tensor | None = None, cu_seq_lens_q: Tensor | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """x (B, C, T) -> (B, C, T): causal, each channel with its own weights (C, width); packed sequences do not see each other."""
    x = hidden_states.transpose(1, 2)
    if x.stride(-1) != 1:
        x = x.contiguous()
    parts = (Part(x.shape[2], activation is not None),)
    before = x.new_zeros(x.shape[0], weight.shape[-1] - 1, x.shape[2])
    pieces = [
        torch.cat([short_convolution(x[b : b + 1, i:j], weight, before[b : b + 1], parts, bias) for i, j in spans], 1)
        for b, spans in enumerate(_spans(x.shape[0], x.shape[1], seq_idx, cu_seq_lens_q))
    ]
    y = torch.cat(pieces) if pieces else short_convolution(x, weight, before, parts, bias)
    return y.transpose(1, 2)


def serves_conv_of_x(x: Tensor, *args: Any, **more: Any) -> bool:
    return serves_conv(x, *args, **more)


def conv_of_x(x: Tensor, *args: Any, **more: Any) -> Tensor:
    """The same under the name that layers before transformers 5.15 give its input."""
    return conv(x, *args, **more)


def conv_in_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any) -> Tensor:
    """What those layers do where nobody gives them a function."""
    y = F.conv1d(x, weight.unsqueeze(1), bias, padding=weight.shape[-1] - 1, groups=weight.shape[0])[..., : x.shape[-1]]
    return y if activation is None else F.silu(y)


def _spans(B: int, T: int, seq_idx: Tensor | None, ends: Tensor | None) -> list[list[tuple[int, int]]]:
    """Where the sequences packed into each row lie; nothing if every row is one."""
    if seq_idx is not None:
        cuts = [[0, *(row.diff().nonzero().flatten() + 1).tolist(), T] for row in seq_idx]
    elif ends is not None and B == 1:
        cuts = [[int(e) for e in ends]]
    else:
        return []
    return [[(i, j) for i, j in zip(row, row[1:], strict=False) if j > i] for row in cuts]


def serves_conv_step(
    hidden_states: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Any = None, **_: Any
) -> bool:
    return activation in _ACTIVATIONS and not torch.is_grad_enabled() and is_float(hidden_states, conv_state, weight, bias)


def conv_step(
    hidden_states: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    """x (B, C, T), usually one token; the last inputs, conv_state (B, C, >= width - 1), are rewritten in place."""
    seen = torch.cat([conv_state, hidden_states.to(conv_state.dtype)], -1)
    conv_state.copy_(seen[..., -conv_state.shape[-1] :])
    width, steps = weight.shape[-1], hidden_states.shape[-1]
    y = (seen[..., -(width + steps - 1) :].float().unfold(-1, width, 1) * weight.float().unsqueeze(1)).sum(-1)
    y = y if bias is None else y + bias.float().unsqueeze(-1)
    return (y if activation is None else F.silu(y)).to(hidden_states.dtype)
