"""Paths through irregular samples with missing values: linear, rectilinear, cubic Hermite, natural cubic; as cubics, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..language.errors import SignalError, SignalTypeError

KINDS = ("linear", "hermite", "rectilinear", "natural")


class Pieces(NamedTuple):
    """A path, piece by piece: ``seconds`` (B, P) that each takes, and its cubic x(s) = sum_p c_p s^p, ``coefficients`` (B, P, 4, C)."""

    seconds: Tensor
    coefficients: Tensor

    def values(self, s: Tensor) -> Tensor:
        """x at ``s`` (B, P, N) seconds into each piece: (B, P, N, C)."""
        a, b, c, d = self.coefficients.unsqueeze(2).unbind(-2)
        s = s.to(a.dtype).unsqueeze(-1)
        return a + s * (b + s * (c + s * d))

    def slopes(self, s: Tensor) -> Tensor:
        """dx/dt there."""
        _, b, c, d = self.coefficients.unsqueeze(2).unbind(-2)
        s = s.to(b.dtype).unsqueeze(-1)
        return b + s * (2 * c + 3 * s * d)

    def at(self, index: Any) -> Pieces:
        """Those of the given numbers."""
        return Pieces(self.seconds[:, index], self.coefficients[:, index])


@dataclass(frozen=True, eq=False)
class Path:
    """x(t): ``path(t)``, and dx/dt: ``path.derivative(t)``, with t in seconds: a number, (N,), or (B, N). Made by ``interpolate``.

    Both are (B, N, C), or (B, C) for a number. Where the derivative jumps, it is the one that follows. ``knots`` (B, P + 1) are the
    times at which the ``pieces`` begin and end; a time before the first or after the last is refused.
    """

    knots: Tensor
    pieces: Pieces

    def __call__(self, t: Tensor | float) -> Tensor:
        return self._read(t, Pieces.values)

    def derivative(self, t: Tensor | float) -> Tensor:
        return self._read(t, Pieces.slopes)

    def _read(self, t: Tensor | float, how: Any) -> Tensor:
        B, at = self.knots.shape[0], torch.as_tensor(t, dtype=torch.float64, device=self.knots.device)
        if at.ndim > 2 or (at.ndim == 2 and at.shape[0] != B):
            raise SignalError(f"t is {tuple(at.shape)}, expected a number, (N,), or (B, N) with B = {B}")
        s = at.expand(B, *(at.shape[-1:] or (1,))).contiguous()
        if bool(((s < self.knots[:, :1]) | (s > self.knots[:, -1:]) | s.isnan()).any()):
            first, last = self.knots[:, 0].max().item(), self.knots[:, -1].min().item()
            raise SignalError(f"t reaches from {s.min().item():g} to {s.max().item():g} s, but the path only from {first:g} to {last:g} s")
        index = (torch.searchsorted(self.knots, s, right=True) - 1).clamp(max=self.knots.shape[1] - 2)
        row = torch.arange(B, device=s.device).unsqueeze(1)
        there = Pieces(self.pieces.seconds[row, index], self.pieces.coefficients[row, index])
        found = how(there, (s - self.knots[row, index]).unsqueeze(-1)).squeeze(2)
        return found if at.ndim else found.squeeze(1)


def interpolate(x: Tensor, times: Tensor | None = None, kind: str = "linear") -> Path:
    """The path through samples x (B, T, C) at ``times``, seconds, (T,) or (B, T), increasing; 0, 1, 2, ... by default.

    * ``linear``: straight from sample to sample.
    * ``hermite``: cubic; the slope at a sample is that from the one before it (backward differences), so that a path up to a sample
      depends on no later one, as with ``linear``.
    * ``rectilinear``: between two samples, x waits for the first half of the time and goes on straight in the second.
    * ``natural``: the cubic spline with two continuous derivatives and no curvature at its ends. It depends on all samples.

    A missing value is NaN. ``rectilinear`` holds the last one seen of that channel (zero before the first), so that nothing depends on
    later samples. The other kinds go through those that are there: ``linear`` and ``hermite`` along a straight line, ``natural`` along
    its spline, constant before the first and after the last, and zero in a channel without any.

    Raises:
        SignalError: ``times`` do not increase, or shapes do not fit.

    Source: Kidger, Morrill, Foster and Lyons 2020, NeurIPS; Morrill et al. 2022 (On the choice of interpolation scheme).

    >>> path = interpolate(torch.tensor([[[0.0], [float("nan")], [6.0]]]), torch.tensor([0.0, 1.0, 3.0]))
    >>> path(1.0).item(), path.derivative(1.0).item()
    (2.0, 2.0)
    """
    if kind not in KINDS:
        raise SignalError(f"path is {kind!r}; known: {', '.join(KINDS)}")
    if not isinstance(x, Tensor) or x.ndim != 3 or not x.is_floating_point() or x.shape[1] == 0:
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise SignalError(f"x is {found}, expected a tensor (B, T, C) of at least one sample, missing values as NaN")
    times = seconds(times, x)
    dt = times.diff(dim=1)
    require_increasing(times[:, 1:], dt > 0)
    if x.shape[1] == 1:
        return Path(times.expand(-1, 2).contiguous(), Pieces(torch.zeros_like(times), _line(torch.where(x.isnan(), 0, x))))
    if kind == "natural":
        return Path(times.contiguous(), natural(x, times))
    if kind == "rectilinear":
        x = filled_forward(x, torch.zeros_like(x[:, 0]), torch.zeros_like(times, dtype=torch.bool))
    elif bool(x.isnan().any()):
        x = filled_between(x, times)
    slope = _slope(x[:, :-1], x[:, 1:], dt)
    pieces = causal(kind, x[:, :-1], x[:, 1:], dt, torch.cat([slope[:, :1], slope[:, :-1]], 1))
    parts = pieces.seconds.shape[1] // dt.shape[1]
    inner = torch.arange(parts, device=x.device) / parts
    return Path(torch.cat([(times[:, :-1, None] + dt[..., None] * inner).flatten(1), times[:, -1:]], 1), pieces)


def seconds(times: Any, x: Tensor) -> Tensor:
    """Times of samples x (B, T, C) as float64 (B, T)."""
    B, T = x.shape[:2]
    if times is None:
        return torch.arange(T, dtype=torch.float64, device=x.device).expand(B, T)
    if not isinstance(times, Tensor) or times.is_complex() or times.dtype == torch.bool:
        found = times.dtype if isinstance(times, Tensor) else type(times).__name__
        raise SignalTypeError(f"times is {found}, expected a tensor of seconds")
    if tuple(times.shape) not in ((T,), (B, T)):
        raise SignalError(f"times is {tuple(times.shape)}, expected (T,) or (B, T) with B = {B}, T = {T}")
    if times.requires_grad:
        raise SignalError("times takes no gradient; pass times.detach()")
    if not bool(times.isfinite().all()):
        raise SignalError("times has NaN or infinite values; a sample without a time is left out, and a missing value is NaN in x")
    return times.to(x.device, torch.float64).expand(B, T)


def require_increasing(times: Tensor, fine: Tensor) -> None:
    """The first time (B, T) that is not ``fine`` is told."""
    if not bool(fine.all()):
        row, i = (~fine).nonzero()[0].tolist()
        raise SignalError(
            f"times must increase from sample to sample, but in row {row} a sample at {times[row, i].item():g} s is not later than the "
            "one before it; sort the samples, and merge those of one moment"
        )


def causal(kind: str, before: Tensor, x: Tensor, dt: Tensor, start: Tensor) -> Pieces:
    """The pieces from samples ``before`` to the next ones x (B, T, C) in dt (B, T) seconds; ``start`` are the slopes at ``before``."""
    if kind == "hermite":
        return Pieces(dt, _cubic(before, x, dt, start, _slope(before, x, dt)))
    if kind == "linear":
        return Pieces(dt, _line(before, _slope(before, x, dt)))
    half = dt / 2
    both = [_line(before), _line(before, _slope(before, x, half))]
    return Pieces(half.repeat_interleave(2, 1), torch.stack(both, 2).flatten(1, 2))


def _slope(before: Tensor, x: Tensor, dt: Tensor) -> Tensor:
    """Zero where no time passes, and x is the same."""
    return (x - before) / torch.where(dt > 0, dt, 1).to(x.dtype).unsqueeze(-1)


def _line(x0: Tensor, slope: Tensor | None = None) -> Tensor:
    """Coefficients (..., 4, C) of a line from x0; it is level without a slope."""
    zero = torch.zeros_like(x0)
    return torch.stack([x0, zero if slope is None else slope, zero, zero], -2)


def _cubic(x0: Tensor, x1: Tensor, dt: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Those of the cubic from x0 to x1 that starts and ends with given slopes."""
    h, mean = torch.where(dt > 0, dt, 1).to(x0.dtype).unsqueeze(-1), _slope(x0, x1, dt)
    return torch.stack([x0, start, (3 * mean - 2 * start - end) / h, (start + end - 2 * mean) / h**2], -2)


def natural(x: Tensor, times: Tensor) -> Pieces:
    """The natural cubic spline of samples x (B, T, C), T >= 2, at times (B, T), over those that are not NaN."""
    dt = times.diff(dim=1)
    if not bool(x.isnan().any()):
        slope = _natural_slopes(x, dt)
        return Pieces(dt, _cubic(x[:, :-1], x[:, 1:], dt, slope[:, :-1], slope[:, 1:]))
    B, T, C = x.shape
    rows, clocks = x.mT.reshape(B * C, T), times.repeat_interleave(C, 0)
    pieces = torch.zeros(B * C, T - 1, 4, 1, dtype=x.dtype, device=x.device)
    patterns, which = (~rows.isnan()).unique(dim=0, return_inverse=True)
    for n, pattern in enumerate(patterns):
        there, members = pattern.nonzero().flatten(), (which == n).nonzero().flatten()
        if len(there):
            pieces = pieces.index_copy(0, members, _through(rows[members][:, there, None], clocks[members], there))
    return Pieces(dt, pieces.reshape(B, C, T - 1, 4).permute(0, 2, 3, 1))


def _through(x: Tensor, times: Tensor, there: Tensor) -> Tensor:
    """The spline through samples x that are there, as one cubic from each of all times to the next: (B, T - 1, 4, 1)."""
    path = interpolate(x, times[:, there], "natural")
    inside = times.clamp(times[:, there[:1]], times[:, there[-1:]])
    value, slope = path(inside), path.derivative(inside)
    first = torch.arange(times.shape[1] - 1, device=x.device)
    spanned = ((first >= there[0]) & (first < there[-1]))[:, None]
    return _cubic(value[:, :-1], value[:, 1:], times.diff(dim=1), slope[:, :-1] * spanned, slope[:, 1:] * spanned)


def _natural_slopes(x: Tensor, dt: Tensor) -> Tensor:
    """Slopes (B, T, C) at the samples: the curvatures m solve a tridiagonal system, by elimination.

    h_{i-1} m_{i-1} + 2 (h_{i-1} + h_i) m_i + h_i m_{i+1} = 6 (slope_i - slope_{i-1}), and m is zero at both ends.
    """
    h, mean = dt.to(x.dtype).unsqueeze(-1), _slope(x[:, :-1], x[:, 1:], dt)
    upper, right = [torch.zeros_like(h[:, 0])], [torch.zeros_like(x[:, 0])]
    for i in range(1, x.shape[1] - 1):
        pivot = 2 * (h[:, i - 1] + h[:, i]) - h[:, i - 1] * upper[-1]
        upper.append(h[:, i] / pivot)
        right.append((6 * (mean[:, i] - mean[:, i - 1]) - h[:, i - 1] * right[-1]) / pivot)
    curved = [torch.zeros_like(x[:, 0])]
    for u, r in zip(reversed(upper), reversed(right), strict=True):
        curved.append(r - u * curved[-1])
    m = torch.stack(curved[::-1], 1)
    return torch.cat([mean - h * (2 * m[:, :-1] + m[:, 1:]) / 6, mean[:, -1:] + h[:, -1:] * (m[:, -2:-1] + 2 * m[:, -1:]) / 6], 1)


def filled_forward(x: Tensor, last: Tensor, first: Tensor) -> Tensor:
    """Every NaN of x (B, T, C) is the last value seen of its channel: ``last`` (B, C) before x, zero since a ``first`` (B, T) sample."""
    place = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
    seen = (place * ~x.isnan()).cummax(1).values
    begun = (place * first.unsqueeze(-1)).cummax(1).values
    found = torch.cat([last.unsqueeze(1), x], 1).gather(1, seen)
    return torch.where((begun > 0) & (seen < begun), 0, found)


def filled_between(x: Tensor, times: Tensor) -> Tensor:
    """Every NaN of x (B, T, C) on a straight line between the values before and after it; constant at the ends, zero without any."""
    T, there = x.shape[1], ~x.isnan()
    place = torch.arange(T, device=x.device)[:, None].expand_as(x)
    before = torch.where(there, place, -1).cummax(1).values
    after = torch.where(there, place, T).flip(1).cummin(1).values.flip(1)
    left, right = torch.where(before < 0, after, before).clamp(max=T - 1), torch.where(after == T, before, after).clamp(min=0)
    clock, x = times.unsqueeze(-1).expand_as(x), torch.where(there, x, 0)
    span = clock.gather(1, right) - clock.gather(1, left)
    share = ((clock - clock.gather(1, left)) / torch.where(span > 0, span, 1) * (span > 0)).to(x.dtype)
    return x.gather(1, left) + share * (x.gather(1, right) - x.gather(1, left))
