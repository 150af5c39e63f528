"""Acting from memory: a sign that must be remembered along a corridor, and a bandit whose best arm moves when a neuromodulator says so."""

from __future__ import annotations

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
from .bandit import Curves, with_cue, without_cue
from .entrants import CHANCE, SOLVED, Entrant, present, scaled
from .experiment import Finding, Result, Setting, experiment
from .training import fit, parameters

_SHORTEST, _TRAINED, _FAR = 5, 20, 100  # steps of corridors: of training, and of the claim


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
    (findings, told), (more, untold) = with_cue(setting, size), without_cue(setting, size)
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
