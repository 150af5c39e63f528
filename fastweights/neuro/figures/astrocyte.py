"""Tripartite synapses: an astrocyte that sums presynaptic activity divides what its synapses read, and the network is linear attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import rules
from ...engine.scan import scan
from ...experiments.experiment import Finding, Result, Setting, experiment
from ...plots import COLOURS, figure
from ..curves import EXACT, Curve, rows, slope
from ..rules import tripartite
from ..spikes import log_decay

_TAU, _DT, _SECONDS = 0.5, 0.02, 4.0  # s: calcium, a step, and how long each query lasts
_REST = 3.0  # calcium before the first query
_PAIRS, _WIDTH = 32, 8  # associations, and the size of keys and values
_FEATURES = (64, 128, 256, 512, 1024, 2048)


@experiment(
    section="neuroscience",
    claim="A tripartite synapse, Hebbian and divided by an astrocyte, computes normalised linear attention once the astrocyte has settled",
    cite="Kozachkov, Kastanenka and Krotov 2023; Choromanski et al. 2021",
    quick=3, default=7, full=35,
)  # fmt: skip
def astrocyte(setting: Setting) -> Result:
    """Hidden neurons phi(x) project through synapses W, ensheathed by an astrocyte, to the output neurons.

    The rule is ``tripartite``, run by ``fw.scan``, where W moves by the catalogue's ``hebb``, W <- W + v k^T. Writing: presynaptic activity
    k = phi(key), postsynaptic activity v = value; the processes at the synapses of hidden neuron j sum its activity, c_j <- c_j + k_j; the
    calcium a of the cell rests. Reading: the query q = phi(query) is held, k = v = 0, and tau da/dt = c^T q - a, solved exactly:
    g = -dt/tau; the astrocyte divides what all its synapses transmit, y = W q / a. That division is the neuromodulator, and acts on the
    read and not on the write; no rate, no eligibility, no heterosynaptic term. Convention: a is updated before the read.

    Settled, a = c^T q and y = sum_j (phi(q) . phi(k_j)) v_j / sum_j phi(q) . phi(k_j): linear attention, the catalogue's
    ``normalised_hebb``. Before, |y - y_settled| / |y_settled| = |c^T q / a - 1| with a = c^T q + (a_0 - c^T q) exp(-t/tau), a_0 left by the
    query before. Hidden neurons with independent normal weights w and rates exp(w . x' - |x'|^2 / 2) / sqrt m, x' = x / d^(1/4), have
    phi(q) . phi(k) near exp(q . k / sqrt d): the output tends to softmax attention with an error of order m^(-1/2), whose size
    is known to first order from E[f_i f_j] = E f_i E f_j exp((q' + k_i') . (q' + k_j')), f_j what a neuron adds to the weight of pair j.
    """
    draw = torch.Generator().manual_seed(0)
    keys, values, queries = _inputs(3, draw)
    weights = torch.randn(64, _WIDTH, generator=draw, dtype=torch.float64)
    off, expected, last, linear = _settling(hidden(keys, weights), values, hidden(queries, weights))
    t = [(i + 1) * _DT for i in range(len(off[0]))]
    curves = [Curve(f"relaxation, query {i + 1}", t, expected[i], [off[i]]) for i in range(3)]
    setting.tell(f"random features, up to {_FEATURES[-1]}")
    networks = setting.pick(quick=20, default=50, full=300)
    runs = [_softmax_error(networks, seed) for seed in setting.each_seed()]
    # relative to what theory gives for each seed's inputs; shown over the mean of that
    theory = [sum(e[i] for _, e in runs) / len(runs) for i in range(len(_FEATURES))]
    relative = [[x / e * t for x, e, t in zip(*run, theory, strict=True)] for run in runs]
    errors = Curve("error against softmax attention", _FEATURES, theory, relative)
    logs = [math.log10(m) for m in _FEATURES]
    fall = [slope(logs, [math.log10(x) for x in run], 0, 4) for run, _ in runs]
    findings = [c.finding() for c in curves]
    findings.append(Finding(f"settled for {20 * _TAU:g} s: distance to linear attention", [last], "0", high=1e-8))
    findings.append(Finding("distance of normalised_hebb to linear attention", [linear], "0", high=EXACT))
    findings.append(errors.finding(0.2, relative=True))
    findings.append(Finding("log-log slope of that error over the number of hidden neurons", fall, "-0.50", -0.6, -0.4))
    table = rows(*curves, errors)
    return Result(findings, table, _draw(curves, errors))


def _inputs(queries: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and queries, (n, width). Keys and queries have |x'|^2 = 1/2, as inputs that are normalised have one length.

    The relative variance of one neuron's estimate of a weight is exp(|q' + k'|^2) - 1, here at most e^2: the law of large numbers for m
    neurons holds from m >> e^2 on.
    """
    keys, values, asked = (torch.randn(n, _WIDTH, generator=draw, dtype=torch.float64) for n in (_PAIRS, _PAIRS, queries))
    length = math.sqrt(0.5) * _WIDTH**0.25
    return length * keys / keys.norm(dim=-1, keepdim=True), values, length * asked / asked.norm(dim=-1, keepdim=True)


def _scaled(x: Tensor) -> Tensor:
    return x * _WIDTH**-0.25  # softmax attention divides by sqrt d: a fourth root on each side


def hidden(x: Tensor, weights: Tensor) -> Tensor:
    """Rates of hidden neurons with random weights (m, d), exp(w . x' - |x'|^2 / 2) / sqrt m with x' = x / d^(1/4), (..., m)."""
    x = _scaled(x)
    return torch.exp(x @ weights.mT - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(len(weights))


def _read(k: Tensor, v: Tensor, q: Tensor, hold: int, dt: float) -> Tensor:
    """What is read in every step, (queries, hold, V): pairs k (N, m), v (N, V) are written, then each query (n, m) is held for so many."""
    held = q.repeat_interleave(hold, 0)
    silent = torch.zeros(len(held), k.shape[1], dtype=k.dtype), torch.zeros(len(held), v.shape[1], dtype=v.dtype)
    signals = {
        "q": torch.cat([torch.zeros_like(k), held]), "k": torch.cat([k, silent[0]]), "v": torch.cat([v, silent[1]]),
        "g": torch.cat([k.new_zeros(len(k)), k.new_full((len(held),), log_decay(tau=_TAU, dt=dt))]),  # no calcium moves while writing
    }  # fmt: skip
    start = k.new_zeros(1, 1, v.shape[1], k.shape[1]), k.new_zeros(1, 1, k.shape[1]), k.new_full((1, 1), _REST)
    y = scan(tripartite, state=start, **{n: x[None, :, None] for n, x in signals.items()}).y
    return y[0, len(k) :, 0].unflatten(0, (len(q), hold))


def _attention(k: Tensor, v: Tensor, q: Tensor) -> Tensor:
    """Normalised linear attention of all pairs, written out, (queries, V)."""
    weights = q @ k.mT
    return weights / weights.sum(1, keepdim=True) @ v


def _settling(k: Tensor, v: Tensor, q: Tensor) -> tuple[list[list[float]], list[list[float]], float, float]:
    """Relative deviations while settling, measured and expected, for every query; that after 20 tau; and that of ``normalised_hebb``."""
    steps = round(_SECONDS / _DT)
    settled = _attention(k, v, q)
    read = _read(k, v, q, steps, _DT)
    off = (read - settled[:, None]).norm(dim=-1) / settled.norm(dim=-1, keepdim=True)
    expected, before = [], _REST
    for end in (q @ k.sum(0)).tolist():
        a = [end + (before - end) * math.exp(-(i + 1) * _DT / _TAU) for i in range(steps)]
        expected.append([abs(end / x - 1) for x in a])
        before = a[-1]
    long = _read(k, v, q, 1, 20 * _TAU)[:, 0]
    pairs = {"q": torch.cat([k, q]), "k": torch.cat([k, torch.zeros_like(q)]), "v": torch.cat([v, torch.zeros_like(settled)])}
    linear = scan(rules.normalised_hebb, **{n: x[None, :, None] for n, x in pairs.items()}).y[0, len(k) :, 0]
    return off.tolist(), expected, float((long - settled).abs().max()), float((linear - settled).abs().max())


def _softmax_error(networks: int, seed: int) -> tuple[list[float], list[float]]:
    """The root mean square error against softmax attention, over networks, for every number of hidden neurons; and what is expected."""
    draw = torch.Generator().manual_seed(seed)
    keys, values, queries = _inputs(16, draw)
    attention = (queries @ keys.mT / math.sqrt(_WIDTH)).softmax(-1)
    softmax = attention @ values
    errors = []
    for m in _FEATURES:
        square = 0.0
        for _ in range(networks):
            weights = torch.randn(m, _WIDTH, generator=draw, dtype=torch.float64)
            read = _read(hidden(keys, weights), values, hidden(queries, weights), 1, 40 * _TAU)[:, 0]
            square += float((read - softmax).square().mean()) / networks
        errors.append(math.sqrt(square))
    one = _error_of_one(_scaled(keys), _scaled(queries), attention, values)
    return errors, [one / math.sqrt(m) for m in _FEATURES]


def _error_of_one(k: Tensor, q: Tensor, attention: Tensor, v: Tensor) -> float:
    """The root mean square error times sqrt m, to first order in 1 / sqrt m.

    To pair j neuron w gives f_j = exp(w . (q + k_j) - (|q|^2 + |k_j|^2) / 2), and E[f_i f_j] = E f_i E f_j exp((q + k_i) . (q + k_j)).
    """
    error = 0.0
    for one, weight in zip(q, attention, strict=True):
        u = one + k
        around = weight[:, None] * (v - weight @ v)  # how the output moves with the relative error of each weight
        error += float(torch.einsum("iv,ij,jv->", around, torch.expm1(u @ u.mT), around)) / (len(q) * v.shape[1])
    return math.sqrt(error)


def _draw(curves: list[Curve], errors: Curve):
    made, (left, right) = figure(2, width=4.8)
    for colour, curve in enumerate(curves):
        curve.draw(left, colour, every=8, label=curve.label.split(", ")[1])
    shown = [0.5, 2.5]
    left.plot(shown, [math.exp(-t / _TAU) for t in shown], ":", color=COLOURS[-1], label=rf"$\exp(-t/\tau)$, $\tau$ = {_TAU:g} s")
    left.set_yscale("log")
    left.set_xlabel("time since the query (s)")
    left.set_ylabel("deviation from linear attention (relative)")
    errors.draw(right, 3, label=r"first order in $m^{-1/2}$")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_yticks([0.003, 0.005, 0.01, 0.02, 0.03], ["0.003", "0.005", "0.01", "0.02", "0.03"])
    right.minorticks_off()
    right.set_xlabel("hidden neurons, m")
    right.set_ylabel("error against softmax attention (r.m.s.)")
    for axes in (left, right):
        axes.legend(frameon=False)
    return made
