"""A language model in plain torch: pre-norm blocks of a sequence layer and a gated MLP, with tied embeddings.

A model is a list of layer names: names of presets (published layers), of systems or of rules, ``softmax`` for attention, ``window:N``
for attention in a sliding window. A hybrid is a list that mixes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..language.errors import FastWeightError
from ..language.rule import Rule
from ..layers.norms import RMSNorm
from .blocks import Block, Memory, initialise, layer_named, resolve, run_blocks


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build a model, but its weights and the code of rules that are not in the catalogue.

    ``options`` are further ones of the layers of presets and rules, by name. ``d_hidden`` is the width of the MLPs, 8/3 d_model by
    default, and 0 leaves them out. ``fingerprints`` says, for every rule in ``layers``, which mathematics its name stands for.
    """

    layers: tuple[str, ...] = ("gated_delta", "gated_delta")
    vocabulary: int = 256
    d_model: int = 128
    heads: int = 4
    d_key: int | None = None
    d_value: int | None = None
    d_hidden: int | None = None
    conv: int = 4
    decay: str = "head"
    feature_map: str = "silu"
    negative_eigenvalues: bool = False
    norm_eps: float = 1e-5
    tied: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"format": 1, "model": "LanguageModel", **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelConfig:
        names = {f.name for f in dataclasses.fields(cls)}
        if data.get("format") != 1 or data.get("model") != "LanguageModel" or not names >= set(data) - {"format", "model"}:
            unknown = sorted(set(data) - names - {"format", "model"})
            raise FastWeightError(
                f"config is of format {data.get('format')!r}, model {data.get('model')!r}, with unknown entries {unknown}; "
                "this version reads format 1 of LanguageModel"
            )
        return cls(**{**{n: data[n] for n in names & set(data)}, "layers": tuple(data["layers"])})


class LanguageModel(nn.Module):
    """``logits, memory = model(ids, memory)``: ids (B, T) int64, logits (B, T, vocabulary), memory a list with a state a layer.

    Packed documents: ``reset``, bool (B, T), marks the tokens that begin one, before which the memory is empty.
    ``rules`` gives the rules that are not in the catalogue, by the name they have in ``config.layers``.

    >>> model = LanguageModel(ModelConfig(layers=("gated_delta", "softmax"), d_model=32, heads=2))
    >>> logits, memory = model(torch.zeros(1, 5, dtype=torch.int64))
    >>> logits.shape, len(memory)
    (torch.Size([1, 5, 256]), 2)
    """

    def __init__(self, config: ModelConfig, rules: Mapping[str, Rule] | None = None, seed: int = 0) -> None:
        super().__init__()
        self.rules = resolve(config, rules or {})
        self.config = dataclasses.replace(config, fingerprints={n: r.fingerprint for n, r in self.rules.items()})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(config.vocabulary, config.d_model)
            self.blocks = nn.ModuleList(Block(layer_named(name, config, self.rules, i), config) for i, name in enumerate(config.layers))
            self.norm = RMSNorm(config.d_model, config.norm_eps)
            self.head = None if config.tied else nn.Linear(config.d_model, config.vocabulary, bias=False)
            nn.init.normal_(self.embed.weight, std=config.d_model**-0.5)
            initialise(self.blocks)

    def forward(self, ids: Tensor, memory: Sequence[dict[str, Tensor]] | None = None, reset: Tensor | None = None) -> tuple[Tensor, Memory]:
        x, new = run_blocks(self.blocks, self.embed(ids), memory, reset)
        return self.logits(self.norm(x)), new

    def to_json(self) -> dict[str, Any]:
        return self.config.to_json()

    @classmethod
    def from_json(cls, data: Mapping[str, Any], rules: Mapping[str, Rule] | None = None) -> LanguageModel:
        return cls(ModelConfig.from_json(data), rules)

    def logits(self, x: Tensor) -> Tensor:
        """Of what the last norm made."""
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)

    def state_bytes(self, tokens: int) -> int:
        """Bytes of memory for one sequence of that many tokens."""
        return sum(block.layer.state_bytes(tokens) for block in self.blocks)  # type: ignore[operator, union-attr]

    def parameters_count(self) -> int:
        return sum(p.numel() for p in self.parameters())
