"""Sequence layers that are more than one rule run by ``scan``: by name, as data. ``LanguageModel`` takes their names as layers.

Every one is a module ``y, state = layer(x, state, reset)`` with x and y (B, T, d_model), a state of named tensors with the batch first
(``None`` before the first token), and ``state_bytes(tokens)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import rules
from ..layers import decays
from ..layers.baselines import SLSTM, RecurrentNetwork
from ..layers.continuous import ContinuousLayer
from ..layers.deep import DeepLayer, mlp, squared_error
from ..layers.hybrid import HybridAttention
from ..layers.least_squares import MesaLayer
from ..layers.log_linear import LogLinear
from ..layers.rwkv import RWKV6, RWKV7
from ..layers.slots import ABC, GatedSlotAttention
from ..layers.state_space import S4D, Mamba
from .presets import Place


@dataclass(frozen=True)
class System:
    """A layer: how it is built at a place of a model, its equation in one line, the forms it runs in, and its source."""

    build: Callable[[Place], nn.Module]
    equation: str
    cite: str
    forms: tuple[str, ...] = ("recurrent",)


ALL_FORMS = ("recurrent", "parallel", "chunk")


def _hybrid(kind: str, when: str) -> System:
    return System(
        lambda p: HybridAttention(rules.delta, p.d_model, heads=p.heads, kind=kind, negative_eigenvalues=p.negative_eigenvalues),
        f"softmax attention to a window, and delta, into which a token goes {when}", "Irie, Yau and Gershman 2025", ALL_FORMS,
    )  # fmt: skip


_TTT = {"every": 16, "normalised": True, "conv": 4, "feature_map": "identity", "norm": "none", "values": "identity"}
_TITANS = {"every": 16, "rate": 0.02, "loss": squared_error, "momentum": True, "forget": True}


def _deep(p: Place, network: Callable[[int, int], nn.Module], **options: Any) -> DeepLayer:
    return DeepLayer(network, p.d_model, heads=p.heads, d_key=p.d_key, d_value=p.d_value or p.d_key, **options)


def _log_linear(p: Place) -> LogLinear:
    step = decays.StepSize(p.d_model, p.heads)
    return LogLinear(
        p.d_model, heads=p.heads, d_key=p.d_key, d_value=p.d_value, rule=rules.stepped_hebb, key_heads=1, conv_bias=True, norm="none",
        output_norm="all", gate_first=True, skip=True, custom={"dt": step, "g": decays.SteppedDecay(step)},
    )  # fmt: skip


def _slots(layer: Callable[..., nn.Module]) -> Callable[[Place], nn.Module]:
    return lambda p: layer(p.d_model, heads=p.heads, slots=p.d_key, d_key=p.d_key, d_value=p.d_value)


_FLOWS = {"hebb": "beta v k^T", "oja": "beta v (k - W^T v)^T", "delta": "beta (v - W k) k^T"}


def _flow(kind: str, name: str) -> System:
    rule = rules.hebb_rate if name == "hebb" else rules.get(name)
    driven = "" if kind == "ode" else f", {'k' if name == 'delta' else 'v'} of dx/dt"
    return System(
        lambda p: ContinuousLayer(rule, p.d_model, kind=kind, heads=p.heads, d_key=p.d_key, d_value=p.d_value),
        f"dW/dt = {_FLOWS[name]}{driven}", "Irie, Faccio and Schmidhuber 2022, NeurIPS", ALL_FORMS,
    )  # fmt: skip


SYSTEMS: dict[str, System] = {
    "hybrid_synchronous": _hybrid("synchronous", "at once"),
    "hybrid_delayed_stream": _hybrid("delayed_stream", "when it leaves the window"),
    "hybrid_delayed_chunk": _hybrid("delayed_chunk", "with its chunk"),
    "rwkv6": System(
        lambda p: RWKV6(p.d_model, heads=p.heads), "bonus_hebb, whose programmer mixes a token with the one before it",
        "Peng et al. 2024 (Eagle and Finch)", ALL_FORMS,
    ),
    "rwkv7": System(
        lambda p: RWKV7(p.d_model, heads=p.heads), "generalised_delta, whose programmer mixes a token with the one before it",
        "Peng et al. 2025 (RWKV-7)", ALL_FORMS,
    ),
    "ttt_linear": System(
        lambda p: _deep(p, nn.Linear, rate=1 / p.d_key, **_TTT),
        "W_t = W' - sum_i beta_i grad 1/2 |f(k_i; W') - v_i|^2 over the mini-batch of W', f(x) = x + LN(W x + c), y = f(q; W_t)",
        "Sun et al. 2024 (TTT-Linear)", ("recurrent", "dual"),
    ),
    "ttt_mlp": System(
        lambda p: _deep(p, mlp, rate=0.1 / p.d_key, **_TTT), "the same with f(x) = x + LN(W2 gelu(W1 x + b1) + b2)",
        "Sun et al. 2024 (TTT-MLP)", ("recurrent", "dual"),
    ),
    "titans": System(
        lambda p: _deep(p, mlp, **_TITANS),
        "S_t = eta_t S_(t-1) - theta_t grad |f(k_t; W') - v_t|^2, W_t = a_t W_(t-1) + S_t, y = f(q; W_t), f(x) = W2 gelu(W1 x + b1) + b2",
        "Behrouz, Zhong and Mirrokni 2025 (Titans)", ("recurrent", "dual"),
    ),
    "mesanet": System(
        lambda p: MesaLayer(p.d_model, heads=p.heads, d_key=p.d_key, d_value=p.d_value),
        "y = G (H + diag(r))^-1 q, G = a G + beta v k^T, H = a H + beta k k^T: ridge regression on all that was seen",
        "von Oswald et al. 2023, 2025 (MesaNet)", ("chunk", "conjugate gradient"),
    ),
    "log_linear": System(
        _log_linear, "y = sum_l lambda_l W_l q, each W_l by stepped_hebb over its part of a Fenwick tree", "Guo et al. 2025", ALL_FORMS
    ),
    "abc": System(_slots(ABC), "K <- K + s k^T, V <- V + v s^T, y = V softmax(K q / sqrt dk)", "Peng et al. 2022", ("recurrent", "chunk")),
    "gsa": System(
        _slots(GatedSlotAttention), "K <- diag(a) K + (1 - a) k^T, V <- V diag(a) + v (1 - a)^T, y = V softmax(K q)", "Zhang et al. 2024",
        ("recurrent", "chunk"),
    ),
    "s4d": System(lambda p: S4D(p.d_model), "h' = A h + u, y = Re C h + D u", "Gu et al. 2022", ("recurrent", "convolution")),
    "mamba": System(
        lambda p: Mamba(p.d_model), "W <- exp(dt_v A_vk) W_vk + (dt_v x_v) B_k, y = W C + D x", "Gu and Dao 2023", ("recurrent", "chunk")
    ),
    **{f"{kind}_{name}": _flow(kind, name) for kind in ("ode", "cde") for name in _FLOWS},
    "rnn": System(lambda p: RecurrentNetwork(p.d_model, cell="rnn"), "h = tanh(W x + R h)", "Elman 1990"),
    "gru": System(lambda p: RecurrentNetwork(p.d_model, cell="gru"), "h = z h + (1 - z) n", "Cho et al. 2014"),
    "lstm": System(
        lambda p: RecurrentNetwork(p.d_model, cell="lstm"), "c = f c + i tanh(z), h = o tanh(c)", "Hochreiter and Schmidhuber 1997"
    ),
    "slstm": System(
        lambda p: SLSTM(p.d_model, heads=p.heads, depth=p.index / max(p.depth - 1, 1)),
        "c = f c + i tanh(z), n = f n + i, h = o c / n, with an exponential i", "Beck et al. 2024",
    ),
}  # fmt: skip
