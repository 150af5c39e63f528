"""Pre-norm blocks of a sequence layer and a gated MLP, which models are made of; what the names of layers stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..engine.gated_norm import gated_unit
from ..language.errors import FastWeightError, RuleError
from ..language.rule import Rule
from ..layers.attention import SoftmaxAttention
from ..layers.layer import FastWeightLayer
from ..layers.norms import RMSNorm
from .presets import PRESETS, Place, layer_of, rule_of
from .systems import SYSTEMS

if TYPE_CHECKING:
    from .language_model import ModelConfig

Memory = list[dict[str, Tensor]]


def resolve(config: ModelConfig, own: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rule behind every layer name; a rule of one's own must be passed, and every rule must be the one that was trained."""
    found = {}
    for name in dict.fromkeys(config.layers):
        if attention_window(name) is not None or (name in SYSTEMS and name not in own):
            continue
        rule = own.get(name)
        if rule is None:
            try:
                rule = rule_of(name)
            except RuleError as error:
                known = f"the model has a layer {name!r}, which is neither a preset nor a rule of the catalogue, nor a system"
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


def layer_named(name: str, config: ModelConfig, rules: Mapping[str, Rule], index: int) -> nn.Module:
    """The sequence layer that a name stands for, at its place in a model; ``rules`` as ``resolve`` found them."""
    window = attention_window(name)
    d_key = config.d_key or config.d_model // max(config.heads, 1)
    place = Place(config.d_model, config.heads, d_key, index, len(config.layers), config.d_value, config.negative_eigenvalues)
    if window is not None:
        return SoftmaxAttention(config.d_model, heads=config.heads, window=window or None)
    if name not in rules:
        return SYSTEMS[name].build(place)
    sizes: dict[str, Any] = {"heads": config.heads, "d_key": config.d_key, "d_value": config.d_value}
    if name in PRESETS and rules[name] == rule_of(name):  # a rule of one's own may have a preset's name
        options = {**config.options, **({"negative_eigenvalues": True} if config.negative_eigenvalues else {})}
        return layer_of(name, config.d_model, **sizes, index=index, depth=len(config.layers), **options)
    general = {"conv": config.conv, "feature_map": config.feature_map, "negative_eigenvalues": config.negative_eigenvalues}
    general["decay"] = config.decay if -1 in rules[name].shapes else "head"
    return FastWeightLayer(rules[name], config.d_model, **sizes, **{**general, **config.options})


class Block(nn.Module):
    """x + layer(norm(x)), then x + mlp(norm(x)) unless the config leaves the MLP out."""

    def __init__(self, layer: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        d_model = config.d_model
        self.norm = RMSNorm(d_model, config.norm_eps)
        self.layer = layer
        self.hidden = 8 * d_model // 3 // 8 * 8 if config.d_hidden is None else config.d_hidden
        if self.hidden:
            self.mlp_norm = RMSNorm(d_model, config.norm_eps)
            self.mlp_in = nn.Linear(d_model, 2 * self.hidden, bias=False)
            self.mlp_out = nn.Linear(self.hidden, d_model, bias=False)

    def forward(self, x: Tensor, state: dict[str, Tensor] | None, reset: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        y, state = self.layer(self.norm(x), state) if reset is None else self.layer(self.norm(x), state, reset)
        x = x + y
        if not self.hidden:
            return x, state
        return x + self.mlp_out(gated_unit(self.mlp_in(self.mlp_norm(x)))), state


def initialise(blocks: nn.ModuleList) -> None:
    """Normal weights that keep the size of what they are given; smaller where they write to the residual stream."""
    deep = (2 * len(blocks)) ** -0.5
    for name, module in blocks.named_modules():
        if isinstance(module, nn.Linear):
            writes = name.endswith((".out", ".mlp_out"))
            nn.init.normal_(module.weight, std=module.in_features**-0.5 * (deep if writes else 1.0))


def run_blocks(blocks: nn.ModuleList, x: Tensor, memory: Sequence[dict[str, Tensor]] | None, reset: Tensor | None) -> tuple[Tensor, Memory]:
    new: Memory = []
    for i, block in enumerate(blocks):
        x, state = block(x, None if memory is None else memory[i], reset)
        new.append(state)
    return x, new
