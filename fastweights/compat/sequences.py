"""A scan as other libraries call it: a scale on the query, a state (keys x values), and several sequences packed into one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.gated_norm import unit_length
from ..engine.scan import scan
from ..language.errors import SignalError
from ..language.rule import Rule


def run(
    rule: Rule,
    signals: dict[str, Tensor],
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    keep_state: bool = False,
    value_first: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    reverse: bool = False,
    l2norm: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y (B, T, H, V) in the dtype of the values, and the final state (N, H, K, V) in float32 (float64 for float64 signals), or None unless
    it is kept.

    ``cu_seqlens`` are the offsets of N sequences that lie one behind the other in one batch row; without it N = B. 16-bit signals
    are computed in float32. ``l2norm`` divides keys and queries by the root of their squared norm + 1e-6.
    """
    dtype = signals["v"].dtype
    wide = torch.float64 if any(x.dtype == torch.float64 for x in signals.values()) else torch.float32
    signals = {n: x.to(wide) for n, x in signals.items()}
    scale = signals["q"].shape[-1] ** -0.5 if scale is None else scale
    if l2norm:
        signals["k"] = unit_length(signals["k"])
        signals["q"] = unit_length(signals["q"]) * scale if isinstance(scale, Tensor) else unit_length(signals["q"], scale)
    else:
        signals["q"] = signals["q"] * scale
    if reverse:
        signals = {n: x.flip(1) for n, x in signals.items()}
    W = None if state is None else (state if value_first else state.transpose(-1, -2)).to(wide)
    ends = _offsets(rule, cu_seqlens, signals, W, reverse)
    backwards = reverse and bool(ends)  # the last sequence comes first, and so do its states
    y, W = _scan(rule, signals, W.flip(0) if backwards and W is not None else W, keep_state, ends)
    W = W.flip(0) if backwards else W
    if reverse:
        y = y.flip(1)
    if not keep_state:
        return y.to(dtype), None
    return y.to(dtype), W if value_first else W.transpose(-1, -2)


def _offsets(
    rule: Rule, cu_seqlens: Tensor | Sequence[int] | None, signals: dict[str, Tensor], W: Tensor | None, reverse: bool
) -> list[int]:
    """The ends of the sequences; empty if every row is one."""
    if cu_seqlens is None:
        return []
    ends = [int(i) for i in (cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)]
    B, T = signals["v"].shape[:2]
    if B != 1:
        raise SignalError(f"{rule.name}: cu_seqlens is given, and the batch size is {B}; pack all sequences into one row")
    if not ends or ends[0] != 0 or ends[-1] != T or sorted(ends) != ends:
        raise SignalError(f"{rule.name}: cu_seqlens is {ends}, expected rising offsets from 0 to T = {T}")
    if W is not None and W.shape[0] != len(ends) - 1:
        raise SignalError(f"{rule.name}: {W.shape[0]} initial states for {len(ends) - 1} sequences; give one for each")
    return [T - e for e in reversed(ends)] if reverse else ends


def _scan(rule: Rule, signals: dict[str, Tensor], W: Tensor | None, keep_state: bool, ends: list[int]) -> tuple[Tensor, Tensor]:
    if not ends:
        return scan(rule, state=W, **signals)
    if W is None and not keep_state:  # one pass, in which W returns to zero
        T = signals["v"].shape[1]
        reset = torch.zeros(1, T, dtype=torch.bool, device=signals["v"].device)
        reset[0, [e for e in ends[:-1] if e < T]] = True
        return scan(rule, reset=reset, **signals)
    found = [
        scan(rule, state=None if W is None else W[i : i + 1], **{n: x[:, a:b] for n, x in signals.items()})
        for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False))
    ]
    return torch.cat([f.y for f in found], 1), torch.cat([f.state for f in found], 0)
