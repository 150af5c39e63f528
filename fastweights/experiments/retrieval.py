"""How many pairs a trained linear attention tells apart: as many as its keys have features, if its feature map can make them sparse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import rules
from ..engine.scan import scan
from ..language.rule import Rule
from ..layers.feature_maps import feature_map, may_vanish
from ..layers.programmer import NORMS
from ..plots import COLOURS, figure
from ..tasks.retrieval import Retrieval
from ..tasks.source import VALIDATION_SEED
from .experiment import Finding, Result, Setting, experiment
from .training import fit, scores

LEFT_ZERO = 0.02  # the error of which it is said that it has left zero, as near d_phi in the published logs


@experiment(
    section="memory",
    claim="Linear attention learns to tell n keys apart until n reaches the number of its features; a polynomial kernel only d + 1 of them",
    cite="Schlag, Irie and Schmidhuber 2021, section 6.1, setting 1",
    quick=22, default=420, full=400_000,
)  # fmt: skip
def retrieval(setting: Setting) -> Result:
    """n pairs, each once, in random order, then one key, whose value is to be told; n is trained by itself, from scratch.

    Keys are n normal vectors of 2.2 n numbers (so that a linear map of them is any table of n keys), under a trained linear map that is
    first the identity; values are unit vectors and are not mapped. k = phi(W_k [key, value]), q = phi(W_q key), with d numbers before
    phi and d_phi behind it; y = sum_i v_i phi(k_i) . phi(q) / sum_i phi(k_i) . phi(q). The loss is half the squared distance; Adam at
    0.001 on batches of 32 sequences with one question each, until the mean loss of 50 steps is below 0.001 or the steps are over (the
    published runs take up to 100,000). All maps have the same number of parameters. The error told is over n questions to 128 sequences.

    What must come out. y = A v with weights A (n, n) of rank d_phi at most, so that the error is |A - I|^2 / 2n and, by Eckart and Young,
    at least (1 - d_phi / n) / 2: no training tells more than d_phi keys apart. The knee N is that of the curve (1 - N / n) / 2 through
    the error at the largest n. Below it the error is zero but for pairs of keys that training has left alike, each of which costs
    1 / 2n: seldom at n = d_phi / 2, often in 16 dimensions near d_phi, where they are a larger part of n than in 64.
    Taylor's features give 1 + s + s^2 / 2 = (1 + (1 + s)^2) / 2, with 1 + s of rank d + 1: keys are told apart only as far as a matrix of
    that rank is diagonal, so that the error is about (1 - (d + 1) / n)^2 / 2 from n = d + 1 on, in spite of 1 + d + d^2 features.
    FAVOR+ has its random features drawn anew in every batch, as published; drawn once, they are features like others.
    """
    d = setting.pick(quick=16, default=16, full=64)
    steps = setting.pick(quick=1000, default=1200, full=100_000)
    loads = setting.pick(quick=(0.5, 1.5), default=(0.5, 0.75, 1.0, 1.5), full=(0.3125, 0.5, 0.75, 0.875, 1.0, 1.125, 1.25, 1.5))
    maps = setting.pick(quick=("elu1", "dpfp:1"), default=("elu1", "dpfp:1", "dpfp:2"), full=("elu1", "dpfp:1", "dpfp:2", "dpfp:3"))
    runs = [(m, round(load * feature_map(m, d).size)) for m in maps for load in loads]
    runs += [(f"favor:{2 * d}", d // 2)] + setting.pick(quick=[], default=[("taylor2", 2 * d)], full=[("taylor2", 2 * d)])
    sizes = {name: feature_map(name, d).size for name, _ in runs}
    errors: dict[tuple[str, int], list[float]] = {run: [] for run in runs}
    for seed in setting.each_seed():
        for name, n in runs:
            task = Retrieval(pairs=n, d_key=int(2.2 * n), table=seed)
            model = Memory(task, rules.normalised_hebb, d=d, features=name, seed=seed)
            fit(model, task, steps, until=1e-3, seed=seed, setting=setting, name=f"{name}, {n} pairs")
            errors[name, n].append(error_of(model, task))
    findings = [f for name in maps for f in _knee(name, sizes[name], errors)]
    above = [min(e[i] - least(sizes[name], n) for (name, n), e in errors.items()) for i in range(setting.seeds)]
    findings.append(Finding("the least that any error is above (1 - d_phi/n)/2", above, "0 or more", low=-1e-3))
    findings += _other_maps(d, errors)
    table = [
        {"features": name, "d_phi": sizes[name], "pairs": n, "error": sum(e) / len(e), "least": least(sizes[name], n)}
        for (name, n), e in errors.items()
    ]
    return Result(findings, table, _draw(maps, sizes, errors))


class Memory(nn.Module):
    """A trained associative memory, as published: x (B, T, d_key + d_value) of a task to what a rule reads at every token, and no state.

    ``norm`` is that of keys and queries behind the feature map. At questions nothing is written: their key is zero. The features of FAVOR+
    are drawn anew in every call.
    """

    def __init__(self, task: Retrieval, rule: Rule, *, d: int, features: str, norm: str = "none", seed: int = 0) -> None:
        super().__init__()
        self.writes, self.d_key, self.rule, self.norm = task.writes, task.d_key, rule, NORMS[norm]
        self.d, self.features, self.drawn = d, features, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.map = feature_map(features, d)
            self.embed = nn.Linear(task.d_key, task.d_key, bias=False)
            self.key, self.query, self.rate = nn.Linear(task.d_in, d), nn.Linear(task.d_key, d), nn.Linear(task.d_in, 1)
            nn.init.eye_(self.embed.weight)
            for part in (self.key, self.query):
                nn.init.uniform_(part.weight, -(d**-0.5), d**-0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        if self.features.startswith("favor"):
            self.drawn += 1
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.drawn)
                self.map = feature_map(self.features, self.d)
        key, value = self.embed(x[..., : self.d_key]), x[..., self.d_key :]
        both = torch.cat([key, value], -1)
        writes = torch.arange(x.shape[1]) < self.writes
        k, q = self._address(self.key(both)) * writes[:, None], self._address(self.query(key))
        given = {"q": q, "k": k, "v": value, "beta": self.rate(both)[..., 0].sigmoid()}
        return scan(self.rule, **{n: given[n].unsqueeze(2) for n in self.rule.signals}).y.squeeze(2), None

    def _address(self, x: Tensor) -> Tensor:
        made = self.map(x)
        return self.norm(made + 1e-6 if may_vanish(self.features) else made)


def least(size: int, n: int) -> float:
    """The least error of n pairs with so many features."""
    return max(1 - size / n, 0.0) / 2


def error_of(model: nn.Module, task: Retrieval) -> float:
    """Half the squared distance over 128 sequences, each asked for as many keys as there are, or writes."""
    asked = replace(task, queries=task.pairs)
    return scores(model, [asked.batch(VALIDATION_SEED, step, 32) for step in range(4)]).error / 2


def _knee(name: str, size: int, errors: Mapping[tuple[str, int], Sequence[float]]) -> list[Finding]:
    n = max(n for m, n in errors if m == name)
    knees = [n * (1 - 2 * e) / size for e in errors[name, n]]
    low = errors[name, size // 2]
    return [
        Finding(f"{name}: knee of the error, over d_phi = {size}", knees, "1; 0.75 to 1.1", 0.75, 1.1, "log"),
        Finding(f"{name}: error of {size // 2} pairs, half of d_phi", low, "0", high=LEFT_ZERO, source="log"),
    ]


def _other_maps(d: int, errors: Mapping[tuple[str, int], Sequence[float]]) -> list[Finding]:
    favor, n = errors[f"favor:{2 * d}", d // 2], d // 2
    found = [Finding(f"FAVOR+ of {2 * d} features, {n} pairs: error", favor, "0.13", low=0.05, source="log")]
    if ("taylor2", 2 * d) in errors:
        about = 0.5 * (1 - (d + 1) / (2 * d)) ** 2
        found.append(
            Finding(f"Taylor of {1 + d + d * d} features, {2 * d} pairs: error", errors["taylor2", 2 * d], f"{about:.3f}", 0.9 * about)
        )
    return found


def _draw(maps: Sequence[str], sizes: Mapping[str, int], errors: Mapping[tuple[str, int], Sequence[float]]) -> Any:
    made, (axes,) = figure(width=7.0)
    names = list(dict.fromkeys(name for name, _ in errors))
    most = max(n for _, n in errors)
    for colour, name in zip(COLOURS, names, strict=False):
        runs = {n: e for (m, n), e in errors.items() if m == name}
        label = f"{name.replace(':', '-')}, {sizes[name]} features"
        axes.plot(list(runs), [sum(e) / len(e) for e in runs.values()], "o-" if name in maps else "s", color=colour, label=label)
        for n, e in runs.items():
            axes.plot([n] * len(e), e, ".", color=colour, ms=4)
        if name in maps:
            beyond = [sizes[name] + (most - sizes[name]) * i / 50 for i in range(51)]
            axes.plot(beyond, [(1 - sizes[name] / n) / 2 for n in beyond], ":", color=colour, lw=1.2)
    axes.axhline(LEFT_ZERO, color="#888888", lw=0.8)
    axes.set_ylim(-0.01, 1.15 * max(max(e) for e in errors.values()))
    axes.set_xlabel("pairs; dotted: the least error that so many features allow")
    axes.set_ylabel("error, |y - v|² / 2")
    axes.legend(frameon=False, fontsize=8)
    return made
