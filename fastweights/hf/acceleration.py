"""Other people's models on this engine: the functions that transformers' layers call are exchanged while it is switched on.

The seams are the names that a layer looks up in its module when it runs (transformers 5.15 and later), or (before) the attributes that it
took them into when it was made, and methods of layers that hold their own scan. On a processor a call that is served runs here; any other
call, and every call on another device, goes to the function that was there.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn

from . import functions, layers

Function = Callable[..., Any]


@dataclass(frozen=True)
class Seam:
    """A function of transformers: its names (in a module; on a layer), what its signature must have, and what stands in for it.

    A name with a dot is the method of a class: the layers that call no function which could be exchanged. It is one that the seam knows
    only where the class has the method ``beside`` as well, if there is one.
    """

    name: str
    attribute: str | None
    needs: tuple[str, ...]
    instead: Function
    serves: Function
    beside: str = ""


_DELTA = ("query", "key", "value", "g", "beta", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel")
_SSD = ("hidden_states", "dt", "A", "B", "C", "D", "dt_bias", "initial_states", "dt_softplus", "dt_limit", "return_final_states")
# Families whose norms are known, each a class of its own: what comes before RMSNorm and RMSNormGated. The gate comes first, or last;
# weights are what they differ from one by in some.
_GATE_FIRST = ("Bamba", "GraniteMoeHybrid", "NemotronH", "Zamba2", "FalconH1")
_GATE_LAST = ("OlmoHybrid", "LaraMini", "KimiLinear", "Glm5NextText", "BailingHybrid")
_FROM_ONE = ("Qwen3Next", "Qwen3_5", "Qwen3_5Moe")
_GATED_NORMS = dict.fromkeys(("Mamba", *_GATE_FIRST), functions.gate_then_norm)
_GATED_NORMS |= dict.fromkeys((*_GATE_LAST, *_FROM_ONE, "Qwen4ExpText"), functions.norm_then_gate)
_NORMS = dict.fromkeys(("Mamba2", *_GATE_FIRST, *_GATE_LAST, "MiniMax"), "hidden_states") | dict.fromkeys(_FROM_ONE, "x")
# The layers that hold their own scan before transformers 5.15
_OLD_LAYERS = dict.fromkeys(("Mamba2Mixer", "BambaMixer", "GraniteMoeHybridMambaLayer", "FalconH1Mixer"), layers.mamba2)
_OLD_LAYERS |= dict.fromkeys(("Zamba2MambaMixer", "NemotronHMamba2Mixer"), layers.zamba2)
_SSD_STEP = ("state", "hidden_states", "dt", "A", "B", "C", "D", "dt_bias", "dt_softplus")
SEAMS = (
    Seam("torch_chunk_gated_delta_rule", "chunk_gated_delta_rule", _DELTA, functions.gated_delta, functions.serves_delta),
    Seam("torch_recurrent_gated_delta_rule", "recurrent_gated_delta_rule", _DELTA, functions.gated_delta, functions.serves_delta),
    Seam("chunk_kimi_delta_attention", None, _DELTA, functions.gated_delta, functions.serves_delta),
    Seam("recurrent_kimi_delta_attention", None, _DELTA, functions.gated_delta, functions.serves_delta),
    Seam("mamba2_chunk_scan", None, _SSD, functions.ssd, functions.serves_ssd),
    Seam("mamba2_selective_state_update", None, _SSD_STEP, functions.ssd_step, functions.serves_ssd_step),
    Seam("causal_conv1d_fn", None, ("hidden_states", "weight", "bias", "activation"), functions.conv, functions.serves_conv),
    Seam(
        "causal_conv1d_update", None, ("hidden_states", "conv_state", "weight", "bias", "activation"),
        functions.conv_step, functions.serves_conv_step,
    ),
    Seam("xLSTMBackend.forward", None, ("query", "igate", "fgate", "c_initial"), functions.mlstm, functions.serves_mlstm),
    Seam(
        "MiniMaxLightningAttention.forward", None, ("hidden_states", "attention_mask"),
        layers.lightning, layers.serves_lightning,
    ),
    *(
        Seam(f"{name}.torch_forward", None, ("cache_params", "attention_mask"), instead, layers.serves_mamba2)
        for name, instead in _OLD_LAYERS.items()
    ),
    *(
        # transformers wraps this one so that its signature cannot be seen
        Seam(f"{name}.forward", None, (), layers.packed, layers.serves_packed, beside="torch_forward")
        for name in ("BambaMixer", "GraniteMoeHybridMambaLayer")
    ),
    *(
        Seam(f"{name}RMSNormGated.forward", None, ("hidden_states", "gate"), instead, functions.serves_gated_norm)
        for name, instead in _GATED_NORMS.items()
    ),
    *(Seam(f"{name}RMSNorm.forward", None, (x,), functions.norm, functions.serves_norm) for name, x in _NORMS.items()),
)  # fmt: skip
_BY_NAME = {seam.name: seam for seam in SEAMS}
# What a layer has under other names before transformers 5.15, or has not: then it calls its own convolution
_CONV_OF_X = Seam("", "causal_conv1d_fn", ("x", "weight", "bias", "activation"), functions.conv_of_x, functions.serves_conv_of_x)
_HELD = (
    _CONV_OF_X,
    Seam(
        "", "causal_conv1d_update", ("hidden_states", "conv_state", "weight", "bias", "activation"),
        functions.conv_step, functions.serves_conv_step,
    ),
)  # fmt: skip


class _Switch(threading.local):
    """How many accelerated layers are running in this thread: their calls are exchanged."""

    def __init__(self) -> None:
        self.depth = 0


_here, _everywhere = _Switch(), [0]


@dataclass
class Report:
    """What was exchanged, as "module.function", and what was refused, with the reason."""

    exchanged: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def _exchange(original: Function, seam: Seam) -> Function:
    @functools.wraps(getattr(original, "forward", original))
    def call(*args: Any, **kwargs: Any) -> Any:
        if (_everywhere[0] or _here.depth) and _on_processor(args, kwargs) and seam.serves(*args, **kwargs):
            return seam.instead(*args, **kwargs)
        return original(*args, **kwargs)

    call.fastweights_original = original  # type: ignore[attr-defined]
    if hasattr(original, "kernel_layer_name"):
        call.kernel_layer_name = original.kernel_layer_name  # type: ignore[attr-defined]
    return call


def _on_processor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return all(x.device.type == "cpu" for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))


def _unfit(function: Function, seam: Seam) -> str:
    """Why a function is not the one that the seam knows; nothing if it is."""
    plain = inspect.unwrap(getattr(function, "forward", function))
    try:
        has = inspect.signature(plain).parameters
    except (TypeError, ValueError):
        return "its signature cannot be read"
    missing = [n for n in seam.needs if n not in has]
    return f"it takes no {', '.join(missing)}: this version of transformers is not known here" if missing else ""


def _is_modeling(name: str) -> bool:
    return name.startswith("transformers.models.") and name.rpartition(".")[2].startswith("modeling_")


def _owner(module: ModuleType, name: str) -> tuple[Any, str]:
    """Where a name lives: the module, or a class of it (or nowhere), and its last part."""
    cls, _, last = name.rpartition(".")
    return (module.__dict__.get(cls, types.SimpleNamespace()) if cls else module), last


class _Exchanges:
    """All functions that are exchanged now, and for whom: switches and layers."""

    def __init__(self) -> None:
        self.users: dict[str, weakref.WeakSet[Any]] = {}

    def add(self, module: ModuleType, user: Any, report: Report) -> None:
        self.users.setdefault(module.__name__, weakref.WeakSet()).add(user)
        for name, seam in _BY_NAME.items():
            owner, last = _owner(module, name)
            found = owner.__dict__.get(last)
            if found is None or (seam.beside and seam.beside not in owner.__dict__):
                continue
            where = f"{module.__name__.rpartition('.')[2]}.{name}"
            if hasattr(found, "fastweights_original"):
                report.exchanged.append(where)
            elif why := _unfit(found, seam):
                report.refused[where] = why
            else:
                setattr(owner, last, _exchange(found, seam))
                report.exchanged.append(where)
        for cls in (c for c in vars(module).values() if isinstance(c, type) and "torch_forward" in vars(c)):
            if (method := f"{cls.__name__}.torch_forward") not in _BY_NAME:
                where = f"{module.__name__.rpartition('.')[2]}.{method}"
                report.refused[where] = "its scan is written into the layer, which is not known here: only its norms are served"

    def remove(self, name: str, user: Any) -> None:
        users = self.users.get(name)
        if users is None:
            return
        users.discard(user)
        if users:
            return
        del self.users[name]
        for function in _BY_NAME if name in sys.modules else ():
            owner, last = _owner(sys.modules[name], function)
            found = owner.__dict__.get(last)
            if found is not None and hasattr(found, "fastweights_original"):
                setattr(owner, last, found.fastweights_original)


_exchanges = _Exchanges()


class _Later(importlib.abc.MetaPathFinder):
    """Exchanges the functions of models that are imported later."""

    def __init__(self, imported: Callable[[ModuleType], None]) -> None:
        self.imported = imported

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not _is_modeling(name):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                self.imported(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class enable:
    """Run the linear-attention layers of transformers on this engine, wherever they run on a processor.

    ``enable()`` holds until ``disable()``, or for a block: ``with enable() as report: ...``. Models that are already loaded, and
    those that are loaded later, are the same to it (before transformers 5.15 layers with a delta rule keep their functions:
    ``accelerate`` models that were there before, which serves their convolutions too). Gated delta (Qwen3-Next, Qwen3.5,
    OLMo-hybrid), KDA (Kimi-Linear, Bailing-hybrid), Mamba-2 with its relatives, mLSTM (xLSTM) and lightning attention (MiniMax) run
    forward, backward and token by token, their short convolutions and norms too, and packed sequences work. ``report`` says what was
    exchanged, and what was refused and why.

    >>> from fastweights import hf
    >>> with hf.enable() as report:
    ...     pass
    """

    _active: ClassVar[list[enable]] = []

    def __init__(self) -> None:
        self.report = Report()
        self.modules: list[str] = []
        self.later = _Later(self._add)
        for name in [n for n in sys.modules if _is_modeling(n)]:
            self._add(sys.modules[name])
        sys.meta_path.insert(0, self.later)
        _everywhere[0] += 1
        enable._active.append(self)

    def _add(self, module: ModuleType) -> None:
        _exchanges.add(module, self, self.report)
        self.modules.append(module.__name__)

    def __enter__(self) -> Report:
        return self.report

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Everything as it was; a second time does nothing."""
        if self not in enable._active:
            return
        enable._active.remove(self)
        sys.meta_path.remove(self.later)
        _everywhere[0] -= 1
        for name in self.modules:
            _exchanges.remove(name, self)


def disable() -> None:
    """End every ``enable()``."""
    for one in list(enable._active):
        one.undo()


def accelerate(model: nn.Module) -> Report:
    """Run the layers of one model on this engine, where they run on a processor; ``restore(model)`` ends it.

    >>> import torch
    >>> from fastweights import hf
    >>> hf.accelerate(torch.nn.Linear(2, 2)).exchanged
    []
    """
    report = Report()
    for layer in _layers(model):
        module = sys.modules[type(layer).__module__]
        _exchanges.add(module, layer, report)
        if _enter in layer._forward_pre_hooks.values():
            continue
        layer.register_forward_pre_hook(_enter)
        layer.register_forward_hook(_leave, always_call=True)
        for seam in (*SEAMS, *_HELD):  # before 5.15 a layer keeps its functions
            held = getattr(layer, seam.attribute, None) if seam.attribute else None
            if held is None and seam is _CONV_OF_X and seam.attribute in layer.__dict__:
                held = functions.conv_in_torch
            if callable(held) and not hasattr(held, "fastweights_original") and not _unfit(held, seam):
                setattr(layer, seam.attribute, _exchange(held, seam))  # type: ignore[arg-type]
    report.exchanged = sorted(set(report.exchanged))
    return report


def restore(model: nn.Module) -> None:
    """The layers of the model as they were before ``accelerate``."""
    for layer in model.modules():
        if _enter not in layer._forward_pre_hooks.values():
            continue
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for number in [n for n, hook in hooks.items() if hook in (_enter, _leave)]:
                del hooks[number]
                layer._forward_hooks_always_called.pop(number, None)
        for seam in (*SEAMS, *_HELD):
            held = layer.__dict__.get(seam.attribute) if seam.attribute else None
            if held is not None and hasattr(held, "fastweights_original"):
                was = held.fastweights_original
                setattr(layer, seam.attribute, None if was is functions.conv_in_torch else was)  # type: ignore[arg-type]
        _exchanges.remove(type(layer).__module__, layer)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers whose own forward looks up a function that can be exchanged."""
    for layer in model.modules():
        name = type(layer).__module__
        if not _is_modeling(name) or name not in sys.modules:
            continue
        code = inspect.unwrap(type(layer).forward).__code__
        calls = any(seam.name in code.co_names or seam.attribute in layer.__dict__ for seam in SEAMS)
        if calls or any(f"{type(layer).__name__}.{method}" in _BY_NAME for method in ("forward", "torch_forward")):
            yield layer


def _enter(layer: nn.Module, args: Any) -> None:
    _here.depth += 1


def _leave(layer: nn.Module, args: Any, output: Any) -> None:
    _here.depth = max(_here.depth - 1, 0)
