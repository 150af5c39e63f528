"""The functional interface of flash-linear-attention (``fla.ops``) over this engine: code written for it runs on any device.

Change ``from fla.ops... import chunk_gated_delta_rule`` to ``from fastweights.compat.fla import chunk_gated_delta_rule``. Names, order
of arguments, layouts and defaults are those of fla-core 0.6: q, k (B, T, H, K), v (B, T, H, V), decays as logarithms, a scale of
K^-1/2, final states (N, H, K, V) in float32 (or (N, H, V, K) with ``state_v_first``), several sequences in one row by ``cu_seqlens``.
What chunk, fused_chunk and fused_recurrent name there is one function here: the engine chooses. Arguments that only steer their
kernels are taken and have no effect; what would change the result and is not there raises an error.

>>> import torch
>>> q = k = v = torch.ones(1, 4, 2, 8)
>>> o, state = chunk_simple_gla(q, k, v, g=torch.zeros(1, 4, 2), output_final_state=True)
>>> o.shape, state.shape
(torch.Size([1, 4, 2, 8]), torch.Size([1, 2, 8, 8]))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import rules as R
from ..engine.gated_norm import unit_length
from ..language.errors import SignalError
from .arguments import log_decay, rate, steering, variant
from .sequences import run

Result = tuple[Tensor, "Tensor | None"]

# ---- rules that erase ------------------------------------------------------------------------------------------------


def chunk_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None = None, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Tensor | None = None, **more: Any,
) -> Result:  # fmt: skip
    """DeltaNet: W <- W + beta (v - W k) k^T; beta (B, T, H), 1 if it is None."""
    steering("chunk_delta_rule", more)
    beta = torch.ones_like(v[..., 0]) if beta is None else beta
    given = {"q": q, "k": k, "v": v, "beta": beta}
    return run(
        R.delta, given, scale=scale, state=initial_state, keep_state=output_final_state, cu_seqlens=cu_seqlens,
        l2norm=use_qk_l2norm_in_kernel,
    )  # fmt: skip


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None, **more: Any,
) -> Result:  # fmt: skip
    """Gated DeltaNet: W <- exp(g) W, then the delta rule; g, beta (B, T, H), with fewer heads of q and k if their number divides H."""
    more |= {"use_beta_sigmoid_in_kernel": use_beta_sigmoid_in_kernel, "allow_neg_eigval": allow_neg_eigval}
    g, beta = log_decay("chunk_gated_delta_rule", g, more), rate("chunk_gated_delta_rule", beta, more)
    steering("chunk_gated_delta_rule", more)
    return run(
        R.gated_delta, {"q": q, "k": k, "v": v, "beta": beta, "g": g}, scale=scale, state=initial_state, keep_state=output_final_state,
        value_first=state_v_first, cu_seqlens=cu_seqlens, l2norm=use_qk_l2norm_in_kernel,
    )  # fmt: skip


def fused_recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, gk: Tensor | None = None, gv: Tensor | None = None,
    beta: Tensor | None = None, scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, **more: Any,
) -> Result:  # fmt: skip
    """The same with a decay a head (g), a key (gk), or both; beta is 1 if not given."""
    if gv is not None:
        raise SignalError("fused_recurrent_gated_delta_rule: gv, a decay a value, is not served here; leave it out")
    log = gk if g is None else g if gk is None else g.unsqueeze(-1) + gk
    log = v.new_zeros(v.shape[:3]) if log is None else log
    beta = torch.ones_like(v[..., 0]) if beta is None else beta
    return chunk_gated_delta_rule(q, k, v, log, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, **more)


def chunk_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, **more: Any,
) -> Result:  # fmt: skip
    """Kimi Delta Attention: the same with a decay a key, g (B, T, H, K)."""
    return chunk_gated_delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, **more)


def fused_recurrent_kda(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor | None = None, dt_bias: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, **more: Any,
) -> Result:  # fmt: skip
    more |= {"A_log": A_log, "dt_bias": dt_bias}
    return chunk_kda(q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, **more)


def chunk_gated_delta_product(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, num_householder: int, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None, **more: Any,
) -> Result:  # fmt: skip
    """DeltaProduct: n = num_householder delta steps a token; k, v, beta have n T rows, and the decay acts once, first."""
    steering("chunk_gated_delta_product", more)
    n = num_householder
    if k.shape[1] != n * q.shape[1]:
        raise SignalError(f"chunk_gated_delta_product: k has {k.shape[1]} rows, expected num_householder * T = {n * q.shape[1]}")
    stacked = {name: x.unflatten(1, (-1, n)).transpose(2, 3) for name, x in (("k", k), ("v", v), ("beta", beta))}
    if n == 1:
        stacked = {name: x.squeeze(3) for name, x in stacked.items()}
    given = {"q": q, **stacked} | ({} if g is None else {"g": g})
    rule = (R.delta if g is None else R.gated_delta) * n
    return run(
        rule, given, scale=scale, state=initial_state, keep_state=output_final_state, cu_seqlens=cu_seqlens, l2norm=use_qk_l2norm_in_kernel
    )


def chunk_gdn2(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, state_v_first: bool = False,
    cu_seqlens: Tensor | None = None, **more: Any,
) -> Result:  # fmt: skip
    """Gated DeltaNet-2: an erase gate a key, b (B, T, H, K), and a write gate a value, w (B, T, H, V)."""
    g = log_decay("chunk_gdn2", g, more)
    steering("chunk_gdn2", more)
    return run(
        R.erase_write, {"q": q, "k": k, "v": v, "b": b, "w": w, "g": g}, scale=scale, state=initial_state, keep_state=output_final_state,
        value_first=state_v_first, cu_seqlens=cu_seqlens, l2norm=use_qk_l2norm_in_kernel,
    )  # fmt: skip


def chunk_comba(
    q: Tensor, k: Tensor, v: Tensor, p: Tensor, g: Tensor, beta: Tensor | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None, **more: Any,
) -> Result:  # fmt: skip
    """Comba: W <- exp(g) W - beta (W p) k^T + beta v k^T, where p reads the undecayed W, as its kernels do."""
    steering("chunk_comba", more)
    beta = torch.ones_like(v[..., 0]) if beta is None else beta
    if use_qk_l2norm_in_kernel:
        p = unit_length(p.to(torch.promote_types(p.dtype, torch.float32)))
    given = {"q": q, "k": k, "v": v, "p": p, "beta": beta, "d": torch.zeros_like(beta), "g": g}
    return run(
        R.comba, given, scale=scale, state=initial_state, keep_state=output_final_state, cu_seqlens=cu_seqlens,
        l2norm=use_qk_l2norm_in_kernel,
    )  # fmt: skip


def fused_recurrent_comba(
    q: Tensor, k: Tensor, p: Tensor, v: Tensor, g: Tensor, beta: Tensor | None = None, *args: Any, **more: Any
) -> Result:
    """The same; p comes before v here."""
    return chunk_comba(q, k, v, p, g, beta, *args, **more)


def chunk_dplr_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gk: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, cu_seqlens: Tensor | None = None, **more: Any,
) -> Result:  # fmt: skip
    """A diagonal and a rank-one part: W <- W diag(exp(gk)) + (W a) b^T + v k^T."""
    reverse = more.pop("reverse", False)
    steering("chunk_dplr_delta_rule", more)
    return run(
        R.generalised_delta, {"q": q, "k": k, "v": v, "x": a, "y": b, "g": gk}, scale=scale, state=initial_state,
        keep_state=output_final_state, cu_seqlens=cu_seqlens, reverse=reverse,
    )  # fmt: skip


def chunk_rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float | None = 1.0, initial_state: Tensor | None = None,
    output_final_state: bool = False, cu_seqlens: Tensor | None = None, **more: Any,
) -> Result:  # fmt: skip
    """RWKV-7: the same with r for the query and w for the log decay a key."""
    return chunk_dplr_delta_rule(r, k, v, a, b, w, scale, initial_state, output_final_state, cu_seqlens, **more)


def fused_recurrent_rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = True, cu_seqlens: Tensor | None = None, **more: Any,
) -> Result:  # fmt: skip
    return chunk_rwkv7(r, w, k, v, a, b, scale, initial_state, output_final_state, cu_seqlens, **more)


# ---- rules that add --------------------------------------------------------------------------------------------------


def chunk_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None, **more: Any,
) -> Result:  # fmt: skip
    """Gated linear attention: W <- W diag(exp(g)) + v k^T, g (B, T, H, K)."""
    reverse = more.pop("reverse", False)
    steering("chunk_gla", more)
    return run(
        R.decayed_hebb, {"q": q, "k": k, "v": v, "g": g}, scale=scale, state=initial_state, keep_state=output_final_state,
        value_first=state_v_first, cu_seqlens=cu_seqlens, reverse=reverse,
    )  # fmt: skip


def fused_recurrent_gla(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None = None, gv: Tensor | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, reverse: bool = False, **more: Any,
) -> Result:  # fmt: skip
    if gv is not None:
        raise SignalError("fused_recurrent_gla: gv, a decay a value, is not served here; leave it out")
    gk = k.new_zeros(k.shape) if gk is None else gk
    return chunk_gla(q, k, v, gk, scale, initial_state, output_final_state, reverse=reverse, **more)


def chunk_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, g_gamma: Tensor | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, state_v_first: bool = False,
    cu_seqlens: Tensor | None = None, **more: Any,
) -> Result:  # fmt: skip
    """A decay a head: g (B, T, H), or g_gamma (H) for all tokens, or their sum."""
    if g_gamma is not None:
        fixed = g_gamma.float().expand(*v.shape[:2], -1)
        g = fixed if g is None else g + fixed
    g = v.new_zeros(v.shape[:3]) if g is None else g
    return chunk_gla(q, k, v, g, scale, initial_state, output_final_state, state_v_first, cu_seqlens, **more)


def chunk_retention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    cu_seqlens: Tensor | None = None, **more: Any,
) -> Result:  # fmt: skip
    """RetNet: head h decays by 1 - 2^(-5-h)."""
    gamma = (1 - 2.0 ** (-5.0 - torch.arange(v.shape[2], dtype=torch.float, device=v.device))).log()
    return chunk_simple_gla(q, k, v, None, gamma, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens, **more)


def fused_recurrent_retention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    reverse: bool = False, **more: Any,
) -> Result:  # fmt: skip
    return chunk_retention(q, k, v, scale, initial_state, output_final_state, reverse=reverse, **more)


def chunk_lightning_attn(
    q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, cu_seqlens: Tensor | None = None, **more: Any,
) -> Result:  # fmt: skip
    """Lightning attention: fixed decays that grow weaker from layer to layer."""
    H = v.shape[2]
    gamma = -(8 / H * (1 - layer_idx / num_layers)) * torch.arange(H, dtype=torch.float, device=v.device)
    return chunk_simple_gla(q, k, v, None, gamma, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens, **more)


def chunk_rwkv6(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    output_final_state: bool = False, cu_seqlens: Tensor | None = None, **more: Any,
) -> Result:  # fmt: skip
    """RWKV-6: read first, with a bonus u (H, K) for the new token, then decay by exp(w) and write."""
    reverse = more.pop("reverse", False)
    steering("chunk_rwkv6", more)
    given = {"q": r, "k": k, "v": v, "u": u.expand(*k.shape), "g": w}
    return run(R.bonus_hebb, given, scale=scale, state=initial_state, keep_state=output_final_state, cu_seqlens=cu_seqlens, reverse=reverse)


def chunk_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: Any = None, output_final_state: bool = False,
    normalize: bool = True, cu_seqlens: Tensor | None = None, **more: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """Linear attention, y = W q, divided by (sum of keys) . q if normalised; the state is then (W, sum of keys (N, 1, H, K))."""
    reverse = more.pop("reverse", False)
    steering("chunk_linear_attn", more)
    W, z = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    how = {"scale": scale, "keep_state": output_final_state, "cu_seqlens": cu_seqlens, "reverse": reverse}
    o, W = run(R.hebb, {"q": q, "k": k, "v": v}, state=W, **how)
    if not normalize:
        return o, W
    sums = {"q": q.float(), "k": k.float(), "v": torch.ones_like(k[..., :1], dtype=torch.float32)}  # the keys' sum is one more value
    below, z = run(R.hebb, sums, state=None if z is None else z.squeeze(1).unsqueeze(-1), **how)
    below = below.repeat_interleave(o.shape[2] // below.shape[2], 2)  # of heads that share a key
    o = (o.float() / (below + 1e-10)).to(o.dtype)
    return o, None if W is None or z is None else (W, z.squeeze(-1).unsqueeze(1))


def fused_recurrent_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, initial_state: Any = None, output_final_state: bool = False,
    reverse: bool = False, normalize: bool = False, **more: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    return chunk_linear_attn(q, k, v, scale, initial_state, output_final_state, normalize, reverse=reverse, **more)


_COMMON = "scale initial_state output_final_state"
_GATE = "use_qk_l2norm_in_kernel use_gate_in_kernel"
_BETA = "use_beta_sigmoid_in_kernel allow_neg_eigval"
_KDA_END = "safe_gate lower_bound disable_recompute return_intermediate_states state_v_first cu_seqlens cu_seqlens_cpu cp_context"
chunk_kda = variant("chunk_kda", chunk_kda, f"q k v g beta {_COMMON} {_GATE} {_BETA} {_KDA_END}")
fused_recurrent_kda = variant(
    "fused_recurrent_kda", fused_recurrent_kda, f"q k v g beta A_log dt_bias {_COMMON} {_GATE} {_BETA} lower_bound state_v_first cu_seqlens"
)
fused_recurrent_gated_delta_rule = variant(
    "fused_recurrent_gated_delta_rule", fused_recurrent_gated_delta_rule,
    f"q k v g gk gv beta {_COMMON} {_GATE} A_log dt_bias {_BETA} state_v_first cu_seqlens",
)  # fmt: skip
chunk_gdn2 = variant(
    "chunk_gdn2", chunk_gdn2,
    f"q k v g b w {_COMMON} {_GATE} cu_seqlens cu_seqlens_cpu safe_gate lower_bound disable_recompute return_intermediate_states"
    " state_v_first",
)  # fmt: skip
fused_recurrent_gdn2 = variant(
    "fused_recurrent_gdn2", chunk_gdn2, f"q k v g b w A_log dt_bias {_COMMON} {_GATE} lower_bound state_v_first cu_seqlens"
)
fused_recurrent_gla = variant("fused_recurrent_gla", fused_recurrent_gla, f"q k v gk gv {_COMMON} reverse state_v_first cu_seqlens")
fused_recurrent_retention = variant(
    "fused_recurrent_retention", fused_recurrent_retention, f"q k v {_COMMON} reverse state_v_first cu_seqlens"
)
fused_recurrent_linear_attn = variant(
    "fused_recurrent_linear_attn", fused_recurrent_linear_attn, f"q k v {_COMMON} reverse normalize cu_seqlens"
)
fused_recurrent_simple_gla = variant(
    "fused_recurrent_simple_gla", chunk_simple_gla, f"q k v g g_gamma {_COMMON} reverse state_v_first cu_seqlens"
)
fused_recurrent_lightning_attn = variant(
    "fused_recurrent_lightning_attn", chunk_lightning_attn, f"q k v layer_idx num_layers {_COMMON} reverse cu_seqlens"
)
fused_recurrent_rwkv6 = variant("fused_recurrent_rwkv6", chunk_rwkv6, f"r k v w u {_COMMON} reverse cu_seqlens")
fused_recurrent_dplr_delta_rule = variant(
    "fused_recurrent_dplr_delta_rule", chunk_dplr_delta_rule, f"q k v a b gk {_COMMON} reverse cu_seqlens"
)
fused_recurrent_delta_rule = variant(
    "fused_recurrent_delta_rule", chunk_delta_rule, f"q k v beta {_COMMON} use_qk_l2norm_in_kernel cu_seqlens"
)
fused_chunk_delta_rule = variant("fused_chunk_delta_rule", chunk_delta_rule, f"q k v beta {_COMMON} use_qk_l2norm_in_kernel cu_seqlens")
fused_chunk_gla = variant("fused_chunk_gla", chunk_gla, f"q k v g {_COMMON} state_v_first cu_seqlens")
fused_chunk_simple_gla = variant("fused_chunk_simple_gla", chunk_simple_gla, f"q k v g g_gamma {_COMMON} cu_seqlens")
fused_chunk_retention = variant("fused_chunk_retention", chunk_retention, f"q k v {_COMMON} cu_seqlens")
fused_chunk_linear_attn = variant("fused_chunk_linear_attn", chunk_linear_attn, f"q k v {_COMMON} normalize cu_seqlens")
