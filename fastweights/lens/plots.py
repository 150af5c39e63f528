"""One figure of what was seen: a panel a measure, a colour a layer, a thin line a head."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..language.errors import FastWeightError, FormError
from ..plots import COLOURS, figure, save_figure
from .seen import Seen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 150  # a line has at most, each the mean of as many tokens as that takes
_PLAIN = 20  # largest to small numbers that a plain axis shows
_DIGITS = 1e-6  # singular values below this share of the largest are rounding


def plot(seen: Seen, path: str | Path, *, layer: int = 0, head: int = 0) -> None:
    """Draw all measures to a file (PNG, PDF or SVG); the attention is that of one head of a layer.

    Thick lines are means over the heads of a layer, thin lines single heads. Of long texts each point is a mean over several tokens.

    >>> import tempfile
    >>> from fastweights import lens
    >>> from fastweights.models import LanguageModel, ModelConfig
    >>> seen = lens.look(LanguageModel(ModelConfig(layers=("delta",), d_model=16, heads=2)), "to be or not to be")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lens.plot(seen, f"{folder}/seen.png")
    """
    path = Path(path)
    made = drawn(seen, layer, head)
    known = made.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise FastWeightError(f"the figure's file is {path.name!r}, expected one that ends in .{', .'.join(sorted(known))}")
    save_figure(made, path)


def drawn(seen: Seen, layer: int, head: int) -> Figure:
    """The figure, not yet in a file."""
    made, panels = figure(8, width=2.0, height=7.2)
    for axes, cell in zip(panels, made.add_gridspec(2, 4), strict=True):  # two rows of four
        axes.set_subplotspec(cell)
    _lines(panels[0], seen, seen.norms, "size of the memory", r"$|W_t|$")
    _lines(panels[1], seen, seen.writes, "what each token changed", r"$|W_t - W_{t-1}|$")
    _kept(panels[2], seen)
    _errors(panels[3], seen)
    _lines(panels[4], seen, seen.ranks, "directions in use", f"effective rank (of {seen.spectra.shape[-1]})", seen.at)
    _spectra(panels[5], seen)
    _ages(panels[6], seen)
    _attention(panels[7], seen, layer, head)
    colours = _colours(seen)
    handles = [made.axes[0].plot([], [], color=c, lw=2)[0] for c in colours]
    labels = [f"layer {i}: {n}" for i, n in zip(seen.layers, seen.names, strict=True)]
    made.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6), frameon=False)
    return made


def _colours(seen: Seen) -> list[Any]:
    n = len(seen.layers)
    if n <= len(COLOURS):
        return list(COLOURS[:n])
    import matplotlib as mpl

    return [mpl.colormaps["viridis"](i / (n - 1)) for i in range(n)]


def _averaged(x: Tensor, bins: int = _POINTS) -> tuple[Tensor, int]:
    """Means over stretches of the last axis, without what is NaN, and how many tokens each is of."""
    width = max(math.ceil(x.shape[-1] / bins), 1)
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % width), value=torch.nan)
    return padded.unflatten(-1, (-1, width)).nanmean(-1), width


def _lines(
    axes: Axes, seen: Seen, values: Tensor, title: str, label: str, at: Tensor | None = None, style: str = "-", heads: bool = True
) -> None:
    """(layers, heads, T) against the token, or against the tokens ``at``."""
    width = 1
    if at is None:
        values, width = _averaged(values)
        at = torch.arange(values.shape[-1]) * width + (width - 1) / 2
    _scale(axes, values.nanmean(1))
    marker = "." if len(at) == 1 else None
    for colour, of_layer in zip(_colours(seen), values, strict=True):
        if heads:
            axes.plot(at.numpy(), of_layer.T.numpy(), color=colour, lw=0.6, alpha=0.35)
        axes.plot(at.numpy(), of_layer.nanmean(0).numpy(), style, color=colour, lw=1.6, marker=marker)
    axes.set_title(title)
    axes.set_xlabel("token" if width == 1 else f"token (means of {width})")
    axes.set_ylabel(label)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e3:g}k" if abs(x) >= 1e4 else f"{x:g}")


def _scale(axes: Axes, values: Tensor) -> None:
    """Logarithmic where numbers above 0 differ more than a plain axis can show."""
    shown = values[values > 0]
    if shown.numel() and float(shown.max() / shown.quantile(0.1)) > _PLAIN:
        axes.set_yscale("log")


def _kept(axes: Axes, seen: Seen) -> None:
    title = "what each token left of the memory"
    if bool(seen.kept.isnan().all()):
        return _told(axes, title, "no rule here is affine in W" if len(seen.ids) > 1 else "there was no memory before the only token")
    _lines(axes, seen, seen.kept, title, r"share of $W_{t-1}$ kept")


def _errors(axes: Axes, seen: Seen) -> None:
    title, label = "retrieval error at the key", r"$|v - W k|\ /\ |v|$"
    if bool(seen.errors.before.isnan().all()):
        return _told(axes, title, "no rule here has both a key and a value")
    _lines(axes, seen, seen.errors.before, title, label, style="--", heads=False)
    _lines(axes, seen, seen.errors.after, title, label, heads=False)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    handles = [axes.plot([], [], s, color="0.3", lw=1.6)[0] for s in ("--", "-")]
    axes.legend(handles, ["before the write", "after it"], frameon=False)


def _spectra(axes: Axes, seen: Seen) -> None:
    last = seen.spectra[:, :, -1]
    last = torch.where(last > _DIGITS * last.amax(-1, keepdim=True), last, torch.nan)
    number = range(1, last.shape[-1] + 1)
    for colour, of_layer in zip(_colours(seen), last, strict=True):
        axes.plot(number, of_layer.T.numpy(), color=colour, lw=0.6, alpha=0.35)
        axes.plot(number, of_layer.log().mean(0).exp().numpy(), ".-", color=colour, lw=1.6, ms=4)
    if not bool(last.isnan().all()):
        axes.set_yscale("log")
    axes.set_title(f"spectrum after token {int(seen.at[-1])}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("singular value, by size")
    axes.set_ylabel(r"$\sigma_i$ of $W_t$")


def _ages(axes: Axes, seen: Seen) -> None:
    title = "age of what is recalled"
    shown = _or_why(lambda: seen.ages)
    if isinstance(shown, str):
        return _told(axes, title, shown)
    _lines(axes, seen, shown, title, f"mean age (tokens), of the last {min(seen.window, len(seen.ids))}")
    axes.set_yscale("linear")
    axes.set_ylim(bottom=0)


def _attention(axes: Axes, seen: Seen, layer: int, head: int) -> None:
    title = f"effective attention, layer {seen.layers[layer]} head {head}" if layer < len(seen.layers) else "effective attention"
    A = _or_why(lambda: seen.attention(layer, head))
    if isinstance(A, str):
        return _told(axes, title, A)
    first, last = len(seen.ids) - len(A), len(seen.ids)
    from matplotlib.colors import SymLogNorm

    top = float(A.abs().max()) or 1.0
    corners = (first - 0.5, last - 0.5, last - 0.5, first - 0.5)
    norm = SymLogNorm(linthresh=top / 100, linscale=0.5, vmin=-top, vmax=top)
    image = axes.imshow(A.numpy(), cmap="RdBu_r", norm=norm, extent=corners, interpolation="nearest")
    axes.grid(False)
    axes.figure.colorbar(image, ax=axes, shrink=0.8, ticks=[-top, -top / 10, 0, top / 10, top], format="{x:.2g}")
    axes.set_title(title)
    axes.set_xlabel("token recalled")
    axes.set_ylabel("token that recalls")


def _or_why(what: Callable[[], Tensor]) -> Tensor | str:
    try:
        return what()
    except FormError as error:
        return str(error)


def _told(axes: Axes, title: str, text: str) -> None:
    """A panel that says why it is empty."""
    import textwrap

    axes.set_title(title)
    axes.set_axis_off()
    axes.text(0.5, 0.5, textwrap.fill(text, 34), ha="center", va="center", transform=axes.transAxes, fontsize=8)
