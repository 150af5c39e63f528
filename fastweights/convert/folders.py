"""Checkpoint folders of flash-linear-attention, and Mamba-2's of transformers, as folders of this library, and back.

A family is data: how its config reads as ``ModelConfig`` and back, and where the weights of a block are. The whole model converts, its
logits the same, where our blocks are its blocks; what is not ours is named.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..models.files import CONFIG, WEIGHTS, load, load_tensors, read_json, save, save_tensors, write_json
from ..models.language_model import LanguageModel
from .families import FAMILIES, ModelFamily
from .table import ConversionError, parts_of

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


def convert(source: str | Path, target: str | Path, to: str = "") -> str:
    """Convert the model in the folder ``source`` into the folder ``target``; returns what was made, in words.

    A folder of another library becomes one of ours, which ``fastweights generate`` and ``fastweights.models.load`` read; one of ours
    becomes a folder of the family ``to`` (such as ``gated_deltanet``). Tokenizer files are copied.

    Raises:
        ConversionError: the family or something in the config is not known; it is named.
    """
    source, target = Path(source), Path(target)
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise ConversionError(f"{target} is there already; name a new folder")
    if read_json(source / CONFIG).get("model") == "LanguageModel":
        told = _export(source, target, to)
    elif to:
        raise ConversionError(f"{source} is not a model of this library, and only those are converted --to another; leave --to out")
    else:
        model, name = load_theirs(source)
        save(model, target)
        told = f"{source} ({name}) is now {target}: {model.parameters_count():,} parameters, layers {_told(model.config.layers)}"
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return told


def load_theirs(folder: str | Path) -> tuple[LanguageModel, str]:
    """A model of another library as ours, and the name of its family."""
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    family = _family(str(config.get("model_type")))
    model = LanguageModel(family.ours(config))
    theirs = family.before(_weights(folder), config)
    named = theirs.keys()
    used: set[str] = set()
    with torch.no_grad():
        for prefix, parts, entries in _places(family, model):
            given = {n.removeprefix(prefix): theirs[n] for n in named if n.startswith(prefix)}
            for entry in entries:
                try:
                    entry.take(given, parts)
                except ConversionError as error:
                    raise ConversionError(f"{folder}, {prefix or 'the model'}: {error}") from error
                used.add(prefix + entry.theirs)
    extra = sorted(named - used - ({family.head} if model.config.tied else set()))
    if extra:
        raise ConversionError(f"{folder} has {len(extra)} weights that a model of ours has no place for: {', '.join(extra[:5])}")
    return model.eval(), family.name


def _export(source: Path, target: Path, to: str) -> str:
    if not to:
        raise ConversionError(f"{source} is a model of this library; say into what it is converted, --to one of {', '.join(FAMILIES)}")
    family = _family(to)
    model = load(source)
    config = family.theirs(model.config, model)
    made: dict[str, Tensor] = {}
    for prefix, parts, entries in _places(family, model):
        for entry in entries:
            tensor = entry.give(parts)
            if tensor is not None:
                made[prefix + entry.theirs] = tensor
    missing = sorted(set(dict(model.named_parameters())) - _covered(family, model))
    if missing:
        raise ConversionError(f"a {to} has no place for {', '.join(missing[:5])} of {source}")
    made = dict(family.after(made, config))
    save_tensors(target / WEIGHTS, made, {"format": "pt"})
    write_json(target / CONFIG, config)
    return f"{source} is now {target}: a {to} of {sum(x.numel() for x in made.values()):,} numbers"


def _places(family: ModelFamily, model: LanguageModel) -> Sequence[tuple[str, dict[str, Tensor], Sequence[Any]]]:
    """Every part of the model: the prefix of their names, our tensors by name, and the table between them."""
    whole = {n: x.detach() for n, x in model.named_parameters() if not n.startswith("blocks.")}
    places = [("", whole, family.whole(model))]
    for i, block in enumerate(model.blocks):
        own = {n: x.detach() for n, x in block.named_parameters() if not n.startswith("layer.")}
        if block.hidden:
            own["mlp.gate"], own["mlp.up"] = own["mlp_in.weight"].chunk(2)
        places.append((family.block.format(i), own, family.around(model)))
        places.append((family.block.format(i) + family.layer, parts_of(block.layer), family.entries(block.layer, model.config)))
    return places


def _covered(family: ModelFamily, model: LanguageModel) -> set[str]:
    """Our parameters that their names have a place for."""
    found: set[str] = set()
    everything = {x.untyped_storage().data_ptr(): n for n, x in model.named_parameters()}
    for _, parts, entries in _places(family, model):
        for entry in entries:
            found |= {everything[p] for n in entry.ours if (p := parts[n].untyped_storage().data_ptr()) in everything}
    return found


def _family(name: str) -> ModelFamily:
    if name not in FAMILIES:
        raise ConversionError(
            f"models of type {name!r} do not convert as a whole; those that do: {', '.join(FAMILIES)}. "
            "fastweights.convert.layer_from converts a layer of a transformers model, and fastweights.hf.enable() makes the model fast"
        )
    return FAMILIES[name]


def _weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, of one file or of several."""
    index = folder / f"{WEIGHTS}.index.json"
    if not index.is_file():
        return load_tensors(folder / WEIGHTS)[0]
    found: dict[str, Tensor] = {}
    for name in sorted(set(read_json(index)["weight_map"].values())):
        if Path(name).name != name:
            raise ConversionError(f"{index} names a file outside of its folder: {name!r}")
        with safe_open(folder / name, framework="pt") as file:
            found |= {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118, a file is not a dictionary
    return found


def _told(layers: Sequence[str]) -> str:
    kinds: Mapping[str, int] = {n: layers.count(n) for n in dict.fromkeys(layers)}
    return ", ".join(f"{count} x {n}" for n, count in kinds.items())
