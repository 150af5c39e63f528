"""Generation: a stream is a model and everything it remembers, which for fast weights is of constant size."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..language.errors import FastWeightError
from .blocks import Memory
from .files import load_tensors, save_tensors
from .language_model import LanguageModel


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn from logits: the most likely one at temperature 0, else at random among the likeliest.

    ``top_k`` keeps that many tokens, ``top_p`` the fewest that together have that probability.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise FastWeightError(f"temperature is {self.temperature}, expected 0 (the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise FastWeightError(f"top_k is {self.top_k}, expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise FastWeightError(f"top_p is {self.top_p}, expected a probability above 0 and at most 1")

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token from the logits (vocabulary,)."""
        if self.temperature == 0:
            return int(logits.argmax())
        logits, order = (logits.double() / self.temperature).sort(descending=True)
        probabilities = logits.softmax(-1)
        if self.top_k is not None:
            probabilities[self.top_k :] = 0
        if self.top_p is not None:
            probabilities[probabilities.cumsum(-1) - probabilities >= self.top_p] = 0
        return int(order[torch.multinomial(probabilities, 1, generator=generator)])


class Stream:
    """A model reading and writing one sequence, token by token, in constant time and memory for fast weight layers.

    >>> from fastweights.models import LanguageModel, ModelConfig
    >>> stream = Stream(LanguageModel(ModelConfig(d_model=32, heads=2)), seed=0)
    >>> stream.feed([72, 101])
    >>> len(list(stream.generate(5, Sampler(temperature=0))))
    5
    """

    def __init__(self, model: LanguageModel, seed: int = 0) -> None:
        self.model = model
        self.memory: Memory | None = None
        self.logits: Tensor | None = None
        self.tokens = 0
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def feed(self, ids: Sequence[int], chunk: int = 4096) -> None:
        """Read tokens."""
        device = self.model.embed.weight.device
        if any(not 0 <= i < self.model.config.vocabulary for i in ids):
            raise FastWeightError(f"a token is outside the vocabulary of {self.model.config.vocabulary}")
        for start in range(0, len(ids), chunk):
            part = torch.tensor([list(ids[start : start + chunk])], device=device)
            logits, self.memory = self.model(part, self.memory)
            self.logits = logits[0, -1]
        self.tokens += len(ids)

    def generate(self, tokens: int, sampler: Sampler | None = None) -> Iterator[int]:
        """Write tokens, one at a time, each read back at once."""
        if self.logits is None:
            raise FastWeightError("the stream has read nothing yet: feed it at least one token first")
        sampler = sampler or Sampler()
        for _ in range(tokens):
            token = sampler.draw(self.logits, self.generator)
            self.feed([token])
            yield token

    def copy(self) -> Stream:
        """A second stream that remembers the same and goes its own way."""
        other = Stream(self.model)
        other.memory, other.tokens = copy.deepcopy(self.memory), self.tokens
        other.logits = None if self.logits is None else self.logits.clone()
        other.generator.set_state(self.generator.get_state())
        return other

    def save(self, path: str | Path) -> None:
        """Write everything the stream remembers to a safetensors file; a loaded one continues bit for bit."""
        if self.memory is None or self.logits is None:
            raise FastWeightError("the stream has read nothing yet, so there is nothing to save")
        tensors = {f"{i}.{name}": t for i, state in enumerate(self.memory) for name, t in state.items()}
        tensors |= {"logits": self.logits, "generator": self.generator.get_state()}
        save_tensors(Path(path), tensors, {"tokens": str(self.tokens), "model": identity(self.model)})

    @classmethod
    def load(cls, path: str | Path, model: LanguageModel) -> Stream:
        """A stream saved with the same model."""
        tensors, metadata = load_tensors(Path(path))
        if metadata.get("model") != identity(model):
            raise FastWeightError(f"{path} is the memory of another model: its layers, sizes or weights differ; name another file")
        stream = cls(model)
        stream.tokens = int(metadata["tokens"])
        stream.logits = tensors.pop("logits")
        stream.generator.set_state(tensors.pop("generator"))
        stream.memory = [{} for _ in model.config.layers]
        for key, tensor in tensors.items():
            layer, name = key.split(".", 1)
            stream.memory[int(layer)][name] = tensor
        return stream


def identity(model: LanguageModel) -> str:
    """A hash of a model's layers and weights."""
    found = hashlib.sha256(" ".join(model.config.layers).encode())
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
