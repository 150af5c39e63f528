"""Families of whole models that convert: flash-linear-attention's, and Mamba-2 of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..models.language_model import LanguageModel, ModelConfig
from .table import ConversionError, Entry

Options = dict[str, Any]


@dataclass(frozen=True)
class ModelFamily:
    """A family: the preset of its layers, its config in our words and back, its names.

    ``sizes`` reads d_key, d_value, heads and options of the layer from their config; ``given`` writes that part of their config;
    ``fixed`` are entries of their config that must have one value (or one of a tuple, of which the first is written), since ours
    knows no other. ``before`` and ``after`` are done to all of their weights together.
    """

    name: str
    preset: str
    sizes: Callable[[Mapping[str, Any]], Options]
    given: Callable[[ModelConfig, Any], Options]
    entries: Callable[[Any, ModelConfig], tuple[Entry, ...]]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    embed: str = "model.embeddings.weight"
    block: str = "model.layers.{}."
    layer: str = "attn."
    norm: str = "attn_norm.weight"
    last: str = "model.norm.weight"
    head: str = "lm_head.weight"
    mlp: bool = True
    eps: str = "norm_eps"
    before: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Mapping[str, Tensor]] = lambda theirs, config: theirs
    after: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Mapping[str, Tensor]] = lambda made, config: made

    def ours(self, config: Mapping[str, Any]) -> ModelConfig:
        for name, known in self.fixed.items():
            allowed = known if isinstance(known, tuple) else (known,)
            if config.get(name, allowed[0]) not in allowed:
                raise ConversionError(f"{self.name}: {name} is {config[name]!r}, and ours is always {allowed[0]!r}")
        sizes = self.sizes(config)
        heads, d_key, d_value = (sizes.pop(n) for n in ("heads", "d_key", "d_value"))
        hidden = _intermediate(config) if self.mlp else 0
        preset = sizes.pop("preset", self.preset)
        return ModelConfig(
            layers=(preset,) * config["num_hidden_layers"], vocabulary=config["vocab_size"], d_model=config["hidden_size"], heads=heads,
            d_key=d_key, d_value=d_value, d_hidden=hidden, norm_eps=_eps(config),
            tied=config.get("tie_word_embeddings", False), options=sizes,
        )  # fmt: skip

    def theirs(self, config: ModelConfig, model: LanguageModel) -> Options:
        layer: Any = model.blocks[0].layer if len(model.blocks) else None
        if set(config.layers) != {self.preset}:
            raise ConversionError(f"a {self.name} has layers {self.preset}, and this model has {', '.join(dict.fromkeys(config.layers))}")
        made = {
            "model_type": self.name, "vocab_size": config.vocabulary, "hidden_size": config.d_model,
            "num_hidden_layers": len(config.layers), self.eps: config.norm_eps, "tie_word_embeddings": config.tied,
            **{n: x[0] if isinstance(x, tuple) else x for n, x in self.fixed.items()}, **self.given(config, layer),
        }  # fmt: skip
        if self.mlp:
            made["intermediate_size"] = model.blocks[0].hidden
        again = replace(self.ours(made), fingerprints=config.fingerprints)
        theirs, mine = LanguageModel(again), model
        for a, b in zip(theirs.modules(), mine.modules(), strict=True):
            eps = getattr(a, "eps", None), getattr(b, "eps", None)
            if eps[0] != eps[1] and not abs(eps[0] / eps[1] - 1) < 1e-6:  # type: ignore[operator]
                raise ConversionError(
                    f"a {self.name} with {self.eps} = {config.norm_eps} has {eps[0]:.3g} in a norm where this model has {eps[1]:.3g}: "
                    "theirs divides queries by the root of d_key; a model built with options={'norm_eps': norm_eps * d_key} converts"
                )
        return made

    def whole(self, model: LanguageModel) -> tuple[Entry, ...]:
        made = (Entry(self.embed, ("embed.weight",)), Entry(self.last, ("norm.weight",)))
        return made if model.config.tied else (*made, Entry(self.head, ("head.weight",)))

    def around(self, model: LanguageModel) -> tuple[Entry, ...]:
        made = (Entry(self.norm, ("norm.weight",)),)
        return (*made, *_MLP) if self.mlp else made


_MLP = (
    Entry("mlp_norm.weight", ("mlp_norm.weight",)), Entry("mlp.gate_proj.weight", ("mlp.gate",)),
    Entry("mlp.up_proj.weight", ("mlp.up",)), Entry("mlp.down_proj.weight", ("mlp_out.weight",)),
)  # fmt: skip


def _eps(config: Mapping[str, Any]) -> float:
    return config.get("norm_eps", config.get("layer_norm_epsilon", 1e-6))


def _intermediate(config: Mapping[str, Any]) -> int:
    """flash-linear-attention: two thirds of hidden_ratio times the width, to a multiple of 256."""
    if config.get("intermediate_size"):
        return config["intermediate_size"]
    return -(-int(config["hidden_size"] * (config.get("hidden_ratio") or 4) * 2 / 3) // 256) * 256


def _same(*names: str) -> tuple[Entry, ...]:
    return tuple(Entry(theirs, (ours,)) for theirs, ours in (name.split(" = ") for name in names))


# ---- what flash-linear-attention's layers share --------------------------------------------------------------------------------------

_QKV = "qkv"


def _projections(layer: Any, names: str = _QKV) -> tuple[Entry, ...]:
    """Projections and convolutions of q, k and v; ``names`` are their letters in this order."""
    made: list[Entry] = []
    for ours, theirs in zip(_QKV, names, strict=True):
        if ours not in layer.programmer.sizes:
            continue
        sets = (layer.rule.signals[ours].sets or 1, layer.programmer._heads(layer.rule.signals[ours]))
        sets = sets if sets[0] > 1 else (1, 1)
        made.append(Entry(f"{theirs}_proj.weight", (ours,), sets=sets))
        if layer.programmer.conv is not None:
            made.append(Entry(f"{theirs}_conv1d.weight", (f"conv.{ours}",), sets=sets))
    return tuple(made)


def _conv(config: Mapping[str, Any], default: bool) -> int:
    return config.get("conv_size", 4) if config.get("use_short_conv", default) else 1


def _head_sizes(config: Mapping[str, Any]) -> Options:
    """heads and the sizes of a head, where they are shares of the width."""
    heads = config["num_heads"]
    return {
        "heads": heads, "d_key": round(config["hidden_size"] * config.get("expand_k", 1.0)) // heads,
        "d_value": round(config["hidden_size"] * config.get("expand_v", 1.0)) // heads,
    }  # fmt: skip


def _shares(config: ModelConfig) -> Options:
    return {
        "num_heads": config.heads, "expand_k": config.heads * _key(config) / config.d_model,
        "expand_v": config.heads * _value(config) / config.d_model,
    }  # fmt: skip


def _key(config: ModelConfig) -> int:
    return config.d_key or config.d_model // config.heads


def _value(config: ModelConfig) -> int:
    return config.d_value or config.d_model // config.heads


def _scaled(config: Mapping[str, Any], d_key: int) -> float:
    """The eps of the norm of a read-out whose queries are not divided by the root of their size."""
    return _eps(config) * d_key


def _conv_given(layer: Any) -> Options:
    conv = layer.programmer.conv
    return {"use_short_conv": conv is not None, **({} if conv is None else {"conv_size": conv.width})}


# ---- the delta family ----------------------------------------------------------------------------------------------------------------


def _delta_heads(config: Mapping[str, Any], default_expand: float) -> Options:
    heads, d_key = config.get("num_v_heads") or config["num_heads"], config["head_dim"]
    return {
        "heads": heads, "key_heads": config["num_heads"], "d_key": d_key, "d_value": int(d_key * config.get("expand_v", default_expand)),
        "conv": _conv(config, True), "negative_eigenvalues": config.get("allow_neg_eigval", False), "norm_eps": _scaled(config, d_key),
    }  # fmt: skip


def _delta_given(config: ModelConfig, layer: Any) -> Options:
    programmer = layer.programmer
    return {
        "num_heads": programmer.key_heads, "num_v_heads": config.heads, "head_dim": _key(config), "expand_v": _value(config) / _key(config),
        "allow_neg_eigval": programmer.negative_eigenvalues, **_conv_given(layer),
    }  # fmt: skip


def _gated_deltanet(config: Mapping[str, Any]) -> Options:
    gate = "sigmoid" if config.get("output_gate_activation") == "sigmoid" else "swish"
    return {**_delta_heads(config, 2.0), "output_gate": config.get("use_gate", True), "gate": gate}


def _gated_deltanet_entries(layer: Any, _: ModelConfig) -> tuple[Entry, ...]:
    gate = _same("g_proj.weight = gate.weight") if layer.gate is not None else ()
    rate = Entry("b_proj.weight", ("beta",), sets=_sets_of(layer, "beta"))
    decay = _same("a_proj.weight = g", "A_log = programmer.decays.g.A_log", "dt_bias = programmer.decays.g.dt_bias")
    return (*_projections(layer), rate, *(decay if "g" in layer.rule.signals else ()), *gate, *_OUT)


def _sets_of(layer: Any, signal: str) -> tuple[int, int]:
    sets = layer.rule.signals[signal].sets
    return (sets, layer.heads) if sets else (1, 1)


_OUT = _same("o_norm.weight = norm.weight", "o_proj.weight = out.weight")


def _deltanet(config: Mapping[str, Any]) -> Options:
    sizes = _head_sizes(config)
    return {
        **sizes, "conv": _conv(config, True), "negative_eigenvalues": config.get("allow_neg_eigval", False),
        "output_gate": config.get("use_gate", False), "norm_eps": _scaled(config, sizes["d_key"]),
    }  # fmt: skip


def _deltanet_given(config: ModelConfig, layer: Any) -> Options:
    own = {"allow_neg_eigval": layer.programmer.negative_eigenvalues, "use_gate": layer.gate is not None}
    return {**_shares(config), **own, **_conv_given(layer)}


def _deltaproduct(config: Mapping[str, Any]) -> Options:
    gated = config.get("use_forget_gate", True)
    if config.get("num_householder", 1) != 2:
        raise ConversionError(f"gated_deltaproduct: num_householder is {config.get('num_householder', 1)}, and our preset has 2")
    found = {**_delta_heads(config, 1.0), "output_gate": config.get("use_output_gate", True)}
    return found if gated else {**found, "preset": "deltaproduct"}


def _deltaproduct_given(config: ModelConfig, layer: Any) -> Options:
    own = {"use_output_gate": layer.gate is not None, "num_householder": 2, "use_forget_gate": True}
    return {**_delta_given(config, layer), **own}


def _kda_entries(layer: Any, config: ModelConfig) -> tuple[Entry, ...]:
    low = _same(
        "f_proj.0.weight = programmer.custom.g.down.weight", "f_proj.1.weight = programmer.custom.g.up.weight",
        "A_log = programmer.custom.g.decay.A_log", "g_proj.0.weight = gate.0.weight", "g_proj.1.weight = gate.1.weight",
        "g_proj.1.bias = gate.1.bias", "b_proj.weight = beta",
    )  # fmt: skip
    bias = Entry("dt_bias", ("programmer.custom.g.decay.dt_bias",), shape=(config.heads * _key(config),))
    return (*_projections(layer), *low, bias, *_OUT)


# ---- the additive family -------------------------------------------------------------------------------------------------------------

_GATED_OUT = _same("g_proj.weight = gate.weight", "g_norm_swish_gate.weight = norm.weight", "o_proj.weight = out.weight")


def _gla(config: Mapping[str, Any]) -> Options:
    sizes = _head_sizes({"expand_k": 0.5, **config})
    return {**sizes, "conv": _conv(config, False), **_activated(config), "norm_eps": _scaled(config, sizes["d_key"])}


def _activated(config: Mapping[str, Any]) -> Options:
    """Where flash-linear-attention convolves, it applies silu too; without, values and keys are as projected."""
    return {"feature_map": "silu", "values": "silu"} if config.get("use_short_conv") else {}


def _gla_entries(layer: Any, _: ModelConfig) -> tuple[Entry, ...]:
    low = _same(
        "gk_proj.0.weight = programmer.custom.g.down.weight", "gk_proj.1.weight = programmer.custom.g.up.weight",
        "gk_proj.1.bias = programmer.custom.g.up.bias",
    )  # fmt: skip
    return (*_projections(layer), *low, *_GATED_OUT)


def _shares_and_conv(config: ModelConfig, layer: Any) -> Options:
    return {**_shares(config), **_conv_given(layer)}


def _retnet(config: Mapping[str, Any]) -> Options:
    sizes = _head_sizes({"expand_v": 2.0, **config})
    return {**sizes, "conv": _conv(config, False), **_activated(config), "norm_eps": _scaled(config, sizes["d_key"])}


def _retnet_entries(layer: Any, _: ModelConfig) -> tuple[Entry, ...]:
    return (*_projections(layer), *_GATED_OUT)


def _hgrn2(config: Mapping[str, Any]) -> Options:
    d_key = config.get("expand_ratio") or config["hidden_size"] // config["num_heads"]
    heads = config["hidden_size"] // d_key
    return {"heads": heads, "d_key": d_key, "d_value": config["hidden_size"] // heads, "norm_eps": _scaled(config, d_key)}


def _hgrn2_entries(layer: Any, _: ModelConfig) -> tuple[Entry, ...]:
    return _same(
        "q_proj.weight = q", "i_proj.weight = v", "f_proj.weight = programmer.custom.g.project.weight", "g_norm.weight = norm.weight",
        "o_proj.weight = out.weight",
    ) + (Entry("bound", ("programmer.custom.g.bound",), shape=(-1,)),)  # fmt: skip


def _bounds_in(theirs: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """HGRN2's lower bounds are a parameter of the whole model: sums over layers of a softmax. A bound a layer, as ours have it."""
    found = dict(theirs)
    logits = found.pop("model.lower_bounds", torch.zeros(config["num_hidden_layers"], config["hidden_size"]))
    shares = logits.double().softmax(0)
    bounds = (shares.cumsum(0) - shares[0]) * config.get("use_lower_bound", True)
    return found | {f"model.layers.{i}.attn.bound": bound for i, bound in enumerate(bounds)}


def _bounds_out(made: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    found = dict(made)
    bounds = torch.stack([found.pop(f"model.layers.{i}.attn.bound") for i in range(config["num_hidden_layers"])]).double()
    shares = torch.cat([1 - bounds[-1:], bounds.diff(dim=0)])
    if bounds[0].any() or not bool((shares > 0).all()):
        raise ConversionError("an hgrn2 has lower bounds that rise from 0 in the first layer, and this model has others")
    return found | {"model.lower_bounds": shares.log().float()}


# ---- Mamba-2 -------------------------------------------------------------------------------------------------------------------------


def _number(x: Any) -> float:
    """JSON has no infinity, and transformers writes one as an object."""
    return float(x["__float__"] if isinstance(x, dict) else x)


def _mamba2(config: Mapping[str, Any]) -> Options:
    heads, groups, d_value = config["num_heads"], config.get("n_groups", 1), config["head_dim"]
    limits = [_number(x) for x in config.get("time_step_limit") or config.get("dt_limit") or (0.0, math.inf)]
    if limits != [0.0, math.inf]:
        raise ConversionError(f"mamba2: time_step_limit is {limits}, and our preset has none")
    return {
        "heads": heads, "d_key": config["state_size"], "d_value": d_value, "key_heads": groups, "conv": config.get("conv_kernel", 4),
        "conv_bias": config.get("use_conv_bias", True), "output_norm": groups, "norm_eps": _eps(config),
    }  # fmt: skip


def _mamba2_given(config: ModelConfig, layer: Any) -> Options:
    conv = layer.programmer.conv
    return {
        "num_heads": config.heads, "head_dim": _value(config), "state_size": _key(config), "n_groups": layer.programmer.key_heads,
        "expand": config.heads * _value(config) // config.d_model, "conv_kernel": conv.width, "use_conv_bias": conv.bias is not None,
    }  # fmt: skip


def _mamba2_entries(layer: Any, _: ModelConfig) -> tuple[Entry, ...]:
    bias = () if layer.programmer.conv.bias is None else (Entry("conv1d.bias", ("bias.v", "bias.k", "bias.q")),)
    return (
        Entry("in_proj.weight", ("gate.weight", "v", "k", "q", "programmer.custom.dt.project.weight")),
        Entry("conv1d.weight", ("conv.v", "conv.k", "conv.q")), *bias,
        *_same(
            "dt_bias = programmer.custom.dt.dt_bias", "A_log = programmer.custom.g.A_log", "D = skip", "norm.weight = norm.weight",
            "out_proj.weight = out.weight",
        ),
    )  # fmt: skip


_ACT = ("swish", "silu")
_PLAIN = {"attn": None, "hidden_act": _ACT, "attnres_block_size": None}
_ADDITIVE = {**_PLAIN, "num_kv_heads": None, "feature_map": None, "use_output_gate": True}
_ALL = (
    ModelFamily("gated_deltanet", "gated_deltanet", _gated_deltanet, lambda c, layer: {
        **_delta_given(c, layer), "use_gate": layer.gate is not None, "output_gate_activation": layer.gate_kind,
    }, _gated_deltanet_entries, _PLAIN),
    ModelFamily("delta_net", "deltanet", _deltanet, _deltanet_given, _gated_deltanet_entries, {
        **_PLAIN, "use_beta": True, "qk_activation": "silu", "qk_norm": "l2",
    }),
    ModelFamily("gated_deltaproduct", "gated_deltaproduct", _deltaproduct, _deltaproduct_given, _gated_deltanet_entries, _PLAIN),
    ModelFamily("kda", "kda", lambda c: _delta_heads(c, 1.0), _delta_given, _kda_entries, {**_PLAIN, "safe_gate": False}),
    ModelFamily("gla", "gla", _gla, _shares_and_conv, _gla_entries, {**_ADDITIVE, "clamp_min": None, "use_gk": True, "use_gv": False}),
    ModelFamily("retnet", "retnet", _retnet, _shares_and_conv, _retnet_entries, _ADDITIVE),
    ModelFamily("hgrn2", "hgrn2", _hgrn2, lambda c, _: {"expand_ratio": _key(c), "num_heads": c.heads}, _hgrn2_entries, {
        **_PLAIN, "use_short_conv": False,
    }, before=_bounds_in, after=_bounds_out),
    ModelFamily(
        "mamba2", "mamba2", _mamba2, _mamba2_given, _mamba2_entries,
        {"use_bias": False, "hidden_act": _ACT[::-1], "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False},
        embed="backbone.embeddings.weight", block="backbone.layers.{}.", layer="mixer.", norm="norm.weight", last="backbone.norm_f.weight",
        mlp=False, eps="layer_norm_epsilon",
    ),
)  # fmt: skip
FAMILIES: dict[str, ModelFamily] = {family.name: family for family in _ALL}
