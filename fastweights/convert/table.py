"""How the weights of other people's layers and of ours are the same numbers: tables that are read in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..language.errors import FastWeightError
from ..layers.layer import FastWeightLayer
from ..layers.programmer import Programmer


class ConversionError(FastWeightError, ValueError):
    """What cannot be converted, by name."""


@dataclass(frozen=True)
class Entry:
    """One of their tensors and what it holds of ours, in the order of its rows.

    ``ours`` are parameters of the layer, or parts of one: ``k`` is the rows of the projection that make the signal k, ``conv.k`` and
    ``bias.k`` those of the short convolution. ``groups``: the rows are laid out group by group, each with its share of every part.
    ``sets`` = (n, heads): the n sets of a signal that a token carries come one after the other (ours: head after head). ``scale``
    multiplies theirs, all or row by row. ``shape`` is theirs where it is not ours. An ``optional`` tensor that they lack is zero.
    """

    theirs: str
    ours: tuple[str, ...]
    groups: int = 1
    sets: tuple[int, int] = (1, 1)
    scale: float | Tensor = 1.0
    shape: tuple[int, ...] | None = None
    optional: bool = False

    def take(self, theirs: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> None:
        """Copy theirs into ours."""
        if self.theirs not in theirs:
            if not self.optional:
                raise ConversionError(f"there is no tensor {self.theirs!r}")
            for name in self.ours:
                parts[name].zero_()
            return
        given = theirs[self.theirs]
        if given.numel() != sum(parts[n].numel() for n in self.ours):
            shapes = " and ".join(str(tuple(parts[n].shape)) for n in self.ours)
            raise ConversionError(f"{self.theirs!r} is {tuple(given.shape)}, which does not hold {', '.join(self.ours)}: {shapes}")
        rows = (given.to(parts[self.ours[0]].dtype) * self.scale).reshape(self.groups, -1)
        n, heads = self.sets
        for part, name in zip(rows.split([parts[n].numel() // self.groups for n in self.ours], 1), self.ours, strict=True):
            parts[name].copy_(part.reshape(n, heads, -1).transpose(0, 1).reshape(parts[name].shape))

    def give(self, parts: Mapping[str, Tensor]) -> Tensor | None:
        """Theirs, made of ours; None if it is optional and all zero."""
        if self.optional and not any(bool(parts[n].any()) for n in self.ours):
            return None
        n, heads = self.sets
        made = [parts[name].reshape(heads, n, -1).transpose(0, 1).reshape(self.groups, -1) for name in self.ours]
        shape = (-1, *parts[self.ours[0]].shape[1:]) if self.shape is None else self.shape
        return (torch.cat(made, 1).reshape(shape) / self.scale).contiguous()


def parts_of(layer: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a layer by name, and views of those rows that belong to one signal."""
    found = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    if isinstance(layer, FastWeightLayer) and isinstance(layer.programmer, Programmer):
        programmer = layer.programmer
        found |= dict(_rows(programmer.project.weight, programmer, "", (*programmer.convolved, *programmer.direct)))
        if programmer.conv is not None:
            found |= dict(_rows(programmer.conv.weight, programmer, "conv.", tuple(programmer.convolved)))
            if programmer.conv.bias is not None:
                found |= dict(_rows(programmer.conv.bias, programmer, "bias.", tuple(programmer.convolved)))
    return {n: x.detach() for n, x in found.items()}


def _rows(x: Tensor, programmer: Programmer, prefix: str, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    start = 0
    for name in names:
        yield prefix + name, x[start : start + programmer.sizes[name]]
        start += programmer.sizes[name]


def load(entries: Sequence[Entry], theirs: Mapping[str, Tensor], layer: nn.Module) -> None:
    """Copy their weights into our layer."""
    parts = parts_of(layer)
    with torch.no_grad():
        for entry in entries:
            entry.take(theirs, parts)


def unload(entries: Sequence[Entry], layer: nn.Module) -> dict[str, Tensor]:
    """Their weights, made of our layer's."""
    parts = parts_of(layer)
    made = {entry.theirs: entry.give(parts) for entry in entries}
    return {n: x for n, x in made.items() if x is not None}
