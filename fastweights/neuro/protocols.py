"""What is done to a subject, as data: conditioning trials, laps on a track, trials with a delay. Each renders to signals in time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..language.errors import FastWeightError


def steps(seconds: float, dt: float) -> int:
    """How many steps of ``dt`` seconds a duration has; it must be a whole number.

    >>> steps(0.3, 0.1)
    3
    """
    if not (dt > 0 and math.isfinite(dt) and seconds >= 0 and math.isfinite(seconds)):
        raise FastWeightError(f"a duration of {seconds} s in steps of {dt} s: expected seconds >= 0 and dt > 0, both finite")
    count = round(seconds / dt)
    if abs(count * dt - seconds) > 1e-6 * dt:
        raise FastWeightError(f"{seconds} s is not a whole number of steps of {dt} s; choose a dt that divides it")
    return count


@dataclass(frozen=True)
class Phase:
    """``rounds`` rounds of trials, each a compound of cues (letters) and ``+`` or ``-`` for the outcome that follows or does not.

    >>> Phase("A+ AB-", 2).kinds
    (('A', True), ('AB', False), ('A', True), ('AB', False))
    """

    trials: str
    rounds: int = 1

    @property
    def kinds(self) -> tuple[tuple[str, bool], ...]:
        """Every trial: its cues, and whether the outcome follows."""
        kinds = self.trials.split()
        for kind in kinds:
            if kind[-1] not in "+-" or not kind[:-1].isalpha() or len(set(kind[:-1])) < len(kind[:-1]):
                raise FastWeightError(f"trial {kind!r} in {self.trials!r}: write the cues, each a letter, and + or -, as in 'AB+'")
        return tuple((kind[:-1], kind[-1] == "+") for kind in kinds) * self.rounds


@dataclass(frozen=True)
class Conditioning:
    """A conditioning experiment: phases one after the other, and the salience of the cues (1 where nothing is said).

    >>> blocking = Conditioning((Phase("A+", 2), Phase("AB+", 1)))
    >>> blocking.cues, blocking.signals(rate=0.1)["k"].squeeze().tolist()
    ('AB', [[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    """

    phases: tuple[Phase, ...]
    salience: Mapping[str, float] | None = None
    outcome: float = 1.0  # lambda, the size of the outcome

    @property
    def kinds(self) -> tuple[tuple[str, bool], ...]:
        return tuple(kind for phase in self.phases for kind in phase.kinds)

    @property
    def cues(self) -> str:
        """The letters of all cues, in order."""
        return "".join(sorted({cue for compound, _ in self.kinds for cue in compound}))

    def scale(self) -> Tensor:
        """The square root of each cue's salience, (K,): its component of the key, and what its weight is multiplied by to give V.

        So the delta rule, ``W += eta (lambda - W k) k^T``, changes ``V_i = W_i k_i`` by ``eta alpha_i (lambda - sum V)``, as
        Rescorla and Wagner have it.
        """
        saliences = [(self.salience or {}).get(cue, 1.0) for cue in self.cues]
        if any(not (a > 0 and math.isfinite(a)) for a in saliences):
            raise FastWeightError(f"the saliences of {self.cues} are {saliences}; they are finite and > 0")
        return torch.tensor(saliences, dtype=torch.float64).sqrt()

    def signals(self, rate: float) -> dict[str, Tensor]:
        """k (1, T, 1, K), the cues present; v (1, T, 1, 1), the outcome; beta (1, T, 1), the rate a trial. Double precision."""
        scale, kinds = dict(zip(self.cues, self.scale().tolist(), strict=True)), self.kinds
        k = torch.tensor([[scale[cue] * (cue in compound) for cue in self.cues] for compound, _ in kinds], dtype=torch.float64)
        v = torch.tensor([self.outcome * follows for _, follows in kinds], dtype=torch.float64)
        return {"k": k[None, :, None], "v": v[None, :, None, None], "beta": torch.full((1, len(kinds), 1), rate, dtype=torch.float64)}


@dataclass(frozen=True)
class Laps:
    """Runs along a track at constant speed, each beginning where the track begins.

    >>> Laps(length=1.0, speed=0.5, count=2).position(0.5).tolist()
    [0.0, 0.25, 0.5, 0.75, 0.0, 0.25, 0.5, 0.75]
    """

    length: float  # m
    speed: float  # m/s
    count: int

    def position(self, dt: float) -> Tensor:
        """Where the animal is at the beginning of every step of ``dt`` seconds, in metres, (T,)."""
        lap = torch.arange(steps(self.length / self.speed, dt), dtype=torch.float64) * dt * self.speed
        return lap.repeat(self.count)

    def places(self, dt: float) -> Tensor:
        """Which step of its lap the animal is in, one-hot, (T, steps a lap): places that it crosses in ``dt`` seconds each."""
        return torch.eye(steps(self.length / self.speed, dt), dtype=torch.float64).repeat(self.count, 1)


def place_cells(position: Tensor, centres: Tensor, width: float) -> Tensor:
    """Rates of cells with Gaussian fields, exp(-(x - c)^2 / (2 width^2)), (..., cells); all in metres.

    >>> place_cells(torch.tensor([0.1]), torch.tensor([0.1, 9.0]), 0.1).tolist()
    [[1.0, 0.0]]
    """
    return torch.exp(-((position.unsqueeze(-1) - centres) ** 2) / (2 * width**2))


@dataclass(frozen=True)
class DelayTrials:
    """Trials of a cue, a silent delay, a probe (a reward, a test), and a rest. Durations are in seconds.

    >>> DelayTrials(cue=0.1, delay=0.2, probe=0.1, rest=0.1).pulses(0.1)["probe"].tolist()
    [0.0, 0.0, 0.0, 1.0, 0.0]
    """

    cue: float
    delay: float
    probe: float
    rest: float = 0.0
    count: int = 1

    def pulses(self, dt: float) -> dict[str, Tensor]:
        """``cue`` and ``probe``: 1 while it lasts and 0 otherwise, (T,)."""
        parts = [steps(seconds, dt) for seconds in (self.cue, self.delay, self.probe, self.rest)]
        part = torch.repeat_interleave(torch.arange(4), torch.tensor(parts)).repeat(self.count)
        return {"cue": (part == 0).double(), "probe": (part == 2).double()}
