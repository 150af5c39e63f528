"""Every claim about fast weights as something that runs: ``fastweights reproduce``. One file a claim."""

from __future__ import annotations

import difflib
import importlib

from ..language.errors import FastWeightError
from .experiment import EXPERIMENTS, Experiment, Finding, Result, Setting, experiment

# in the order in which they are shown
MODULES: tuple[str, ...] = (
    "fastweights.experiments.capacity",
    "fastweights.experiments.retrieval",
    "fastweights.experiments.overwrite",
    "fastweights.experiments.mqar",
    "fastweights.experiments.carry_over",
    "fastweights.experiments.parity",
    "fastweights.experiments.modular",
    "fastweights.experiments.word_problems",
    "fastweights.experiments.formal_languages",
    "fastweights.experiments.hybrid",
    "fastweights.experiments.hybrid_modular",
    "fastweights.experiments.code_listops",
    "fastweights.experiments.icl_regression",
    "fastweights.experiments.fewshot",
    "fastweights.experiments.continual",
    "fastweights.experiments.rl",
    "fastweights.experiments.charlm",
    "fastweights.experiments.painter",
    "fastweights.experiments.scaling",
    "fastweights.experiments.timeseries",
    "fastweights.neuro.figures.rescorla_wagner",
    "fastweights.neuro.figures.blocking",
    "fastweights.neuro.figures.cue_competition",
    "fastweights.neuro.figures.oja",
    "fastweights.neuro.figures.hopfield",
    "fastweights.neuro.figures.willshaw",
    "fastweights.neuro.figures.palimpsest",
    "fastweights.neuro.figures.benna_fusi",
    "fastweights.neuro.figures.stdp",
    "fastweights.neuro.figures.short_term_plasticity",
    "fastweights.neuro.figures.working_memory",
    "fastweights.neuro.figures.three_factor",
    "fastweights.neuro.figures.btsp",
    "fastweights.neuro.figures.dendritic_error",
    "fastweights.neuro.figures.successor_representation",
    "fastweights.neuro.figures.key_value_memory",
    "fastweights.neuro.figures.astrocyte",
    "fastweights.neuro.figures.plastic_networks",
)


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
