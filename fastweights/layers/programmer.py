"""Slow networks: from an input x to the signals of a rule. What a signal's role is says how it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.convolution import Part, short_convolution
from ..engine.gated_norm import unit_length
from ..language.errors import SignalError
from ..language.roles import Signal
from ..language.rule import Rule
from .decays import SoftplusDecay, single
from .feature_maps import FeatureMap, is_positive, may_vanish
from .feature_maps import feature_map as make_map

NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "l2": unit_length,
    "sum": lambda x: x / (x.sum(-1, keepdim=True) + 1e-6),
}


class ShortConvolution(nn.Module):
    """A causal convolution of each channel with its own few weights: y_t = sum_j w_j x_{t - width + 1 + j}, j < width:
    the last weight is that of the present token.

    ``forward(x, state)``: x (B, T, C) and the last width - 1 inputs before it, (B, width - 1, C), zero if None. Returns y and
    the state after x. ``parts`` says what follows in the same pass over memory (see ``short_convolution``); before tokens
    marked in ``reset``, bool (B, T), the inputs are as if they were zero.

    >>> conv = ShortConvolution(3, width=2)
    >>> y, state = conv(torch.ones(1, 5, 3), None)
    >>> y.shape, state.shape
    (torch.Size([1, 5, 3]), torch.Size([1, 1, 3]))
    """

    def __init__(self, channels: int, width: int = 4, bias: bool = False) -> None:
        super().__init__()
        self.width = width
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.weight = nn.Parameter(torch.empty(channels, 1, width).uniform_(-1, 1) / math.sqrt(width))

    def forward(self, x: Tensor, state: Tensor | None, parts: tuple[Part, ...] = (), reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept = self.width - 1
        state = x.new_zeros(x.shape[0], kept, x.shape[2]) if state is None else state.to(x.dtype)
        if reset is None or not bool(reset.any()):
            y = short_convolution(x, self.weight[:, 0], state, parts, self.bias)
            return y, torch.cat([state, x[:, -kept:]], 1)[:, -kept:].contiguous() if kept else state
        rows = [self._documents(x[b : b + 1], state[b : b + 1], parts, reset[b]) for b in range(x.shape[0])]
        return torch.cat([y for y, _ in rows]), torch.cat([after for _, after in rows])

    def _documents(self, x: Tensor, state: Tensor, parts: tuple[Part, ...], reset: Tensor) -> tuple[Tensor, Tensor]:
        """One row, whose documents do not see each other."""
        starts = reset.nonzero().flatten().tolist()
        done = []
        for i, j in zip([0, *starts], [*starts, x.shape[1]], strict=True):
            if i in starts:
                state = torch.zeros_like(state)
            if i < j:
                y, state = self(x[:, i:j], state, parts)
                done.append(y)
        return torch.cat(done, 1), state


class Programmer(nn.Module):
    """The default slow network of a rule: every signal is made as its role asks.

    Keys and queries: projection, short convolution, silu (or another ``feature_map``), l2 norm (or another ``norm``: none, sum);
    positive ones: the feature map if its features are positive, else elu + 1. Where a feature map makes more of d_key numbers,
    everything else in key space, and W, has that size, ``d_feature``.
    Values: projection, short convolution, silu (or ``values``: identity), and the l2 norm where they say what is erased, as in ``oja``,
    unless ``norm`` is none. Rates: a sigmoid, doubled with ``negative_eigenvalues``.
    Gates: a sigmoid. Log decays: Mamba's softplus form, per head or per channel. Numbers and other vectors: projections. What is slow
    is a parameter.

    ``forward(x, conv, reset)``: x (B, T, d_model); returns the signals by name, (B, T, heads, ...), and the new convolution state.
    ``custom`` replaces how single signals are made: a module from x (B, T, d_model) to the signal.
    """

    def __init__(
        self,
        rule: Rule,
        d_model: int,
        *,
        heads: int,
        d_key: int,
        d_value: int,
        key_heads: int | None = None,
        conv: int = 4,
        conv_bias: bool = False,
        feature_map: str = "silu",
        values: str = "silu",
        norm: str = "l2",
        decay: str = "head",
        negative_eigenvalues: bool = False,
        custom: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        for what, given, known in (
            ("norm", norm, tuple(NORMS)),
            ("decay", decay, ("head", "channel")),
            ("values", values, ("silu", "identity")),
        ):
            if given not in known:
                raise SignalError(f"{what} is {given!r}; known: {', '.join(known)}")
        self.rule, self.heads, self.key_heads = rule, heads, key_heads or heads
        if heads % self.key_heads:
            raise SignalError(f"key_heads is {key_heads}, which does not divide the {heads} heads")
        self.d_key, self.d_value = d_key, d_value
        self.feature_map, self.values, self.norm, self.negative_eigenvalues = feature_map, values, norm, negative_eigenvalues
        self.d_feature = make_map(feature_map, d_key).size
        self.value_norm = "l2" if norm != "none" and _erases_rows(rule) else "none"
        self.pick = self._pick(decay)
        self.custom = nn.ModuleDict(dict(custom or {}))
        if unknown := [n for n in self.custom if n not in rule.signals]:
            raise SignalError(f"{rule.name} has no signal {', '.join(map(repr, unknown))}; its signals are {', '.join(rule.signals)}")
        self.slow = nn.ParameterDict({n: self._weight(s) for n, s in rule.signals.items() if s.role.slow})
        made = {n: s for n, s in rule.signals.items() if n not in self.custom and n not in self.slow}
        self.convolved = {n: s for n, s in made.items() if _is_pattern(s)}
        self.direct = {n: s for n, s in made.items() if not _is_pattern(s)}
        self.sizes = {n: math.prod(self._axes(n)) for n in (*self.convolved, *self.direct)}
        self.project = nn.Linear(d_model, sum(self.sizes.values()), bias=False)
        channels = sum(self.sizes[n] for n in self.convolved)
        self.conv = ShortConvolution(channels, conv, conv_bias) if conv > 1 and channels else None
        self.parts = {n: self._part(n) for n in self.convolved}
        self.decays = nn.ModuleDict(
            {n: SoftplusDecay(heads, self._shape(s)[-1] if self._shape(s) else None) for n, s in self.direct.items() if s.role.log_decay}
        )

        self.maps = nn.ModuleDict()
        for n in (n for n, s in self.convolved.items() if _is_address(s)):
            name = self._map_name(n)
            if self._map_key(n) not in self.maps:
                self.maps[self._map_key(n)] = make_map(name, d_key, self._heads(rule.signals[n]))

    def _weight(self, s: Signal) -> nn.Parameter:
        """A slow weight of each head: normal, so that a product with it keeps the size of what it is given."""
        shape = (self.heads, *s.shapes(self.d_feature, self.d_value)[0])
        if s.role.name == "SlowScalar":
            return nn.Parameter(torch.full(shape, 0.5))
        return nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1]))

    def _map_name(self, signal: str) -> str:
        positive = self.rule.signals[signal].role.name.startswith("Positive")
        return self.feature_map if not positive or is_positive(self.feature_map) else "elu1"

    def _map_key(self, signal: str) -> str:
        """Keys and queries have one map, but each its own where it is learned."""
        name = self._map_name(signal)
        return f"{name}_{signal}" if name == "hedgehog" else name.replace(":", "_")

    def _pick(self, decay: str) -> int:
        wanted = 0 if decay == "head" else -1
        several = any(s.role.log_decay for s in self.rule.signals.values())
        if several and wanted not in self.rule.shapes:
            if decay == "channel":
                raise SignalError(f"decay='channel', but {self.rule.name} takes one decay a head; leave decay='head'")
            wanted = -1
        return wanted if several else 0

    def _shape(self, s: Signal) -> tuple[int, ...]:
        return s.shapes(self.d_feature, self.d_value)[self.pick]

    def _heads(self, s: Signal) -> int:
        return self.key_heads if _is_address(s) else self.heads

    def forward(self, x: Tensor, conv: Tensor | None = None, reset: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor | None]:
        split = [sum(self.sizes[n] for n in self.convolved), sum(self.sizes[n] for n in self.direct)]
        patterns, numbers = self.project(x).split(split, -1)
        done = {} if self.conv is None else self.parts
        if self.conv is not None:
            patterns, conv = self.conv(patterns, conv, tuple(self.parts.values()), reset)
        raw = dict(zip(self.convolved, patterns.split([self.sizes[n] for n in self.convolved], -1), strict=True))
        raw |= dict(zip(self.direct, numbers.split([self.sizes[n] for n in self.direct], -1), strict=True))
        made = {n: self._make(n, z.unflatten(-1, self._axes(n)), done.get(n)) for n, z in raw.items()}
        made |= {n: self._own(n, module(x), patterns.dtype) for n, module in self.custom.items()}
        made |= {n: p.to(patterns.dtype) for n, p in self.slow.items()}
        return {n: made[n] for n in self.rule.signals}, conv

    def _own(self, name: str, z: Tensor, dtype: torch.dtype) -> Tensor:
        """What a module of one's own made, its patterns in the type of the others (which autocast may have chosen)."""
        return z.to(dtype) if _is_pattern(self.rule.signals[name]) and self.convolved else z

    def _axes(self, name: str) -> tuple[int, ...]:
        """Of what is projected, before a feature map."""
        s = self.rule.signals[name]
        shape = self._shape(s)
        return (self._heads(s), *((*shape[:-1], self.d_key) if _is_address(s) else shape))

    def _part(self, name: str) -> Part:
        """What of a signal's making is done in one pass with the convolution."""
        role, size = self.rule.signals[name].role.name, self.sizes[name]
        if role in ("Key", "Query"):
            silu = self.feature_map == "silu"
            return Part(size, silu, self.d_key if silu and self.norm == "l2" else 0)
        unit = role == "Value" and self.value_norm == "l2"
        return Part(size, role == "Value" and self.values == "silu", self.d_value if unit else 0)

    def _make(self, name: str, z: Tensor, done: Part | None) -> Tensor:
        s = self.rule.signals[name]
        role = s.role.name
        if _is_address(s):
            z = z if done and done.silu else self._map(name, z)
            if role.startswith("Positive"):
                return z + 1e-6 if may_vanish(self._map_name(name)) else z
            return z if done and done.group else NORMS[self.norm](z)
        if role == "Value":
            z = z if self.values == "identity" or (done and done.silu) else F.silu(z)
            return z if done and done.group else NORMS[self.value_norm](z)
        if role == "Rate":
            return single(z).sigmoid() * (2 if self.negative_eigenvalues else 1)
        if role.endswith("Gate"):
            return single(z).sigmoid()
        return self.decays[name](z) if s.role.log_decay else z

    def _map(self, name: str, z: Tensor) -> Tensor:
        made = self.maps[self._map_key(name)]
        assert isinstance(made, FeatureMap)
        if z.ndim > 4 and made.name == "hedgehog":  # several keys a token: (B, T, H, n, d)
            return made(z.transpose(2, -2)).transpose(2, -2)
        return made(z)

    def extra_repr(self) -> str:
        return f"{self.rule.name}, {', '.join(f'{n} {self._axes(n)}' for n in self.sizes)}"


def _is_address(s: Signal) -> bool:
    return s.role.name.endswith(("Key", "Query")) and not s.role.slow


def _erases_rows(rule: Rule) -> bool:
    """Whether values say what is erased, as keys do in most rules: then W stays bounded only if they are."""
    program = rule.trace.program
    return program is not None and program.transposed and program.erase != "none"


def _is_pattern(s: Signal) -> bool:
    return _is_address(s) or s.role.name == "Value"


def is_gate_parameter(name: str) -> bool:
    """Parameters that must not decay to zero with the weights: those of the decays."""
    return name.endswith(("A_log", "A_imag", "dt_bias"))
