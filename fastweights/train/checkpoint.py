"""Checkpoints: a folder a checkpoint, complete or not there at all; enough to continue bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..language.errors import FastWeightError
from ..models.files import last_checkpoint, load_tensors, read_json, save, save_tensors, write_atomically, write_json
from ..models.language_model import LanguageModel

_KEPT = 2


class Progress(NamedTuple):
    """Where training stands."""

    step: int
    tokens: int
    seconds: float
    data: str


def save_checkpoint(run: Path, model: LanguageModel, optimiser: torch.optim.Optimizer, progress: Progress) -> Path:
    """Write ``checkpoints/step_N`` in one move, then remove all but the last two."""

    def write(folder: Path) -> None:
        folder.mkdir()
        save(model, folder)
        save_tensors(folder / "training.safetensors", {**_flat(model, optimiser), "random": torch.get_rng_state()})
        write_json(folder / "training.json", progress._asdict())

    place = run / "checkpoints" / f"step_{progress.step:08d}"
    write_atomically(place, write)
    for old in sorted(place.parent.glob("step_*"))[:-_KEPT]:
        shutil.rmtree(old)
    return place


def load_checkpoint(run: Path, model: LanguageModel, optimiser: torch.optim.Optimizer) -> Progress:
    """Put the last checkpoint of a run into a model and its optimiser."""
    folder = last_checkpoint(run)
    if folder is None:
        raise FastWeightError(f"{run} has no checkpoint to resume from; leave --resume out to start it")
    type(model).from_json(read_json(folder / "config.json"), model.rules)  # the rules are those it was trained with
    weights, _ = load_tensors(folder / "model.safetensors")
    model.load_state_dict(weights)
    state, _ = load_tensors(folder / "training.safetensors")
    torch.set_rng_state(state.pop("random"))
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optimiser.param_groups:
        for p in group["params"]:
            mine = {key.rpartition("|")[2]: t for key, t in state.items() if key.startswith(f"{names[id(p)]}|")}
            if mine:
                optimiser.state[p] = mine
    return Progress(**read_json(folder / "training.json"))


def _flat(model: LanguageModel, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {f"{names[id(p)]}|{key}": torch.as_tensor(value) for p, state in optimiser.state.items() for key, value in state.items()}


def clean(run: Path) -> None:
    """Remove what a killed process left half written."""
    for rest in [*run.glob(".*.writing-*"), *run.glob("*/.*.writing-*")]:
        if rest.is_dir():
            shutil.rmtree(rest)
        else:
            rest.unlink()
