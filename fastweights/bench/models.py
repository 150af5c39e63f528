"""Whole models: tokens a second of training, of one model with its scan replaced, and of softmax attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..engine.scan import Output, scan
from ..language.rule import Rule
from ..layers import layer as layers
from ..models import LanguageModel, ModelConfig
from .measure import interleaved
from .scans import fallbacks

BATCH = 8192  # tokens a step
LENGTHS = (512, 2048, 8192)


def config(kind: str, depth: int = 12) -> ModelConfig:
    """Ten million parameters."""
    return ModelConfig(layers=(kind,) * depth, d_model=256, heads=4)


@contextlib.contextmanager
def _scan_as(function: Callable[..., Any]) -> Iterator[None]:
    layers.scan = function  # type: ignore[assignment]
    try:
        yield
    finally:
        layers.scan = scan


def _on_torch(rule: Rule, **given: Any) -> Output:
    return scan(rule, **given, backend="torch")


def _on_transformers(rule: Rule, *, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **_: Any) -> Output:
    y = fallbacks()["Gated DeltaNet"](q * q.shape[-1] ** 0.5, k, v, g, beta)  # which divides q by the root of its size
    return Output(y, v.new_zeros(v.shape[0], v.shape[2], v.shape[3], k.shape[3]))


def _training_step(kind: str, T: int, function: Callable[..., Any]) -> Callable[[], object]:
    model = LanguageModel(config(kind))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(256, (BATCH // T, T + 1), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        with _scan_as(function):
            logits, _ = model(ids[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def training(seconds: float) -> Iterator[tuple[int, dict[str, float]]]:
    """For every length: tokens a second of each model, forward, backward and optimiser."""
    kinds: dict[str, tuple[str, Callable[..., Any]]] = {
        "kernels": ("gated_delta", scan),
        "torch": ("gated_delta", _on_torch),
        "softmax": ("softmax", scan),
    }
    if fallbacks():
        kinds["transformers"] = ("gated_delta", _on_transformers)
    for T in LENGTHS:
        steps = {name: _training_step(kind, T, function) for name, (kind, function) in kinds.items()}
        times = interleaved(steps, seconds, least=1)
        yield T, {name: BATCH / t for name, t in times.items()}
