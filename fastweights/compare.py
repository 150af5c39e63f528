"""Rules beside each other on one task: trained alike at several sizes; a table, and a figure of how well against how large."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from .language.errors import FastWeightError
from .models.files import last_checkpoint
from .plots import COLOURS, figure
from .train.config import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Point(NamedTuple):
    """One trained model: what it is, how large, and how well it does on what it has not seen.

    ``score`` is what is measured in the units of ``measure``; ``state_bytes`` is the memory of one sequence.
    """

    rule: str
    d_model: int
    seed: int
    parameters: int
    state_bytes: int
    score: float
    measure: str


def compare(config: TrainConfig, rules: Sequence[str], sizes: Sequence[int], seeds: int, console: Console) -> list[Point]:
    """Train every rule at every size with every seed; each is a run of its own, ``RUNS/compare-TASK/RULE-SIZE-SEED``.

    A word of ``rules`` is a rule or several with commas; a+b is one model whose layers are both, in turn. ``config`` gives everything
    but the rule, the size and the seed. A run that was cut off goes on where it was.
    """
    rules = [rival.strip() for words in rules for rival in words.split(",")]
    if not all(rules) or not rules or not sizes or seeds < 1:
        raise FastWeightError("compare needs at least one rule, one size and one seed")
    from .train.loop import train

    folder = Path(config.runs) / f"compare-{config.task.partition(':')[0]}"
    found = []
    for rule in rules:
        for size in sizes:
            for seed in range(seeds):
                name = f"{rule.replace(' ', '')}-{size}-{seed}"
                run = dataclasses.replace(config, rule=rule.replace("+", ","), d_model=size, seed=seed, runs=str(folder), name=name)
                run = dataclasses.replace(run, resume=last_checkpoint(run.folder()) is not None)
                with console.status(f"{rule}, d_model {size}, seed {seed}"):
                    result = train(run, Console(quiet=True))
                score, measure = (result.error, "squared error") if math.isnan(result.accuracy) else (result.accuracy, "accuracy")
                if config.task == "text":
                    score, measure = result.bits, "bits per byte"
                state = result.model.state_bytes(config.length)
                found.append(Point(rule, size, seed, sum(p.numel() for p in result.model.parameters()), state, score, measure))
    return found


def draw(points: Sequence[Point], task: str) -> Figure:
    """The score of every rule against the bytes of its state: a line through the means, a dot a seed."""
    made, (axes,) = figure(width=5.6)
    for i, rule in enumerate(dict.fromkeys(p.rule for p in points)):
        mine = [p for p in points if p.rule == rule]
        colour, marker = COLOURS[i % len(COLOURS)], "osD^vPX"[i % 7]
        axes.plot([p.state_bytes for p in mine], [p.score for p in mine], marker, color=colour, ms=4, alpha=0.6)
        sizes = sorted({p.state_bytes for p in mine})
        means = [sum(p.score for p in mine if p.state_bytes == s) / sum(p.state_bytes == s for p in mine) for s in sizes]
        axes.plot(sizes, means, marker + "-", color=colour, ms=5, label=rule)
    axes.set_xscale("log")
    axes.set_xlabel("memory of one sequence (bytes)")
    axes.set_ylabel(f"{points[0].measure} on {task}")
    axes.legend(frameon=False)
    return made
