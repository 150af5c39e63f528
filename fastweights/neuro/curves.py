"""Measured points over an analytic curve: how far off they are at most, as a finding, as rows of a table, and as drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..experiments.experiment import Finding, Source
from ..plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXACT = 1e-10  # what rounding in double precision may leave of an equality
SIGMAS = 5.0  # what sampling may leave: standard errors, known from theory, that the worst of some hundred points may be off


@dataclass(frozen=True)
class Curve:
    """``expected`` from theory and ``measured`` (a run a seed) at ``x``; ``error`` is the standard error that theory gives a run, if any.

    ``line`` is the theory at more points, for drawing.

    >>> Curve("V", [0, 1], [0.0, 0.5], [[0.0, 0.5]]).finding().passed
    True
    """

    label: str
    x: Sequence[float]
    expected: Sequence[float]
    measured: Sequence[Sequence[float]]
    error: Sequence[float] | None = None
    line: tuple[Sequence[float], Sequence[float]] | None = None

    def deviation(self, relative: bool = False) -> list[float]:
        """Of each run, the largest |measured - expected|: as it is, relative to ``expected``, or in standard errors if there are any."""
        scale = self.error or [abs(e) if relative else 1.0 for e in self.expected]
        return [max(abs(m - e) / s for m, e, s in zip(run, self.expected, scale, strict=True)) for run in self.measured]

    def finding(self, high: float | None = None, relative: bool = False, source: Source = "exact") -> Finding:
        """The largest deviation, of which ``high`` is allowed: rounding, or ``SIGMAS`` standard errors, if not given."""
        unit = ", in standard errors" if self.error else ", relative" if relative else ""
        high = (SIGMAS if self.error else EXACT) if high is None else high
        return Finding(f"{self.label}: largest deviation from its curve{unit}", self.deviation(relative), "0", high=high, source=source)

    def rows(self) -> list[Mapping[str, Any]]:
        """A row for every x: what is expected, and the mean over runs of what was measured."""
        columns = list(zip(*self.measured, strict=True))
        return [
            {"curve": self.label, "x": float(x), "expected": float(e), "measured": float(sum(column) / len(column))}
            for x, e, column in zip(self.x, self.expected, columns, strict=True)
        ]

    def draw(self, axes: Axes, colour: int = 0, every: int = 1, label: str = "", style: str = "-", marker: str = "o") -> None:
        """The theory as a line, every ``every``-th point of each run as a dot."""
        line = self.line or (self.x, self.expected)
        axes.plot(*line, style, color=COLOURS[colour], lw=1.5, label=label or self.label)
        for run in self.measured:
            axes.plot(self.x[::every], run[::every], marker, color=COLOURS[colour], ms=4, mec="white", mew=0.4)


def rows(*curves: Curve) -> list[Mapping[str, Any]]:
    """The table of some curves."""
    return [row for curve in curves for row in curve.rows()]


def slope(x: Sequence[float], y: Sequence[float], low: float, high: float) -> float:
    """Of the line of least squares through the points with low <= x <= high.

    >>> slope([0, 1, 2, 3], [0, 2, 4, 0], 0, 2)
    2.0
    """
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if low <= a <= high]
    mx, my = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
    return sum((a - mx) * (b - my) for a, b in pairs) / sum((a - mx) ** 2 for a, _ in pairs)
