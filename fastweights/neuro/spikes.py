"""Spike trains and pairing protocols in seconds and hertz, and how they become the signals of a rule at a step dt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..language.errors import SignalError
from .protocols import steps

_SNAP = 1e-6  # of a step: a time meant to lie on the grid may be off it by rounding


class Spikes(NamedTuple):
    """Rendered spikes of the two sides of a synapse, (T,) each: how many fall into every step."""

    pre: Tensor
    post: Tensor


def _positive(name: str, x: float, unit: str, infinite: bool = False) -> None:
    if not (0 < x < math.inf or (infinite and x == math.inf)):
        raise SignalError(f"{name} is {x}, expected a positive number of {unit}")


def _rate(rate: float) -> None:
    if not 0 <= rate < math.inf:
        raise SignalError(f"rate is {rate}, expected Hz from 0 on")


def _duration(duration: float) -> None:
    if not 0 <= duration < math.inf:
        raise SignalError(f"duration is {duration}, expected seconds from 0 on")


def log_decay(tau: float, dt: float) -> float:
    """The log decay of a step: g = -dt / tau, so that g.exp() is what an exponential of time constant tau keeps; in seconds.

    >>> log_decay(tau=0.02, dt=0.001)
    -0.05
    """
    _positive("tau", tau, "s", infinite=True)
    _positive("dt", dt, "s")
    return -dt / tau


def from_times(times: Iterable[float] | Tensor) -> Tensor:
    """A spike train from its times in seconds: a sorted float64 tensor, (spikes,).

    Raises ``SignalError`` for a time that is negative or not finite.

    >>> from_times([0.3, 0.1]).tolist()
    [0.1, 0.3]
    """
    train = torch.as_tensor(times if isinstance(times, Tensor) else list(times), dtype=torch.float64)
    if train.ndim != 1:
        raise SignalError(f"the times of a spike train are a list of seconds, got a tensor of shape {tuple(train.shape)}")
    if train.numel() and not bool((train.isfinite() & (train >= 0)).all()):
        raise SignalError(f"the times of a spike train are seconds from 0 on, got {train.min().item():g} to {train.max().item():g}")
    return train.sort().values


def regular(rate: float, duration: float, start: float = 0.0) -> Tensor:
    """Spikes at ``start``, ``start + 1 / rate``, ... before ``duration``; rate in hertz, the others in seconds.

    >>> regular(10.0, 0.35).tolist()
    [0.0, 0.1, 0.2, 0.3]
    """
    _rate(rate)
    _duration(duration)
    if not 0 <= start < math.inf:
        raise SignalError(f"start is {start}, expected seconds from 0 on")
    if rate == 0:
        return torch.zeros(0, dtype=torch.float64)
    count = max(math.ceil((duration - start) * rate - _SNAP), 0)
    return start + torch.arange(count, dtype=torch.float64) / rate


def poisson(rate: float, duration: float, generator: torch.Generator) -> Tensor:
    """A Poisson train: the number of spikes is Poisson with mean rate * duration, their times are uniform; hertz and seconds.

    >>> train = poisson(20.0, 100.0, torch.Generator().manual_seed(0))
    >>> 1800 < len(train) < 2200
    True
    """
    _rate(rate)
    _duration(duration)
    count = int(torch.poisson(torch.tensor(rate * duration, dtype=torch.float64), generator=generator))
    return (torch.rand(count, dtype=torch.float64, generator=generator) * duration).sort().values


def render(train: Tensor | Sequence[float], duration: float, dt: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """The number of spikes in every step, (T,): step n holds the times in [n dt, (n + 1) dt), all in seconds.

    An interval between two spikes is so rounded by less than dt, and is exact where both times are multiples of dt.
    Raises ``SignalError`` for spikes that do not lie in [0, duration), ``FastWeightError`` for a duration that is no whole number of steps.

    >>> render([0.001, 0.0035, 0.0036], duration=0.005, dt=0.001).tolist()
    [0.0, 1.0, 0.0, 2.0, 0.0]
    """
    length, times = steps(duration, dt), from_times(train)
    at = (times / dt + _SNAP).floor().to(torch.int64)
    if times.numel() and int(at.max()) >= length:
        raise SignalError(f"a spike at {times.max().item():g} s lies outside the {duration:g} s that are rendered; make duration longer")
    return torch.bincount(at, minlength=length).to(dtype)


def steady(batch: int, length: int, dtype: torch.dtype = torch.float64, **numbers: float | Tensor) -> dict[str, Tensor]:
    """Numbers that do not change, as the scalar signals of a rule: (batch, length, 1) each; a tensor (batch,) has one a row.

    >>> {n: x.shape for n, x in steady(2, 3, beta=0.1, g=-0.05).items()}
    {'beta': torch.Size([2, 3, 1]), 'g': torch.Size([2, 3, 1])}
    """
    return {n: torch.as_tensor(x, dtype=dtype).reshape(-1, 1, 1).expand(batch, length, 1) for n, x in numbers.items()}


@dataclass(frozen=True)
class Pairing:
    """A pairing protocol: ``count`` pairs at ``frequency`` hertz, the postsynaptic spike ``interval`` seconds after the presynaptic.

    A negative interval lets the postsynaptic spike lead. ``rest`` seconds pass before the first spike and after the last.

    >>> p = Pairing(interval=-0.010, frequency=10, count=3)
    >>> p.post.tolist(), [round(t, 3) for t in p.pre.tolist()]
    ([0.0, 0.1, 0.2], [0.01, 0.11, 0.21])
    """

    interval: float
    frequency: float = 1.0
    count: int = 60
    rest: float = 0.0

    def __post_init__(self) -> None:
        _positive("frequency", self.frequency, "Hz")
        if not math.isfinite(self.interval):
            raise SignalError(f"the interval of a pairing is {self.interval}, expected seconds")
        if not isinstance(self.count, int) or self.count < 0:
            raise SignalError(f"the count of a pairing is {self.count!r}, expected a whole number of pairs")
        if not 0 <= self.rest < math.inf:
            raise SignalError(f"the rest of a pairing is {self.rest}, expected seconds from 0 on")

    @property
    def pre(self) -> Tensor:
        """The times of the presynaptic spikes, (count,), in seconds."""
        return self._times(max(-self.interval, 0.0))

    @property
    def post(self) -> Tensor:
        """The times of the postsynaptic spikes, (count,), in seconds."""
        return self._times(max(self.interval, 0.0))

    @property
    def duration(self) -> float:
        """Of the whole protocol, a period for every pair, in seconds."""
        return 2 * self.rest + self.count / self.frequency + abs(self.interval)

    def render(self, dt: float, dtype: torch.dtype = torch.float64) -> Spikes:
        """Both trains at a step of ``dt`` seconds, (T,) each."""
        _positive("dt", dt, "s")
        whole = math.ceil(self.duration / dt - _SNAP) * dt
        return Spikes(render(self.pre, whole, dt, dtype), render(self.post, whole, dt, dtype))

    def _times(self, first: float) -> Tensor:
        return self.rest + first + torch.arange(self.count, dtype=torch.float64) / self.frequency


# 60 pairs at 1 Hz, intervals to 80 ms either way (Bi and Poo 1998, J. Neurosci. 18)
BI_POO_1998 = tuple(Pairing(ms / 1000) for ms in (-80, -60, -40, -30, -20, -15, -10, -5, -2, 2, 5, 10, 15, 20, 30, 40, 60, 80))
# 10 ms either way at 0.1 to 50 Hz (Sjostrom, Turrigiano and Nelson 2001, Neuron 32); their 75 pairs, in 15 bursts of 5, as one train
SJOSTROM_2001 = tuple(Pairing(ms / 1000, hz, 75) for ms in (10, -10) for hz in (0.1, 10.0, 20.0, 40.0, 50.0))
