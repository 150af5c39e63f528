"""Key-value memory: addressing and fidelity want different codes, and what is forgotten may only not be found."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import rules
from ...engine.scan import scan
from ...experiments.experiment import Finding, Result, Setting, experiment
from ...plots import COLOURS, figure
from ..curves import EXACT, SIGMAS, Curve, rows
from ..spikes import log_decay

_ITEMS, _UNITS = 30, 64  # memories, and units that carry the content (as many carry the index)
_ALIKE = 0.9  # cosine between the contents of two memories, which are of one kind
_CUE_NOISE, _VALUE_NOISE = 0.25, 0.05  # standard deviations a unit
_SHARES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)
_TAU, _INTERVAL, _READ_NOISE = 900.0, 60.0, 0.15  # s, s, and a standard deviation where keys are matched
_AGES = range(0, 60, 4)  # min
_GAINS = (1.0, 4.0, 16.0)


@experiment(
    section="neuroscience",
    claim="One code for keys and values trades addressing for fidelity, two need not; memories lost by decay of keys return with gain",
    cite="Gershman, Fiete and Irie 2025; Teyler and DiScenna 1986; Ryan et al. 2015",
    quick=2, default=7, full=90,
)  # fmt: skip
def key_value_memory(setting: Setting) -> Result:
    """Memories are found in two steps: a cue is matched with the keys, the best slot wins, and the value of that slot is read.

    Two matrices are written by ``hebb``, W <- W + v k^T, run by ``fw.scan``: A, with the memory's key as presynaptic k and its slot,
    one-hot, as postsynaptic v; and C, with the slot as k and the memory's value as v. No rate, eligibility, neuromodulator or
    heterosynaptic term. Reads come after all writes.

    Fidelity and addressing: the contents x_i of N memories of one kind have cosines rho = 0.9. A code gives the share a of its power to an
    index that is orthogonal for each memory (as the dentate gyrus separates patterns), the rest to the content: (sqrt(1 - a) x_i, sqrt(a)
    r_i). Keys then have cosines s = (1 - a) rho, and a cue with noise sigma finds the right slot with probability
    E_u[Phi(u + sqrt(1 - s)/sigma)^(N - 1)], u normal. A value read with noise sigma_v a unit explains the fraction
    (1 - a) / (1 - a + d sigma_v^2) of the content. With one code for both, a raises the one and lowers the other; with two, keys take
    a = 1 and values a = 0.

    Forgetting: one memory a minute, keys a = 1, and A decays, ``decayed_hebb`` with g = -dt/tau, tau = 15 min, while C does not; where
    keys are matched there is noise sigma_r. A cue of gain c finds the memory of some age with probability
    E_u[Phi(u + c exp(-age/tau)/sigma_r)^(N - 1)]: a gain of c is worth tau ln c, and what is then read is the value as it was stored.
    Control: if C decays and A does not, the fidelity exp(-2 age/tau) / (exp(-2 age/tau) + d sigma_v^2) is the same at every gain.

    The steps, matching, separation (here: the largest wins) and reading, are the paper's; codes, noise and numbers are not its simulations
    but chosen so that its two claims have closed forms.
    """
    draws = setting.pick(quick=200, default=1000, full=10000)
    setting.tell(f"{draws} cues for each of {_ITEMS} memories")
    seeds = list(setting.each_seed())
    curves = [*_trade_off(draws, seeds), *_forgetting(draws, seeds)]
    two = [_recall(_codes(1.0, seed), _codes(0.0, seed), draws, seed) for seed in seeds]
    best = found_right(1 / _CUE_NOISE, _ITEMS), 1 / (1 + _UNITS * _VALUE_NOISE**2)
    one = [max(a * f for a, f in zip(*both, strict=True)) for both in zip(curves[0].measured, curves[1].measured, strict=True)]
    gained = [a * f / o for (a, f), o in zip(two, one, strict=True)]
    bound = best[0] * best[1] / max(a * f for a, f in zip(curves[0].expected, curves[1].expected, strict=True))
    findings = [c.finding() for c in curves]
    what = "recall (addressing x fidelity) of two codes over that of the best single code"
    findings.append(Finding(what, gained, f"{bound:.2f}", 0.97 * bound, 1.03 * bound))
    findings.append(Finding("value at the slot of the oldest memory: distance from what was stored", [_kept()], "0", high=EXACT))
    findings.append(_shift(curves[2], curves[3]))
    return Result(findings, rows(*curves), _draw(curves, two, best))


def found_right(separation: float, items: int) -> float:
    """E_u[Phi(u + separation)^(items - 1)]: the chance that the right one of some slots has the largest of normal scores.

    >>> round(found_right(0.0, 4), 6)
    0.25
    """
    u = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    density = torch.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(torch.special.ndtr(u + separation) ** (items - 1) * density, u))


def _codes(share: float, seed: int) -> Tensor:
    """The codes of all memories, (N, 2 d): content, then index, with exact cosines."""
    draw = torch.Generator().manual_seed(seed)
    basis = [torch.linalg.qr(torch.randn(_UNITS, _UNITS, generator=draw, dtype=torch.float64))[0] for _ in range(2)]
    content = math.sqrt(_ALIKE) * basis[0][0] + math.sqrt(1 - _ALIKE) * basis[0][1 : _ITEMS + 1]
    return torch.cat([math.sqrt(1 - share) * content, math.sqrt(share) * basis[1][:_ITEMS]], 1)


def _write(k: Tensor, v: Tensor, tau: float = math.inf) -> Tensor:
    """W (V, K) after pairs (N, K), (N, V), one every interval, with decay between them."""
    k, v = k[None, :, None], v[None, :, None]
    if tau == math.inf:
        return scan(rules.hebb, q=k, k=k, v=v).state[0, 0]
    return scan(rules.decayed_hebb, q=k, k=k, v=v, g=k.new_full(k.shape[:3], log_decay(tau=tau, dt=_INTERVAL))).state[0, 0]


def _explained(read: Tensor, content: Tensor) -> float:
    """The fraction of the power of the content that what was read explains, at the best gain."""
    return float((read * content).sum() ** 2 / (read.square().sum() * content.square().sum()))


def _recall(keys: Tensor, values: Tensor, draws: int, seed: int) -> tuple[float, float]:
    """How often the right slot is found, and the fidelity of its value."""
    draw = torch.Generator().manual_seed(seed + 1)
    slots = torch.eye(_ITEMS, dtype=keys.dtype)
    A, C = _write(keys, slots), _write(slots, values)
    cues = keys + _CUE_NOISE * torch.randn(draws, *keys.shape, generator=draw, dtype=keys.dtype)
    found = (cues @ A.mT).argmax(-1)
    read = (slots @ C.mT)[:, :_UNITS] + _VALUE_NOISE * torch.randn(draws, _ITEMS, _UNITS, generator=draw, dtype=keys.dtype)
    content = _codes(0.0, seed)[:, :_UNITS].expand_as(read)
    return float((found == torch.arange(_ITEMS)).double().mean()), _explained(read, content)


def _trade_off(draws: int, seeds: list[int]) -> list[Curve]:
    """Addressing and fidelity of a single code, by the share of the index."""
    runs = [[_recall(_codes(a, seed), _codes(a, seed), draws, seed) for a in _SHARES] for seed in seeds]
    shown = [i / 100 for i in range(101)]

    def address(a: float) -> float:
        return found_right(math.sqrt(1 - (1 - a) * _ALIKE) / _CUE_NOISE, _ITEMS)

    def fidelity(a: float) -> float:
        return (1 - a) / (1 - a + _UNITS * _VALUE_NOISE**2)

    p, f = ([of(a) for a in _SHARES] for of in (address, fidelity))
    error = [_fraction_error(x, draws * _ITEMS) for x in p], [_explained_error(x, draws * _ITEMS * _UNITS) for x in f]
    return [
        Curve("addressing", _SHARES, p, [[found for found, _ in run] for run in runs], error[0], (shown, [address(a) for a in shown])),
        Curve("fidelity", _SHARES, f, [[kept for _, kept in run] for run in runs], error[1], (shown, [fidelity(a) for a in shown])),
    ]


def _fraction_error(p: float, count: int) -> float:
    """The standard error of a fraction p of so many, at least that of one of them."""
    return math.sqrt(max(p * (1 - p), 1 / count) / count)


def _explained_error(f: float, numbers: int) -> float:
    """The standard error of a squared correlation; at zero it is the square of a normal variable, of which SIGMAS^2 are allowed."""
    return max(2 * math.sqrt(f) * (1 - f) / math.sqrt(numbers), SIGMAS / numbers)


def _forgetting(draws: int, seeds: list[int]) -> list[Curve]:
    """How often a memory is found, by its age, for each gain; and the control, where values decay."""
    count, shown = _AGES[-1] + 1, [i / 4 for i in range(4 * _AGES[-1] + 1)]

    def found(age: float, gain: float) -> float:
        return found_right(gain * math.exp(-60 * age / _TAU) / _READ_NOISE, count)

    def kept(age: float) -> float:
        return 1 / (1 + _UNITS * _VALUE_NOISE**2 * math.exp(120 * age / _TAU))

    curves = []
    slots = torch.eye(count, dtype=torch.float64)
    for gain in _GAINS:
        runs = []
        for seed in seeds:
            draw = torch.Generator().manual_seed(seed + 2)
            scores = gain * _write(slots, slots, _TAU).mT[[-1 - age for age in _AGES]]  # a row for each cue
            scores = scores + _READ_NOISE * torch.randn(draws * 4, *scores.shape, generator=draw, dtype=scores.dtype)
            runs.append((scores.argmax(-1) == torch.tensor([count - 1 - age for age in _AGES])).double().mean(0).tolist())
        p = [found(age, gain) for age in _AGES]
        error = [_fraction_error(x, 4 * draws) for x in p]
        curves.append(Curve(f"found, gain {gain:g}", _AGES, p, runs, error, (shown, [found(age, gain) for age in shown])))
    f = [kept(age) for age in _AGES]
    error = [_explained_error(x, draws * _UNITS) for x in f]
    for gain in _GAINS[::2]:
        runs = [_decayed_values(gain, draws, count, seed) for seed in seeds]
        curves.append(Curve(f"values decay: fidelity, gain {gain:g}", _AGES, f, runs, error, (shown, [kept(age) for age in shown])))
    return curves


def _decayed_values(gain: float, draws: int, count: int, seed: int) -> list[float]:
    """Fidelity by age where values decay and keys do not."""
    draw = torch.Generator().manual_seed(seed + 3)
    slots = torch.eye(count, dtype=torch.float64)
    contents = torch.linalg.qr(torch.randn(_UNITS, _UNITS, generator=draw, dtype=torch.float64))[0][:count]
    scores = gain * _write(slots, slots).mT[[-1 - age for age in _AGES]]
    scores = scores + _READ_NOISE * torch.randn(draws, *scores.shape, generator=draw, dtype=scores.dtype)
    read = slots[scores.argmax(-1)] @ _write(slots, contents, _TAU).mT
    read = read + _VALUE_NOISE * torch.randn(read.shape, generator=draw, dtype=read.dtype)
    return [_explained(read[:, i], contents[-1 - age].expand(draws, -1)) for i, age in enumerate(_AGES)]


def _kept() -> float:
    """How far the value of the oldest memory is from what was stored, after all keys have decayed."""
    slots, values = torch.eye(_ITEMS, dtype=torch.float64), _codes(0.0, 0)
    return float((_write(slots, values) @ slots[0] - values[0]).abs().max())


def _shift(plain: Curve, amplified: Curve) -> Finding:
    """By how many minutes the gain moves the age at which half of the memories are found."""
    ages = [[_half(curve.x, run) for run in curve.measured] for curve in (plain, amplified)]
    expected = _TAU / 60 * math.log(_GAINS[1] / _GAINS[0])
    moved = [b - a for a, b in zip(*ages, strict=True)]
    what = f"a gain of {_GAINS[1]:g} moves forgetting by (min)"
    return Finding(what, moved, f"tau ln {_GAINS[1]:g} = {expected:.1f}", expected - 1, expected + 1)


def _half(x: Sequence[float], y: Sequence[float]) -> float:
    for x0, x1, y0, y1 in zip(x, x[1:], y, y[1:], strict=False):
        if y1 < 0.5 <= y0:
            return x0 + (x1 - x0) * (y0 - 0.5) / (y0 - y1)
    return math.inf


def _draw(curves: list[Curve], two: list[tuple[float, float]], best: tuple[float, float]):
    made, (left, middle, right) = figure(3, width=3.8)
    for colour, curve in enumerate(curves[:2]):
        curve.draw(left, colour, label=("right slot found", "content explained")[colour])
    left.set_xlabel("share of the index in the code, a")
    left.set_ylabel("fraction")
    left.set_title("one code for keys and values", fontsize=10)
    address, fidelity = curves[:2]
    assert address.line is not None
    assert fidelity.line is not None
    middle.plot(address.line[1], fidelity.line[1], color=COLOURS[2], label="one code, a from 0 to 1")
    for x, y in zip(address.measured, fidelity.measured, strict=True):
        middle.plot(x, y, "o", color=COLOURS[2], ms=4, mec="white", mew=0.4)
    middle.plot(*best, "*", color="white", mec=COLOURS[1], ms=16, label="two codes: keys a = 1, values a = 0")
    middle.plot([a for a, _ in two], [f for _, f in two], "o", color=COLOURS[1], ms=4)
    middle.set_xlabel("addressing: right slot found")
    middle.set_ylabel("fidelity: content explained")
    middle.set_title("two codes need not trade", fontsize=10)
    for colour, curve in enumerate(curves[2:5]):
        curve.draw(right, colour, label=f"keys decay, {curve.label.split(', ')[1]}")
    for curve, marker in zip(curves[5:], "os", strict=True):
        curve.draw(right, 6, style=":", marker=marker, label="values decay, gain 1 or 16: fidelity" if marker == "o" else "_hidden")
    right.set_xlabel("age of the memory (min)")
    right.set_ylabel("right slot found")
    right.set_title("forgetting, and gain on the key", fontsize=10)
    left.set_ylim(-0.03, 1.25)
    middle.set_ylim(-0.03, 1.25)
    right.set_ylim(-0.03, 1.45)
    for axes in (left, middle, right):
        axes.legend(frameon=False, fontsize=8)
    return made
