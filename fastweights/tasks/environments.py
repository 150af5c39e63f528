"""Environments: worlds that answer actions, for reinforcement learning. Many episodes are run side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..language.errors import FastWeightError, SignalError
from .source import IGNORED, Task, generator, tokens


class Step(NamedTuple):
    """What follows an action: the next observation (B, d_in), the reward (B,), and whether the episode is over (B,)."""

    observation: Tensor
    reward: Tensor
    done: Tensor


class Environment(Protocol):
    """B episodes of one length side by side: ``reset(seed)`` gives the first observations (B, d_in), ``step(actions)`` what follows.

    Actions are int64 (B,), below ``actions``. An episode depends on the seed and on the actions, and on nothing else.
    """

    actions: int
    d_in: int

    def reset(self, seed: int) -> Tensor: ...

    def step(self, action: Tensor) -> Step: ...


def _checked(action: Tensor, size: int, actions: int) -> np.ndarray:
    given = action.numpy()
    if given.shape != (size,) or given.dtype.kind != "i" or (given < 0).any() or (given >= actions).any():
        raise SignalError(f"action is {action.dtype} {tuple(action.shape)}, expected integers ({size},) from 0 to {actions - 1}")
    return given


RIGHT, UP, LEFT, DOWN = range(4)


@dataclass(frozen=True)
class TMaze(Task):
    """The passive T-maze: a sign at the beginning of a corridor tells which way to turn at its end, ``corridor`` steps later.

    An observation is (at the junction or beyond, sign): the sign is +1 or -1 at the beginning and 0 in the corridor; at the junction it
    is where one stands, 0 before the turn. Actions are right, up, left, down; those into a wall do nothing. An episode has
    corridor + 1 actions; the last one is rewarded with 1 if it ends in the arm of the sign. Every action after which one is behind the
    shortest way costs ``penalty``. Only a memory of the sign gains more than 1/2.

    As a task for training: what the shortest way observes, and the right turn (UP or DOWN) as target at its last token alone.
    Source: Bakker 2001; Ni et al. 2023.

    >>> maze = TMaze(corridor=3).environment(2)
    >>> first = maze.reset(seed=0)
    >>> for _ in range(3):
    ...     there = maze.step(torch.tensor([RIGHT, RIGHT]))
    >>> there.observation.tolist(), maze.step(torch.where(first[:, 1] > 0, UP, DOWN)).reward.tolist()
    ([[1.0, 0.0], [1.0, 0.0]], [1.0, 1.0])
    """

    name: ClassVar[str] = "tmaze"
    kind: ClassVar[Literal["classification"]] = "classification"
    d_in: ClassVar[int] = 2
    d_out: ClassVar[int] = 4
    corridor: int = 20
    penalty: float = 0.0

    def __post_init__(self) -> None:
        self.expect(corridor=1, penalty=0)

    def environment(self, size: int) -> MazeEpisodes:
        return MazeEpisodes(self, size)

    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]:
        up = generator(seed, step).integers(2, size=size) == 1
        x = np.zeros((size, self.corridor + 1, 2), np.float32)
        x[:, 0, 1], x[:, -1, 0] = np.where(up, 1, -1), 1
        y = np.full(x.shape[:2], IGNORED)
        y[:, -1] = np.where(up, UP, DOWN)
        return torch.from_numpy(x), tokens(y)


class MazeEpisodes:
    """Episodes of a T-maze; see ``TMaze``."""

    actions, d_in = 4, 2

    def __init__(self, task: TMaze, size: int) -> None:
        self.task, self.size = task, size

    def reset(self, seed: int) -> Tensor:
        self.sign = np.where(generator(seed, 0).integers(2, size=self.size) == 1, 1, -1)
        self.x, self.y, self.time = np.zeros(self.size, np.int64), np.zeros(self.size, np.int64), 0
        return self._observation()

    def step(self, action: Tensor) -> Step:
        a, end = _checked(action, self.size, self.actions), self.task.corridor
        self.time += 1
        along = (a == RIGHT).astype(np.int64) - (a == LEFT)
        across = (a == UP).astype(np.int64) - (a == DOWN)
        self.x, self.y = (
            np.where(self.y == 0, np.clip(self.x + along, 0, end), self.x),
            np.where(self.x == end, np.clip(self.y + across, -1, 1), self.y),
        )
        done = self.time > end
        reward = (self.y == self.sign) * 1.0 if done else -self.task.penalty * (self.x < self.time)
        return Step(self._observation(), torch.from_numpy(reward).float(), torch.full((self.size,), done))

    def _observation(self) -> Tensor:
        end = self.x == self.task.corridor
        sign = np.where(end, self.y, self.sign * ((self.x == 0) & (self.time == 0)))
        return torch.from_numpy(np.stack([end, sign], 1)).float()


@dataclass(frozen=True)
class Bandit(Task):
    """A bandit whose best arm moves: one of ``arms`` is rewarded with probability ``best``, the others with 1 - best.

    Before every trial but the first the best arm moves to another one with probability ``hazard``. An observation is the action before
    (one-hot), its reward, and a neuromodulatory cue, 1 where the best arm has just moved; all are 0 at first, and ``cue=false`` takes
    the cue away. With the cue, an agent may forget what it knew there and then, and keep it for good elsewhere.

    As a task for training: the actions are drawn uniformly, and the target of every token is the arm that is best at that trial.
    Source: after Yu and Dayan 2005, where noradrenaline signals unexpected uncertainty; Behrens et al. 2007.

    >>> bandit = Bandit(arms=3).environment(4)
    >>> bandit.reset(seed=0).shape, bandit.step(torch.tensor([0, 1, 2, 0])).observation.shape
    (torch.Size([4, 5]), torch.Size([4, 5]))
    """

    name: ClassVar[str] = "bandit"
    kind: ClassVar[Literal["classification"]] = "classification"
    arms: int = 2
    trials: int = 100
    best: float = 0.8
    hazard: float = 0.05
    cue: bool = True

    def __post_init__(self) -> None:
        self.expect(arms=2, trials=1)
        for option in ("best", "hazard"):
            if not 0 <= getattr(self, option) <= 1:
                raise FastWeightError(f"{option} of task bandit is {getattr(self, option)}, expected a probability")

    @property
    def d_in(self) -> int:
        return self.arms + 2

    @property
    def d_out(self) -> int:
        return self.arms

    def environment(self, size: int) -> BanditEpisodes:
        return BanditEpisodes(self, size)

    def world(self, seed: int, step: int, size: int) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
        """The best arm (B, trials), the luck that decides rewards (B, trials), and the generator behind them."""
        draw = generator(seed, step)
        moves = draw.random((size, self.trials)) < self.hazard
        by = np.where(moves, draw.integers(1, self.arms, size=moves.shape), 0)
        by[:, 0] = draw.integers(self.arms, size=size)
        return by.cumsum(1) % self.arms, draw.random(moves.shape), draw

    def rewards(self, best: np.ndarray, luck: np.ndarray, action: np.ndarray) -> np.ndarray:
        return (luck < np.where(action == best, self.best, 1 - self.best)).astype(np.float32)

    def observation(self, action: np.ndarray, reward: np.ndarray, moved: np.ndarray) -> np.ndarray:
        told = (action[..., None] == np.arange(self.arms)).astype(np.float32)
        return np.concatenate([told, reward[..., None], (moved & self.cue)[..., None].astype(np.float32)], -1)

    def batch(self, seed: int, step: int, size: int, length: int = 0) -> tuple[Tensor, Tensor]:
        best, luck, draw = self.world(seed, step, size)
        action = draw.integers(self.arms, size=best.shape)
        reward = self.rewards(best, luck, action)
        moved = best[:, 1:] != best[:, :-1]
        x = self.observation(action[:, :-1], reward[:, :-1], moved)
        return torch.from_numpy(np.pad(x, ((0, 0), (1, 0), (0, 0)))), tokens(best)


class BanditEpisodes:
    """Episodes of a bandit; see ``Bandit``."""

    def __init__(self, task: Bandit, size: int) -> None:
        self.task, self.size = task, size
        self.actions, self.d_in = task.arms, task.d_in

    def reset(self, seed: int) -> Tensor:
        self.best, self.luck, _ = self.task.world(seed, 0, self.size)
        self.time = 0
        return torch.zeros(self.size, self.d_in)

    def step(self, action: Tensor) -> Step:
        """After the last trial the observation is of no use: the best arm does not move there."""
        a, t = _checked(action, self.size, self.actions), self.time
        if t == self.task.trials:
            raise SignalError(f"the episode is over after {t} trials; begin another with reset(seed)")
        reward = self.task.rewards(self.best[:, t], self.luck[:, t], a)
        self.time += 1
        done = self.time == self.task.trials
        moved = np.zeros(self.size, bool) if done else self.best[:, t + 1] != self.best[:, t]
        seen = self.task.observation(a, reward, moved)
        return Step(torch.from_numpy(seen), torch.from_numpy(reward), torch.full((self.size,), done))


ENVIRONMENTS: dict[str, Callable[..., TMaze | Bandit]] = {"tmaze": TMaze, "bandit": Bandit}
