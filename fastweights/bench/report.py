"""The tables, the figure and the JSON file of ``fastweights bench``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..engine.kernels import library
from ..models.files import write_atomically
from ..plots import COLOURS, figure, save_figure
from . import models, scans
from .measure import memory

PARTS = ("scans", "decode", "lengths", "memory", "training")


def run(parts: tuple[str, ...], shapes: tuple[str, ...], seconds: float, out: Path, console: Console) -> None:
    found: dict[str, Any] = {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "kernels": library().isa, "shapes": scans.SHAPES,
    }  # fmt: skip
    if not console.is_terminal:
        console.width = 100
    console.print(f"torch {torch.__version__}, {found['threads']} threads, kernels for {found['kernels']}, float32; medians")
    for part in PARTS:
        if part in parts:
            found[part] = _PARTS[part](shapes, seconds, console)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "bench.json", lambda p: p.write_text(json.dumps(found, indent=2)))
    console.print(f"wrote {out / 'bench.json'}", highlight=False)
    if "scans" in found:
        _figure(found["scans"], out / "bench.png")
        console.print(f"wrote {out / 'bench.png'}", highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _scans(shapes: tuple[str, ...], seconds: float, console: Console) -> list[dict[str, Any]]:
    rows = []
    for shape in shapes:
        B, H, T, D = scans.SHAPES[shape]
        title = f"shape {shape}: B{B} H{H} T{T}, {D} x {D}; the others, how many times as long"
        table = _table(title, "class", "", "ms", "of peak", "goal", "torch", "softmax", "transformers")
        with console.status("measuring ...") as status:
            for row in scans.scans((shape,), seconds):
                rows.append(dataclasses.asdict(row))
                ratios = ["" if r is None else f"{r:.1f}" for r in map(row.ratio, ("torch", "softmax", "transformers"))]
                colour = "white" if row.goal is None else "green" if row.share >= row.goal else "yellow"
                share, goal = f"[{colour}]{row.share:.0%}[/{colour}]", "" if row.goal is None else f"{row.goal:.0%}"
                what = "both" if row.backward else "forward"
                table.add_row(row.name, what, f"{1e3 * row.seconds['kernels']:.2f}", share, goal, *ratios)
                status.update(f"measured {row.name}, {what}")
        console.print(table)
    return rows


def _decode(shapes: tuple[str, ...], seconds: float, console: Console) -> dict[str, float]:
    found = scans.decode(seconds)
    table = _table("one token, 16 heads of 128 x 128", *found)
    table.add_row(*(f"{1e6 * t:.0f} us" for t in found.values()))
    console.print(table)
    return found


def _lengths(shapes: tuple[str, ...], seconds: float, console: Console) -> dict[int, float]:
    found = scans.lengths(seconds)
    table = _table("a token of gated delta, 2 heads of 64 x 64, forward", "tokens", *(f"{T:,}" for T in found))
    table.add_row("ns a token", *(f"{1e9 * t:.0f}" for t in found.values()))
    console.print(table)
    return found


def _memory(shapes: tuple[str, ...], seconds: float, console: Console) -> dict[str, dict[str, float | None]]:
    shape, names = shapes[-1], ("Gated DeltaNet", "KDA")
    found = {name: {backend: memory(name, shape, backend) for backend in ("cpu", "torch")} for name in names}
    table = _table(f"memory of forward and backward, shape {shape}, beyond the inputs", "class", "kernels", "torch")
    for name, of in found.items():
        table.add_row(name, *("unknown" if b is None else f"{b / 2**20:.0f} MB" for b in of.values()))
    console.print(table)
    return found


def _training(shapes: tuple[str, ...], seconds: float, console: Console) -> dict[int, dict[str, float]]:
    with console.status("training ..."):
        found = dict(models.training(seconds))
    title = f"training a model of 10 million parameters, {models.BATCH} tokens a step: tokens a second"
    names = list(next(iter(found.values())))
    table = _table(title, "tokens a sequence", *(f"gated delta, {n}" if n != "softmax" else n for n in names))
    for T, of in found.items():
        table.add_row(f"{T:,}", *(f"{of[n]:,.0f}" for n in names))
    console.print(table)
    return found


_PARTS = {"scans": _scans, "decode": _decode, "lengths": _lengths, "memory": _memory, "training": _training}


def _figure(rows: list[dict[str, Any]], path: Path) -> None:
    made, axes = figure(2, width=5.5, height=4.6)
    names, shapes = list(scans.CLASSES), list(dict.fromkeys(r["shape"] for r in rows))
    height = 0.8 / len(shapes)
    for ax, backward in zip(axes, (False, True), strict=True):
        for i, shape in enumerate(shapes):
            share = {r["name"]: 100 * r["share"] for r in rows if r["shape"] == shape and r["backward"] is backward}
            D = scans.SHAPES[shape][3]
            places = [n + height * (i - (len(shapes) - 1) / 2) for n in range(len(names))]
            ax.barh(places, [share.get(n, 0) for n in names], height, color=COLOURS[i], label=f"{shape}, {D} x {D}")
        ax.set(title="forward and backward" if backward else "forward", xlabel="share of the multiply-add peak (%)", xlim=(0, 100))
        ax.set_yticks(range(len(names)), [escape(n) for n in names] if ax is axes[0] else [""] * len(names))
        ax.invert_yaxis()
        ax.grid(False, axis="y")
    axes[1].legend(title="shape", frameon=False, loc="lower right")
    save_figure(made, path)
