"""Oja's rule: a neuron finds the first principal component of its input, a layer the subspace of the first few."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...engine.scan import unroll
from ...experiments.experiment import Finding, Result, Setting, experiment
from ...plots import COLOURS, figure
from ..curves import Curve, rows, slope
from ..rules import oja_neurons

_VARIANCES = (1.0, 0.4, 0.2, 0.1)  # of the input along its principal axes
_TAU = 10.0  # s, the time constant of plasticity at unit variance
_SECONDS = 80.0


@experiment(
    section="neuroscience",
    claim="Oja's rule turns to the first principal component at rate l1 - l2 and keeps |w| = 1; for a layer, W W^T tends to I",
    cite="Oja 1982, 1989; Yan, Helmke and Moore 1994",
    quick=8, default=19, full=55,
)  # fmt: skip
def oja(setting: Setting) -> Result:
    """Neurons receive Gaussian input x of covariance C = diag(l1, l2, ...) and learn while they respond, y = W x.

    The rule is the catalogue's ``oja``, W <- W + beta v (k - W^T v)^T, whose value is the neurons' own response: presynaptic activity
    k = x; postsynaptic activity v = y = W x, read from the old W (update after the read); beta = dt/tau with tau = 10 s; Hebb's term is
    beta v k^T, and -beta v v^T W, which shrinks all synapses of an active neuron, is the heterosynaptic term; no eligibility, no
    neuromodulator. Since v depends on W the rule is no longer affine in W: it is ``oja_neurons``, run token by token.

    On average tau dW/dt = W C - W C W^T W, which is solved by W^T W = e^(Ct) W_0^T [I + W_0 (e^(2Ct) - I) W_0^T]^-1 W_0 e^(Ct), t in tau.
    For one neuron: w = e^(Ct) w_0 / sqrt(1 + w_0^T (e^(2Ct) - I) w_0); the tangent of its angle to the first component falls as
    exp(-(l1 - l2) t) and |w| tends to 1. Sampling adds fluctuations of order sqrt(beta), and dt an error of order beta; the curves are
    means over animals (of w, and of W W^T for two neurons). All of this is for the limit of small beta: deviations of some beta remain.
    """
    dt = setting.pick(quick=0.04, default=0.02, full=0.01)
    animals = setting.pick(quick=200, default=400, full=1000)
    every = round(1.0 / dt)
    t = [i / _TAU for i in range(int(_SECONDS) + 1)]
    starts = {"from |w| = 0.2": torch.tensor([[0.06, 0.18, 0.05, 0.03]]), "from |w| = 1.5": torch.tensor([[0.3, 1.4, 0.3, 0.3]])}
    pair = torch.tensor([[0.3, 0.2, 0.5, -0.2], [-0.2, 0.4, -0.1, 0.5]])
    starts = {label: w0.double() for label, w0 in starts.items()}
    angle = {label: Curve(label, t, [_tangent(_flow(w0, s)) for s in t], []) for label, w0 in starts.items()}
    length = {label: Curve(f"|w| {label}", t, [float(_flow(w0, s).norm()) for s in t], []) for label, w0 in starts.items()}
    layer = Curve("|W W^T - I| of two neurons", t, [_from_identity(_projector(pair.double(), s)) for s in t], [])
    found: dict[str, list[list[float]]] = {name: [] for name in (*angle, *(f"|w| {n}" for n in length), layer.label)}
    for seed in setting.each_seed():
        setting.tell(f"seed {seed}: {animals} animals, {round(_SECONDS / dt)} steps of {dt} s")
        for label, w0 in starts.items():
            W = _learn(w0, animals, dt, seed)[:, ::every]
            found[label].append([_tangent(w) for w in W.mean(0)])
            found[f"|w| {label}"].append(W.mean(0).norm(dim=(-2, -1)).tolist())
        W = _learn(pair.double(), animals, dt, seed + 1000)[:, ::every]
        squares = torch.einsum("btvk,btwk->tvw", W, W) / animals
        found[layer.label].append((squares - torch.eye(2, dtype=squares.dtype)).norm(dim=(1, 2)).tolist())
    curves = [Curve(c.label, c.x, c.expected, found[c.label]) for c in (*angle.values(), *length.values(), layer)]
    gap = _VARIANCES[0] - _VARIANCES[1]
    # the window: before it smaller components still matter, after it fluctuations do
    rates = [[-slope(t, [math.log(x) for x in run], 1.0, 5.0) for run in c.measured] for c in curves[:2]]
    findings = [
        Finding(f"rate at which the tangent of the angle falls, {label}", rate, f"l1 - l2 = {gap:g}", 0.93 * gap, 1.07 * gap)
        for label, rate in zip(starts, rates, strict=True)
    ]
    findings += [c.finding(0.03) for c in curves[2:]]
    findings.append(Finding("|w| at the end", [run[-1] for run in curves[2].measured], "1", 0.98, 1.02))
    findings.append(Finding("|W W^T - I| at the end", [run[-1] for run in curves[4].measured], "0", high=0.03))
    return Result(findings, rows(*curves), _draw(curves, gap))


def _learn(W0: Tensor, animals: int, dt: float, seed: int) -> Tensor:
    """W before and after every step, (animals, T + 1, neurons, K)."""
    draw = torch.Generator().manual_seed(seed)
    count = round(_SECONDS / dt)
    spread = torch.tensor(_VARIANCES, dtype=torch.float64).sqrt()
    x = torch.randn(animals, count, 1, len(_VARIANCES), generator=draw, dtype=torch.float64) * spread
    state = W0.expand(animals, 1, *W0.shape)
    W = unroll(oja_neurons, k=x, beta=torch.full((animals, count, 1), dt / _TAU, dtype=x.dtype), state=state.contiguous())
    return torch.cat([state.unsqueeze(1), W], 1)[:, :, 0]


def _flow(w0: Tensor, t: float) -> Tensor:
    """The mean flow of one neuron from w0 (1, K), after t time constants."""
    grown = w0 * (torch.tensor(_VARIANCES, dtype=w0.dtype) * t).exp()
    return grown / (1 + grown.square().sum() - w0.square().sum()).sqrt()


def _projector(W0: Tensor, t: float) -> Tensor:
    """W^T W of a layer under the mean flow."""
    grow = (torch.tensor(_VARIANCES, dtype=W0.dtype) * t).exp()
    grown = W0 * grow
    inner = torch.eye(len(W0), dtype=W0.dtype) + grown @ grown.mT - W0 @ W0.mT
    return grown.mT @ torch.linalg.solve(inner, grown)


def _from_identity(P: Tensor) -> float:
    """|W W^T - I| in the Frobenius norm for two neurons, from P = W^T W, which has the same traces."""
    return math.sqrt(max(float((P @ P).trace() - 2 * P.trace() + 2), 0.0))


def _tangent(w: Tensor) -> float:
    """Of the angle between w (1, K) and the first axis."""
    return float(w[0, 1:].norm() / w[0, 0].abs())


def _draw(curves: list[Curve], gap: float):
    made, (left, middle, right) = figure(3, width=3.9)
    for colour, curve in enumerate(curves[:2]):
        _in_seconds(curve).draw(left, colour, every=2)
    shown = [10.0, 60.0]
    left.plot(shown, [1.2 * math.exp(-gap * s / _TAU) for s in shown], ":", color=COLOURS[-1], label=r"$\exp(-(l_1 - l_2)\,t/\tau)$")
    left.set_yscale("log")
    left.set_ylabel("tangent of the angle to the first component")
    for colour, curve in enumerate(curves[2:4]):
        _in_seconds(curve).draw(middle, colour, every=2, label=curve.label.removeprefix("|w| "))
    middle.set_ylabel("|w|")
    _in_seconds(curves[4]).draw(right, 2, every=2, label=r"two neurons, $|W W^\top - I|$")
    right.set_ylabel(r"$|W W^\top - I|$ (Frobenius)")
    for axes in (left, middle, right):
        axes.set_xlabel("time (s)")
        axes.legend(frameon=False)
    return made


def _in_seconds(curve: Curve) -> Curve:
    return Curve(curve.label, [x * _TAU for x in curve.x], curve.expected, curve.measured)
