"""What a call was given: signals, states and options, checked by name and put into one layout."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..language.errors import SignalError, SignalTypeError
from ..language.rule import Rule
from .watched import may_look


@dataclass(frozen=True)
class Inputs:
    """Checked signals (B, T, H or fewer, ...) and states (B, H, ...), with the sizes they agree on; what is slow is expanded.

    ``dtype`` is that of the state and of all arithmetic; ``out`` that of the output.
    """

    rule: Rule
    signals: dict[str, Tensor]
    states: tuple[Tensor, ...]
    reset: Tensor | None
    B: int
    T: int
    H: int
    K: int
    V: int
    dtype: torch.dtype
    out: torch.dtype
    device: torch.device
    slow: Mapping[str, Tensor] = field(default_factory=dict)  # as given: (H or fewer, ...)

    def empty(self) -> Tensor:
        """The output of no tokens, whose gradients are zeros."""
        shown = self.rule.trace_for(self.token_shapes()).output
        shape = (self.V,) if shown is None else tuple(shown.shape)
        out = torch.zeros(self.B, 0, self.H, *shape, dtype=self.dtype, device=self.device)
        for x in (*self.signals.values(), *self.states, *self.slow.values()):
            if x.requires_grad:
                out = out + 0 * x.sum().to(self.dtype)
        return out

    def token_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every state and signal for one token and one head."""
        states = {n: tuple(s.shape[2:]) for n, s in zip(self.rule.states, self.states, strict=True)}
        left_out = {n: s.shapes(self.K, self.V)[0] for n, s in self.rule.signals.items() if n not in self.signals}
        return states | {n: tuple(x.shape[3:]) for n, x in self.signals.items()} | left_out


def require_rule(rule: Any) -> None:
    if not isinstance(rule, Rule):
        raise SignalTypeError(
            f"the first argument is a rule, such as fw.rules.delta or a function under @fw.rule; got {type(rule).__name__}"
        )


def check(
    rule: Any, signals: Mapping[str, Any], state: Any = None, reset: Any = None, optional: tuple[str, ...] = (), time: bool = True
) -> Inputs:
    """Check everything a call was given; ``optional`` signals may be left out, and without ``time`` there is no T axis."""
    require_rule(rule)
    _names(rule, signals, optional)
    for n, x in signals.items():
        _check_signal(rule, n, x, time)
    given = {n: x if time else x.unsqueeze(1) for n, x in signals.items() if not rule.signals[n].role.slow}
    hint = f"; signals are (B, {'T, ' if time else ''}H, ...)"
    B = _common(rule, "B", {n: x.shape[0] for n, x in given.items()}, hint)
    T = _common(rule, "T", {n: x.shape[1] for n, x in given.items()}, hint)
    given = {n: given[n] if n in given else x.expand(B, T, *x.shape) for n, x in signals.items()}
    w = state[0] if isinstance(state, (tuple, list)) and state else state
    w = w if isinstance(w, Tensor) and w.ndim == 4 else None
    K = _channels(rule, given, "K", None if w is None else w.shape[3])
    one_hot = T if "v" in optional else None  # values that are left out are one-hot in time
    V = _channels(rule, given, "V", one_hot if w is None else w.shape[2])
    H = _heads(rule, given, w)
    for n, x in given.items():
        role, shapes = rule.signals[n].role, rule.signals[n].shapes(K, V)
        if tuple(x.shape[3:]) not in shapes:
            raise SignalError(
                f"{rule.name}: signal {n!r} ({role}) has shape {tuple(signals[n].shape)}: for one token and head it is "
                f"{tuple(x.shape[3:])}, expected {' or '.join(map(str, shapes))}, with K = {K} and V = {V}"
            )
        if role.log_decay and x.numel() and may_look(x) and bool((x > 0).any()):
            raise SignalError(
                f"{rule.name}: signal {n!r} is the log of a decay and must be <= 0, but its largest value is {x.max().item():g}; "
                "pass decay.log(), or -softplus(...)"
            )
    out, device = _dtype_and_device(rule, given)
    dtype = torch.float64 if out == torch.float64 else torch.float32
    states = _states(rule, state, (B, H, K, V), dtype, device)
    if reset is not None:
        _check_reset(rule, reset, (B, T), device)
    slow = {n: x for n, x in signals.items() if rule.signals[n].role.slow}
    return Inputs(rule, given, states, reset, B, T, H, K, V, dtype, out, device, slow)


def _names(rule: Rule, signals: Mapping[str, Any], optional: tuple[str, ...]) -> None:
    unknown = [n for n in signals if n not in rule.signals]
    missing = [n for n in rule.signals if n not in signals and n not in optional]
    signature = ", ".join(f"{n}: {s.role}" for n, s in rule.signals.items())
    if unknown:
        near = ", ".join(f"{n!r}{_did_you_mean(n, rule.signals)}" for n in unknown)
        raise SignalError(f"{rule.name}: unknown signal {near}; the signals are {signature}")
    if missing or not signals:
        missing = missing or list(rule.signals)
        raise SignalError(f"{rule.name}: missing signal {', '.join(map(repr, missing))}; the signals are {signature}")


def _check_signal(rule: Rule, n: str, x: Any, time: bool) -> None:
    expected = rule.signals[n]
    if not isinstance(x, Tensor):
        raise SignalTypeError(f"{rule.name}: signal {n!r} is a {type(x).__name__}, expected a torch.Tensor")
    if x.layout != torch.strided:
        raise SignalTypeError(f"{rule.name}: signal {n!r} is of layout {x.layout}, expected a dense tensor; pass {n}.to_dense()")
    if not x.is_floating_point():
        raise SignalTypeError(f"{rule.name}: signal {n!r} has dtype {x.dtype}, expected a real floating-point dtype; pass {n}.float()")
    lead = 1 if expected.role.slow else 2 + time
    if x.ndim - lead not in map(len, expected.shapes(1, 1)):
        letters = expected.letters() if time else expected.letters().replace("T, ", "")
        raise SignalError(f"{rule.name}: signal {n!r} ({expected.role}) has shape {tuple(x.shape)}, expected {letters}")


def _common(rule: Rule, letter: str, sizes: dict[str, int], hint: str = "") -> int:
    """The size that all signals share."""
    first, size = next(iter(sizes.items()))
    for n, found in sizes.items():
        if found != size:
            raise SignalError(f"{rule.name}: signal {n!r} has {letter} = {found}, but {first!r} has {letter} = {size}{hint}")
    return size


def _channels(rule: Rule, given: dict[str, Tensor], letter: str, otherwise: int | None) -> int:
    """K or V, from the signals that must have them, or from elsewhere."""
    axes = {n: rule.signals[n].axes() for n in given}
    sizes = {n: x.shape[axes[n].index(letter) - len(axes[n])] for n, x in given.items() if letter in axes[n]}
    if sizes:
        return _common(rule, letter, sizes)
    if otherwise is None:
        if not any(letter in s.axes() for s in (*rule.states.values(), *rule.signals.values())):
            return 1  # nothing has such an axis
        raise SignalError(f"{rule.name}: no signal tells {letter}; pass state=, of shape (B, H, V, K)")
    return otherwise


def _heads(rule: Rule, given: dict[str, Tensor], w: Tensor | None) -> int:
    counts = {n: x.shape[2] for n, x in given.items()}
    if w is not None and not any("V" in s.axes() for s in rule.signals.values()):
        counts["state"] = w.shape[1]
    most = max(counts, key=counts.__getitem__)
    H = counts[most]
    for n, h in counts.items():
        if H == 0:
            raise SignalError(f"{rule.name}: signal {n!r} has no heads; signals are (B, T, H, ...)")
        if h == 0 or H % h:
            raise SignalError(f"{rule.name}: signal {n!r} has {h} heads, which does not divide the {H} heads of {most!r}")
    return H


# roles that may be float32 beside 16-bit vectors, by the ends of their names
_NUMBERS = ("Rate", "Gate", "Decay", "Scalar")


def _dtype_and_device(rule: Rule, given: dict[str, Tensor]) -> tuple[torch.dtype, torch.device]:
    """One device; one dtype, except that numbers and decays may be float32 beside 16-bit vectors."""
    patterns = {n for n in given if rule.signals[n].role.name.endswith(("Query", "Key", "Value")) and not rule.signals[n].role.slow}
    others = {n: x for n, x in given.items() if not rule.signals[n].role.name.endswith(_NUMBERS)}
    vectors = {n: x for n, x in given.items() if n in patterns} or others or given
    lead = next((n for n in vectors if rule.signals[n].role.name == "Value"), next(iter(vectors)))
    dtype, device = given[lead].dtype, given[lead].device
    for n, x in given.items():
        if x.device != device:
            raise SignalError(f"{rule.name}: signal {n!r} is on {x.device}, but {lead!r} is on {device}; move one of them")
        gate = n not in vectors and x.dtype == torch.float32 and dtype.itemsize == 2
        if x.dtype != dtype and not gate:
            raise SignalTypeError(
                f"{rule.name}: signal {n!r} has dtype {x.dtype}, but {lead!r} has {dtype}; use one dtype "
                "(only gates and decays may be float32 beside 16-bit keys, queries and values)"
            )
    return dtype, device


def _states(rule: Rule, state: Any, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    B, H, K, V = sizes
    shapes = {n: (B, H, *s.shapes(K, V)[0]) for n, s in rule.states.items()}
    if state is None:
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes.values())
    given = state if isinstance(state, (tuple, list)) else (state,)
    if len(given) != len(shapes):
        raise SignalError(f"{rule.name}: state has {len(given)} parts, expected {len(shapes)}: {', '.join(shapes)}")
    for (n, shape), x in zip(shapes.items(), given, strict=True):
        what = f"{rule.name}: state" if len(shapes) == 1 else f"{rule.name}: state {n!r}"
        if not isinstance(x, Tensor):
            raise SignalTypeError(f"{what} is a {type(x).__name__}, expected a torch.Tensor of shape {shape}")
        if tuple(x.shape) != shape:
            raise SignalError(f"{what} has shape {tuple(x.shape)}, expected (B, H, ...) = {shape} with K = {K}, V = {V}")
        if x.dtype != dtype:
            raise SignalTypeError(f"{what} has dtype {x.dtype}, expected {dtype}: the state is float32, or float64 with float64")
        if x.device != device:
            raise SignalError(f"{what} is on {x.device}, but the signals are on {device}")
    return tuple(given)


def _check_reset(rule: Rule, reset: Any, shape: tuple[int, int], device: torch.device) -> None:
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        kind = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
        raise SignalTypeError(f"{rule.name}: reset is {kind}, expected a bool tensor (B, T): True where W returns to zero before the token")
    if tuple(reset.shape) != shape:
        raise SignalError(f"{rule.name}: reset has shape {tuple(reset.shape)}, expected (B, T) = {shape}")
    if reset.device != device:
        raise SignalError(f"{rule.name}: reset is on {reset.device}, but the signals are on {device}")


def whole_number(rule: Rule, name: str, value: Any) -> int:
    """An option that counts something."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise SignalTypeError(f"{rule.name}: {name} is {value!r}, expected a whole number")
    if value < 1:
        raise SignalError(f"{rule.name}: {name} is {value}, expected at least 1")
    return value


def one_of(rule: Rule, name: str, value: Any, known: tuple[str, ...]) -> str:
    """An option that names one of a few things."""
    if value not in known:
        raise SignalError(f"{rule.name}: unknown {name} {value!r}{_did_you_mean(str(value), known)}; known: {', '.join(known)}")
    return value


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
