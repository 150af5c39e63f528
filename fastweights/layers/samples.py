"""Samples of a path as a layer meets them: with times, missing values, documents, and a state between calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..language.errors import SignalError
from .interpolation import Pieces, causal, filled_between, filled_forward, natural, require_increasing, seconds

State = dict[str, Tensor]


class Samples(NamedTuple):
    """Samples x (B, T, C) without missing values; which begin a document, ``first`` (B, T); what leads to them; the state after them.

    As many ``pieces`` of the path lead to each sample, and those to a first one take no time.
    """

    x: Tensor
    first: Tensor
    pieces: Pieces
    state: State


def gathered(path: str, x: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None, times: Tensor | None) -> Samples:
    """Samples x (B, T, C) on a path of a kind (see ``interpolate``), after those of ``state``, in at least float32.

    The state, with the batch first, is the last sample ``x``, its ``time``, how many ``samples`` its document has so far, and its
    ``slope`` (``hermite``). It is empty if the path looked ahead: ``natural``, or values missing where no later sample fills them.

    Raises:
        SignalError: the path looks ahead and state or reset is given; the state is empty or of another batch; times do not increase.

    >>> samples = gathered("linear", torch.tensor([[[0.0], [2.0]]]), None, None, torch.tensor([0.0, 4.0]))
    >>> samples.pieces.values(torch.tensor([[[0.0], [1.0]]])).flatten().tolist(), samples.state["time"].item()
    ([0.0, 0.5], 4.0)
    """
    if reset is not None and (not isinstance(reset, Tensor) or reset.dtype != torch.bool or reset.shape != x.shape[:2]):
        found = f"{reset.dtype} {tuple(reset.shape)}" if isinstance(reset, Tensor) else type(reset).__name__
        raise SignalError(f"reset is {found}, expected a bool tensor (B, T) = {tuple(x.shape[:2])}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    missing = path != "rectilinear" and bool(x.isnan().any())
    if path != "natural" and not missing:
        return _onward(path, x, state, reset, times)
    if state is not None or reset is not None:
        given = "reset" if state is None else "state"
        why = "depends on all samples" if path == "natural" else "fills the missing values of x from later samples"
        raise SignalError(
            f"path={path!r} {why}, so {given} has no meaning; use 'rectilinear', which looks at none ahead, or a whole document"
        )
    return _ahead(path, x, times)._replace(state={})


def kept_bytes(path: str, channels: int) -> int:
    """Bytes of the state for one sequence in float32."""
    return 0 if path == "natural" else 16 + 4 * channels * (2 if path == "hermite" else 1)


def _ahead(path: str, x: Tensor, times: Tensor | None) -> Samples:
    """Samples of one document from its beginning, each of which may depend on all."""
    clock = seconds(times, x)
    require_increasing(clock[:, 1:], clock.diff(dim=1) > 0)
    if path != "natural" or x.shape[1] < 2:
        return _onward("linear" if path == "natural" else path, filled_between(x, clock) if x.shape[1] else x, None, None, times)
    taken, cubics = natural(x, clock)
    last = Pieces(taken[:, -1:], cubics[:, -1:]).values(taken[:, -1:, None]).squeeze(2)
    x = torch.cat([cubics[:, :, 0], last], 1)
    standing = torch.cat([x[:, :1, None], torch.zeros_like(cubics[:, :1, 1:])], 2)
    pieces = Pieces(torch.cat([torch.zeros_like(taken[:, :1]), taken], 1), torch.cat([standing, cubics], 1))
    return Samples(x, torch.zeros_like(clock, dtype=torch.bool), pieces, {})


def _onward(path: str, x: Tensor, state: Mapping[str, Tensor] | None, reset: Tensor | None, times: Tensor | None) -> Samples:
    """Samples that depend on none that is later."""
    B, T, C = x.shape
    last = _begin(path, x) if state is None else state
    if "samples" not in last:
        raise SignalError(
            f"the state holds {', '.join(last)} alone: the call that made it looked ahead (missing values, or path='natural'), and no "
            "other goes on from there; use path='rectilinear', or pass the whole sequence"
        )
    if last["x"].shape != (B, C):
        raise SignalError(f"the state is of {last['x'].shape[0]} rows of {last['x'].shape[1]} channels, but x is {(B, T, C)}")
    begun = last["samples"] > 0
    first = torch.zeros(B, T, dtype=torch.bool, device=x.device) if reset is None else reset
    first = torch.cat([first[:, :1] | ~begun[:, None], first[:, 1:]], 1)
    clock = seconds(times, x) + (torch.where(begun, last["time"] + 1, 0)[:, None] if times is None else 0)
    if path == "rectilinear":
        x = filled_forward(x, last["x"], first)
    all_x, all_clock = torch.cat([last["x"][:, None], x], 1), torch.cat([last["time"][:, None], clock], 1)
    before, dt = torch.where(first[..., None], x, all_x[:, :-1]), clock - all_clock[:, :-1]
    require_increasing(clock, first | (dt > 0))
    dt = torch.where(first, 0, dt)
    index = torch.arange(T, device=x.device)
    opening = torch.cat([-last["samples"][:, None], torch.where(first, index, -last["samples"][:, None])], 1).cummax(1).values
    new = {"x": all_x[:, -1], "time": all_clock[:, -1], "samples": T - opening[:, -1]}
    start = torch.zeros_like(x)
    if path == "hermite":
        slope = (x - before) / torch.where(first, 1, dt).to(x.dtype)[..., None]
        all_slopes = torch.cat([last["slope"][:, None], slope], 1)
        start = torch.where((index - opening[:, 1:] > 1)[..., None], all_slopes[:, :-1], slope)  # a second sample has none before it
        new["slope"] = all_slopes[:, -1]
    return Samples(x, first, causal(path, before, x, dt, start), new)


def _begin(path: str, x: Tensor) -> State:
    """The state before the first sample."""
    B, _, C = x.shape
    none = {"x": x.new_zeros(B, C), "time": x.new_zeros(B, dtype=torch.float64), "samples": x.new_zeros(B, dtype=torch.int64)}
    return none | ({"slope": none["x"]} if path == "hermite" else {})
