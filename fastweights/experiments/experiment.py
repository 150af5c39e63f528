"""What an experiment is: a claim, a function that measures it, and findings that say whether it holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..language.errors import FastWeightError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Size = Literal["quick", "default", "full"]
SIZES: tuple[Size, ...] = ("quick", "default", "full")
# where an expected number comes from: a closed form, the authors' logs or code, print; or only the order of models is the claim
Source = Literal["exact", "log", "paper", "order"]
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One measured number beside the one expected; it holds where every seed's number, or the mean's interval, lies in the range.

    ``measured`` has a number a seed. ``low`` and ``high`` bound what the claim allows, decided before anything was run.

    >>> Finding("accuracy of delta", [1.0, 1.0], "1.00", low=0.99).passed
    True
    """

    what: str
    measured: Sequence[float]
    expected: str
    low: float = -math.inf
    high: float = math.inf
    source: Source = "exact"

    @property
    def mean(self) -> float:
        return sum(self.measured) / len(self.measured)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the mean, 95 %, by Student's t over seeds; of no width with one seed."""
        n = len(self.measured)
        if n < 2:
            return self.mean, self.mean
        spread = math.sqrt(sum((x - self.mean) ** 2 for x in self.measured) / (n - 1) / n)
        half = _STUDENT[min(n - 1, len(_STUDENT)) - 1] * spread
        return self.mean - half, self.mean + half

    @property
    def passed(self) -> bool:
        return self.low <= self.mean <= self.high


# the 97.5th percentile of Student's t, of 1, 2, ... degrees of freedom
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


@dataclass(frozen=True)
class Result:
    """What an experiment found: findings, a table (a row a dictionary), a figure, and what must be known to read them."""

    findings: Sequence[Finding]
    table: Sequence[Mapping[str, Any]]
    figure: Figure
    notes: str = ""

    @property
    def passed(self) -> bool:
        return all(f.passed for f in self.findings)


@dataclass(frozen=True)
class Setting:
    """How large an experiment is run, with which seeds, and where it tells its progress.

    >>> Setting("quick").pick(quick=10, default=100, full=1000)
    10
    """

    size: Size = "default"
    seeds: int = 3
    tell: Callable[[str], None] = lambda text: None
    record: Callable[[Mapping[str, Any]], None] = lambda line: None  # a line of metrics.jsonl

    def pick(self, *, quick: T, default: T, full: T) -> T:
        """The value for this size."""
        return {"quick": quick, "default": default, "full": full}[self.size]

    def each_seed(self) -> Iterator[int]:
        yield from range(self.seeds)


@dataclass(frozen=True)
class Experiment:
    """A claim about fast weights as something that runs; made by the decorator ``experiment``."""

    name: str
    section: str
    claim: str
    cite: str
    run: Callable[[Setting], Result]
    seconds: Mapping[Size, float] = field(default_factory=dict)  # measured, on two cores

    @property
    def page(self) -> str:
        """What is done, how, and by which conventions: the docstring of its function."""
        lines = (self.run.__doc__ or "").strip().splitlines()
        return "\n".join(line.strip() for line in lines)


EXPERIMENTS: dict[str, Experiment] = {}


def experiment(
    *, section: str, claim: str, cite: str, quick: float, default: float, full: float, name: str = ""
) -> Callable[[Callable[[Setting], Result]], Experiment]:
    """Make an experiment of a function, named after it; ``quick``, ``default`` and ``full`` are the seconds that each size takes."""

    def made(run: Callable[[Setting], Result]) -> Experiment:
        called = name or run.__name__.replace("_", "-")
        if called in EXPERIMENTS and EXPERIMENTS[called].run.__module__ != run.__module__:
            raise FastWeightError(f"there are two experiments {called!r}")
        found = Experiment(called, section, claim, cite, run, {"quick": quick, "default": default, "full": full})
        EXPERIMENTS[called] = found
        return found

    return made
