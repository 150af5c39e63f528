"""Published models as data: a rule, and how its signals are made. ``LanguageModel`` takes their names as layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import rules as catalogue
from ..language.errors import RuleError
from ..language.rule import Rule
from ..layers import decays
from ..layers.layer import FastWeightLayer


@dataclass(frozen=True)
class Place:
    """Where in a model a layer stands, and its sizes."""

    d_model: int
    heads: int
    d_key: int
    index: int = 0
    depth: int = 1
    d_value: int | None = None
    negative_eigenvalues: bool = False


@dataclass(frozen=True)
class Preset:
    """A published layer: the name of its rule, options of ``FastWeightLayer``, and signals that are made in a way of their own.

    The maker of a signal is given the place of the layer and the makers' work so far, by signal. ``begin`` sets where training begins,
    where that is not as good as any.
    """

    rule: str
    cite: str
    options: Mapping[str, Any] = field(default_factory=dict)
    signals: Mapping[str, Callable[[Place, Mapping[str, Any]], nn.Module]] = field(default_factory=dict)
    begin: Callable[[FastWeightLayer], None] | None = None


class Complement(nn.Module):
    """1 - exp(g): a key that writes as much as is forgotten."""

    def __init__(self, decay: decays.LowerBoundedDecay) -> None:
        super().__init__()
        self.of = (decay,)  # whose parameters belong to the decay

    def forward(self, x: Tensor) -> Tensor:
        return 1 - self.of[0].decay(x)


def _bounded(place: Place, made: Mapping[str, Any]) -> decays.LowerBoundedDecay:
    return decays.LowerBoundedDecay(place.d_model, place.heads, place.d_key, place.index / max(place.depth, 1))


def _sharp_keys(layer: FastWeightLayer) -> None:
    """Keys, a softmax of P_0 times a softmax, begin as those of the identity: equal inputs have equal keys, different ones others.

    Of random matrices of the usual size all keys are nearly uniform, what is written at one is read at all, and training hardly begins.
    """
    slow = layer.programmer.slow
    with torch.no_grad():
        slow["P_0"].copy_(_SHARP * torch.eye(slow["P_0"].shape[-1]).expand_as(slow["P_0"]))
        slow["Q_0"] *= _SHARP


_SHARP = 8.0
_RAW = {"conv": 1, "feature_map": "identity", "norm": "none", "values": "identity"}  # what the rule itself passes through a softmax
_NORMALISED = {"conv": 1, "values": "identity", "output_norm": False, "output_gate": False}
_DELTA = {"conv": 4, "feature_map": "silu", "norm": "l2"}


def _cite(rule: str) -> str:
    return catalogue.get(rule).cite


PRESETS: dict[str, Preset] = {
    "linear_transformer": Preset("normalised_hebb", "Katharopoulos et al. 2020, ICML", {**_NORMALISED, "feature_map": "elu1"}),
    "performer": Preset("normalised_hebb", "Choromanski et al. 2021, ICLR", {**_NORMALISED, "feature_map": "favor"}),
    "based": Preset("normalised_hebb", "Arora et al. 2024, ICML", {**_NORMALISED, "feature_map": "taylor2"}),
    "hedgehog": Preset("normalised_hebb", "Zhang et al. 2024, ICLR", {**_NORMALISED, "feature_map": "hedgehog"}),
    "retnet": Preset(
        "decayed_hebb", "Sun et al. 2023", {**_RAW, "rotary": True}, {"g": lambda p, _: decays.retention(p.heads)}
    ),
    "lightning": Preset(
        "decayed_hebb", "Qin et al. 2024; MiniMax 2025", {**_RAW, "feature_map": "silu", "values": "silu", "gate": "sigmoid"},
        {"g": lambda p, _: decays.lightning(p.heads)},
    ),
    "mamba2": Preset(
        "stepped_hebb", "Dao and Gu 2024, ICML",
        {
            "conv": 4, "conv_bias": True, "feature_map": "silu", "norm": "none", "key_heads": 1, "output_norm": "all",
            "gate_first": True, "skip": True,
        },
        {"dt": lambda p, _: decays.StepSize(p.d_model, p.heads), "g": lambda _, made: decays.SteppedDecay(made["dt"])},
    ),
    "gla": Preset(
        "decayed_hebb", "Yang et al. 2024, ICML", _RAW, {"g": lambda p, _: decays.LowRankDecay(p.d_model, p.heads, p.d_key)}
    ),
    "hgrn2": Preset(
        "decayed_hebb", "Qin et al. 2024", {**_RAW, "feature_map": "silu", "output_norm": "all", "output_gate": False},
        {"g": _bounded, "k": lambda _, made: Complement(made["g"])},
    ),
    "mlstm": Preset(
        "exp_gated_hebb", "Beck et al. 2024, NeurIPS", {**_RAW, "gate": "sigmoid", "output_norm": "layer"},
        {"i": lambda p, _: decays.CappedGate(p.d_model, p.heads), "g": lambda p, _: decays.ForgetGate(p.d_model, p.heads)},
    ),
    "fast_weight_delta": Preset(
        "delta", "Schlag, Irie and Schmidhuber 2021, ICML",
        {"conv": 1, "feature_map": "dpfp", "norm": "sum", "values": "identity", "output_norm": False, "output_gate": False},
    ),
    "deltanet": Preset("delta", "Yang et al. 2024, NeurIPS", {**_DELTA, "output_gate": False}),
    "deltaproduct": Preset("delta * 2", "Siems et al. 2025", {**_DELTA, "negative_eigenvalues": True, "output_gate": False}),
    "gated_deltanet": Preset("gated_delta", "Yang, Kautz and Hatamizadeh 2025, ICLR", {**_DELTA, "decay": "head"}),
    "gated_deltaproduct": Preset("gated_delta * 2", "Siems et al. 2025", {**_DELTA, "decay": "head", "negative_eigenvalues": True}),
    "kda": Preset(
        "gated_delta", "Kimi Team 2025 (Kimi Linear)", {**_DELTA, "decay": "channel", "gate": "sigmoid", "gate_rank": "head"},
        {"g": lambda p, _: decays.LowRankSoftplusDecay(p.d_model, p.heads, p.d_key, p.d_value or p.d_key)},
    ),
    "gdn2": Preset("erase_write", "Gated DeltaNet-2, 2026", {**_DELTA, "decay": "channel"}),
    "comba": Preset("comba", "Hu et al. 2025", {**_DELTA, "decay": "head"}),
    "longhorn": Preset("implicit_delta", "Liu et al. 2024", {**_DELTA, "norm": "none"}),
    "srwm": Preset("srwm", _cite("srwm"), {**_RAW, "output_gate": False}, begin=_sharp_keys),
    "srwm_delta": Preset("srwm_delta", _cite("srwm_delta"), {**_RAW, "output_gate": False}, begin=_sharp_keys),
    "srwm_fixed": Preset("srwm_fixed", _cite("srwm_fixed"), {**_RAW, "output_gate": False}),
    "rdn": Preset("rdn", _cite("rdn"), {**_RAW, "output_gate": False}),
    "delta_rnn": Preset("delta_rnn", _cite("delta_rnn"), {**_RAW, "feature_map": "softmax", "output_gate": False}),
    "delta_lstm": Preset("delta_lstm", _cite("delta_lstm"), {**_RAW, "feature_map": "softmax", "output_gate": False}),
    "delta_mlp": Preset("delta_mlp", _cite("delta_mlp"), {**_RAW, "feature_map": "softmax", "output_gate": False}),
    "delta_delta": Preset("delta_delta", _cite("delta_delta"), {**_RAW, "output_gate": False}),
}  # fmt: skip


def preset(name: str) -> Preset:
    """The preset of that name.

    >>> preset("kda").rule
    'gated_delta'
    """
    if name not in PRESETS:
        raise RuleError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def rule_of(name: str) -> Rule:
    """The rule of a preset, or of the catalogue."""
    return catalogue.get(PRESETS[name].rule if name in PRESETS else name)


def layer_of(
    name: str,
    d_model: int,
    *,
    heads: int,
    d_key: int | None = None,
    d_value: int | None = None,
    index: int = 0,
    depth: int = 1,
    custom: Mapping[str, nn.Module] | None = None,
    **options: Any,
) -> FastWeightLayer:
    """A preset's layer; ``index`` of ``depth`` layers, where that matters; other options and signals than the preset's by name.

    >>> layer_of("retnet", 32, heads=2)
    FastWeightLayer(
      decayed_hebb, d_model=32, heads=2, d_key=16, d_value=16
      ...
    """
    found = preset(name)
    each = d_model // max(heads, 1)
    place = Place(d_model, heads, d_key or each, index, depth, d_value or each)
    made = dict(custom or {})
    for signal, make in found.signals.items():
        if signal not in made:
            made[signal] = make(place, made)
    options = {**found.options, **options}
    layer = FastWeightLayer(rule_of(name), d_model, heads=heads, d_key=d_key, d_value=d_value, custom=made, **options)
    if found.begin is not None:
        found.begin(layer)
    return layer
