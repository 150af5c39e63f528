"""Bytes of real text: additive, decaying and error-correcting memories at equal parameters, and with a state carried beyond the context."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..models.language_model import LanguageModel
from ..plots import COLOURS, figure
from ..tasks.text import Text, standard_library
from .entrants import Entrant
from .experiment import Finding, Result, Setting, experiment
from .training import fit, parameters

_ENTRANTS = (
    Entrant("additive (hebb)", ("hebb",)), Entrant("decay (decayed_hebb)", ("decayed_hebb",)), Entrant("delta", ("delta",)),
    Entrant("gated delta", ("gated_delta",)), Entrant("softmax", ("softmax",)),
)  # fmt: skip
_MORE = (
    Entrant("KDA", ("kda",)), Entrant("DeltaProduct", ("gated_deltaproduct",)), Entrant("hybrid", ("gated_delta", "softmax")),
)  # fmt: skip


@experiment(
    section="sequences",
    claim="On text, a memory that corrects errors beats an additive one of the same size, and can carry its state where that one cannot",
    cite="Schlag, Irie and Schmidhuber 2021, section 6.3; Yang et al. 2024",
    quick=60, default=580, full=20_000,
)  # fmt: skip
def charlm(setting: Setting) -> Result:
    """Models of two layers, of equal numbers of parameters to a few per cent, read the standard library's Python source byte by byte.

    Contexts are longer than a head has key channels, so that memories are full. All see the same batches, with Adam along a cosine, in
    windows of one context. Told are bits per byte on text held out, in windows of the same length; and in windows four times as long,
    over which the state is carried, counted from the second context on: a memory that only adds has never seen so much in it, one that
    replaces or forgets has. The claim is the order: delta below additive, in both. The quick size trains three models for 120 steps, long
    before they differ by what they hold; it tells only what carrying costs.
    """
    width, depth, length, batch, steps = setting.pick(
        quick=(48, 2, 256, 4, 120), default=(64, 2, 256, 8, 800), full=(256, 6, 512, 32, 20_000)
    )
    text = Text(standard_library())
    entrants = _ENTRANTS[::2] if setting.size == "quick" else (*_ENTRANTS, *_MORE)
    bits: dict[str, list[float]] = {e.name: [] for e in entrants}
    carried: dict[str, list[float]] = {e.name: [] for e in entrants}
    sizes = {}
    for seed in setting.each_seed():
        for entrant in entrants:
            model = entrant.build(text, width, depth, seed, heads=4)
            sizes[entrant.name] = parameters(model)
            fit(model, text, steps, batch=batch, length=length, lr=4e-3, seed=seed, cosine=True, setting=setting, name=entrant.name)
            assert isinstance(model, LanguageModel)
            bits[entrant.name].append(_bits(model, text, length, 1))
            carried[entrant.name].append(_bits(model, text, length, 4))
    hebb, delta = _ENTRANTS[0].name, "delta"

    def apart(found: dict[str, list[float]]) -> list[float]:
        return [a - b for a, b in zip(found[hebb], found[delta], strict=True)]

    lost = [(c - b) - (d - a) for a, b, c, d in zip(bits[delta], bits[hebb], carried[hebb], carried[delta], strict=True)]
    findings = [Finding("bits that additive loses by carrying, beside delta", lost, "> 0", low=0.0, source="order")]
    if setting.size != "quick":
        findings += [
            Finding("bits per byte that delta saves beside additive", apart(bits), "> 0", low=0.0, source="order"),
            Finding("the same with the state carried", apart(carried), "> 0", low=0.0, source="order"),
        ]
    table = [
        {"model": n, "parameters": sizes[n], "bits per byte": sum(bits[n]) / len(bits[n]), "carried": sum(carried[n]) / len(carried[n])}
        for n in bits
    ]
    return Result(findings, table, _draw(bits, carried))


@torch.no_grad()
def _bits(model: LanguageModel, text: Text, length: int, contexts: int) -> float:
    """Bits per byte of held-out text; with more than one context, of all but the first, the state carried."""
    nats, count = 0.0, 0
    for inputs, targets in list(text.validation(8, length * contexts))[:2]:
        memory = None
        for i, (x, y) in enumerate(zip(inputs.split(length, 1), targets.split(length, 1), strict=True)):
            logits, memory = model(x, memory)
            if i or contexts == 1:
                nats += _nats(logits, y)
                count += y.numel()
    return nats / count / math.log(2)


def _nats(logits: Tensor, y: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"))


def _draw(bits: dict[str, list[float]], carried: dict[str, list[float]]):
    made, (axes,) = figure(width=6.4)
    for i, name in enumerate(bits):
        for found, marker, shift, label in ((bits, "o", -0.12, "within the context"), (carried, "s", 0.12, "state carried, 4 contexts")):
            at = [i + shift] * len(found[name])
            axes.plot(at, found[name], marker, color=COLOURS[marker == "s"], ms=5, label=label if not i else None)
    axes.set_xticks(range(len(bits)), [n.replace(" (", "\n(") for n in bits], fontsize=8)
    axes.set_ylabel("bits per byte, held out")
    axes.legend(frameon=False)
    return made
