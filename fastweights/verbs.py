"""What can be asked of the command line: a frozen dataclass a verb, so that options, help and types are one thing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .train.config import TrainConfig


@dataclass(frozen=True)
class Rules:
    """The catalogue of rules, presets and systems, or everything about one.

    Example: fastweights rules gated_delta
    """

    name: Annotated[str, tyro.conf.Positional] = ""
    """A rule, which may be composed ("delta * 2", "delta.T"), or FILE.py:NAME."""
    markdown: bool = False
    """Print the catalogue as a table in Markdown."""


@dataclass(frozen=True)
class Check:
    """Do all forms, precisions and gradients of a rule agree? Exit status 1 if not.

    Example: fastweights check gated_delta
    """

    name: Annotated[str, tyro.conf.Positional]
    """A rule of the catalogue, or FILE.py:NAME."""
    seed: int = 0
    """Of the random signals."""


@dataclass(frozen=True)
class Train(TrainConfig):
    """Train a small language model with a rule, on text or on a task.

    Example: fastweights train --rule gated_delta --steps 200
    """


@dataclass(frozen=True)
class Generate:
    """Write on from a prompt with a trained model, token by token.

    Example: fastweights generate runs/gated_delta-text --prompt "def "
    """

    run: Annotated[str, tyro.conf.Positional]
    """The folder of a run, or of a model."""
    prompt: str = "def "
    """What to write on from."""
    tokens: int = 400
    """How many bytes to write."""
    temperature: float = 0.8
    """0 is always the likeliest byte."""
    top_k: int | None = None
    """Draw among that many likeliest bytes."""
    top_p: float | None = None
    """Draw among the fewest bytes that together have this probability."""
    seed: int = 0
    """Of the drawing."""
    rule: str = ""
    """FILE.py:NAME of a rule of your own that the model was trained with; several with commas."""
    memory: str = ""
    """A file that the stream's memory is read from, if it is there, and written to at the end."""


@dataclass(frozen=True)
class Compare:
    """Train several rules alike on one task, at several sizes: a table, and a figure of how well against how large.

    Example: fastweights compare --task mqar --rules hebb,gated_delta,kda,softmax --sizes 16 32 64
    """

    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    rules: tuple[str, ...] = ("hebb", "gated_delta", "softmax")
    """Presets, systems or rules, with commas or spaces; gated_delta+softmax is one model of both layers."""
    sizes: tuple[int, ...] = (32, 64)
    """Of the residual stream."""
    seeds: int = 1
    """How many models of each."""


@dataclass(frozen=True)
class Lens:
    """What the fast weights of a trained model do while it reads a text: one figure, and a line a layer.

    Example: fastweights lens runs/gated_delta-text --text README.md --out lens.png
    """

    run: Annotated[str, tyro.conf.Positional]
    """The folder of a run, or of a model of bytes."""
    text: str = ""
    """A file, a folder or - for standard input; the default is the Python standard library's own source."""
    out: Path = Path("lens.png")
    """The figure: .png, .pdf or .svg."""
    tokens: int = 4096
    """How much of the text is read, from its beginning."""
    window: int = 512
    """How many tokens back ages and attention look."""
    layer: int = 0
    """Whose attention is drawn, counted among the layers with fast weights."""
    head: int = 0
    """Whose attention is drawn."""
    rule: str = ""
    """FILE.py:NAME of a rule of your own that the model was trained with; several with commas."""


@dataclass(frozen=True)
class Convert:
    """Make a model of this library of a checkpoint of flash-linear-attention (or Mamba-2 of transformers), or the other way round.

    Example: fastweights convert gated_deltanet-1.3B mine
    """

    source: Annotated[str, tyro.conf.Positional]
    """A folder with config.json and model.safetensors, which may be in several files."""
    target: Annotated[str, tyro.conf.Positional]
    """A new folder."""
    to: str = ""
    """Of a model of this library: the family that it becomes, such as gated_deltanet."""


@dataclass(frozen=True)
class Reproduce:
    """Run experiments: claims about fast weights, measured beside what is expected, PASS or FAIL. Without a name: what there is.

    Example: fastweights reproduce capacity blocking --quick
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Experiments."""
    all: bool = False
    """All of them. More than one writes a page of all that have been run."""
    quick: bool = False
    """A small version, under a minute."""
    full: bool = False
    """The sizes of the paper; may take hours."""
    seeds: int = 0
    """How many; by default 3, and 1 with --quick --all."""
    runs: Path = Path("runs")
    """The folder of all runs."""


@dataclass(frozen=True)
class Bench:
    """What the rules cost on this machine, as shares of its peak and beside what else runs here: tables, JSON and a figure.

    Example: fastweights bench --parts scans decode --shapes A
    """

    parts: tuple[Literal["scans", "decode", "lengths", "memory", "training"], ...] = (
        "scans", "decode", "lengths", "memory", "training",
    )  # fmt: skip
    """scans: the nine classes of rules; decode: one token; lengths: up to a million tokens; memory; training: a whole model."""
    shapes: tuple[Literal["A", "B", "C"], ...] = ("A", "B", "C")
    """A: B1 H4 T2048, 64 x 64; B: B4 H8 T1024, 64 x 64; C: B1 H8 T8192, 128 x 128."""
    seconds: float = 0.5
    """For each of the things compared."""
    out: Path = Path("runs/bench")
    """The folder that bench.json and bench.png are written to."""


@dataclass(frozen=True)
class Doctor:
    """What this installation can do: versions, devices, backends, and what is missing.

    Example: fastweights doctor
    """
