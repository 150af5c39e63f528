"""Layers of transformers' models as layers of this library with the same weights, and back: one entry of a table a family."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.decays import SafeDecay, SteppedDecay, StepSize
from ..layers.layer import FastWeightLayer
from ..models.presets import layer_of
from ..rules.hebb import mlstm
from .table import ConversionError, Entry, load, unload


@dataclass(frozen=True)
class Family:
    """How a class of layers is built here, and where its weights are."""

    build: Callable[[Any], FastWeightLayer]
    entries: Callable[[Any], tuple[Entry, ...]]


def layer_from(theirs: nn.Module) -> FastWeightLayer:
    """Our layer with the weights (copied) of a linear-attention layer of a transformers model.

    Known are the layers of Qwen3-Next, Qwen3.5, OLMo-hybrid, Kimi-Linear, Bailing-hybrid, the Mamba-2 family, MiniMax and xLSTM.
    The state of ours is (B, H, V, K), theirs (B, H, K, V). Padding is theirs to mask; ours has ``reset``.

    Raises:
        ConversionError: the layer is of another class, or has an option that ours does not know; both are named.
    """
    family = _family(theirs)
    mine = family.build(theirs)
    weight = next(theirs.parameters())
    mine = mine.to(weight.dtype).to(weight.device)
    load(family.entries(theirs), _tensors(theirs), mine)
    return mine


def layer_to(mine: FastWeightLayer, theirs: nn.Module) -> None:
    """Copy the weights of our layer back into one of theirs, of the class and sizes that ``layer_from`` made it of."""
    named = _tensors(theirs)
    made = unload(_family(theirs).entries(theirs), mine)
    with torch.no_grad():
        for name, tensor in made.items():
            if name not in named:
                raise ConversionError(f"{type(theirs).__name__} has no {name!r}, which ours needs to keep")
            named[name].copy_(tensor.reshape(named[name].shape))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _family(theirs: nn.Module) -> Family:
    for kind in type(theirs).__mro__:
        if kind.__name__ in LAYERS:
            return LAYERS[kind.__name__]
    raise ConversionError(f"a {type(theirs).__name__} is not a layer that converts; those are: {', '.join(LAYERS)}")


def _require(theirs: nn.Module, what: str, found: Any, *known: Any) -> None:
    if found not in known:
        raise ConversionError(f"{type(theirs).__name__} has {what} {found!r}; ours is {' or '.join(map(repr, known))}")


def _same(*names: str) -> tuple[Entry, ...]:
    """Tensors of one name of theirs and one of ours: "theirs = ours"."""
    pairs = (name.split(" = ") for name in names)
    return tuple(Entry(theirs, (ours,)) for theirs, ours in pairs)


_QKV = _same("q_proj.weight = q", "k_proj.weight = k", "v_proj.weight = v")
_CONV = (Entry("conv1d.weight", ("conv.q", "conv.k", "conv.v")),)
_DECAY = _same("A_log = programmer.decays.g.A_log", "dt_bias = programmer.decays.g.dt_bias")


# ---- the gated delta rule ----------------------------------------------------------------------------------------------------------


def _gated_delta(theirs: Any) -> FastWeightLayer:
    _require(theirs, "activation", theirs.activation, "silu", "swish")
    norm = getattr(theirs, "norm", None) or theirs.o_norm
    return layer_of(
        "gated_deltanet", theirs.hidden_size, heads=theirs.num_v_heads, key_heads=theirs.num_k_heads, d_key=theirs.head_k_dim,
        d_value=theirs.head_v_dim, conv=theirs.conv_kernel_size, negative_eigenvalues=getattr(theirs, "allow_neg_eigval", False),
        norm_eps=_eps(norm) * theirs.head_k_dim,  # theirs divides q by the root of its size
    )  # fmt: skip


def _eps(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def _qwen3_next(theirs: Any) -> tuple[Entry, ...]:
    fused = (
        Entry("in_proj_qkvz.weight", ("q", "k", "v", "gate.weight"), groups=theirs.num_k_heads),
        Entry("in_proj_ba.weight", ("beta", "g"), groups=theirs.num_k_heads),
    )
    return (*fused, *_CONV, *_DECAY, *_same("norm.weight = norm.weight", "out_proj.weight = out.weight"))


def _qwen3_5(theirs: Any) -> tuple[Entry, ...]:
    projections = _same(
        "in_proj_z.weight = gate.weight", "in_proj_b.weight = beta", "in_proj_a.weight = g", "norm.weight = norm.weight",
        "out_proj.weight = out.weight",
    )  # fmt: skip
    return (Entry("in_proj_qkv.weight", ("q", "k", "v")), *projections, *_CONV, *_DECAY)


def _olmo_hybrid(theirs: Any) -> tuple[Entry, ...]:
    return (*_QKV, *_CONV, *_DECAY, *_same("b_proj.weight = beta", "a_proj.weight = g", "g_proj.weight = gate.weight", *_OUT))


_OUT = ("o_norm.weight = norm.weight", "o_proj.weight = out.weight")


# ---- KDA ---------------------------------------------------------------------------------------------------------------------------


def _kda(theirs: Any, **options: Any) -> FastWeightLayer:
    _require(theirs, "activation", theirs.activation, "silu", "swish")
    return layer_of(
        "kda", theirs.q_proj.in_features, heads=theirs.num_heads, d_key=theirs.head_dim, d_value=theirs.head_dim,
        conv=theirs.conv_kernel_size, norm_eps=_eps(theirs.o_norm) * theirs.head_dim, **options,
    )  # fmt: skip


def _kimi(theirs: Any) -> tuple[Entry, ...]:
    H, K = theirs.num_heads, theirs.head_dim
    gate = (
        *_same("forget_gate.f_a_proj.weight = programmer.custom.g.down.weight"),
        *_same("forget_gate.f_b_proj.weight = programmer.custom.g.up.weight"),
        Entry("forget_gate.A_log", ("programmer.custom.g.decay.A_log",), shape=(1, 1, H, 1)),
        Entry("forget_gate.dt_bias", ("programmer.custom.g.decay.dt_bias",), shape=(H * K,)),
        *_same("g_a_proj.weight = gate.0.weight", "g_b_proj.weight = gate.1.weight"),
        Entry("g_b_proj.bias", ("gate.1.bias",), optional=True),
    )  # fmt: skip
    return (*_QKV, *_CONV, *gate, *_same("b_proj.weight = beta", *_OUT))


def _bailing_layer(theirs: Any) -> FastWeightLayer:
    gate = theirs.forget_gate
    _require(theirs, "safe_gate", gate.safe_gate, True)
    decay = SafeDecay(theirs.hidden_size, theirs.num_heads, theirs.head_dim, gate.lower_bound)
    return _kda(theirs, custom={"g": decay}, gate_rank=None)


def _bailing(theirs: Any) -> tuple[Entry, ...]:
    names = ("f_proj.weight = programmer.custom.g.project.weight", "A_log = programmer.custom.g.A_log")
    gate = (
        *_same(*(f"forget_gate.{n}" for n in names)),
        Entry("forget_gate.dt_bias", ("programmer.custom.g.dt_bias",), shape=(theirs.num_heads * theirs.head_dim,)),
    )
    return (*_QKV, *_CONV, *gate, *_same("b_proj.weight = beta", "g_proj.weight = gate.weight", *_OUT))


# ---- Mamba-2 -----------------------------------------------------------------------------------------------------------------------


def _mamba2(theirs: Any) -> FastWeightLayer:
    _require(theirs, "activation", theirs.activation, "silu", "swish")
    if theirs.in_proj.bias is not None or theirs.out_proj.bias is not None:
        raise ConversionError(f"{type(theirs).__name__} has projections with a bias; ours have none")
    d_model, H, groups = theirs.in_proj.in_features, theirs.num_heads, theirs.n_groups
    norm = theirs.norm if any(True for _ in theirs.norm.parameters()) else None
    dt = StepSize(d_model, H, tuple(theirs.time_step_limit))
    return layer_of(
        "mamba2", d_model, heads=H, key_heads=groups, d_key=theirs.ssm_state_size, d_value=theirs.head_dim,
        conv=theirs.conv_kernel_size, conv_bias=theirs.conv1d.bias is not None, gate_first=not getattr(norm, "norm_before_gate", False),
        output_norm=_groups(norm), norm_eps=_eps(norm) if norm else 0.0,
        custom={"dt": dt, "g": SteppedDecay(dt)},
    )  # fmt: skip


def _groups(norm: Any) -> int:
    """Of a norm, in how many parts it takes the values; 0 if there is none."""
    if norm is None:
        return 0
    return getattr(norm, "n_groups", None) or norm.weight.numel() // getattr(norm, "group_size", norm.weight.numel())


def _mamba2_entries(theirs: Any) -> tuple[Entry, ...]:
    bias = () if theirs.conv1d.bias is None else (Entry("conv1d.bias", ("bias.v", "bias.k", "bias.q")),)
    norm = _same("norm.weight = norm.weight") if any(True for _ in theirs.norm.parameters()) else ()
    given = ("gate.weight", "v", "k", "q", "programmer.custom.dt.project.weight")
    scale = theirs.mup_vector.reshape(-1, 1) * theirs.ssm_in_multiplier if hasattr(theirs, "mup_vector") else 1.0
    own = _same("dt_bias = programmer.custom.dt.dt_bias", "A_log = programmer.custom.g.A_log", "D = skip", "out_proj.weight = out.weight")
    return (Entry("in_proj.weight", given, scale=scale), Entry("conv1d.weight", ("conv.v", "conv.k", "conv.q")), *bias, *norm, *own)


# ---- lightning attention, mLSTM ----------------------------------------------------------------------------------------------------


def _minimax(theirs: Any) -> FastWeightLayer:
    d_model, size = theirs.qkv_proj.in_features, theirs.head_dim
    made = layer_of("lightning", d_model, heads=theirs.num_attention_heads, d_key=size, d_value=size, output_norm="all")
    assert made.norm is not None
    made.norm.eps = _eps(theirs.norm)
    return made


def _minimax_entries(theirs: Any) -> tuple[Entry, ...]:
    H = theirs.num_attention_heads
    return (
        Entry("qkv_proj.weight", ("q", "k", "v"), groups=H),
        Entry("slope_rate", ("programmer.custom.g.log_decay",), scale=-1.0, shape=(H, 1, 1)),
        *_same("output_gate.weight = gate.weight", "norm.weight = norm.weight", "out_proj.weight = out.weight"),
    )


def _xlstm(theirs: Any) -> FastWeightLayer:
    config = theirs.config
    _require(theirs, "weight_mode", config.weight_mode, "single")
    _require(theirs, "use_bias", config.use_bias, False)
    H = config.num_heads
    preset = layer_of("mlstm", config.hidden_size, heads=H, d_key=theirs.qk_dim // H, d_value=theirs.v_dim // H, norm_eps=config.norm_eps)
    preset.rule = mlstm(config.eps)
    for name in ("i", "g"):
        gate = preset.programmer.custom[name]
        (gate if name == "i" else gate.gate).cap = config.gate_soft_cap  # type: ignore[union-attr]
    return preset


def _xlstm_entries(theirs: Any) -> tuple[Entry, ...]:
    K = theirs.qk_dim // theirs.config.num_heads
    gates = ("weight = programmer.custom.i.project.weight", "bias = programmer.custom.i.project.bias")
    forget = ("weight = programmer.custom.g.gate.project.weight", "bias = programmer.custom.g.gate.project.bias")
    named = (*(f"igate_preact.{n}" for n in gates), *(f"fgate_preact.{n}" for n in forget))
    rest = ("k.weight = k", "v.weight = v", "ogate_preact.weight = gate.weight", "multihead_norm.weight = norm.weight")
    return (Entry("q.weight", ("q",), scale=1 / math.sqrt(K)), *_same(*named, *rest, "out_proj.weight = out.weight"))


_MAMBA2 = Family(_mamba2, _mamba2_entries)
LAYERS: Mapping[str, Family] = {
    "Qwen3NextGatedDeltaNet": Family(_gated_delta, _qwen3_next),
    "Qwen3_5GatedDeltaNet": Family(_gated_delta, _qwen3_5),
    "Qwen3_5MoeGatedDeltaNet": Family(_gated_delta, _qwen3_5),
    "OlmoHybridGatedDeltaNet": Family(_gated_delta, _olmo_hybrid),
    "KimiLinearDeltaAttention": Family(_kda, _kimi),
    "BailingHybridDeltaAttention": Family(_bailing_layer, _bailing),
    "Mamba2Mixer": _MAMBA2,
    "BambaMixer": _MAMBA2,
    "FalconH1Mixer": _MAMBA2,
    "GraniteMoeHybridMambaLayer": _MAMBA2,
    "NemotronHMamba2Mixer": _MAMBA2,
    "Zamba2MambaMixer": _MAMBA2,
    "MiniMaxLightningAttention": Family(_minimax, _minimax_entries),
    "xLSTMLayer": Family(_xlstm, _xlstm_entries),
}
