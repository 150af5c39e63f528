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
from ..layers.deep import DeepLayer, mlp, squared_error
from ..layers.hybrid import HybridAttention
from ..layers.rwkv import RWKV6, RWKV7
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
        lambda p: HybridAttention(rules.delta, p.d_model, heads=p.heads, kind=kind),
        f"softmax attention to a window, and delta, into which a token goes {when}", "Irie, Yau and Gershman 2025", ALL_FORMS,
    )  # fmt: skip


_TTT = {"every": 16, "normalised": True, "conv": 4, "feature_map": "identity", "norm": "none", "values": "identity"}
_TITANS = {"every": 16, "rate": 0.02, "loss": squared_error, "momentum": True, "forget": True}


def _deep(p: Place, network: Callable[[int, int], nn.Module], **options: Any) -> DeepLayer:
    return DeepLayer(network, p.d_model, heads=p.heads, d_key=p.d_key, d_value=p.d_value or p.d_key, **options)


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
}  # fmt: skip
