"""Multi-query associative recall: what is recalled, against the numbers of the state that it must be kept in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.decays import SoftplusDecay
from ..layers.programmer import ShortConvolution
from ..models.blocks import Block, Memory, initialise, layer_named, resolve, run_blocks
from ..models.language_model import ModelConfig
from ..plots import COLOURS, figure
from ..tasks.recall import MQAR
from .experiment import Finding, Result, Setting, experiment
from .training import accuracy, fit, parameters

_FAMILIES = {
    "softmax": ("softmax",), "delta": ("delta", "gated_delta"), "gated": ("decayed_hebb", "stepped_hebb"), "additive": ("hebb",),
}  # fmt: skip
_BESIDE = ("hebb_rate",)
_VOCABULARY = 128
_WHY = (
    "Nothing here is written twice and nothing need be forgotten: a decay has nothing to give, and is as good as a sum once it has learned "
    "not to decay. That takes more steps than there were; until then a memory that decays recalls less."
)
_TIE = 0.02  # recalls that differ by less are the same


@experiment(
    section="memory",
    claim="Recall of many pairs at equal width: softmax attention, then memories that correct errors, then those that decay, then sums",
    cite="Arora et al. 2023 (Zoology); Yang et al. 2024, NeurIPS",
    quick=30, default=480, full=20_000,
)  # fmt: skip
def mqar(setting: Setting) -> Result:
    """Sequences of 32 tokens (64 at the full size) of a vocabulary of 128: pairs of key and value, then each key once more, whose value is
    to be told. What stands between is 0: with so few words, words at random would be keys that nobody wrote.

    All models have two layers without MLPs: the same causal convolution of 3 tokens, which brings a key and its value together, and then
    one of ``softmax`` attention, ``delta``, ``gated_delta``, ``decayed_hebb`` (a decay a head, of x), ``stepped_hebb`` (Mamba-2: a size
    of the write beside the decay) and ``hebb``, with 2 heads and no convolution of their own. Decays start slow, A = 1, for so short a
    sequence. The same batches and the same steps, or fewer once the loss is below 0.02; Adam at 0.01 along a cosine; parameters
    agree to a few per cent. A model of width d keeps d^2 / 2 numbers, softmax attention two of d for every token. The order is that of
    mean recall over the widths; of a family the better member counts.

    Beside them stands ``hebb_rate``, a sum with a trained rate of each write, without a claim. The quick size trains for 600 steps, long
    before decays are learned, and leaves their place in the order out.
    """
    quick = setting.size == "quick"
    widths = setting.pick(quick=(16,), default=(16, 32), full=(16, 32, 64, 128))
    pairs, tokens = setting.pick(quick=(4, 32), default=(8, 32), full=(16, 64))
    steps, batch = setting.pick(quick=(600, 32), default=(2000, 64), full=(20_000, 64))
    task = MQAR(pairs=pairs, vocabulary=_VOCABULARY, tokens=tokens, filler=False)
    names = [name for family in _FAMILIES.values() for name in family] + [*_BESIDE]
    recall: dict[tuple[str, int], list[float]] = {(name, d): [] for name in names for d in widths}
    sizes: dict[tuple[str, int], tuple[int, int]] = {}
    for seed in setting.each_seed():
        for name, d in recall:
            model = Recaller(name, d, seed)
            sizes[name, d] = (model.numbers(tokens), parameters(model))
            told = {"setting": setting, "name": f"{name}, width {d}"}
            fit(model, task, steps, batch=batch, lr=0.01, cosine=True, until=0.02, seed=seed, **told)
            recall[name, d].append(accuracy(model, task.validation(128)))
    seeds = range(setting.seeds)
    mean = {f: [max(sum(recall[n, d][i] for d in widths) / len(widths) for n in ns) for i in seeds] for f, ns in _FAMILIES.items()}
    order = [f for f in _FAMILIES if not (quick and f == "gated")]
    findings = [
        Finding(f"recall, {a} - {b}", [x - y for x, y in zip(mean[a], mean[b], strict=True)], "0 or more", low=-_TIE, source="order")
        for a, b in zip(order, order[1:], strict=False)
    ]
    table = [
        {"layer": n, "width": d, "numbers of state": sizes[n, d][0], "parameters": sizes[n, d][1], "recall": sum(r) / len(r)}
        for (n, d), r in recall.items()
    ]
    return Result(findings, table, _draw(recall, sizes, pairs), "" if findings[-1].passed else _WHY)


class _Neighbours(nn.Module):
    """A causal convolution of three tokens, and a projection."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.conv, self.out = ShortConvolution(d_model, 3), nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, state: dict[str, Tensor] | None, reset: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        y, conv = self.conv(x, None if state is None else state["conv"], reset=reset)
        return self.out(y), {"conv": conv}


class Recaller(nn.Module):
    """``logits, memory = model(ids)``: a convolution of three tokens, then one layer, whose state has ``numbers(tokens)``.

    >>> logits, _ = Recaller("delta", 16, seed=0)(torch.zeros(1, 5, dtype=torch.int64))
    >>> logits.shape
    torch.Size([1, 5, 128])
    """

    def __init__(self, name: str, width: int, seed: int, heads: int = 2) -> None:
        super().__init__()
        config = ModelConfig(layers=(name,), d_model=width, heads=heads, conv=1, d_hidden=0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(_VOCABULARY, width)
            layer = layer_named(name, config, resolve(config, {}), 0)
            self.blocks = nn.ModuleList([Block(_Neighbours(width), config), Block(layer, config)])
            self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, _VOCABULARY, bias=False)
            nn.init.normal_(self.embed.weight, std=width**-0.5)
            initialise(self.blocks)
            for part in layer.modules():
                if isinstance(part, SoftplusDecay):
                    nn.init.zeros_(part.A_log)

    def numbers(self, tokens: int) -> int:
        return self.blocks[1].layer.state_bytes(tokens) // 4  # type: ignore[operator, union-attr]

    def forward(self, ids: Tensor) -> tuple[Tensor, Memory]:
        x, memory = run_blocks(self.blocks, self.embed(ids), None, None)
        return self.head(self.norm(x)), memory


def _draw(recall: Mapping[tuple[str, int], Sequence[float]], sizes: Mapping[tuple[str, int], tuple[int, int]], pairs: int) -> Any:
    made, (axes,) = figure()
    for colour, name in zip(COLOURS, dict.fromkeys(n for n, _ in recall), strict=False):
        runs = {sizes[n, d][0]: r for (n, d), r in recall.items() if n == name}
        axes.semilogx(list(runs), [sum(r) / len(r) for r in runs.values()], "o-", color=colour, label=name)
        for n, r in runs.items():
            axes.plot([n] * len(r), r, ".", color=colour, ms=4)
    axes.axhline(2 / _VOCABULARY, color="#888888", lw=0.8, ls="--")
    ticks = sorted({n for n, _ in sizes.values()})
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.05)
    axes.set_xlabel(f"numbers of state ({pairs} pairs; dashed: chance)")
    axes.set_ylabel("recall")
    axes.legend(frameon=False)
    return made
