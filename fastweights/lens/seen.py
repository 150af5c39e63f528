"""``look``: reads a text with a model, a few tokens at a time, and measures the fast weights of every layer on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..language.errors import FastWeightError, FormError
from ..layers.attention import rotate
from ..layers.layer import FastWeightLayer
from ..models.language_model import LanguageModel
from ..models.systems import SYSTEMS
from .measure import Recall, attention_of, effective_rank, kept, mean_age, retrieval_error, size, trajectory

_NUMBERS_A_PIECE = 2**22
_MOST_TOKENS_A_PIECE = 1024
_SPECTRA = 100


class Errors(NamedTuple):
    """|v - W k| / |v| at the key of each token, (layers, heads, T): with the W before the token and with the W after it."""

    before: Tensor
    after: Tensor


@dataclass(frozen=True, repr=False, eq=False)
class Seen:
    """What each head wrote, kept and recalled of a text of T tokens; W_t is the fast weights after token t, W_{-1} zero.

    ``layers`` are the layers of the model that were looked at, those with fast weights; the first axis of everything counts these.
    ``names`` are theirs; ``notes`` says what was left out, and why. All are on the CPU, in the precision of the state.

    Attributes:
        ids: the text, (T,).
        norms: |W_t|, (layers, heads, T).
        writes: how much each token changed, |W_t - W_{t-1}|, (layers, heads, T).
        kept: the share of W_{t-1} that is still in W_t, (layers, heads, T); see ``lens.kept``.
        errors: how far W k is from v before and after the write; see ``lens.retrieval_error``.
        at: the tokens of which spectra were taken, (N,).
        spectra: singular values of W_t at these, the largest first, (layers, heads, N, min(V, K)).
        ranks: their effective rank, (layers, heads, N); see ``lens.effective_rank``.
        window: how many tokens back ages and attention look, the token itself included.
    """

    layers: tuple[int, ...]
    names: tuple[str, ...]
    notes: tuple[str, ...]
    ids: Tensor
    norms: Tensor
    writes: Tensor
    kept: Tensor
    errors: Errors
    at: Tensor
    spectra: Tensor
    ranks: Tensor
    window: int
    recalled: tuple[Recalled, ...]

    @property
    def ages(self) -> Tensor:
        """Mean age in tokens of what is recalled, sum_s |A_ts| (t - s) / sum_s |A_ts|, (layers, heads, T).

        s goes over the last ``window`` tokens. NaN for layers without an attention matrix; ``FormError`` where no layer has one.
        """
        ages = [r.ages for r in self.recalled]
        found = next((a for a in ages if a is not None), None)
        if found is None:
            raise FormError(self.recalled[0].refusal)
        return torch.stack([torch.full_like(found, torch.nan) if a is None else a for a in ages])

    def attention(self, layer: int, head: int) -> Tensor:
        """The effective attention A, y = A v, of the last N = min(T, window) tokens among themselves, (N, N).

        y is what the rule reads, before the layer's norm, gate and projection, without the part from before these tokens.
        Raises ``FormError`` if the layer's rule has no such matrix.
        """
        for what, i, n in (("layer", layer, len(self.layers)), ("head", head, self.norms.shape[1])):
            if not 0 <= i < n:
                raise FastWeightError(f"{what} is {i}, expected 0 to {n - 1}: {self!r}")
        found = self.recalled[layer].attention
        if found is None:
            raise FormError(self.recalled[layer].refusal)
        return found[head]

    def __repr__(self) -> str:
        named = ", ".join(f"{i} {n}" for i, n in zip(self.layers, self.names, strict=True))
        return f"Seen({len(self.ids):,} tokens; {self.norms.shape[1]} heads; layers {named})"


class Recalled(NamedTuple):
    """Ages (heads, T) and the attention matrix (heads, N, N) of one layer, or why there are none."""

    ages: Tensor | None
    attention: Tensor | None
    refusal: str


@torch.no_grad()
def look(
    model: LanguageModel,
    ids: Tensor | Sequence[int] | str | bytes,
    *,
    every: int | None = None,
    window: int = 512,
    chunk: int | None = None,
) -> Seen:
    """Read a text with a model and measure its fast weights at every token, without storing every W_t.

    The text is read ``chunk`` tokens at a time with the state carried, so that memory does not grow with it but by the results, a few
    numbers a token and head. What is found does not depend on ``chunk``, up to rounding. Layers without fast weights of their own
    (softmax attention, systems, rules that are not affine in W) are skipped, with a note.

    Args:
        ids: tokens (T,), at least one; or a text, for a model of bytes.
        every: spectra are taken of every so many tokens, and of the last; by default of about a hundred.
        window: how many tokens back ages and attention look.
        chunk: tokens at a time; by default as many as keep a layer's tensors at about 16 MB, and 1024 at most.

    >>> from fastweights import lens
    >>> from fastweights.models import LanguageModel, ModelConfig
    >>> model = LanguageModel(ModelConfig(layers=("gated_delta", "softmax"), d_model=32, heads=2))
    >>> seen = lens.look(model, "to be or not to be", every=6)
    >>> seen
    Seen(18 tokens; 2 heads; layers 0 gated_delta)
    >>> seen.norms.shape, seen.spectra.shape, seen.attention(0, 1).shape
    (torch.Size([1, 2, 18]), torch.Size([1, 2, 3, 16]), torch.Size([18, 18]))
    """
    ids = _tokens(model, ids)
    T = len(ids)
    layers = {
        i: b.layer for i, b in enumerate(model.blocks) if isinstance(b.layer, FastWeightLayer) and b.layer.rule.trace.program is not None
    }
    names = model.config.layers
    notes = tuple(f"layer {i}, {names[i]}, is skipped: {_why(names[i])}" for i in range(len(names)) if i not in layers)
    if not layers:
        raise FastWeightError("the model has no layer of a rule to look at; " + "; ".join(notes))
    every = -(-T // _SPECTRA) if every is None else every
    chunk = min(_MOST_TOKENS_A_PIECE, *(_tokens_a_piece(layer, window) for layer in layers.values())) if chunk is None else chunk
    for what, n in (("every", every), ("window", window), ("chunk", chunk)):
        if n < 1:
            raise FastWeightError(f"{what} is {n}, expected at least 1 token")
    at = torch.tensor(sorted({*range(every - 1, T, every), T - 1}))
    watched = {i: _Watched(f"layer {i}, {names[i]}", layer, at, min(window, T), T) for i, layer in layers.items()}
    memory = None
    for start in range(0, T, chunk):
        with _heard(layers) as signals:
            _, after = model(ids[None, start : start + chunk].to(model.embed.weight.device), memory)
        for i, one in watched.items():
            one.take(start, signals[i], {n: torch.zeros_like(x) for n, x in after[i].items()} if memory is None else memory[i])
        memory = after
    return _seen(tuple(layers), names, notes, ids, at, window, list(watched.values()))


def _tokens(model: LanguageModel, ids: Tensor | Sequence[int] | str | bytes) -> Tensor:
    if not isinstance(model, LanguageModel):
        raise FastWeightError(f"model is a {type(model).__name__}, expected a LanguageModel, such as models.load(folder)")
    vocabulary = model.config.vocabulary
    if isinstance(ids, (str, bytes)):
        if vocabulary != 256:
            raise FastWeightError(f"a text is bytes, and the model has a vocabulary of {vocabulary}; pass its tokens, int64 (T,)")
        ids = list(ids.encode() if isinstance(ids, str) else ids)
    ids = torch.as_tensor(ids).cpu()
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise FastWeightError(f"ids is {ids.dtype} {tuple(ids.shape)}, expected at least one token, int64 (T,), or a text")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise FastWeightError(f"a token is outside the vocabulary of {vocabulary}")
    return ids.long()


def _why(name: str) -> str:
    if name == "softmax" or name.startswith("window:"):
        return "attention has no fast weights"
    return "a system is more than a rule" if name in SYSTEMS else "its rule is not affine in W"


def _tokens_a_piece(layer: FastWeightLayer, window: int) -> int:
    return max(_NUMBERS_A_PIECE // (layer.heads * max(layer.d_value * layer.d_feature, window)), 1)


@contextmanager
def _heard(layers: Mapping[int, FastWeightLayer]) -> Iterator[dict[int, dict[str, Tensor]]]:
    """The signals of each layer in the calls within, as its programmer made them."""
    heard: dict[int, dict[str, Tensor]] = {}
    hooks = [
        layer.programmer.register_forward_hook(lambda _, __, made, i=i: heard.__setitem__(i, dict(made[0]))) for i, layer in layers.items()
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


class _Watched:
    """The measures of one layer, added to piece by piece."""

    def __init__(self, name: str, layer: FastWeightLayer, at: Tensor, window: int, total: int) -> None:
        self.name, self.layer, self.rule, self.at, self.total = name, layer, layer.rule, at, total
        self.recall: Recall | None = Recall(layer.rule, window)
        self.refusal = ""
        self.parts: dict[str, list[Tensor]] = {}

    def take(self, start: int, signals: dict[str, Tensor], before: Mapping[str, Tensor]) -> None:
        """Tokens from ``start`` on: their signals, and the layer's state before them."""
        signals = self._as_run(signals, before)
        state = tuple(before[n] for n in self.rule.states)
        states = trajectory(self.rule, signals, state)
        old, new = states.before[0], states.after[0]
        norms = size(new)
        if not bool(norms.isfinite().all()):
            token = start + int((~norms.isfinite()).any(2).nonzero()[0, 1])
            raise FastWeightError(f"{self.name}: W is not finite from token {token} on; end the text before it")
        here = self.at[(self.at >= start) & (self.at < start + norms.shape[1])] - start
        found = {
            "norms": norms, "writes": size(new - old), "kept": kept(self.rule, signals, states),
            "before": retrieval_error(old, signals), "after": retrieval_error(new, signals),
            "spectra": torch.linalg.svdvals(new[:, here.to(new.device)]),
        }  # fmt: skip
        found |= self._recalled(start, signals, state)
        for name, x in found.items():
            self.parts.setdefault(name, []).append(x[0].to("cpu", copy=True))  # a view would keep all that it is of

    def _as_run(self, signals: dict[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As the layer gives them to its rule, in the precision of the state."""
        if self.layer.rotary:
            positions = torch.arange(signals["k"].shape[1], device=signals["k"].device) + before["position"]
            signals |= {n: rotate(signals[n].transpose(1, 2), positions).transpose(1, 2) for n in ("q", "k")}
        dtype = before[next(iter(self.rule.states))].dtype
        return {n: x.to(dtype) for n, x in signals.items()}

    def _recalled(self, start: int, signals: dict[str, Tensor], state: tuple[Tensor, ...]) -> dict[str, Tensor]:
        if self.recall is None:
            return {}
        try:
            rows = self.recall.rows(signals, state)
        except FormError as error:
            self.recall, self.refusal = None, f"{self.name}: {error}"
            return {}
        return {"ages": mean_age(rows), "rows": rows[:, max(self.total - self.recall.window - start, 0) :]}

    def over_time(self, name: str) -> Tensor:
        """(heads, T) or (heads, T, ...)."""
        return torch.cat(self.parts[name]).transpose(0, 1).contiguous()

    def recalled(self) -> Recalled:
        if self.recall is None:
            return Recalled(None, None, self.refusal)
        return Recalled(self.over_time("ages"), attention_of(torch.cat(self.parts["rows"])), "")


def _seen(
    layers: tuple[int, ...], names: Sequence[str], notes: tuple[str, ...], ids: Tensor, at: Tensor, window: int, watched: list[_Watched]
) -> Seen:
    found = {n: torch.stack([w.over_time(n) for w in watched]) for n in ("norms", "writes", "kept", "before", "after")}
    spectra = [w.over_time("spectra") for w in watched]
    most = max(s.shape[-1] for s in spectra)
    # a feature map may make larger matrices in one layer than in another: smaller ones have no further singular values
    joined = torch.stack([torch.nn.functional.pad(s, (0, most - s.shape[-1])) for s in spectra])
    return Seen(
        layers=layers, names=tuple(names[i] for i in layers), notes=notes, ids=ids,
        norms=found["norms"], writes=found["writes"], kept=found["kept"], errors=Errors(found["before"], found["after"]),
        at=at, spectra=joined, ranks=effective_rank(joined), window=window, recalled=tuple(w.recalled() for w in watched),
    )  # fmt: skip
