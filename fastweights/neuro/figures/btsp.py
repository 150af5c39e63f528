"""Behavioural time scale plasticity: one plateau potential makes a place field of seconds' width, and a second one moves it."""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch import Tensor

from ...engine.scan import scan
from ...experiments.experiment import Finding, Result, Setting, experiment
from ...plots import COLOURS, figure
from ..curves import Curve, rows
from ..protocols import Laps, place_cells, steps
from ..spikes import log_decay, steady
from ..synapses import Gain, bounded_btsp
from ..synapses import btsp as rule

_TAU_E, _TAU_I = 1.31, 0.69  # s, of eligibility and of instruction (Bittner et al. 2017)
_TAU = 1 / (1 / _TAU_E + 1 / _TAU_I)  # of their product
_PLATEAU = 0.3  # s
_TRACK, _FIELD = 1.8, 0.1  # m, length of the track and width (standard deviation) of the inputs' fields
_FIRST, _SECOND = 0.6, 1.2  # m, where the plateaus are
_UP, _DOWN = Gain(half=0.4, slope=10.0), Gain(half=0.1, slope=20.0)
_RATES = (1.7, 0.7)  # 1/s, at most, of potentiation and depression
_START = 0.25  # of the largest weight


@experiment(
    section="neuroscience",
    claim="A plateau writes what was active seconds before and after: one makes a place field, wider with speed; another moves it",
    cite="Bittner et al. 2017, Science 357; Milstein et al. 2021, eLife 10:e73046",
    quick=1, default=1, full=2,
)  # fmt: skip
def btsp(setting: Setting) -> Result:
    """An animal runs along a track; inputs are active at their places; the neuron has a plateau potential at one place, once.

    The rule is ``btsp``: e <- exp(-dt/tau_E) e + k, i <- exp(-dt/tau_I) i + v, W <- W + beta i e^T: Hebb's rule (``hebb_rate``) on traces,
    run by ``fw.scan`` in its chunk form. Presynaptic activity is k, its eligibility e (a KeyState, tau_E = 1.31 s); plateaus are v, the
    postsynaptic side, and the instructive signal i that they leave (a ValueState, tau_I = 0.69 s) stands where a neuromodulator would; g
    are -dt/tau. There is no heterosynaptic term. With bounds (``bounded_btsp``, Milstein et al.) overlap raises weak synapses towards W_max
    and lowers strong ones: W <- W + r_up up(e i)(W_max - W) - r_down down(e i) W, a decay per key channel and a write to v = W_max. To
    lower synapses that overlap little is its heterosynaptic term. Its gains and rates are round numbers within what the paper fits to
    cells.

    Conventions: both traces are read after the step's own activity entered them; dt = 10 ms. beta = 1 - exp(-dt/tau), 1/tau = 1/tau_E +
    1/tau_I, is the integral of e i over a step in units of what a pair at t = 0 does in all, so that the kernel does not depend on dt where
    events lie on the grid; the bounded rule is an Euler step, whose error is of the order of dt.

    Closed forms: an input t before a plateau is changed by exp(-t/tau_E), t after it by exp(-t/tau_I); at speed s the field is as wide, at
    half its height, as s (tau_E + tau_I) ln 2 metres. The bounded rule: the field lies within 0.25 m of the plateau that made it, and
    the second plateau lowers it where it was.
    """
    dt = 0.010
    window = _window(dt)
    speeds = setting.pick(quick=[0.1, 0.2, 0.4], default=[0.05, 0.1, 0.2, 0.3, 0.4, 0.5], full=[0.05 * i for i in range(1, 11)])
    widths = _widths(speeds, dt)
    before, once, twice = fields(dt)
    x = torch.linspace(0, _TRACK, 181, dtype=torch.float64)
    ramps = [place_cells(x, _centres(), _FIELD) @ weights for weights in (before, once, twice)]
    peaks = [float(x[ramp.argmax()]) for ramp in ramps[1:]]
    old = int(ramps[1].argmax())
    left = float((ramps[2][old] - ramps[0][old]) / (ramps[1][old] - ramps[0][old]))
    findings = [window.finding(), widths.finding()]
    for where, place in zip(peaks, (_FIRST, _SECOND), strict=True):
        findings.append(
            Finding(f"peak of the field, from the plateau at {place} m (m)", [where - place], "within 0.25", -0.25, 0.25, "paper")
        )
    findings.append(Finding("what the second plateau leaves of the first field's peak", [left], "below 0.9", high=0.9, source="order"))
    return Result(findings, rows(window, widths), _draw(window, widths, x, ramps))


def _numbers(batch: int, length: int, dt: float, **more: float) -> dict[str, Tensor]:
    return steady(batch, length, g_e=log_decay(_TAU_E, dt), g_i=log_decay(_TAU_I, dt), **more)


def kernel(intervals: list[float], dt: float) -> list[float]:
    """The change by an input ``t_plateau - t_input`` seconds before a plateau, by that number."""
    far, after = max(intervals), 20 * _TAU_E
    length = steps(far - min(intervals) + after, dt)
    k, v = torch.zeros(1, length, 1, len(intervals), dtype=torch.float64), torch.zeros(1, length, 1, 1, dtype=torch.float64)
    v[:, round(far / dt)] = 1
    for j, interval in enumerate(intervals):
        k[:, round((far - interval) / dt), :, j] = 1
    state = scan(rule, q=k, k=k, v=v, **_numbers(1, length, dt, beta=1 - math.exp(-dt / _TAU))).state
    return state[0].flatten().tolist()


def _change(interval: float) -> float:
    return math.exp(-interval / _TAU_E) if interval >= 0 else math.exp(interval / _TAU_I)


def _window(dt: float) -> Curve:
    intervals = [-3.0, -2.0, -1.5, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
    shown = [i / 50 for i in range(-150, 201)]
    return Curve(
        "change by one pair", intervals, [_change(t) for t in intervals], [kernel(intervals, dt)], line=(shown, [_change(t) for t in shown])
    )


def _widths(speeds: list[float], dt: float) -> Curve:
    """Inputs at all places that the animal is at after a step; the width at half height, interpolated in the logarithm."""
    found = []
    for speed in speeds:
        length = math.ceil(4 * speed * (_TAU_E + _TAU_I) / (speed * dt)) * speed * dt
        k = Laps(length, speed, 1).places(dt)
        pause = torch.zeros(round(20 * _TAU / dt), k.shape[1], dtype=k.dtype)
        k = torch.cat([k, pause])[None, :, None]
        v = torch.zeros(1, k.shape[1], 1, 1, dtype=k.dtype)
        v[:, round(0.7 * length / speed / dt)] = 1
        state = scan(rule, q=k, k=k, v=v, **_numbers(1, k.shape[1], dt, beta=1 - math.exp(-dt / _TAU))).state
        found.append(_width(state[0].flatten().log()) * speed * dt)
    shown = [0.0, max(speeds)]
    slope = (_TAU_E + _TAU_I) * math.log(2)
    return Curve("width of the field", speeds, [s * slope for s in speeds], [found], line=(shown, [s * slope for s in shown]))


def _width(logs: Tensor) -> float:
    """The distance between the two places, in units of the index, where a peaked curve is at half its height."""
    half = logs.max() - math.log(2)
    above = (logs > half).nonzero().flatten()
    first, last = int(above[0]), int(above[-1])
    rise = first - (logs[first] - half) / (logs[first] - logs[first - 1])
    fall = last + (logs[last] - half) / (logs[last] - logs[last + 1])
    return float(fall - rise)


def _centres() -> Tensor:
    return torch.linspace(-0.3, _TRACK + 0.3, 121, dtype=torch.float64)


def fields(dt: float, speed: float = 0.25) -> list[Tensor]:
    """The weights of the bounded rule, (inputs,), at the start, after a lap with the first plateau, and after one with the second."""
    position = Laps(_TRACK, speed, 1).position(dt)
    rates = place_cells(position, _centres(), _FIELD)
    kept = math.exp(-dt / _TAU_E)
    highest = max(accumulate(rates[:, len(_centres()) // 2].tolist(), lambda e, r: kept * e + r))
    k = (rates / highest)[None, :, None]  # so that eligibilities reach 1
    each = (1 - math.exp(-dt / _TAU_I)) / (1 - math.exp(-_PLATEAU / _TAU_I))  # so that instruction reaches 1
    W = torch.full((1, 1, 1, k.shape[-1]), _START, dtype=torch.float64)
    found = [W.flatten()]
    r_up, r_down = (rate * dt for rate in _RATES)
    for place in (_FIRST, _SECOND):
        lasts = (position >= place) & (torch.arange(len(position)) < int((position < place).sum()) + round(_PLATEAU / dt))
        p = (each * lasts.to(k.dtype))[None, :, None]
        one = torch.ones(1, k.shape[1], 1, 1, dtype=k.dtype)
        zero = k.new_zeros(1, 1, k.shape[-1])  # a long time passes between the laps
        made = bounded_btsp(_UP, _DOWN)
        W, *_ = scan(made, state=(W, zero, zero), q=k, k=k, v=one, p=p, **_numbers(1, k.shape[1], dt, r_up=r_up, r_down=r_down)).state
        found.append(W.flatten())
    return found


def _draw(window: Curve, widths: Curve, x: Tensor, ramps: list[Tensor]):
    made, (left, middle, right) = figure(3, width=3.9)
    window.draw(left, 0, label=r"$e^{-t/\tau_E}$ before, $e^{t/\tau_I}$ after")
    left.set_xlabel(r"$t_\mathrm{plateau} - t_\mathrm{input}$ (s)")
    left.set_ylabel("weight change (of the largest)")
    widths.draw(middle, 1, label=r"$s\,(\tau_E + \tau_I)\ln 2$")
    middle.set_xlabel("running speed s (m/s)")
    middle.set_ylabel("width of the field at half height (m)")
    labels = "before", f"after a plateau at {_FIRST} m", f"after another at {_SECOND} m"
    for i, (ramp, label) in enumerate(zip(ramps, labels, strict=True)):
        right.plot(x.tolist(), ramp.tolist(), color=COLOURS[(6, 2, 3)[i]], label=label, lw=1.5)
    for i, place in enumerate((_FIRST, _SECOND)):
        right.axvline(place, color=COLOURS[2 + i], ls=":", lw=1)
    right.set_xlabel("place on the track (m)")
    right.set_ylabel("input to the neuron, W k (of $W_\\mathrm{max}$)")
    right.set_ylim(top=1.35 * max(float(r.max()) for r in ramps))
    for axes in (left, middle, right):
        axes.legend(frameon=False, fontsize=8, loc="upper left" if axes is not left else "best")
    return made
