"""A language model in plain torch: pre-norm blocks of a sequence layer and a gated MLP, with tied embeddings.

A model is a list of layer names: names of presets (published layers) or of rules, ``softmax`` for attention, ``window:N`` for
attention in a sliding window. A hybrid is a list that mixes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..language.errors import FastWeightError, RuleError
from ..language.rule import Rule
from ..layers.attention import SoftmaxAttention
from ..layers.layer import FastWeightLayer
from .presets import PRESETS, layer_of, rule_of

Memory = list[dict[str, Tensor]]


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build a model, but its weights and the code of rules that are not in the catalogue.

    ``fingerprints`` says, for every rule in ``layers``, which mathematics its name stands for.
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


def resolve(config: ModelConfig, own: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rule behind every layer name; a rule of one's own must be passed, and every rule must be the one that was trained."""
    found = {}
    for name in dict.fromkeys(config.layers):
        if attention_window(name) is not None:
            continue
        rule = own.get(name)
        if rule is None:
            try:
                rule = rule_of(name)
            except RuleError as error:
                known = f"the model has a layer {name!r}, which is neither a preset nor a rule of the catalogue"
                raise RuleError(f"{known}; pass it: rules={{{name!r}: ...}}, or --rule FILE.py:{name}") from error
        stored = config.fingerprints.get(name)
        if stored is not None and not rule.matches(stored):
            raise RuleError(
                f"the model was trained with another rule {name!r}: its fingerprint differs from that of {rule!r}; "
                f"pass the rule it was trained with: rules={{{name!r}: ...}}, or --rule FILE.py:{name}"
            )
        found[name] = rule
    return found


def attention_window(name: str) -> int | None:
    """0 for ``softmax``, N for ``window:N``, None for the name of a rule."""
    if name == "softmax":
        return 0
    if not name.startswith("window:"):
        return None
    size = name.removeprefix("window:")
    if not size.isdigit() or int(size) < 1:
        raise FastWeightError(f"layer {name!r}: write window:N with N the number of tokens, such as window:64")
    return int(size)


class Block(nn.Module):
    """x + layer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, name: str, rules: Mapping[str, Rule], index: int) -> None:
        super().__init__()
        window = attention_window(name)
        self.norm = nn.RMSNorm(config.d_model, eps=1e-5)
        if window is not None:
            self.layer: nn.Module = SoftmaxAttention(config.d_model, heads=config.heads, window=window or None)
        elif name in PRESETS and rules[name] == rule_of(name):  # a rule of one's own may have a preset's name
            self.layer = layer_of(
                name, config.d_model, heads=config.heads, d_key=config.d_key, d_value=config.d_value, index=index, depth=len(config.layers)
            )
        else:
            self.layer = FastWeightLayer(
                rules[name], config.d_model, heads=config.heads, d_key=config.d_key, d_value=config.d_value, conv=config.conv,
                decay=config.decay if -1 in rules[name].shapes else "head", feature_map=config.feature_map,
                negative_eigenvalues=config.negative_eigenvalues,
            )  # fmt: skip
        hidden = config.d_hidden or 8 * config.d_model // 3 // 8 * 8
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=1e-5)
        self.mlp_in = nn.Linear(config.d_model, 2 * hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, config.d_model, bias=False)

    def forward(self, x: Tensor, state: dict[str, Tensor] | None, reset: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        y, state = self.layer(self.norm(x), state) if reset is None else self.layer(self.norm(x), state, reset)
        x = x + y
        gate, up = self.mlp_in(self.mlp_norm(x)).chunk(2, -1)
        return x + self.mlp_out(F.silu(gate) * up), state


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
            self.blocks = nn.ModuleList(Block(config, name, self.rules, i) for i, name in enumerate(config.layers))
            self.norm = nn.RMSNorm(config.d_model, eps=1e-5)
            self._initialise()

    def _initialise(self) -> None:
        """Normal weights that keep the size of what they are given; smaller where they write to the residual stream."""
        deep = (2 * len(self.blocks)) ** -0.5
        nn.init.normal_(self.embed.weight, std=self.config.d_model**-0.5)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                writes = name.endswith((".out", ".mlp_out"))
                nn.init.normal_(module.weight, std=module.in_features**-0.5 * (deep if writes else 1.0))

    def forward(self, ids: Tensor, memory: Sequence[dict[str, Tensor]] | None = None, reset: Tensor | None = None) -> tuple[Tensor, Memory]:
        x = self.embed(ids)
        new: Memory = []
        for i, block in enumerate(self.blocks):
            x, state = block(x, None if memory is None else memory[i], reset)
            new.append(state)
        return F.linear(self.norm(x), self.embed.weight), new

    def state_bytes(self, tokens: int) -> int:
        """Bytes of memory for one sequence of that many tokens."""
        return sum(block.layer.state_bytes(tokens) for block in self.blocks)  # type: ignore[operator, union-attr]

    def parameters_count(self) -> int:
        return sum(p.numel() for p in self.parameters())
