"""A bandit whose best arm moves: agents by three factors and a neuromodulator, exact chances of their choices, and Bayes' filter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import rules
from ..engine.step import step
from ..tasks.environments import Bandit
from .experiment import Finding, Setting

_FORGOTTEN = -1e9  # log decay of an eligibility that lasts for one trial
Curves = Mapping[str, tuple[np.ndarray, np.ndarray | None]]  # by agent: the share of wrong choices at every trial, and the exact one


class Agent(NamedTuple):
    """Whether rewards change its weights, and the rate at which they are erased at a cue, where the best arm has moved."""

    name: str
    learns: bool
    rate: float


AGENTS = (
    Agent("fixed weights", False, 0.0),
    Agent("three factors, never forgets", True, 0.0),
    Agent("cue: forgets, rate 1", True, 1.0),
    Agent("cue: turns over, rate 2", True, 2.0),
)


def chances(agent: Agent, task: Bandit) -> np.ndarray:
    """The exact chance that an agent takes the worse arm, at every trial: a chain over the lead D of the weight of the better one.

    >>> chances(AGENTS[0], Bandit(trials=3)).tolist()
    [0.5, 0.5, 0.5]
    """
    T = task.trials
    start = np.eye(2 * T + 1)[T]
    p, wrong = start, np.zeros(T)
    for t in range(T):
        wrong[t] = p[:T].sum() + p[T] / 2
        if agent.learns:  # at most t < T steps from the middle, so that nothing comes round the ends
            p = task.best * np.roll(p, 1) + (1 - task.best) * np.roll(p, -1)
        moved = {0.0: p[::-1], 1.0: start, 2.0: p}[agent.rate]
        p = (1 - task.hazard) * p + task.hazard * moved
    return wrong


class ThreeFactors:
    """The fast weights of an agent: called with what follows an action, how much more arm 0 weighs than arm 1, (B,)."""

    def __init__(self, agent: Agent, leak: float = 0.0) -> None:
        self.agent, self.leak, self.rule = agent, leak, rules.eligibility >> rules.erase
        self.state: Any = None

    def __call__(self, seen: Tensor) -> np.ndarray:
        seen = seen.double()
        one, r, cue = torch.ones(len(seen), 1, 1, dtype=torch.float64), 2 * seen[:, 2:3] - 1, seen[:, 3:]
        beta = cue * self.agent.rate + (1 - cue) * self.leak
        r, g = r * self.agent.learns, torch.full_like(r, _FORGOTTEN)
        W, self.state = step(self.rule, self.state, q=one, k=one, v=seen[:, None, :2], r=r, beta=beta, g=g)
        return (W[:, 0, 0] - W[:, 0, 1]).numpy()


class Filter:
    """Bayes' filter, called with what follows an action: the log odds that arm 0 is the best one, (B,); it knows how often arms move."""

    def __init__(self, task: Bandit) -> None:
        self.task, self.odds = task, np.zeros(1)

    def __call__(self, seen: Tensor) -> np.ndarray:
        first, reward, cue = (seen[:, i].numpy() > 0 for i in (0, 2, 3))
        p, h = self.task.best, self.task.hazard
        likely = [np.where(reward == right, p, 1 - p) for right in (first, ~first)]  # if arm 0 is the best one, and if arm 1 is
        odds = self.odds + np.log(likely[0]) - np.log(likely[1])
        if self.task.cue:
            self.odds = np.where(cue, -odds, odds)
        else:
            one = 1 / (1 + np.exp(-odds))
            moved = (1 - h) * one + h * (1 - one)
            self.odds = np.log(moved) - np.log1p(-moved)
        return self.odds


class Watched:
    """An agent, and the log odds of a filter that sees what the agent sees, one array a trial."""

    def __init__(self, agent: ThreeFactors, by: Filter) -> None:
        self.agent, self.by = agent, by
        self.odds: list[np.ndarray] = []

    def __call__(self, seen: Tensor) -> np.ndarray:
        self.odds.append(self.by(seen))
        return self.agent(seen)


def play(agent: Callable[[Tensor], np.ndarray], task: Bandit, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The share of wrong choices at every trial, (trials,), and how much the agent preferred arm 0 after it, (trials, size)."""
    bandit, draw = task.environment(size), torch.Generator().manual_seed(seed)
    bandit.reset(seed)
    wrong, leads = np.zeros(task.trials), np.zeros((task.trials + 1, size))
    for t in range(task.trials):
        coin = torch.randint(2, (size,), generator=draw)
        action = torch.where(torch.from_numpy(leads[t] == 0), coin, torch.from_numpy(leads[t] < 0).long())
        wrong[t] = (action.numpy() != bandit.best[:, t]).mean()
        leads[t + 1] = agent(bandit.step(action).observation)
    return wrong, leads[1:]


def with_cue(setting: Setting, size: int) -> tuple[list[Finding], Curves]:
    """Agents that are told of moves, or do not listen: findings, and shares of wrong choices beside the exact ones."""
    task = Bandit()
    lost, unit = 2 * task.best - 1, math.log(task.best / (1 - task.best))
    findings, curves, off = [], {}, [0.0] * setting.seeds
    for agent in AGENTS:
        exact = chances(agent, task)
        watching = [Watched(ThreeFactors(agent), Filter(task)) for _ in setting.each_seed()]
        runs = [play(watched, task, size, seed) for seed, watched in enumerate(watching)]
        curves[agent.name] = np.mean([wrong for wrong, _ in runs], 0), exact
        off = [max(o, float(np.abs(wrong - exact).max())) for o, (wrong, _) in zip(off, runs, strict=True)]
        regret, right = [lost * float(wrong.sum()) for wrong, _ in runs], lost * float(exact.sum())
        findings.append(Finding(f"bandit, {agent.name}: regret in {task.trials} trials", regret, f"{right:.2f}", 0.9 * right, 1.1 * right))
        if agent.rate == 2:
            apart = [float(np.abs(unit * leads - w.odds).max()) for w, (_, leads) in zip(watching, runs, strict=True)]
            findings.append(Finding("bandit, rate 2: largest distance from the log odds of Bayes' filter", apart, "0", high=1e-9))
    errors = 4.5 * 0.5 / size**0.5  # standard errors of a share, of which there are hundreds
    findings.append(Finding("bandit, all: largest deviation from the exact chance of a wrong choice", off, "0", high=errors))
    return findings, curves


def without_cue(setting: Setting, size: int) -> tuple[list[Finding], Curves]:
    """A leak in every trial beside Bayes' filter, where rewards tell little and where they tell much."""
    findings, curves = [], {}
    for best, high, expected in ((0.6, 1.1, "1, or little more"), (Bandit.best, math.inf, "1 or more")):
        task = Bandit(best=best, cue=False)
        leaky, filtered = (
            [play(make(), task, size, seed)[0] for seed in setting.each_seed()]
            for make in (lambda h=task.hazard: ThreeFactors(AGENTS[1], 2 * h), lambda task=task: Filter(task))
        )
        ratio = [float(a.sum() / b.sum()) for a, b in zip(leaky, filtered, strict=True)]
        what = f"bandit of p = {best:g}, no cue, leak 2h: regret over that of Bayes' filter"
        findings.append(Finding(what, ratio, expected, 0.98, high, "order"))
        curves = {"no cue: leaks": (np.mean(leaky, 0), None), "no cue: Bayes' filter": (np.mean(filtered, 0), None)}
    return findings, curves
