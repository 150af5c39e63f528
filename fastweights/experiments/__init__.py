"""Every claim about fast weights as something that runs: ``fastweights reproduce``. One file a claim."""

from __future__ import annotations

import difflib
import importlib

from ..language.errors import FastWeightError
from .experiment import EXPERIMENTS, Experiment, Finding, Result, Setting, experiment

# in the order in which they are shown
MODULES: tuple[str, ...] = (
    "fastweights.experiments.capacity",
)  # fmt: skip


def experiments() -> dict[str, Experiment]:
    """All experiments by name, in order."""
    for module in MODULES:
        importlib.import_module(module)
    order = {m: i for i, m in enumerate(MODULES)}
    return dict(sorted(EXPERIMENTS.items(), key=lambda pair: order.get(pair[1].run.__module__, len(order))))


def find(name: str) -> Experiment:
    """The experiment of that name.

    >>> find("capacity").section
    'memory'
    """
    known = experiments()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FastWeightError(f"there is no experiment {name!r}{hint} Known: {', '.join(known)}")
    return known[name]


__all__ = ["EXPERIMENTS", "Experiment", "Finding", "Result", "Setting", "experiment", "experiments", "find"]
