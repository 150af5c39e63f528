"""Files: safetensors and JSON, written to a temporary name, flushed to disk, then renamed. Nothing that is loaded runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..language.errors import FastWeightError
from ..language.rule import Rule
from .language_model import LanguageModel
from .sequence_model import SequenceModel

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """``write`` a file or folder under a temporary name beside ``path``, then move it there in one step."""
    if path.is_dir():
        raise FastWeightError(f"{path} is a folder, and nothing in it is removed; give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing-{os.getpid()}")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    try:
        write(temporary)
        for file in [temporary] if temporary.is_file() else sorted(temporary.rglob("*")):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    write_atomically(path, lambda p: _text(p, json.dumps(data, indent=1) + "\n"))


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FastWeightError(f"{path} is not there; expected a folder with {CONFIG} and {WEIGHTS}, or a run that has one") from error
    except json.JSONDecodeError as error:
        raise FastWeightError(f"{path} is not JSON: {error}") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    unshared = {n: t.detach().contiguous().clone() for n, t in tensors.items()}
    write_atomically(path, lambda p: save_file(unshared, p, dict(metadata or {})))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except FileNotFoundError as error:
        raise FastWeightError(f"{path} is not there") from error
    except SafetensorError as error:
        raise FastWeightError(f"{path} is not a safetensors file, or is cut off: {error}") from error


def save(model: LanguageModel | SequenceModel, path: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` into the folder ``path``."""
    folder = Path(path)
    save_tensors(folder / WEIGHTS, dict(model.state_dict()))
    write_json(folder / CONFIG, model.to_json())


def load(path: str | Path, rules: Mapping[str, Rule] | None = None) -> Any:
    """Rebuild a ``LanguageModel`` or ``SequenceModel`` from a folder, or from the last checkpoint of a run.

    ``rules`` gives rules that are not in the catalogue, by name. A stored model never executes code: it names its rules, and
    each is checked against a fingerprint of its mathematics.
    """
    folder = last_checkpoint(Path(path)) or Path(path)
    config = read_json(folder / CONFIG)
    model = (SequenceModel if config.get("model") == "SequenceModel" else LanguageModel).from_json(config, rules)
    tensors, _ = load_tensors(folder / WEIGHTS)
    mine = model.state_dict()
    wrong = sorted(set(mine) ^ set(tensors)) or sorted(n for n in mine if mine[n].shape != tensors[n].shape)
    if wrong:
        raise FastWeightError(
            f"{folder / WEIGHTS} does not fit its config: {', '.join(wrong[:5])} are missing, unknown or of another shape"
        )
    model.load_state_dict(tensors)
    return model.eval()


def last_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = sorted((run / "checkpoints").glob("step_*"))
    return found[-1] if found else None


__all__ = ["last_checkpoint", "load", "load_tensors", "read_json", "save", "save_tensors", "write_atomically", "write_json"]
