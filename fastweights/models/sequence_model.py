"""A model of vectors instead of tokens: for regression, classification, control. The same blocks as the language model's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..language.errors import SignalError
from ..language.rule import Rule
from ..layers.norms import RMSNorm
from .blocks import Block, Memory, initialise, layer_named, resolve, run_blocks
from .language_model import ModelConfig


class SequenceModel(nn.Module):
    """``y, memory = model(x, memory)``: x (B, T, d_in) to y (B, T, d_out), causally, through the layers of ``config``.

    A classifier of sequences reads y at the last token. The layers, sizes and options are those of ``ModelConfig``, whose vocabulary
    is not used; ``reset`` and ``rules`` as in ``LanguageModel``.

    >>> import torch
    >>> model = SequenceModel(ModelConfig(layers=("delta",), d_model=32, heads=2), d_in=5, d_out=3)
    >>> y, memory = model(torch.randn(2, 7, 5))
    >>> y.shape
    torch.Size([2, 7, 3])
    """

    def __init__(self, config: ModelConfig, *, d_in: int, d_out: int, rules: Mapping[str, Rule] | None = None, seed: int = 0) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.rules = found = resolve(config, rules or {})
        self.config = dataclasses.replace(config, fingerprints={n: r.fingerprint for n, r in found.items()})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.enter = nn.Linear(d_in, config.d_model)
            self.blocks = nn.ModuleList(Block(layer_named(name, config, found, i), config) for i, name in enumerate(config.layers))
            self.norm = RMSNorm(config.d_model, config.norm_eps)
            self.leave = nn.Linear(config.d_model, d_out)
            initialise(self.blocks)

    def forward(self, x: Tensor, memory: Sequence[dict[str, Tensor]] | None = None, reset: Tensor | None = None) -> tuple[Tensor, Memory]:
        if x.ndim != 3 or x.shape[-1] != self.d_in:
            raise SignalError(f"x is {tuple(x.shape)}, expected (B, T, d_in = {self.d_in})")
        x, new = run_blocks(self.blocks, self.enter(x), memory, reset)
        return self.leave(self.norm(x)), new

    def state_bytes(self, tokens: int) -> int:
        """Bytes of memory for one sequence of that many tokens."""
        return sum(block.layer.state_bytes(tokens) for block in self.blocks)  # type: ignore[operator, union-attr]

    def to_json(self) -> dict[str, Any]:
        return self.config.to_json() | {"model": "SequenceModel", "d_in": self.d_in, "d_out": self.d_out}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], rules: Mapping[str, Rule] | None = None) -> SequenceModel:
        own = {n: x for n, x in data.items() if n not in ("d_in", "d_out")} | {"model": "LanguageModel"}
        return cls(ModelConfig.from_json(own), d_in=data["d_in"], d_out=data["d_out"], rules=rules)
