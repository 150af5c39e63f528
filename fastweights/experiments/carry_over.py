"""State carried from one segment of a stream to the next: good for rules that replace or forget, the end of one that only adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import rules
from ..engine.scan import scan
from ..models.blocks import Memory
from ..models.language_model import LanguageModel, ModelConfig
from ..plots import COLOURS, figure
from ..tasks.source import IGNORED
from ..tasks.text import Text, hash_numbers, standard_library
from ..train.scores import counts, loss_of
from .experiment import Finding, Result, Setting, experiment
from .training import parameters

_RULES = ("hebb", "decayed_hebb", "delta", "gated_delta")
_NAMES = {"hebb": "Hebb", "decayed_hebb": "Hebb with decay", "delta": "delta", "gated_delta": "gated delta"}
_VALUES = 32  # numbers a pair
_KEYS = 16  # of the stream of writes, and as many values, and writes to a segment


@experiment(
    section="memory",
    claim="State carried across segments helps the delta rule and decaying memories, and breaks the purely additive rule",
    cite="Schlag, Irie and Schmidhuber 2021, section 6.3",
    quick=15, default=240, full=40_000,
)  # fmt: skip
def carry_over(setting: Setting) -> Result:
    """Without training: segments of N pairs, keys of length 1 in d = 64 dimensions, values of +1 and -1. At the end of a segment the pairs
    of the segment before are read; with W set to zero between segments that is chance. A bit is wrong with the probability
    erfc(SNR / sqrt 2) / 2. After s segments SNR = sqrt(d / (sN - 1)) for Hebb, which goes to chance as s grows; for decay lambda =
    1 - 1/d and for delta with beta = 1 it is that of ``capacity`` at ages N ... 2N - 1, but for the first segments, in which W is not
    yet full, and does not depend on s.

    Trained, a stream of writes: key, value, key, value, ..., n = 16 keys and 16 values at random, 16 writes to a segment. At each key the
    value is to be told that it was last given, in whatever segment; then it is given another. One layer each, with the same width,
    batches and steps, and gradients that stay within a segment. ``carried``: W of a segment is where the next begins, in training and in
    the test. ``reset``: W is zero there, and only the last inputs of the short convolution stay, so that 1 - (1 - (1 - 1/n)^n) = 0.36 of
    the answers can be known. A sum of all that was ever written to a key does not tell the last value.

    Trained on text, at larger sizes: the same with bytes, in segments of 64 from end to end. What is told is bits per byte of held-out
    text. The published gain of the delta rule is that of 16 layers of 256 channels after 400,000 steps; in one layer that has seen a
    thousandth of that, a full memory costs delta more than it tells, so that at the default size it must only lose less than the sum.
    """
    exact, expected = _segments(setting)
    findings = []
    for name in ("hebb", "decayed_hebb", "delta"):
        off = [max(abs(a - b) for a, b in zip(run, expected[name], strict=True)) for run in exact[name]]
        findings.append(Finding(f"{_NAMES[name]}, untrained: largest deviation of wrong bits from the curve", off, "0", high=0.01))
    right, sizes = _stream_of_writes(setting)
    for name in _RULES:
        gained = [c - r for c, r in zip(right[name]["carried"], right[name]["reset"], strict=True)]
        low, high = (-math.inf, -0.05) if name == "hebb" else (0.05, math.inf)
        told = f"{_NAMES[name]}, stream of writes: share told right that carrying adds"
        findings.append(Finding(told, gained, "below 0" if name == "hebb" else "above 0", low, high, "order"))
    bits = {} if setting.size == "quick" else _text(setting)
    findings += _findings_of_text(bits, setting.size == "full")
    table: list[Mapping[str, Any]] = [
        {"rule": name, "segment": s + 2, "wrong bits": sum(r[s] for r in runs) / len(runs), "expected": expected[name][s]}
        for name, runs in exact.items()
        for s in range(len(expected[name]))
    ]
    for what, by_rule in (("told right", right), ("bits per byte", bits)):
        table += [{"rule": n, "what": what, **{how: sum(b) / len(b) for how, b in runs.items()}} for n, runs in by_rule.items()]
    table += [{"rule": n, "what": "parameters", "carried": size, "reset": size} for n, size in sizes.items()]
    return Result(findings, table, _draw(exact, expected, right))


def _findings_of_text(bits: Mapping[str, Mapping[str, Sequence[float]]], full: bool) -> list[Finding]:
    if not bits:
        return []
    saved = {n: [a - b for a, b in zip(runs["reset"], runs["carried"], strict=True)] for n, runs in bits.items()}
    beside = [a - b for a, b in zip(saved["delta"], saved["hebb"], strict=True)]
    found = [
        Finding("text: bits per byte that carrying saves Hebb", saved["hebb"], "below 0", high=0.0, source="order"),
        Finding("text: bits per byte that carrying saves delta, less those it saves Hebb", beside, "above 0", low=0.0, source="order"),
    ]
    more = ("delta", "gated_delta") if full else ()
    told = "text: bits per byte that carrying saves {}"
    return found + [Finding(told.format(_NAMES[n]), saved[n], "above 0", low=0.0, source="order") for n in more]


def _segments(setting: Setting) -> tuple[dict[str, list[list[float]]], dict[str, list[float]]]:
    """Wrong bits of the pairs of the segment before, after 2, 3, ... segments: measured by seed, and expected."""
    d, pairs, segments = 64, 16, setting.pick(quick=24, default=32, full=64)
    draws, decay = setting.pick(quick=200, default=500, full=2000), 1 - 1 / d
    found: dict[str, list[list[float]]] = {n: [] for n in ("hebb", "decayed_hebb", "delta")}
    for seed in setting.each_seed():
        draw = torch.Generator().manual_seed(seed)
        k = F.normalize(torch.randn(segments, draws, pairs, d, generator=draw), dim=-1)
        v = torch.randint(2, (segments, draws, pairs, _VALUES), generator=draw).float() * 2 - 1
        for name, runs in found.items():
            rule, W, wrong = rules.get(name), None, []
            for s in range(segments):
                given = {
                    "q": k[s],
                    "k": k[s],
                    "v": v[s],
                    "beta": torch.ones(draws, pairs),
                    "g": torch.full((draws, pairs), math.log(decay)),
                }
                W = scan(rule, state=W, **{n: given[n].unsqueeze(2) for n in rule.signals}).state
                if s:
                    wrong.append(float((k[s - 1] @ W[:, 0].mT * v[s - 1] < 0).double().mean()))
            runs.append(wrong)
    return found, {name: [_expected(name, s * pairs, pairs, d) for s in range(2, segments + 1)] for name in found}


def _expected(name: str, writes: int, pairs: int, d: int) -> float:
    """Wrong bits of the pairs at ages ``pairs`` to 2 pairs - 1 after so many writes."""
    if name == "hebb":
        return _wrong(math.sqrt(d / (writes - 1)))
    rho, total = 1 - 1 / d, 0.0
    for age in range(pairs, 2 * pairs):
        if name == "decayed_hebb":
            noise = ((1 - rho ** (2 * writes)) / (1 - rho**2) - rho ** (2 * age)) / d
        else:  # what is read at a key has the power m, a row of W the power p; each later write adds to both
            m, p = 1.0, d * (1 - rho ** (writes - age))
            for _ in range(age):
                m, p = m + (1 - 2 * m + (p + 2 * m) / (d + 2)) / d, rho * p + 1
            noise = m - rho ** (2 * age)
        total += _wrong(rho**age / math.sqrt(noise))
    return total / pairs


def _wrong(snr: float) -> float:
    return 0.5 * math.erfc(snr / math.sqrt(2))


def _stream_of_writes(setting: Setting) -> tuple[dict[str, dict[str, list[float]]], dict[str, int]]:
    """The share told right by rule, carried or reset, over seeds; and numbers of parameters."""
    steps = setting.pick(quick=250, default=500, full=2000)
    right: dict[str, dict[str, list[float]]] = {n: {how: [] for how in _KEEP} for n in _RULES}
    sizes = {}
    for seed in setting.each_seed():
        for name in _RULES:
            for how, keep in _KEEP.items():
                model = LanguageModel(ModelConfig(layers=(name,), vocabulary=2 * _KEYS, d_model=48, heads=1, d_hidden=0), seed=seed)
                sizes[name] = parameters(model)
                _train(model, _writes(seed, 32, steps), keep, 0.01, setting, f"{name}, {how}, seed {seed}")
                right[name][how].append(_test(model, _writes(2**40 + seed, 32, 24), keep)[1])
    return right, sizes


def _writes(seed: int, rows: int, segments: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Segments of a stream: keys below 16, each followed by a value from 16 on, and at the key the value it was last given."""
    draw = torch.Generator().manual_seed(hash_numbers(seed, rows))
    last = torch.full((rows, _KEYS), IGNORED)
    for _ in range(segments):
        keys = torch.randint(_KEYS, (rows, _KEYS), generator=draw)
        values = torch.randint(_KEYS, 2 * _KEYS, (rows, _KEYS), generator=draw)
        targets = torch.full((rows, 2 * _KEYS), IGNORED)
        for i in range(_KEYS):
            targets[:, 2 * i] = last.gather(1, keys[:, i : i + 1])[:, 0]
            last.scatter_(1, keys[:, i : i + 1], values[:, i : i + 1])
        yield torch.stack([keys, values], -1).flatten(1), targets


def _text(setting: Setting) -> dict[str, dict[str, list[float]]]:
    """Bits per byte by rule, carried or reset, over seeds."""
    width, layers, length, rows, steps = setting.pick(
        quick=(48, 1, 64, 8, 200), default=(48, 1, 64, 8, 600), full=(256, 6, 256, 32, 20_000)
    )
    text = Text(standard_library())
    bits: dict[str, dict[str, list[float]]] = {n: {how: [] for how in _KEEP} for n in ("hebb", "delta", "gated_delta")}
    for seed in setting.each_seed():
        for name, runs in bits.items():
            for how, keep in _KEEP.items():
                model = LanguageModel(ModelConfig(layers=(name,) * layers, d_model=width, heads=2), seed=seed)
                read = _streams(text.data[: text.split], seed, rows, length, steps)
                _train(model, read, keep, 0.003, setting, f"text, {name}, {how}, seed {seed}")
                runs[how].append(_test(model, _streams(text.data[text.split :], 0, 16, length, 48), keep)[0])
    return bits


def _detached(memory: Memory) -> Memory:
    return [{n: z.detach() for n, z in state.items()} for state in memory]


def _only_inputs(memory: Memory) -> Memory:
    """Fast weights at zero, and the last inputs of the short convolution as they are."""
    return [{n: z.detach() if n == "conv" else torch.zeros_like(z) for n, z in state.items()} for state in memory]


_KEEP: dict[str, Callable[[Memory], Memory]] = {"reset": _only_inputs, "carried": _detached}


def _streams(data: Tensor, seed: int, rows: int, length: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Segments one after the other of ``rows`` places of a text, which begin at random."""
    starts = torch.randint(len(data), (rows,), generator=torch.Generator().manual_seed(hash_numbers(seed, rows)))
    for step in range(steps):
        windows = data[(starts[:, None] + step * length + torch.arange(length + 1)) % len(data)].long()
        yield windows[:, :-1], windows[:, 1:]


def _train(
    model: LanguageModel, batches: Iterator[tuple[Tensor, Tensor]], keep: Callable[[Memory], Memory], lr: float, setting: Setting, name: str
) -> None:
    """Adam, with gradients through one segment."""
    optimiser, memory = torch.optim.Adam(model.parameters(), lr=lr), None
    for step, (inputs, targets) in enumerate(batches):
        logits, memory = model(inputs, memory)
        memory = keep(memory)
        loss = loss_of(logits, targets)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 50 == 0:
            setting.tell(f"{name}: step {step}, loss {loss.item():.3f}")
            setting.record({"model": name, "step": step, "loss": loss.item()})


@torch.no_grad()
def _test(model: LanguageModel, batches: Iterator[tuple[Tensor, Tensor]], keep: Callable[[Memory], Memory]) -> tuple[float, float]:
    """Bits a target and the share told right, over all segments but the first."""
    nats, right, count, memory = 0.0, 0, 0, None
    for i, (inputs, targets) in enumerate(batches):
        logits, memory = model(inputs, memory)
        memory = keep(memory)
        if i:
            n = int(counts(targets).sum())
            nats += float(loss_of(logits, targets)) * n
            right += int((logits.argmax(-1) == targets).sum())
            count += n
    return nats / count / math.log(2), right / count


def _draw(
    exact: Mapping[str, Sequence[Sequence[float]]],
    expected: Mapping[str, Sequence[float]],
    right_share: Mapping[str, Mapping[str, Sequence[float]]],
) -> Any:
    made, (left, right) = figure(2, width=4.8)
    for colour, (name, runs) in zip(COLOURS, exact.items(), strict=False):
        segments = range(2, 2 + len(expected[name]))
        left.plot(segments, expected[name], color=colour, label=_NAMES[name])
        for run in runs:
            left.plot(segments, run, ".", color=colour, ms=4)
    left.axhline(0.5, color="#888888", lw=0.8, ls="--")
    left.set_xlabel("segments so far (dashed: chance, as without carrying)")
    left.set_ylabel("wrong bits of the segment before")
    left.legend(frameon=False, fontsize=8)
    for i, (how, marker, shift) in enumerate((("reset", "o", -0.1), ("carried", "s", 0.1))):
        for j, runs in enumerate(right_share.values()):
            label = f"W {how}" if not j else None
            right.plot([j + shift] * len(runs[how]), runs[how], marker, color=COLOURS[i], ms=5, label=label)
    right.set_xticks(range(len(right_share)), [_NAMES[n].replace(" with", "\nwith") for n in right_share])
    right.set_xlim(-0.5, len(right_share) - 0.5)
    right.set_ylabel("told right, stream of writes")
    right.legend(frameon=False, fontsize=8)
    return made
