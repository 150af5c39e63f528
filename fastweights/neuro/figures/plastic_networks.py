"""Networks with plastic connections, trained by gradient descent through their plasticity: completing patterns and delayed matching.

The cells that the catalogue does not have are as small as the figure allows, one rule each, and not meant as layers: H is the fast weight
matrix, slow weights are signals that are the same at all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import rules
from ...engine.scan import scan
from ...engine.step import step
from ...experiments.experiment import Finding, Result, Setting, experiment
from ...language.decorator import outer, rule
from ...language.roles import Gate, Key, SlowMatrix, SlowScalar, SlowValue, ValueVector
from ...language.rule import Rule
from ...plots import COLOURS, figure
from ..curves import EXACT, Curve, rows

_NEURONS = 64  # of a network that completes patterns
_LOAD = 5  # patterns that it is trained with
_RECALL = 4  # steps
_BITS, _HIDDEN = 12, 24  # of a stimulus to be matched; neurons


@rule(cite="Miconi, Stanley and Clune 2018, ICML (differentiable plasticity)")
def plastic(H, k: Key, c: ValueVector, w: SlowMatrix, alpha: SlowMatrix, eta: Gate):
    """Slow weights w and a plastic part alpha * H, which Hebb's rule moves; neurons with an input c of +1 or -1 are held there."""
    y = torch.where(c == 0, torch.tanh((w + alpha * H) @ k), c)
    return (1 - eta) * H + eta * outer(y, k), y


@rule(cite="Miconi, Rawal, Clune and Stanley 2019, ICLR (Backpropamine)")
def modulated(H, k: Key, w: SlowMatrix, alpha: SlowMatrix, u: SlowValue, b: SlowScalar):
    """The same, at a rate that the network sets itself by a neuromodulator m that it emits; H is bounded."""
    y = torch.tanh((w + alpha * H) @ k)
    m = torch.tanh(u @ y + b)
    return torch.clamp(H + m * outer(y, k), -1, 1), y


@dataclass(frozen=True)
class Cell:
    """A rule, the standard deviations at which its slow weights start, and how its numbers come from trained ones (start, map)."""

    rule: Rule
    slow: Mapping[str, float]
    numbers: Mapping[str, tuple[float, Callable[[Tensor], Tensor]]]


def _same(x: Tensor) -> Tensor:
    return x


# what is trained to match; without plasticity the rate is zero
CELLS: Mapping[str, Cell] = {
    "MPN, w (1 + M)": Cell(rules.mpn, {"W_0": 0.3, "b": 0.0}, {"eta": (0.1, _same), "g": (3.0, F.logsigmoid)}),
    "plastic, w + α H": Cell(plastic, {"w": 0.3, "alpha": 0.1}, {"eta": (-1.0, torch.sigmoid)}),
    "Backpropamine": Cell(modulated, {"w": 0.3, "alpha": 0.1, "u": 0.1}, {"b": (0.1, _same)}),
    "no plasticity": Cell(rules.mpn, {"W_0": 0.3, "b": 0.0}, {"eta": (0.0, torch.zeros_like), "g": (3.0, F.logsigmoid)}),
}


@experiment(
    section="neuroscience",
    claim="Networks trained through their own plasticity complete patterns and match over a delay; without plasticity they are at chance",
    cite="Miconi, Stanley and Clune 2018; Miconi et al. 2019; Aitken and Mihalas 2023",
    quick=9, default=25, full=140,
)  # fmt: skip
def plastic_networks(setting: Setting) -> Result:
    """New random patterns in every episode, so that nothing about them can be in the slow weights.

    The cells: ``plastic`` y = tanh((w + alpha * H) k), H <- (1 - eta) H + eta y k^T; ``modulated`` (Backpropamine) the same with
    H <- clip(H + m y k^T), m = tanh(u y + b); ``mpn`` of the catalogue y = tanh(W_0 * (1 + M) k + b), M <- exp(g) M + eta y k^T (* is
    elementwise). Presynaptic activity is k, the postsynaptic v is y itself, which H or M has made, so that none is affine and all run as
    recurrences; beta is eta, or the neuromodulator m; the log decay is log(1 - eta) or g; no eligibility and no heterosynaptic term. Where
    y is held by its input, H is that of ``decayed_hebb`` with v = eta y. Convention: y is read with the H from *before* the update of the
    step. ``plastic`` and ``modulated`` are the figure's own, as small as it allows: the catalogue's ``differentiable_plasticity`` and
    ``backpropamine`` have recurrent connections. The unit of time is the step.

    Completion: P patterns of 64 bits, each shown once, then half of one of them, from which the network runs for 4 steps with the known
    half held. Left: plain Hebb (``hebb``, one step, nothing trained) gets a bit wrong when P - 1 other patterns of 32 known bits, fair
    coins all of them, outvote 32: a binomial tail, about erfc(sqrt(32 / (2 (P - 1)))) / 2. Middle: trained at P = 5, with w, alpha and eta
    free, or with alpha = 0. Right: a stimulus of 12 bits, noise for a while, then the same or another one: is it the same? A trained linear
    read-out of the neurons' answer to the second stimulus. Seeds are heads of one network and are trained at once. Expected: plastic
    networks get at most 5 % of the missing bits wrong and match in at least 90 % of trials; without plasticity 50 %.
    """
    hebb = _hebb(setting)
    completed = {name: _completion(setting, name == "plastic") for name in ("plastic", "α = 0")}
    matched = {name: _match(setting, name, cell) for name, cell in CELLS.items()}
    findings = [hebb.finding(), Finding("H of held neurons next to decayed_hebb: largest difference", [_held()], "0", high=EXACT)]
    for name, curve in completed.items():
        low, high = (0.0, 0.05) if name == "plastic" else (0.48, 0.52)
        findings.append(Finding(f"completion, {name}: missing bits wrong", curve[-1][1], "0" if low == 0 else "0.5", low, high, "order"))
    for name, curve in matched.items():
        low, high = (0.9, 1.0) if name != "no plasticity" else (0.47, 0.53)
        findings.append(Finding(f"delayed match, {name}: accuracy", curve[-1][1], "above 0.9" if low == 0.9 else "0.5", low, high, "order"))
    trained = {f"completion, {n}": c for n, c in completed.items()} | {f"match, {n}": c for n, c in matched.items()}
    table = [*rows(hebb), *({"curve": n, "x": at, "measured": sum(y) / len(y)} for n, c in trained.items() for at, y in c)]
    return Result(findings, table, _draw(hebb, completed, matched))


def _trainer(trained: list[Tensor], updates: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam, its rate falling to a hundredth by the end."""
    optimiser = torch.optim.Adam(trained, lr=0.01)
    return optimiser, torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, updates)


# ---- completion ------------------------------------------------------------------------------------------------------


def _patterns(*shape: int, draw: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(2, shape, generator=draw).to(dtype) * 2 - 1


def _hebb(setting: Setting) -> Curve:
    """Wrong bits of one step of Hebb's matrix, ties counted half; over episodes, whose spread gives the standard error."""
    loads, episodes = [4, 6, 8, 16, 32], setting.pick(quick=2000, default=10000, full=100000)
    runs, errors = [], []
    for seed in setting.each_seed():
        draw = torch.Generator().manual_seed(seed)
        wrong = torch.stack([_wrong_bits(_patterns(episodes, P, 1, _NEURONS, draw=draw)) for P in loads])
        runs.append(wrong.mean(1).tolist())
        errors.append(wrong.var(1) / episodes)
    line = [p / 4 for p in range(12, 4 * loads[-1] + 1)]
    gauss = [0.5 * math.erfc(math.sqrt(_NEURONS / 4 / (p - 1))) for p in line]
    return Curve(
        "one step of Hebb", loads, [binomial_tail(P) for P in loads], runs, torch.stack(errors).mean(0).sqrt().tolist(), (line, gauss)
    )


def _wrong_bits(xi: Tensor) -> Tensor:
    """Of the missing half of the first pattern, the share that is wrong, by episode."""
    half = xi[:, :1].clone()
    half[..., _NEURONS // 2 :] = 0
    read = scan(rules.hebb, q=half.expand_as(xi), k=xi, v=xi).y[:, -1, 0]
    return 0.5 - 0.5 * (read * xi[:, 0, 0]).sign()[:, _NEURONS // 2 :].double().mean(1)


def binomial_tail(patterns: int, known: int = _NEURONS // 2) -> float:
    """The chance that (patterns - 1) * known fair coins of +1 and -1 sum to less than -known, or to -known and a toss decides."""
    n = (patterns - 1) * known
    heads = torch.arange(n + 1, dtype=torch.float64)
    lg = torch.lgamma
    chance = (lg(torch.tensor(n + 1.0, dtype=torch.float64)) - lg(heads + 1) - lg(n - heads + 1) - n * math.log(2)).exp()
    total = 2 * heads - n
    return float(chance[total < -known].sum() + 0.5 * chance[total == -known].sum())


def _held() -> float:
    """The largest difference between H of ``plastic`` whose neurons are all held and of ``decayed_hebb``."""
    draw = torch.Generator().manual_seed(0)
    x, y = (_patterns(2, 7, 1, 5, draw=draw, dtype=torch.float64) for _ in range(2))
    w, alpha = (torch.randn(1, 5, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    eta = torch.rand(2, 7, 1, generator=draw, dtype=torch.float64)
    H = scan(plastic, k=x, c=y, w=w, alpha=alpha, eta=eta).state
    other = scan(rules.decayed_hebb, q=x, k=x, v=eta[..., None] * y, g=torch.log1p(-eta)).state
    return float((H - other).abs().max())


def _completion(setting: Setting, can_learn: bool) -> list[tuple[int, list[float]]]:
    """Share of missing bits that are wrong, a number a seed, as training goes on."""
    updates, batch, heads = setting.pick(quick=150, default=400, full=1500), 16, setting.seeds
    draws = [torch.Generator().manual_seed(seed) for seed in setting.each_seed()]
    w, alpha = (torch.stack([s * torch.randn(_NEURONS, _NEURONS, generator=d) for d in draws]).requires_grad_() for s in (0.01, 0.1))
    eta = torch.full((heads,), -1.0, requires_grad=True)
    optimiser, schedule = _trainer([w, alpha, eta] if can_learn else [w], updates)
    curve = []
    for update in range(updates + 1):
        look = update % max(updates // 15, 1) == 0 or update == updates
        xi = torch.stack([_patterns(512 if update == updates else 64 if look else batch, _LOAD, _NEURONS, draw=d) for d in draws], 2)
        with torch.set_grad_enabled(not look):
            wanted, y = _complete(xi, w, alpha if can_learn else torch.zeros_like(alpha), eta)
        missing = slice(_NEURONS // 2, None)
        if look:
            wrong = 0.5 - 0.5 * (y * wanted).sign()[..., missing].mean((0, 2))
            curve.append((update, wrong.tolist()))
            setting.tell(f"completion, plastic: {can_learn}, update {update}: {wrong.mean():.3f} wrong")
            continue
        optimiser.zero_grad()
        (y - wanted)[..., missing].square().mean((0, 2)).sum().backward()
        optimiser.step()
        schedule.step()
    return curve


def _complete(xi: Tensor, w: Tensor, alpha: Tensor, eta: Tensor) -> tuple[Tensor, Tensor]:
    """The pattern that is asked for and what the network makes of its half, (B, heads, neurons), for patterns (B, P, heads, neurons)."""
    batch, P, heads, n = xi.shape
    slow, rate = {"w": w, "alpha": alpha}, torch.sigmoid(eta).expand(batch, heads)
    state = scan(plastic, k=xi, c=xi, eta=rate[:, None].expand(batch, P, heads), **slow).state
    wanted = xi[torch.arange(batch), torch.arange(batch) % P]
    half = torch.cat([wanted[..., : n // 2], torch.zeros_like(wanted[..., n // 2 :])], -1)
    y = half
    for _ in range(_RECALL):
        y, state = step(plastic, state, k=y, c=half, eta=rate, **slow)
    return wanted, y


# ---- delayed match ---------------------------------------------------------------------------------------------------


def _trials(batch: int, delay: int, draws: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Inputs (B, 2 + delay, heads, bits + 3), with three lines that tell the part of the trial, and whether it was a match (B, heads)."""
    inputs, matches = [], []
    for draw in draws:
        sample, other = _patterns(batch, _BITS, draw=draw), _patterns(batch, _BITS, draw=draw)
        match = torch.randint(2, (batch, 1), generator=draw).float()
        noise = 0.3 * torch.randn(batch, delay, _BITS, generator=draw)
        stimuli = torch.cat([sample[:, None], noise, torch.where(match > 0, sample, other)[:, None]], 1)
        part = torch.eye(3)[[0, *[1] * delay, 2]].expand(batch, -1, -1)
        inputs.append(torch.cat([stimuli, part], -1))
        matches.append(match[:, 0])
    return torch.stack(inputs, 2), torch.stack(matches, 1)


def _match(setting: Setting, name: str, cell: Cell) -> list[tuple[int, list[float]]]:
    """Share of trials that are right, a number a seed, as training goes on."""
    updates, delay = setting.pick(quick=200, default=400, full=1500), setting.pick(quick=3, default=6, full=12)
    draws = [torch.Generator().manual_seed(seed) for seed in setting.each_seed()]
    heads, K = setting.seeds, _BITS + 3
    shapes = {n: cell.rule.signals[n].shapes(K, _HIDDEN)[0] for n in cell.slow}
    slow = {n: torch.stack([s * torch.randn(*shapes[n], generator=d) for d in draws]) for n, s in cell.slow.items()}
    raw = {n: torch.full((heads,), start) for n, (start, _) in cell.numbers.items()}
    read = {"a": torch.stack([0.3 * torch.randn(_HIDDEN, generator=d) for d in draws]), "c": torch.zeros(heads)}
    trained = [x.requires_grad_() for part in (slow, raw, read) for x in part.values()]
    optimiser, schedule = _trainer(trained, updates)
    curve = []
    for update in range(updates + 1):
        look = update % max(updates // 15, 1) == 0 or update == updates
        x, match = _trials(4096 if update == updates else 512 if look else 64, delay, draws)
        with torch.set_grad_enabled(not look):
            answer = (_answers(cell, x, slow, raw) * read["a"]).sum(-1) + read["c"]
        if look:
            right = ((answer > 0) == (match > 0)).float().mean(0)
            curve.append((update, right.tolist()))
            setting.tell(f"delayed match, {name}, update {update}: {right.mean():.2f} right")
            continue
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(answer, match, reduction="none").mean(0).sum().backward()
        optimiser.step()
        schedule.step()
    return curve


def _answers(cell: Cell, x: Tensor, slow: Mapping[str, Tensor], raw: Mapping[str, Tensor]) -> Tensor:
    """What the neurons say to the last input, (B, heads, hidden)."""
    batch, length, heads, _ = x.shape
    numbers = {n: of(raw[n]) for n, (_, of) in cell.numbers.items()}
    numbers = {n: x if cell.rule.signals[n].role.slow else x.expand(batch, length, heads) for n, x in numbers.items()}
    free = {"c": x.new_zeros(batch, length, heads, _HIDDEN)} if "c" in cell.rule.signals else {}
    return scan(cell.rule, k=x, **slow, **numbers, **free).y[:, -1]


def _draw(hebb: Curve, completed: dict[str, list[tuple[int, list[float]]]], matched: dict[str, list[tuple[int, list[float]]]]):
    made, (left, middle, right) = figure(3, width=3.9)
    left.set_yscale("log")
    left.plot(hebb.x, hebb.expected, "_", color=COLOURS[6], ms=14, mew=1.5, label="binomial tail (exact)")
    hebb.draw(left, 0, label=r"erfc$(\sqrt{32/2(P-1)})/2$")
    left.set_xlabel("patterns stored, P (64 bits)")
    left.set_ylabel("missing bits wrong, one step of Hebb")
    for axes, curves, colours in ((middle, completed, (2, 6)), (right, matched, (0, 2, 3, 6))):
        for colour, (name, curve) in zip(colours, curves.items(), strict=True):
            at = [x for x, _ in curve]
            axes.plot(at, [sum(y) / len(y) for _, y in curve], color=COLOURS[colour], label=name, lw=1.5)
            for i in range(len(curve[0][1])):
                axes.plot(at, [y[i] for _, y in curve], "o", color=COLOURS[colour], ms=3, alpha=0.6)
        axes.axhline(0.5, color="grey", ls=":", lw=1)
        axes.set_xlabel("updates")
    middle.set_ylabel(f"missing bits wrong, trained, P = {_LOAD}")
    right.set_ylabel("delayed match: share of trials right")
    for axes in (left, middle, right):
        axes.legend(frameon=False, fontsize=8)
    return made
