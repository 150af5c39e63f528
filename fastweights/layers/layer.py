"""``FastWeightLayer``: a programmer, a rule and a read-out, as a module with its state in the open."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..engine.gated_norm import ACTIVATIONS, gated_norm, with_share
from ..engine.scan import scan
from ..language.errors import SignalError, SignalTypeError
from ..language.rule import Rule
from .attention import rotate
from .norms import GroupedNorm, RMSNorm
from .programmer import Programmer

State = dict[str, Tensor]


class FastWeightLayer(nn.Module):
    """A layer whose memory is a fast weight matrix a head, rewritten by a rule at every token.

    ``y, state = layer(x, state)`` with x and y (B, T, d_model). The state holds the fast weights (B, heads, d_value, d_key) (or as
    many keys as a feature map makes of d_key), any other state of the rule, and the last inputs of the short convolution, so that
    a sequence may be cut anywhere: streaming token by token equals the whole. ``None`` is the empty state. Before the tokens marked
    in ``reset``, bool (B, T), the state is empty again: packed documents do not see each other.

    Args:
        rule: any rule; the programmer is built from its signature (see ``Programmer``).
        d_model: size of x.
        heads, d_key, d_value: heads, and the sizes of a head; by default d_model is shared out among the heads.
        output_norm, norm_eps: RMS norm of each head's read-out; of all heads together ``"all"``, of n groups of heads ``n``, a layer
            norm of each head ``"layer"``; none if False.
        output_gate: a gate on the read-out: ``gate`` is swish or sigmoid, ``gate_first`` before the norm. ``gate_rank`` makes it of two
            projections with so many numbers between them, as many as a head has values if ``"head"``.
        skip: what is read gets a share of the value itself, a number a head (as in Mamba-2).
        rotary: keys and queries turn with their position (as in RetNet), which is then a part of the state.
        programmer: a module of your own in the place of the default one: ``signals, conv = programmer(x, conv)``.
        options: passed to ``Programmer``: ``key_heads, conv, feature_map, norm, decay, negative_eigenvalues, custom``.

    >>> import torch, fastweights as fw
    >>> layer = fw.FastWeightLayer(fw.rules.gated_delta, 32, heads=2)
    >>> y, state = layer(torch.randn(1, 10, 32))
    >>> y.shape, state["W"].shape
    (torch.Size([1, 10, 32]), torch.Size([1, 2, 16, 16]))
    """

    def __init__(
        self,
        rule: Rule,
        d_model: int,
        *,
        heads: int = 4,
        d_key: int | None = None,
        d_value: int | None = None,
        output_norm: bool | str | int = True,
        norm_eps: float = 1e-5,
        output_gate: bool = True,
        gate: str = "swish",
        gate_first: bool = False,
        gate_rank: int | str | None = None,
        skip: bool = False,
        rotary: bool = False,
        form: str = "auto",
        programmer: nn.Module | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        if not isinstance(rule, Rule):
            raise SignalTypeError(f"rule is a {type(rule).__name__}, expected a Rule such as fw.rules.delta, or a function under @fw.rule")
        if heads < 1:
            raise SignalError(f"heads is {heads}, expected at least 1")
        if (d_key is None or d_value is None) and d_model % heads:
            raise SignalError(f"d_model = {d_model} is not a multiple of heads = {heads}; give d_key and d_value, or other heads")
        if gate not in ACTIVATIONS:
            raise SignalError(f"gate is {gate!r}; known: {', '.join(ACTIVATIONS)}")
        self.rule, self.d_model, self.heads, self.form, self.rotary, self.gate_kind = rule, d_model, heads, form, rotary, gate
        self.d_key, self.d_value = d_key or d_model // heads, d_value or d_model // heads
        if programmer is None:
            programmer = Programmer(rule, d_model, heads=heads, d_key=self.d_key, d_value=self.d_value, **options)  # type: ignore[arg-type]
        elif options:
            raise SignalError(f"{', '.join(options)} are options of the default programmer, and another programmer was given")
        self.programmer = programmer
        self.d_feature = getattr(programmer, "d_feature", self.d_key)  # of W
        self.gate_first = gate_first
        values = heads * self.d_value
        self.norm = _norm(output_norm, heads, self.d_value, norm_eps)
        self.skip = nn.Parameter(torch.ones(heads)) if skip else None
        rank = self.d_value if gate_rank == "head" else gate_rank
        self.gate = _gate(d_model, values, rank) if output_gate else None
        self.out = nn.Linear(values, d_model, bias=False)
        if rotary and (self.d_feature % 2 or not {"q", "k"} <= rule.signals.keys()):
            raise SignalError(
                f"rotary turns pairs of channels of q and k; {rule.name} has {', '.join(rule.signals)}, of {self.d_feature} channels"
            )

    def forward(self, x: Tensor, state: Mapping[str, Tensor] | None = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[-1] != self.d_model:
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise SignalError(f"x is {found}, expected a tensor (B, T, d_model = {self.d_model})")
        if state is not None and (missing := [n for n in (*self.rule.states, *(("position",) if self.rotary else ())) if n not in state]):
            raise SignalError(f"the state has {', '.join(state)}, and {', '.join(missing)} is missing; pass one that this layer returned")
        before = None if state is None else state.get("conv")
        signals, conv = self.programmer(x, before) if reset is None else self.programmer(x, before, reset)
        turned = {}
        if self.rotary:
            start = torch.zeros((), dtype=torch.int64, device=x.device) if state is None else state["position"]
            positions = torch.arange(x.shape[1], device=x.device) + start
            signals |= {n: rotate(signals[n].transpose(1, 2), positions).transpose(1, 2) for n in ("q", "k")}
            turned["position"] = start + x.shape[1]
        memory = self._empty(x, signals) if state is None else tuple(state[n] for n in self.rule.states)
        y, after = scan(self.rule, **signals, state=memory, reset=reset, form=self.form)
        new = dict(zip(self.rule.states, after if isinstance(after, tuple) else (after,), strict=True)) | turned
        if conv is not None:
            new["conv"] = conv
        if self.skip is not None:
            y = with_share(y, self.skip, signals["v"].expand_as(y))
        return self.out(self._finish(x, y.flatten(2).to(x.dtype))), new

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        """The norm and the gate, (B, T, heads d_value)."""
        gate = None if self.gate is None else self.gate(x)
        if self.norm is None:
            return gated_norm(y, gate, activation=self.gate_kind)
        return self.norm(y, gate, self.gate_kind, self.gate_first)

    def _empty(self, x: Tensor, signals: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        dtype = torch.float64 if any(s.dtype == torch.float64 for s in signals.values()) else torch.float32
        shapes = [s.shapes(self.d_feature, self.d_value)[0] for s in self.rule.states.values()]
        return tuple(torch.zeros(x.shape[0], self.heads, *shape, dtype=dtype, device=x.device) for shape in shapes)

    def state_bytes(self, tokens: int) -> int:
        """Bytes of state for one sequence of that many tokens: the same for any number."""
        del tokens
        sizes = [math.prod(s.shapes(self.d_feature, self.d_value)[0]) for s in self.rule.states.values()]
        conv = getattr(self.programmer, "conv", None)
        short = 0 if conv is None else (conv.width - 1) * conv.weight.shape[0]
        return 4 * (self.heads * sum(sizes) + short)

    def extra_repr(self) -> str:
        return f"{self.rule.name}, d_model={self.d_model}, heads={self.heads}, d_key={self.d_key}, d_value={self.d_value}"


def _norm(kind: bool | str | int, heads: int, d_value: int, eps: float) -> nn.Module | None:
    if kind is True:
        return RMSNorm(d_value, eps)
    if kind == "all":
        return RMSNorm(heads * d_value, eps)
    if kind == "layer":
        return GroupedNorm(heads, heads * d_value, eps, centred=True)
    if not kind:
        return None
    if not isinstance(kind, int) or kind < 1 or heads % kind:
        raise SignalError(f"output_norm is {kind!r}; known: True, False, 'all', 'layer', or a number of groups that divides {heads} heads")
    return GroupedNorm(kind, heads * d_value, eps)


def _gate(d_model: int, values: int, rank: int | str | None) -> nn.Module:
    if rank is None:
        return nn.Linear(d_model, values, bias=False)
    if not isinstance(rank, int) or rank < 1:
        raise SignalError(f"gate_rank is {rank!r}, expected a number of at least 1, 'head', or None")
    return nn.Sequential(nn.Linear(d_model, rank, bias=False), nn.Linear(rank, values))
