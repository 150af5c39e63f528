"""Two memories in one layer: which mixing of a softmax window with fast weights recalls exactly and still tracks a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import rules
from ..layers.attention import SoftmaxAttention
from ..layers.hybrid import KINDS, HybridAttention
from ..layers.layer import FastWeightLayer
from ..layers.programmer import ShortConvolution
from ..models.blocks import Block, Memory, initialise, run_blocks
from ..models.language_model import ModelConfig
from ..plots import COLOURS, figure
from ..tasks.parity import Parity
from ..tasks.recall import MQAR
from ..tasks.source import VALIDATION_SEED
from .entrants import CHANCE, SOLVED, right_by_token, scaled
from .experiment import Finding, Result, Setting, Source, experiment
from .training import accuracy, fit, parameters

_TESTED, _LATE = 256, 193  # bits of the test of parity, and from which on they count
_VOCABULARY = 128  # of recall


class _Row(NamedTuple):
    name: str
    layers: tuple[str, ...]
    tracks: bool  # parity
    recalls: bool
    printed: str = ""  # scaled accuracy on parity in the paper
    narrower: float = 1.0  # two layers are so much narrower, so that parameters agree

    @property
    def source(self) -> Source:
        return "paper" if self.printed else "order"


ROWS = (
    _Row("synchronous", ("synchronous",), True, True, "1.00"),
    _Row("delayed stream", ("delayed_stream",), False, True, "0.033"),
    _Row("delayed chunk", ("delayed_chunk",), False, True, "0.028"),
    _Row("attention alone", ("attention",), False, True),
    _Row("fast weights alone", ("memory",), True, False),
    _Row("attention, then fast weights", ("attention", "memory"), True, True, narrower=0.75),
)
_QUICK = ("synchronous", "delayed stream", "delayed chunk", "fast weights alone")


@experiment(
    section="expressivity",
    claim="A softmax window with fast weights: every mixture recalls, only those whose memory sees every token at once track a state",
    cite="Irie, Yau and Gershman 2025 (Blending complementary memory systems in hybrid quadratic-linear transformers)",
    quick=45, default=450, full=20_000,
)  # fmt: skip
def hybrid(setting: Setting) -> Result:
    """A layer with two memories of the same queries, keys and values: softmax attention to a window of the last tokens, and a delta rule
    memory with rates to 2. They are mixed by a sigmoid of x for each. A token enters the fast weights at once (synchronous), when it
    leaves the window (delayed stream), or with its whole chunk, when that is full (delayed chunk).

    Without training: the share of attention is shut, and the gradient of what a token reads with respect to those before it says which of
    them the memory has seen. The newest one stands 1 token before in a synchronous layer, W tokens, the window, in a delayed stream, and
    1 + (t mod W) tokens before token t in delayed chunks. Of the last tokens a delayed memory knows nothing, and attention, which weighs
    tokens without order or state, is left to count them.

    With training: one layer without an MLP behind a causal convolution of 3 tokens. Parity is trained on 3 to 40 bits with a window of 16,
    so that a delayed memory is in use, and tested on bits 193 to 256 (accuracy scaled: 0 at chance, 1 where all is right). Recall is
    multi-query recall of so many pairs that the fast weights alone, with heads of 8 numbers, do not come to hold them; the window is the
    whole sequence. Beside the hybrids: attention alone, fast weights alone, and one layer of each, one after the other (narrower). The same
    batches for the same number of steps, or fewer in recall once the loss is below 0.02; parameters agree to a sixth. "Solves" is 0.95
    or more, "does not" 0.1 or less for parity and less than 0.95 for recall.

    The paper has larger models, and modular arithmetic: see hybrid-modular. The quick size compares the three hybrids on both tasks, and
    fast weights alone on recall.
    """
    findings, table, ages = _untrained(setting)
    rows = [r for r in ROWS if r.name in _QUICK or setting.size != "quick"]
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        tasks = ("recall",) if setting.size == "quick" and not row.printed else ("parity", "recall")
        for task in tasks:
            size = 0
            for seed in setting.each_seed():
                value, size = (_parity if task == "parity" else _recall)(row, setting, seed)
                found.setdefault((row.name, task), []).append(value)
            values = found[row.name, task]
            findings.append(_finding(row, task, values))
            table.append({"model": row.name, "parameters": size, "measured": task, "value": sum(values) / len(values)})
    return Result(findings, table, _draw(ages, found))


def _finding(row: _Row, task: str, values: Sequence[float]) -> Finding:
    if task == "recall":
        bounds = {"low": SOLVED} if row.recalls else {"high": SOLVED}
        return Finding(f"{row.name}: recall", values, "1.00" if row.recalls else "below 0.95", source="order", **bounds)
    bounds = {"low": SOLVED} if row.tracks else {"high": CHANCE}
    expected = row.printed or ("1.00" if row.tracks else "about 0")
    return Finding(f"{row.name}: parity, scaled accuracy at bits {_LATE} to {_TESTED}", values, expected, source=row.source, **bounds)


# -- without training


def newest(kind: str, window: int, tokens: int) -> list[int]:
    """At every token, how many tokens before it the newest one stands that is in the fast weights; -1 where none is.

    >>> newest("delayed_stream", 2, 4)
    [-1, -1, 2, 2]
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = HybridAttention(rules.delta, 8, heads=1, window=window, kind=kind).double()
        x = torch.randn(1, tokens, 8, dtype=torch.float64, requires_grad=True)
    assert layer.shares is not None
    nn.init.zeros_(layer.shares.weight)
    with torch.no_grad():
        layer.shares.bias.copy_(torch.tensor([-1e9, 1e9]))  # of attention nothing, of the fast weights all
    read = layer(x)[0][0].sum(-1)
    ages = []
    for t in range(tokens):
        changed = torch.autograd.grad(read[t], x, retain_graph=True)[0][0, :t].abs().sum(-1) > 0
        ages.append(t - int(changed.nonzero().max()) if bool(changed.any()) else -1)
    return ages


def due(kind: str, window: int, tokens: int) -> list[int]:
    """The same as the definition of the kind has it."""
    if kind == "synchronous":
        return [1 if t else -1 for t in range(tokens)]
    return [-1 if t < window else window if kind == "delayed_stream" else 1 + t % window for t in range(tokens)]


def _untrained(setting: Setting) -> tuple[list[Finding], list[dict], dict[str, list[int]]]:
    window, tokens = setting.pick(quick=(8, 32), default=(8, 32), full=(64, 512))
    ages = {kind: newest(kind, window, tokens) for kind in KINDS}
    findings, table = [], []
    for kind, said in zip(KINDS, ("1", f"{window}", f"1 to {window}"), strict=True):
        wrong = sum(a != b for a, b in zip(ages[kind], due(kind, window, tokens), strict=True))
        what = f"{kind}, window {window}: tokens at which the newest that is in the fast weights is not {said} before"
        findings.append(Finding(what, [wrong] * setting.seeds, "0", low=0, high=0))
        table.append({"model": kind, "parameters": 0, "measured": "age of the newest, at most", "value": max(ages[kind])})
    return findings, table, ages


# -- with training


class Mixed(nn.Module):
    """``logits, memory = model(ids)``: a causal convolution of three tokens, then layers without MLPs.

    A layer is a kind of hybrid, ``attention`` to a window or ``memory``, a delta rule with rates to 2.

    >>> Mixed(("synchronous",), vocabulary=3, width=16, window=4, heads=2, seed=0)(torch.zeros(1, 5, dtype=torch.int64))[0].shape
    torch.Size([1, 5, 3])
    """

    def __init__(self, layers: Sequence[str], *, vocabulary: int, width: int, window: int, heads: int, seed: int) -> None:
        super().__init__()
        config = ModelConfig(d_model=width, heads=heads, d_hidden=0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed, self.conv = nn.Embedding(vocabulary, width), ShortConvolution(width, 3)
            self.blocks = nn.ModuleList(Block(_layer(name, width, heads, window), config) for name in layers)
            self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
            nn.init.normal_(self.embed.weight, std=width**-0.5)
            initialise(self.blocks)

    def forward(self, ids: Tensor) -> tuple[Tensor, Memory]:
        x = self.embed(ids)
        x, memory = run_blocks(self.blocks, x + self.conv(x, None)[0], None, None)
        return self.head(self.norm(x)), memory


def _layer(name: str, width: int, heads: int, window: int) -> nn.Module:
    if name == "attention":
        return SoftmaxAttention(width, heads=heads, window=window)
    if name == "memory":
        return FastWeightLayer(rules.delta, width, heads=heads, conv=1, negative_eigenvalues=True)
    return HybridAttention(rules.delta, width, heads=heads, window=window, kind=name, negative_eigenvalues=True)


def _parity(row: _Row, setting: Setting, seed: int) -> tuple[float, int]:
    """Scaled accuracy at late bits, and the number of parameters."""
    steps, batch = setting.pick(quick=(800, 16), default=(1200, 32), full=(20_000, 128))
    width, window = setting.pick(quick=(32, 16), default=(32, 16), full=(128, 16))
    task: Any = Parity()  # whose vocabulary is the class's, which the protocol does not know
    model = Mixed(row.layers, vocabulary=task.vocabulary, width=int(width * row.narrower), window=window, heads=4, seed=seed)
    lr = setting.pick(quick=1e-2, default=1e-2, full=1e-3)
    fit(model, task, steps, batch=batch, lr=lr, seed=seed, cosine=True, setting=setting, name=f"parity, {row.name}")
    right = right_by_token(model, *Parity(lengths=(_TESTED, _TESTED)).batch(VALIDATION_SEED, 0, 128))
    return scaled(float(right[_LATE:].mean()), 0.5), parameters(model)


def _recall(row: _Row, setting: Setting, seed: int) -> tuple[float, int]:
    """The share of pairs that is recalled, and the number of parameters."""
    pairs, steps = setting.pick(quick=(12, 800), default=(16, 2000), full=(64, 20_000))
    width = setting.pick(quick=32, default=32, full=128)
    task = MQAR(pairs=pairs, vocabulary=_VOCABULARY, tokens=4 * pairs, filler=False)
    model = Mixed(row.layers, vocabulary=_VOCABULARY, width=int(width * row.narrower), window=task.tokens, heads=4, seed=seed)
    lr = setting.pick(quick=1e-2, default=5e-3, full=1e-3)
    fit(model, task, steps, batch=32, lr=lr, seed=seed, cosine=True, until=0.02, setting=setting, name=f"recall, {row.name}")
    return accuracy(model, task.validation(128)), parameters(model)


def _draw(ages: Mapping[str, Sequence[int]], found: Mapping[tuple[str, str], Sequence[float]]) -> Any:
    made, (left, right) = figure(2, width=5.0)
    for colour, (kind, values) in zip(COLOURS, ages.items(), strict=False):
        seen = [(t, age) for t, age in enumerate(values) if age >= 0]
        left.plot(*zip(*seen, strict=True), ".-", color=colour, lw=1, ms=4, label=kind.replace("_", " "))
    left.set_ylim(0, 1.6 * max(map(max, ages.values())))
    left.set_xlabel("token that reads")
    left.set_ylabel("tokens since the newest in memory")
    left.legend(frameon=False, fontsize=8, loc="upper left")
    names = list(dict.fromkeys(name for name, _ in found))
    for i, (task, mark, said) in enumerate((("parity", "o", "parity (scaled)"), ("recall", "s", "recall"))):
        for y, name in enumerate(names):
            values = found.get((name, task), [])
            right.plot(values, [-y - 0.12 + 0.24 * (i == 0)] * len(values), mark, color=COLOURS[i], ms=7, alpha=0.8)
        right.plot([], [], mark, color=COLOURS[i], label=said)
    right.set_yticks([-y for y in range(len(names))], names)
    right.set_ylim(-len(names) + 0.5, 0.6)
    right.set_xlim(-0.08, 1.08)
    right.set_xlabel("accuracy (a mark a seed)")
    right.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return made
