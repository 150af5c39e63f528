"""The models that an experiment compares, as data: names of layers and options, built at equal numbers of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..language.errors import RuleError
from ..models.blocks import attention_window
from ..models.language_model import LanguageModel, ModelConfig
from ..models.presets import rule_of
from ..models.sequence_model import SequenceModel
from ..models.systems import SYSTEMS
from ..tasks.source import Source, VectorSource
from ..train.scores import counts, kind_of
from .training import parameters

SOLVED, CHANCE = 0.95, 0.1  # scaled accuracies, 0 at chance and 1 where all is right: what "solves" and "does not" mean in every experiment


@dataclass(frozen=True)
class Entrant:
    """A model of an experiment: its name there, the layers that repeat in it, and how its config differs from that of the others.

    >>> Entrant("DeltaNet", ("delta",), {"negative_eigenvalues": True}).known
    True
    """

    name: str
    layers: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def known(self) -> bool:
        """Whether every layer is a preset, a system, a rule or attention."""
        return all(_known(layer) for layer in self.layers)

    def build(self, source: Source | VectorSource, width: int, depth: int = 1, seed: int = 0, **config: Any) -> nn.Module:
        """A model for ``source`` of ``depth`` layers, with the width that brings its parameters nearest to those of delta at ``width``.

        Of more layers than that if that many are needed to have each of the entrant's.
        """
        wanted = parameters(_made(("delta",) * depth, source, width, 0, config))
        layers = tuple(self.layers[i % len(self.layers)] for i in range(max(depth, len(self.layers))))
        config = {**config, **self.config}
        step = 2 * config.get("heads", ModelConfig.heads)
        found = min(range(step, 2 * width + 1, step), key=lambda w: abs(parameters(_made(layers, source, w, 0, config)) - wanted))
        return _made(layers, source, found, seed, config)


def present(entrants: Sequence[Entrant]) -> tuple[list[Entrant], str]:
    """Those whose layers there are, and a note about the others."""
    absent = [e.name for e in entrants if not e.known]
    return [e for e in entrants if e.known], f"Left out, as there is no such layer here: {', '.join(absent)}." if absent else ""


@torch.no_grad()
def right_by_token(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Of every token, the share of the targets (B, T) that are told right, (T,); NaN where none counts."""
    counted = counts(targets)
    right = (model(inputs)[0].argmax(-1) == targets) & counted
    return right.sum(0) / counted.sum(0)


def scaled(accuracy: float, chance: float) -> float:
    """0 at chance, 1 where all is right.

    >>> scaled(0.75, chance=0.5)
    0.5
    """
    return (accuracy - chance) / (1 - chance)


def _known(layer: str) -> bool:
    if layer in SYSTEMS or attention_window(layer) is not None:
        return True
    try:
        rule_of(layer)
    except RuleError:
        return False
    return True


def _made(layers: tuple[str, ...], source: Source | VectorSource, width: int, seed: int, config: Mapping[str, Any]) -> nn.Module:
    if kind_of(source) == "tokens":
        vocabulary = source.vocabulary  # type: ignore[union-attr]
        return LanguageModel(ModelConfig(layers=layers, vocabulary=vocabulary, d_model=width, **{"tied": False, **config}), seed=seed)
    made = ModelConfig(layers=layers, d_model=width, **config)
    return SequenceModel(made, d_in=source.d_in, d_out=source.d_out, seed=seed)  # type: ignore[union-attr]
