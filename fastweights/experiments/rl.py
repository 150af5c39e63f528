"""Acting from memory: a sign that must be remembered along a corridor, and a bandit whose best arm moves when a neuromodulator says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import rules
from ..engine.step import step
from ..plots import COLOURS, figure
from ..tasks.environments import DOWN, RIGHT, UP, Bandit, TMaze
from ..tasks.source import IGNORED, VALIDATION_SEED, generator
from .entrants import CHANCE, SOLVED, Entrant, present, scaled
from .experiment import Finding, Result, Setting, experiment
from .training import fit, parameters

_SHORTEST, _TRAINED, _FAR = 5, 20, 100  # steps of corridors: of training, and of the claim
_FORGOTTEN = -1e9  # log decay of an eligibility that lasts for one trial
Curves = Mapping[str, tuple[np.ndarray, np.ndarray | None]]  # by agent: the share of wrong choices at every trial, and the exact one


class _Row(NamedTuple):
    entrant: Entrant
    remembers: int  # steps of the longest corridor at which a model is claimed to act rightly; 0: nowhere
    quick: bool = False


ROWS = (
    _Row(Entrant("DeltaNet", ("delta",)), _FAR, True),
    _Row(Entrant("Hebb", ("hebb",)), _TRAINED),
    _Row(Entrant("SRWM", ("srwm",)), _TRAINED),
    _Row(Entrant("SRWM, fixed weights", ("srwm_fixed",)), 0, True),
    _Row(Entrant("LSTM", ("lstm",)), _TRAINED, True),
)


class _Agent(NamedTuple):
    """Whether rewards change its weights, and the rate at which they are erased at a cue, where the best arm has moved."""

    name: str
    learns: bool
    rate: float


AGENTS = (
    _Agent("fixed weights", False, 0.0),
    _Agent("three factors, never forgets", True, 0.0),
    _Agent("cue: forgets, rate 1", True, 1.0),
    _Agent("cue: turns over, rate 2", True, 2.0),
)


@experiment(
    section="learning to learn",
    claim="A fast weight remembers a sign along corridors longer than trained; three factors and a neuromodulator play bandits best",
    cite="Bakker 2001; Ni et al. 2023; Yu and Dayan 2005; Glaze, Kable and Gold 2015",
    quick=12, default=80, full=6000,
)  # fmt: skip
def rl(setting: Setting) -> Result:
    """Passive T-maze: a sign at the beginning tells which way to turn at the end of a corridor. All that is observed between is (0, 0).

    Without training: delta with rate 1 at the sign and 0 in the corridor reads +1 or -1 at the junction of any corridor. With training, by
    imitation: at every token the target is the action of the shortest way, in corridors of 5 to 20 steps drawn anew for every batch. Then
    the models act in the environment, the likeliest action at every step, in corridors of up to 200; the return is 1 for the right turn.
    One layer without an MLP and without a convolution, equal data, steps and, nearly, parameters. In a corridor every token is the same,
    so delta writes one key over and over and comes to rest: what was written at directions orthogonal to it stays for good. A sum grows
    with every step, and its claim, like that of SRWM and LSTM, ends where training did. A model without a memory gains 1/2 of
    the returns. "Remembers" is a scaled return of 0.95 or more (0 at chance, 1 where all are right), "does not" one of 0.1 or less.

    Bandit: two arms, rewarded with p = 0.8 and 0.2; the best arm moves with h = 0.05 a trial. Without training, by the rule
    ``eligibility >> erase``: k = 1, v the action, and the third factor r = +1 or -1 for a reward or none, W <- W + r v k^T; then at a cue
    W <- W - beta W k k^T. The arm with the larger weight is taken, either where they are equal. The log odds that arm 0 is best are
    (W_0 - W_1) log(p / (1 - p)) as long as it does not move, and a move changes their sign: with rate 2 at the cue this is Bayes' filter.
    Either arm tells as much, so the likelier arm is the best one to take, and no agent can regret less. Whatever is taken, the lead
    D of the weight of the best arm goes up with p and down with 1 - p; a move makes of it -D where nothing is forgotten, 0 at rate 1,
    and D at rate 2. That chain gives the exact chance of a wrong choice, P(D < 0) + P(D = 0) / 2, at every trial; regret is 2p - 1 times
    their sum. Fixed weights regret p - 1/2 a trial. Without a cue, erasing at a rate of 2h in every trial is Bayes' filter for a moving arm
    to first order in the log odds: near the least regret where rewards tell little, p = 0.6, with log odds of up to 4 and mostly below 1.
    At p = 0.8 they go to 12, where the filter's own end at log((1 - h) / h) = 2.9; the argument says nothing, and the leak regrets more.
    """
    size = setting.pick(quick=4000, default=20_000, full=200_000)
    (findings, told), (more, untold) = _with_cue(setting, size), _without_cue(setting, size)
    choices, lost = {**told, **untold}, 2 * Bandit.best - 1
    findings += more
    table: list[dict[str, Any]] = [{"task": "bandit", "agent": n, "regret": lost * float(wrong.sum())} for n, (wrong, _) in choices.items()]
    rows = [r for r in ROWS if r.quick or setting.size != "quick"]
    known, note = present([r.entrant for r in rows])
    corridors = (20, 50, _FAR, 200)
    long = (20, _FAR, setting.pick(quick=1000, default=10_000, full=100_000))
    runs = [min(gained(Construction(), TMaze(corridor=c), 64, seed) for c in long) for seed in setting.each_seed()]
    findings.append(Finding(f"T-maze, delta without training: return in corridors of up to {long[-1]:,} steps", runs, "1", low=1.0))
    returns: dict[str, dict[int, list[float]]] = {}
    for row in (r for r in rows if r.entrant in known):
        found = returns[row.entrant.name] = {corridor: [] for corridor in corridors}
        for seed in setting.each_seed():
            model = _trained(row.entrant, setting, seed)
            size = parameters(model)
            for corridor in corridors:
                found[corridor].append(scaled(gained(Reader(model), TMaze(corridor=corridor), 128), 0.5))
        at = row.remembers or _TRAINED
        bounds = {"low": SOLVED} if row.remembers else {"high": CHANCE}
        what = f"T-maze of {at} steps, {row.entrant.name}: scaled return"
        findings.append(Finding(what, found[at], "1.00" if row.remembers else "about 0", source="order", **bounds))
        table += [
            {"task": "T-maze", "agent": row.entrant.name, "steps": c, "scaled return": sum(x) / len(x), "parameters": size}
            for c, x in found.items()
        ]
    return Result(findings, table, _draw(returns, choices), note)


# -- T-maze


@dataclass(frozen=True)
class _Corridors:
    """The shortest way through corridors of a range of lengths, with its action as the target of every token."""

    d_in: int = 2
    d_out: int = 4
    kind: Literal["classification"] = "classification"
    identity: str = f"T-mazes of {_SHORTEST} to {_TRAINED} steps, all actions"

    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]:
        corridor = int(generator(seed, step).integers(_SHORTEST, _TRAINED, endpoint=True))
        x, y = TMaze(corridor=corridor).batch(seed, step, size)
        return x, torch.where(y == IGNORED, RIGHT, y)

    def validation(self, size: int, length: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.batch(VALIDATION_SEED, 0, size)


class Reader:
    """A model that acts: observations (B, d_in) in, the likeliest actions (B,) out, one step after the other."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.memory = model, None

    @torch.no_grad()
    def __call__(self, seen: Tensor) -> Tensor:
        y, self.memory = self.model(seen.unsqueeze(1), self.memory)
        return y[:, 0].argmax(-1)


class Construction:
    """Delta, one number, no training: the sign is written at rate 1, the corridor at rate 0; the read tells which way to turn."""

    def __init__(self) -> None:
        self.W: Tensor | None = None

    def __call__(self, seen: Tensor) -> Tensor:
        one, sign = torch.ones(len(seen), 1, 1), seen[:, None, 1:]
        read, self.W = step(rules.delta, self.W, q=one, k=one, v=sign, beta=sign[..., 0].abs())
        turn = torch.where(read[:, 0, 0] > 0, UP, DOWN)
        return torch.where(seen[:, 0] > 0, turn, RIGHT)


def gained(agent: Callable[[Tensor], Tensor], task: TMaze, size: int, seed: int = VALIDATION_SEED) -> float:
    """The mean return of an agent in ``size`` episodes.

    >>> gained(Construction(), TMaze(corridor=7), 10)
    1.0
    """
    maze, total = task.environment(size), 0.0
    seen, done = maze.reset(seed), False
    while not done:
        there = maze.step(agent(seen))
        seen, done = there.observation, bool(there.done.all())
        total += float(there.reward.mean())
    return total


def _trained(entrant: Entrant, setting: Setting, seed: int) -> nn.Module:
    steps, batch = setting.pick(quick=(400, 32), default=(1000, 32), full=(20_000, 128))
    task, width = _Corridors(), setting.pick(quick=32, default=32, full=128)
    model = entrant.build(task, width, 1, seed, heads=4, conv=1, d_hidden=0)
    fit(model, task, steps, batch=batch, lr=5e-3, seed=seed, cosine=True, setting=setting, name=entrant.name)
    return model


# -- bandit


def chances(agent: _Agent, task: Bandit) -> np.ndarray:
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

    def __init__(self, agent: _Agent, leak: float = 0.0) -> None:
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


def _with_cue(setting: Setting, size: int) -> tuple[list[Finding], Curves]:
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


def _without_cue(setting: Setting, size: int) -> tuple[list[Finding], Curves]:
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


def _draw(returns: Mapping[str, Mapping[int, Sequence[float]]], choices: Curves) -> Any:
    made, (left, right) = figure(2, width=5.4, height=3.9)
    for i, (name, found) in enumerate(returns.items()):  # smaller ones over larger ones, as many are the same
        style: dict[str, Any] = {"color": COLOURS[i], "marker": "osD^v"[i], "ms": 11 - 2 * i, "lw": 3.5 - 0.7 * i}
        left.plot(list(found), [0.5 + 0.5 * sum(x) / len(x) for x in found.values()], label=name, **style)
    left.axvspan(_SHORTEST, _TRAINED, color="0.9")
    left.axhline(0.5, color="0.5", lw=1, ls=":")
    left.set_ylim(-0.02, 1.08)
    left.set_xlabel("steps of the T-maze's corridor (grey: trained)")
    left.set_ylabel("return (dotted: chance)")
    left.legend(frameon=False, fontsize=8, loc="lower left")
    for colour, (name, (wrong, exact)) in zip(COLOURS, choices.items(), strict=False):
        trials = np.arange(1, len(wrong) + 1)
        if exact is not None:
            right.plot(trials, exact, color=colour, lw=1.2)
        right.plot(trials[::4], wrong[::4], "o" if exact is not None else ".-", color=colour, ms=3.5, lw=1, label=name)
    right.set_ylim(0, 0.75)
    right.set_xlabel("trial of the bandit (lines without dots: exact)")
    right.set_ylabel("share of wrong choices")
    right.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    return made
