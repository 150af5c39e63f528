"""What a training run is: options as a frozen dataclass, so that options, help and types are one thing."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from .. import rules as catalogue
from ..language.errors import FastWeightError, RuleError
from ..language.rule import Rule
from ..models.blocks import attention_window
from ..models.language_model import ModelConfig
from ..models.presets import rule_of
from ..models.systems import SYSTEMS
from ..tasks import Source, Text, VectorSource, read_text
from ..tasks import task as task_named


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run."""

    rule: str = "gated_delta"
    """A preset, a rule of the catalogue, FILE.py:NAME, softmax or window:N; a comma-separated list is one pattern of layers, repeated."""
    task: str = "text"
    """text, to predict the next byte; or NAME[:option=value,...], a diagnostic task: recall, mqar, copying, parity, modular, words,
    language, listops, code, retrieval, overwrite, icl-regression, fewshot, continual, timeseries, tmaze, bandit."""
    text: str = ""
    """A file, a folder or - for standard input; the default is the Python standard library's own source."""
    name: str = ""
    """The run's folder is RUNS/NAME; by default it is named after the rule and the task."""
    runs: str = "runs"
    """The folder of all runs."""
    resume: bool = False
    """Continue the run exactly where its last checkpoint left it."""
    steps: int = 1000
    """Optimiser steps."""
    batch: int = 8
    """Sequences a batch, shared out among the processes that torchrun started."""
    accumulate: int = 1
    """Batches a step, whose gradients are added up: as one batch that is so much larger, in less memory."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of products and activations. Weights, decays, the state of the optimiser and losses are float32 in any case."""
    shard: Literal["none", "full"] = "none"
    """With several processes: each has the whole model (none), or a share of every parameter and of the optimiser's state (full)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """What trains; with several processes each has a CUDA device of its own."""
    length: int = 256
    """Tokens a sequence (of text)."""
    depth: int = 4
    """Layers."""
    d_model: int = 128
    """Size of the residual stream."""
    heads: int = 4
    """Heads a layer."""
    decay: Literal["head", "channel"] = "head"
    """One decay a head, or one a key channel where the rule takes it."""
    negative_eigenvalues: bool = False
    """Rates up to 2, so that a write can reflect."""
    learning_rate: float = 3e-3
    """Of AdamW, after a warm-up; falls to a tenth along a cosine."""
    warmup: int = 50
    """Steps of warm-up."""
    weight_decay: float = 0.1
    """Of matrices only."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    seed: int = 0
    """Of the weights and of the order of the data."""
    evaluate_every: int = 100
    """Steps between validations."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""

    def folder(self) -> Path:
        """Where the run lives."""
        rule = Path(self.rule.split(":")[0]).stem + self.rule.partition(".py")[2]
        plain = "".join(c if c.isalnum() or c in "_.-" else "-" for c in f"{rule}-{self.task}")
        return Path(self.runs) / (self.name or plain)

    def check(self) -> None:
        """Numbers that make no sense are refused before anything is built."""
        for name in ("steps", "batch", "accumulate", "length", "depth", "d_model", "heads", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise FastWeightError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise FastWeightError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected a number above 0")
        if self.d_model % (2 * self.heads):
            raise FastWeightError(f"--d-model {self.d_model} is not a multiple of 2 * --heads = {2 * self.heads}")

    def source(self) -> Source | VectorSource:
        """The data."""
        return Text(read_text(self.text)) if self.task == "text" else task_named(self.task)  # type: ignore[return-value]

    def model(self, vocabulary: int = 0) -> tuple[ModelConfig, dict[str, Rule]]:
        """The model, and the rules that are not in the catalogue by their layer names; a model of vectors has no vocabulary."""
        pattern, own = layer_names(self.rule)
        layers = tuple(pattern[i % len(pattern)] for i in range(max(self.depth, len(pattern))))
        config = ModelConfig(
            layers=layers, vocabulary=vocabulary, d_model=self.d_model, heads=self.heads, decay=self.decay,
            negative_eigenvalues=self.negative_eigenvalues,
        )  # fmt: skip
        return config, own


# options that may differ between the parts of one run
MAY_CHANGE = {"resume", "runs", "name", "steps", "evaluate_every", "checkpoint_every", "text", "shard", "device"}


def differences(a: Mapping[str, Any], b: TrainConfig) -> list[str]:
    """Options of a stored run that another one may not change."""
    asked = [(f.name, a.get(f.name, f.default), getattr(b, f.name)) for f in fields(b) if f.name not in MAY_CHANGE]
    return [f"--{name.replace('_', '-')} (was {was}, is {now})" for name, was, now in asked if was != now]


def layer_names(text: str) -> tuple[list[str], dict[str, Rule]]:
    """The layer names in ``--rule``, and the rules that came from files."""
    names, own = [], {}
    for part in text.split(","):
        name = part.strip()
        if ".py:" in name:
            rule = rule_from_file(name)
            name = name.rpartition(":")[2]
            own[name] = rule
        elif attention_window(name) is None and name not in SYSTEMS:
            rule_of(name)
        names.append(name)
    return names, own


def find_rule(name: str) -> Rule:
    """A rule by its name in the catalogue, or FILE.py:NAME."""
    return rule_from_file(name) if ".py:" in name else catalogue.get(name)


def rule_from_file(place: str) -> Rule:
    """The rule NAME of FILE.py:NAME. The file is run, as any Python file that one imports."""
    file, _, name = place.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise RuleError(f"there is no file {file!r}; write FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise RuleError(f"{file!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        if isinstance(error, FastWeightError):
            raise
        frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == path.resolve()]
        line = getattr(error, "lineno", None) or (frames[-1] if frames else "?")
        raise RuleError(f"{file}, line {line}, cannot be read: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not isinstance(found, Rule):
        rules = [n for n, x in vars(module).items() if isinstance(x, Rule) and x.name == n]
        what = "there is nothing of that name" if found is None else f"it is a {type(found).__name__}; put @fw.rule above it"
        raise RuleError(f"{file} has no rule {name!r}: {what}. Rules in the file: {', '.join(rules) or 'none'}")
    return found
