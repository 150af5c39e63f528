"""What a call was given: signals, states and options, checked by name and put into one layout."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..language.errors import SignalError, SignalTypeError
from ..language.roles import Signal
from ..language.rule import Rule


@dataclass(frozen=True)
class Inputs:
    """Checked signals (B, T, H or fewer, ...) and states (B, H, ...), with the sizes they agree on.

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

    def empty(self) -> Tensor:
        """The output of no tokens."""
        shown = self.rule.trace_for(self.token_shapes()).output
        shape = (self.V,) if shown is None else tuple(shown.shape)
        return torch.zeros(self.B, 0, self.H, *shape, dtype=self.dtype, device=self.device)

    def token_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every state and signal for one token and one head."""
        states = {n: tuple(s.shape[2:]) for n, s in zip(self.rule.states, self.states, strict=True)}
        left_out = {n: s.shapes(self.K, self.V)[0] for n, s in self.rule.signals.items() if n not in self.signals}
        return states | {n: tuple(x.shape[3:]) for n, x in self.signals.items()} | left_out


def may_look() -> bool:
    """Whether values may be looked at: not while a graph is compiled, nor inside vmap and its kin."""
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is None  # pyright: ignore[reportAttributeAccessIssue]


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
    _tensors(rule, signals)
    given = {n: x if time or x.ndim < 2 else x.unsqueeze(1) for n, x in signals.items()}
    expected = {n: rule.signals[n] for n in given}
    _ranks(rule, expected, given, time)
    B, T = _agree(rule, given, time)
    sizes = _sizes(rule, expected, given, state, optional)
    H = _heads(rule, given, state)
    for n, x in given.items():
        if not any(tuple(x.shape[3:]) == shape for shape in expected[n].shapes(*sizes)):
            want = " or ".join(map(str, expected[n].shapes(*sizes)))
            raise SignalError(
                f"{rule.name}: signal {n!r} ({expected[n].role}) has shape {tuple(signals[n].shape)}: for one token and head it is "
                f"{tuple(x.shape[3:])}, expected {want}, with K = {sizes[0]} and V = {sizes[1]}"
            )
        if expected[n].role.log_decay and x.numel() and may_look() and bool((x > 0).any()):
            raise SignalError(
                f"{rule.name}: signal {n!r} is the log of a decay and must be <= 0, but its largest value is {x.max().item():g}; "
                "pass decay.log(), or -softplus(...)"
            )
    dtype, out, device = _dtypes(rule, given, expected)
    states = _states(rule, state, (B, H, *sizes), dtype, device)
    if reset is not None:
        _check_reset(rule, reset, (B, T), device)
    return Inputs(rule, given, states, reset, B, T, H, *sizes, dtype, out, device)


def _names(rule: Rule, signals: Mapping[str, Any], optional: tuple[str, ...]) -> None:
    unknown = [n for n in signals if n not in rule.signals]
    missing = [n for n in rule.signals if n not in signals and n not in optional]
    signature = ", ".join(f"{n}: {s.role}" for n, s in rule.signals.items())
    if unknown:
        near = [f"{n!r} (did you mean {m[0]!r}?)" if (m := difflib.get_close_matches(n, rule.signals, 1)) else repr(n) for n in unknown]
        raise SignalError(f"{rule.name}: unknown signal {', '.join(near)}; the signals are {signature}")
    if missing or not signals:
        missing = missing or list(rule.signals)
        raise SignalError(f"{rule.name}: missing signal {', '.join(map(repr, missing))}; the signals are {signature}")


def _tensors(rule: Rule, signals: Mapping[str, Any]) -> None:
    for n, x in signals.items():
        if not isinstance(x, Tensor):
            raise SignalTypeError(f"{rule.name}: signal {n!r} is a {type(x).__name__}, expected a torch.Tensor")
        if x.layout != torch.strided:
            raise SignalTypeError(f"{rule.name}: signal {n!r} is of layout {x.layout}, expected a dense tensor; pass {n}.to_dense()")
        if not x.is_floating_point():
            raise SignalTypeError(f"{rule.name}: signal {n!r} has dtype {x.dtype}, expected a real floating-point dtype; pass {n}.float()")


def _ranks(rule: Rule, expected: dict[str, Signal], given: dict[str, Tensor], time: bool) -> None:
    for n, x in given.items():
        if x.ndim - 3 not in [len(shape) for shape in expected[n].shapes(1, 1)]:
            letters = expected[n].letters() if time else expected[n].letters().replace("T, ", "")
            shape = tuple(x.shape if time or x.ndim < 2 else x.squeeze(1).shape)
            raise SignalError(f"{rule.name}: signal {n!r} ({expected[n].role}) has shape {shape}, expected {letters}")


def _agree(rule: Rule, given: dict[str, Tensor], time: bool) -> tuple[int, int]:
    first, lead = next(iter(given.items()))
    for axis, letter in ((0, "B"), (1, "T")):
        for n, x in given.items():
            if x.shape[axis] != lead.shape[axis]:
                raise SignalError(
                    f"{rule.name}: signal {n!r} has {letter} = {x.shape[axis]}, but {first!r} has {letter} = {lead.shape[axis]}; "
                    f"signals are (B, {'T, ' if time else ''}H, ...)"
                )
    return lead.shape[0], lead.shape[1]


def _sizes(rule: Rule, expected: dict[str, Signal], given: dict[str, Tensor], state: Any, optional: tuple[str, ...]) -> tuple[int, int]:
    """K and V, from the first signal that must have them, or from the state."""
    found = []
    for space, letter, axis in (("key", "K", 3), ("value", "V", 2)):
        have = [(n, given[n].shape[-1]) for n, s in expected.items() if s.role.spaces == (space,)]
        if not have and space == "value" and "v" in optional:
            have = [("T", next(iter(given.values())).shape[1])]  # the values are one-hot in time
        if not have:
            w = state[0] if isinstance(state, (tuple, list)) and state else state
            if not isinstance(w, Tensor) or w.ndim != 4:
                raise SignalError(f"{rule.name}: no signal tells {letter}; pass state=, of shape (B, H, V, K)")
            have = [("state", w.shape[axis])]
        for n, size in have[1:]:
            if size != have[0][1]:
                raise SignalError(f"{rule.name}: signal {n!r} has {letter} = {size}, but {have[0][0]!r} has {letter} = {have[0][1]}")
        found.append(have[0][1])
    return found[0], found[1]


def _heads(rule: Rule, given: dict[str, Tensor], state: Any) -> int:
    w = state[0] if isinstance(state, (tuple, list)) and state else state
    counts = {n: x.shape[2] for n, x in given.items()}
    if isinstance(w, Tensor) and w.ndim == 4 and not any(s.role.spaces == ("value",) for s in rule.signals.values()):
        counts["state"] = w.shape[1]
    H = max(counts.values())
    for n, h in counts.items():
        if H == 0:
            raise SignalError(f"{rule.name}: signal {n!r} has no heads; signals are (B, T, H, ...)")
        if h == 0 or H % h:
            most = max(counts, key=lambda name: counts[name])
            raise SignalError(f"{rule.name}: signal {n!r} has {h} heads, which does not divide the {H} heads of {most!r}")
    return H


def _dtypes(rule: Rule, given: dict[str, Tensor], expected: dict[str, Signal]) -> tuple[torch.dtype, torch.dtype, torch.device]:
    """One device; one dtype, except that numbers and decays may be float32 beside 16-bit vectors."""
    vectors = {n: x for n, x in given.items() if expected[n].role.name.endswith(("Query", "Key", "Value"))} or given
    lead = next((n for n in vectors if expected[n].role.name == "Value"), next(iter(vectors)))
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
    return (torch.float64 if dtype == torch.float64 else torch.float32), dtype, device


def _states(rule: Rule, state: Any, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    B, H, K, V = sizes
    shapes = {n: (B, H, *s.shapes(K, V)[0]) for n, s in rule.states.items()}
    if state is None:
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes.values())
    given = state if isinstance(state, (tuple, list)) else (state,)
    if len(given) != len(shapes):
        raise SignalError(f"{rule.name}: state has {len(given)} parts, expected {len(shapes)}: {', '.join(shapes)}")
    for (n, shape), x in zip(shapes.items(), given, strict=True):
        what = "state" if len(shapes) == 1 else f"state {n!r}"
        if not isinstance(x, Tensor):
            raise SignalTypeError(f"{rule.name}: {what} is a {type(x).__name__}, expected a torch.Tensor of shape {shape}")
        if tuple(x.shape) != shape:
            raise SignalError(f"{rule.name}: {what} has shape {tuple(x.shape)}, expected (B, H, ...) = {shape} with K = {K}, V = {V}")
        if x.dtype != dtype:
            raise SignalTypeError(
                f"{rule.name}: {what} has dtype {x.dtype}, expected {dtype}: the state is float32, or float64 with float64"
            )
        if x.device != device:
            raise SignalError(f"{rule.name}: {what} is on {x.device}, but the signals are on {device}")
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
        near = difflib.get_close_matches(str(value), known, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise SignalError(f"{rule.name}: unknown {name} {value!r}{hint}; known: {', '.join(known)}")
    return value
