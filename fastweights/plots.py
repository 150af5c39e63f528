"""Figures: colour-blind safe, labelled with units, readable in print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "figure.constrained_layout.use": True, "savefig.dpi": 150,
}  # fmt: skip


def figure(columns: int = 1, width: float = 6.0, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """A figure of a row of axes, drawn without a display."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        made = Figure(figsize=(width * columns, height))
        FigureCanvasAgg(made)
        axes = made.subplots(1, columns, squeeze=False)[0]
    return made, list(axes)


def save_figure(made: Figure, path: Path) -> None:
    import matplotlib as mpl

    from .models.files import write_atomically

    with mpl.rc_context(_STYLE):
        write_atomically(path, lambda p: made.savefig(p, format=path.suffix[1:]))


def loss_curve(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, unit: str = "bits per byte") -> None:
    """Training loss (thin, an average over about 20 steps) and validation (dots) of one or more runs against tokens seen."""
    made, (axes,) = figure()
    draw_losses(axes, runs, unit)
    save_figure(made, path)


def draw_losses(axes: Axes, runs: Mapping[str, Sequence[Mapping[str, Any]]], unit: str) -> None:
    import math

    for colour, (name, lines) in zip(COLOURS * 9, runs.items(), strict=False):
        steps = [(x["tokens"], x["loss"] / math.log(2)) for x in lines if "loss" in x]
        tokens_at = {x["step"]: x["tokens"] for x in lines if "tokens" in x}
        checked = [(tokens_at[x["step"]], x["validation_bits"]) for x in lines if "validation_bits" in x and x["step"] in tokens_at]
        if steps:
            axes.plot([x for x, _ in steps], smoothed([y for _, y in steps]), color=colour, lw=1, alpha=0.6, label=f"{name}, training")
        if checked:
            axes.plot(*zip(*checked, strict=True), "o-", color=colour, ms=4, lw=1.5, label=f"{name}, validation")
    axes.set_xlabel("tokens seen")
    axes.set_ylabel(f"loss ({unit})")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x else "0")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def smoothed(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """An exponential average, without the bias of its start."""
    out, total, weight = [], 0.0, 0.0
    for v in values:
        total, weight = keep * total + (1 - keep) * v, keep * weight + (1 - keep)
        out.append(total / weight)
    return out
