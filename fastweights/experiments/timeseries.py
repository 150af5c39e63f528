"""Learning rules in continuous time: against their closed forms, against the discrete rules, and on series with samples left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import rules
from ..engine.scan import scan
from ..language.errors import FastWeightError
from ..layers.continuous import ContinuousLayer
from ..plots import COLOURS, figure
from ..tasks.timeseries import TimeSeries
from .experiment import Finding, Result, Setting, experiment
from .training import accuracy, fit

_RULES = ("hebb_rate", "oja", "delta")
_KINDS = ("ode", "cde")
_ORDERS = {"euler": 1, "midpoint": 2, "rk4": 4}
_SERIES, _CLASSES = "JapaneseVowels", 9
_D = 6  # keys and values of the exact part


@experiment(
    section="sequences",
    claim="Fast weights that follow a differential equation: closed forms, orders of convergence, and series with samples left out",
    cite="Irie, Faccio and Schmidhuber 2022, NeurIPS",
    quick=22, default=330, full=4000,
)  # fmt: skip
def timeseries(setting: Setting) -> Result:
    """``ContinuousLayer`` in float64, from a random W_0. With k, v and beta constant, and k and v of length 1, dW/dt = beta v k^T (Hebb)
    has W(t) = W_0 + beta t v k^T; dW/dt = beta v (k - W^T v)^T (Oja) has W(t)^T v = k + (W_0^T v - k) exp(-beta t); dW/dt =
    beta (v - W k) k^T (delta) has W(t) k = v + (W_0 k - v) exp(-beta t). An Euler step of a second is the discrete rule. Along a path of
    samples, halving the step divides the error by 2, 4 and 16 with ``euler``, ``midpoint`` and ``rk4``. In a cde a signal is made of
    dx/dt: W stands still where x does; and for Hebb, linear in dx/dt, W does not depend on how fast the path is run through. An ode does.

    With the package aeon installed (its JapaneseVowels: 9 speakers, 12 channels, 7 to 29 steps), a layer of each kind and rule learns
    to tell speakers, where a share of the steps of each series is not observed. One layer of 32 channels and 2 heads each, the same
    number of parameters, the same batches of 32, Adam at 0.005 along a cosine; steps that are missing lie on straight lines between
    those that are there. Accuracies are of the test part. Without the package there is the exact part alone, and a note.
    """
    found: dict[str, list[float]] = {}
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for seed in setting.each_seed():
        setting.tell(f"seed {seed}: closed forms")
        for name, value in _exact(seed, curves).items():
            found.setdefault(name, []).append(value)
    findings = [Finding(f"{n}: largest deviation from the closed form", found[n], "0", high=1e-8) for n in _RULES]
    findings += [Finding(f"{n}: Euler steps of 1 s against the discrete rule", found[f"euler {n}"], "0", high=1e-12) for n in _RULES]
    findings += [Finding(f"order of convergence of {m}", found[m], str(order), 0.9 * order, 1.15 * order) for m, order in _ORDERS.items()]
    findings += [
        Finding("cde, all rules: change of W where x stands still", found["rest"], "0", high=0.0),
        Finding("cde of Hebb: change of W when times change, relative", found["retimed cde"], "0", high=1e-10),
        Finding("ode of Hebb: change of W when times change, relative", found["retimed ode"], "not 0", low=0.1),
    ]
    trained, note = _trained(setting)
    findings += [
        Finding(
            f"{kind} of {name}, nothing dropped: accuracy, chance {1 / _CLASSES:.2f}",
            runs[0.0],
            "above chance",
            2 / _CLASSES,
            source="order",
        )
        for (kind, name), runs in trained.items()
    ]
    table: list[Mapping[str, Any]] = [{"what": f.what, "measured": f.mean, "expected": f.expected} for f in findings]
    table += [
        {"what": "accuracy", "kind": kind, "rule": name, "dropped": dropped, "measured": sum(a) / len(a)}
        for (kind, name), runs in trained.items()
        for dropped, a in runs.items()
    ]
    return Result(findings, table, _draw(curves, trained), note)


class _Given(nn.Module):
    """Signals that are linear in x, or do not depend on it where x has no channels for them: q, k, v, and one rate."""

    def __init__(self, k: Tensor, v: Tensor, beta: float, maps: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.constant, self.beta, self.maps = {"q": k, "k": k, "v": v}, beta, maps or {}

    def forward(self, x: Tensor, conv: None = None) -> tuple[dict[str, Tensor], None]:
        made = {n: (x @ self.maps[n].mT if n in self.maps else z.expand(*x.shape[:2], -1)).unsqueeze(2) for n, z in self.constant.items()}
        return {**made, "beta": x.new_full((*x.shape[:2], 1), self.beta)}, None


def _layer(name: str, programmer: nn.Module, **options: Any) -> ContinuousLayer:
    sizes = {"heads": 1, "d_key": _D, "d_value": _D, "output_norm": False, "output_gate": False}
    return ContinuousLayer(rules.get(name), _D, programmer=programmer, **sizes, **options).double()


@torch.no_grad()
def _exact(seed: int, curves: dict[str, list[tuple[float, float, float]]]) -> dict[str, float]:
    draw = torch.Generator().manual_seed(seed)
    k, v = nn.functional.normalize(torch.randn(2, _D, generator=draw, dtype=torch.float64), dim=-1)
    W0 = torch.randn(1, 1, _D, _D, generator=draw, dtype=torch.float64)
    x = torch.randn(1, 9, _D, generator=draw, dtype=torch.float64).cumsum(1) / 6
    maps = {n: torch.randn(_D, _D, generator=draw, dtype=torch.float64) / _D**0.5 for n in "qkv"}
    out = {}
    for name in _RULES:
        out[name] = _closed_form(name, k, v, W0, curves)
        euler = _layer(name, _Given(k, v, 0.3, maps), method="euler")
        given = euler.programmer(x[:, :-1])[0]
        discrete = scan(rules.get(name), **{n: given[n] for n in rules.get(name).signals}).state
        out[f"euler {name}"] = float((euler(x)[1]["W"] - discrete).abs().max())
    for method in _ORDERS:
        out[method] = _order(method, _Given(k, v, 0.8, maps), x)
    still = x[:, :1].expand(-1, 5, -1)
    cdes = [_layer(name, _Given(k, v, 0.8, maps), kind="cde") for name in _RULES]
    out["rest"] = max(float(layer(still)[1]["W"].abs().max()) for layer in cdes)
    times = torch.rand(9, generator=draw, dtype=torch.float64).mul(3).add(0.1).cumsum(0)
    for kind in _KINDS:
        layer = _layer("hebb_rate", _Given(k, v, 0.8, maps), kind=kind)
        W = layer(x)[1]["W"]
        out[f"retimed {kind}"] = float((layer(x, times=times)[1]["W"] - W).norm() / W.norm())
    return out


def _closed_form(name: str, k: Tensor, v: Tensor, W0: Tensor, curves: dict[str, list[tuple[float, float, float]]]) -> float:
    """The largest deviation over 4 seconds; and for the figure how far it is from W_0, k or v, and how far it should be."""
    beta, start = 0.9, W0[0, 0]
    layer = _layer(name, _Given(k, v, beta), method="rk4", step=1 / 32)
    nowhere = k.new_zeros(1, 1, _D)
    state = {**layer(nowhere)[1], "W": W0}
    origin = {"hebb_rate": start, "oja": k, "delta": v}[name]
    worst, curves[name] = 0.0, []
    for i in range(1, 17):
        state = layer(nowhere, state, times=k.new_tensor([i / 4]))[1]
        W, fall = state["W"][0, 0], math.exp(-beta * i / 4)
        seen, right = {
            "hebb_rate": (W, start + beta * i / 4 * torch.outer(v, k)),
            "oja": (W.mT @ v, k + (start.mT @ v - k) * fall),
            "delta": (W @ k, v + (start @ k - v) * fall),
        }[name]
        worst = max(worst, float((seen - right).abs().max()))
        curves[name].append((i / 4, float((seen - origin).norm()), float((right - origin).norm())))
    return worst


def _order(method: str, programmer: _Given, x: Tensor) -> float:
    """Half the log ratio of the errors of steps of 1/8 and 1/32 s, delta, against steps of 1/128 s of the highest order."""
    exact = _layer("delta", programmer, method="rk4", step=1 / 128)(x)[1]["W"]
    errors = [float((_layer("delta", programmer, method=method, step=h)(x)[1]["W"] - exact).norm()) for h in (1 / 8, 1 / 32)]
    return math.log2(errors[0] / errors[1]) / 2


class _Classifier(nn.Module):
    """A series with unobserved steps, (B, T, d_in) of which the last channel says what is observed, to classes at every step."""

    def __init__(self, kind: str, rule: str, task: TimeSeries, seed: int, width: int = 32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.enter = nn.Linear(task.d_in, width)
            self.layer = ContinuousLayer(rules.get(rule), width, kind=kind, heads=2)
            self.leave = nn.Linear(width, task.d_out)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        seen = x[..., -1:] > 0
        return self.leave(self.layer(torch.where(seen, self.enter(x), torch.nan))[0]), None


def _trained(setting: Setting) -> tuple[dict[tuple[str, str], dict[float, list[float]]], str]:
    """Accuracies by kind, rule and share dropped, over seeds; nothing and a note where there are no data."""
    shares = setting.pick(quick=(0.0, 0.5), default=(0.0, 0.3, 0.5, 0.7), full=(0.0, 0.3, 0.5, 0.7))
    steps = setting.pick(quick=60, default=150, full=2000)
    try:
        tasks = {share: TimeSeries(series=_SERIES, dropped=share) for share in shares}
    except FastWeightError as error:
        return {}, f"The exact part alone: {error}"
    found: dict[tuple[str, str], dict[float, list[float]]] = {(k, r): {s: [] for s in shares} for k in _KINDS for r in _RULES}
    for seed in setting.each_seed():
        for (kind, name), runs in found.items():
            for share, task in tasks.items():
                model = _Classifier(kind, name, task, seed)
                told = f"{kind} of {name}, {share:.0%} dropped"
                fit(model, task, steps, lr=5e-3, cosine=True, seed=seed, setting=setting, name=told)
                runs[share].append(accuracy(model, task.validation(64)))
    return found, f"{_SERIES} as in the package aeon."


def _draw(
    curves: Mapping[str, Sequence[tuple[float, float, float]]], trained: Mapping[tuple[str, str], Mapping[float, Sequence[float]]]
) -> Any:
    made, axes = figure(2 if trained else 1, width=5.2)
    labels = {"hebb_rate": "Hebb, |W − W₀|", "oja": "Oja, |Wᵀv − k|", "delta": "delta, |Wk − v|"}
    for colour, (name, points) in zip(COLOURS, curves.items(), strict=False):
        t, seen, right = zip(*points, strict=True)
        axes[0].plot(t, right, color=colour, label=labels[name])
        axes[0].plot(t, seen, "o", color=colour, ms=4)
    axes[0].set_xlabel("time (s); dots: the layer, lines: closed forms")
    axes[0].set_ylabel("distance")
    axes[0].legend(frameon=False)
    for i, ((kind, name), runs) in enumerate(trained.items()):
        style = {"color": COLOURS[i % len(_RULES)], "ls": "-" if kind == "ode" else "--"}
        label = f"{kind.upper()}, {labels[name].split(',')[0]}"
        axes[1].plot([100 * s for s in runs], [sum(a) / len(a) for a in runs.values()], "o", label=label, **style)
    if trained:
        axes[1].set_xlabel(f"steps left out (%), {_SERIES}")
        axes[1].set_ylabel("accuracy on the test part")
        axes[1].set_ylim(0, 1)
        axes[1].legend(frameon=False, fontsize=8)
    return made
