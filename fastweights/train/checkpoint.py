"""Checkpoints: a folder a checkpoint, complete or not there at all; enough to continue, bit for bit on one process.

The folder does not say how many processes wrote it: whatever is in shares is put together, and the first process alone writes, once all
have handed over their parts. So any number of processes can continue.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..language.errors import FastWeightError
from ..models.files import CONFIG, WEIGHTS, last_checkpoint, load, load_tensors, read_json, save_tensors, write_atomically, write_json
from .processes import Processes, whole

_KEPT = 2
_TRAINING, _PROGRESS = "training.safetensors", "training.json"


class Progress(NamedTuple):
    """Where training stands."""

    step: int
    tokens: int
    seconds: float
    data: str


def save_checkpoint(run: Path, model: Any, optimiser: torch.optim.Optimizer, progress: Progress, among: Processes) -> Path:
    """Write ``checkpoints/step_N`` in one move, then remove all but the last two. Every process calls it."""
    weights = _gathered(model.state_dict(), among)
    training = _gathered(_flat(model, optimiser), among)

    def write(folder: Path) -> None:
        folder.mkdir()
        save_tensors(folder / WEIGHTS, weights)
        write_json(folder / CONFIG, model.to_json())
        save_tensors(folder / _TRAINING, {**training, "random": torch.get_rng_state()})
        write_json(folder / _PROGRESS, progress._asdict())

    place = run / "checkpoints" / f"step_{progress.step:08d}"
    if among.first:
        write_atomically(place, write)
        for old in sorted(place.parent.glob("step_*"))[:-_KEPT]:
            shutil.rmtree(old)
    return place


def _gathered(tensors: dict[str, Tensor], among: Processes) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the first process, and none on the others; one after the other, so that none holds two at a time."""
    found = {}
    for name, t in tensors.items():
        complete = whole(t)
        if among.first:
            found[name] = complete.cpu()
    return found


def _flat(model: Any, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {f"{names[id(p)]}|{key}": torch.as_tensor(value) for p, state in optimiser.state.items() for key, value in state.items()}


def load_checkpoint(run: Path, model: Any, optimiser: torch.optim.Optimizer, among: Processes) -> Progress:
    """Put the last checkpoint of a run, which the first process reads, into a model and its optimiser. Every process calls it."""
    held: dict[str, Tensor] = {}
    progress, random, layout = among.told(lambda: _read(run, model, held))
    torch.set_rng_state(random)
    weights, parameters = model.state_dict(), dict(model.named_parameters())
    for name, (shape, dtype) in layout.items():
        given = held.pop(name) if among.first else torch.empty(shape, dtype=dtype)
        owner, _, key = name.rpartition("|")
        if owner:
            optimiser.state[parameters[owner]][key] = among.shared(given, parameters[owner])
        else:
            with torch.no_grad():
                weights[key].copy_(among.shared(given, weights[key]))
    return progress


def _read(run: Path, model: Any, into: dict[str, Tensor]) -> tuple[Progress, Tensor, dict[str, tuple[torch.Size, torch.dtype]]]:
    """All tensors of the last checkpoint: ``|NAME`` is a weight, ``NAME|KEY`` what the optimiser keeps of it."""
    progress = progress_of(run)
    folder = last_checkpoint(run)
    assert folder is not None
    weights = load(folder, model.rules).state_dict()  # the rules are those it was trained with
    training, _ = load_tensors(folder / _TRAINING)
    random = training.pop("random")
    into |= {f"|{n}": t for n, t in weights.items()} | training
    return progress, random, {n: (t.shape, t.dtype) for n, t in into.items()}


def progress_of(run: Path) -> Progress:
    """Where the last checkpoint of a run stands."""
    folder = last_checkpoint(run)
    if folder is None:
        raise FastWeightError(f"{run} has no checkpoint to resume from; leave --resume out to start it, or check --name and --runs")
    return Progress(**read_json(folder / _PROGRESS))


def clean(run: Path) -> None:
    """Remove what a killed process left half written."""
    for rest in [*run.glob(".*.writing-*"), *run.glob("*/.*.writing-*")]:
        if rest.is_dir():
            shutil.rmtree(rest)
        else:
            rest.unlink()
