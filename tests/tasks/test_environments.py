"""Environments against slow simulations of their definitions, and what the best and the forgetful can gain in them."""

import math

import numpy as np
import pytest
import torch

import fastweights as fw
from fastweights.tasks import Bandit, TMaze
from fastweights.tasks.environments import DOWN, LEFT, RIGHT, UP
from fastweights.tasks.source import IGNORED


def walked(sign, corridor, penalty, actions):
    """Observations and rewards of one walk, on a map of the maze."""
    free = {(x, 0) for x in range(corridor + 1)} | {(corridor, 1), (corridor, -1)}
    place, seen, gained = (0, 0), [(float(corridor == 0), float(sign))], []
    for time, action in enumerate(actions, 1):
        dx, dy = {RIGHT: (1, 0), UP: (0, 1), LEFT: (-1, 0), DOWN: (0, -1)}[action]
        there = (place[0] + dx, place[1] + dy)
        place = there if there in free else place
        end = place[0] == corridor
        seen.append((float(end), float(place[1] if end else 0)))
        gained.append(float(place[1] == sign) if time == corridor + 1 else -penalty * (place[0] < time))
    return seen, gained


@pytest.mark.parametrize("corridor", [1, 2, 5])
def test_the_maze_is_its_map(corridor):
    size = 300
    maze = TMaze(corridor=corridor, penalty=0.25).environment(size)
    draw = np.random.default_rng(0)
    actions = draw.choice(4, p=[0.7, 0.12, 0.06, 0.12], size=(corridor + 1, size))
    seen, gained = [maze.reset(7)], []
    signs = seen[0][:, 1].tolist()
    for t, a in enumerate(actions):
        there = maze.step(torch.from_numpy(a))
        seen.append(there.observation)
        gained.append(there.reward)
        assert there.done.all() == there.done.any() == (t == corridor)
    for i in range(size):
        expected = walked(signs[i], corridor, 0.25, actions[:, i].tolist())
        assert [tuple(o[i].tolist()) for o in seen] == expected[0]
        assert [float(r[i]) for r in gained] == expected[1]


@pytest.mark.parametrize("corridor", [1, 20, 100])
def test_who_remembers_the_sign_gains_all_and_who_guesses_half(corridor):
    task = TMaze(corridor=corridor, penalty=1.0)
    gained = []
    for remembers in (True, False):
        maze = task.environment(2000)
        sign = maze.reset(0)[:, 1]
        for _ in range(corridor):
            there = maze.step(torch.full((2000,), RIGHT))
            assert not there.reward.any()
        gained.append(maze.step(torch.where(sign > 0, UP, DOWN) if remembers else torch.full((2000,), UP)).reward.mean())
    assert gained[0] == 1
    assert abs(gained[1] - 0.5) < 5 * 0.5 / math.sqrt(2000)


def test_training_shows_the_shortest_way():
    task = TMaze(corridor=4)
    x, y = task.batch(5, 0, 50)
    maze = task.environment(50)
    assert torch.equal(maze.reset(5), x[:, 0])  # the same seed and step
    for t in range(1, 5):
        assert torch.equal(maze.step(torch.full((50,), RIGHT)).observation, x[:, t])
    assert (y[:, :-1] == IGNORED).all()
    assert maze.step(y[:, -1]).reward.all()


@pytest.mark.parametrize("cue", [True, False])
def test_episodes_of_a_bandit_are_those_of_training(cue):
    task = Bandit(arms=3, trials=40, cue=cue, hazard=0.2)
    x, best = task.batch(11, 0, 60)
    bandit = task.environment(60)
    observation = bandit.reset(11)
    for t in range(40):
        assert torch.equal(observation, x[:, t])
        action = x[:, t + 1, :3].argmax(-1) if t < 39 else torch.zeros(60, dtype=torch.int64)
        there = bandit.step(action)
        observation = there.observation
        assert there.done.all() == (t == 39)
    assert (x[..., 4].any() == cue).all()
    if cue:
        assert torch.equal(x[:, 1:, 4] == 1, best[:, 1:] != best[:, :-1])
    with pytest.raises(fw.SignalError, match="begin another"):
        bandit.step(action)


def test_rewards_and_moves_have_their_probabilities():
    task = Bandit(arms=4, trials=50, best=0.8, hazard=0.1)
    best, luck, _ = task.world(0, 0, 2000)
    for arm, p in ((best, 0.8), ((best + 1) % 4, 0.2), ((best + 3) % 4, 0.2)):
        assert abs(task.rewards(best, luck, arm).mean() - p) < 5 * math.sqrt(p * (1 - p) / best.size)
    moved = best[:, 1:] != best[:, :-1]
    assert abs(moved.mean() - 0.1) < 5 * math.sqrt(0.09 / moved.size)
    to = np.bincount(((best[:, 1:] - best[:, :-1]) % 4)[moved], minlength=4)
    assert to[0] == 0
    assert (abs(to[1:] - to.sum() / 3) < 5 * math.sqrt(to.sum() / 3)).all()
    assert (abs(np.bincount(best[:, 0]) - 500) < 5 * math.sqrt(500)).all()


def believed(task, x, uses_cue):
    """What Bayes' rule tells about the best arm at every trial."""
    belief = torch.full((len(x), task.arms), 1 / task.arms, dtype=torch.float64)
    out = []
    for t in range(x.shape[1]):
        if t:
            pulled, reward, cue = x[:, t, : task.arms].double(), x[:, t, task.arms, None].double(), x[:, t, -1, None].double()
            is_best = (reward * task.best + (1 - reward) * (1 - task.best)) * pulled
            is_other = (reward * (1 - task.best) + (1 - reward) * task.best) * (1 - pulled)
            belief = belief * (is_best + is_other)
            belief = belief / belief.sum(-1, keepdim=True)
            hazard = cue if uses_cue else torch.full_like(cue, task.hazard)
            belief = (1 - hazard) * belief + hazard * (1 - belief) / (task.arms - 1)
        out.append(belief.argmax(-1))
    return torch.stack(out, 1)


def test_the_cue_is_worth_something():
    task = Bandit()
    x, best = task.batch(0, 0, 400)
    right = [float((believed(task, x, uses)[:, 1:] == best[:, 1:]).double().mean()) for uses in (True, False)]
    assert right[0] > right[1] + 0.03
    assert right[1] > 0.75


@pytest.mark.parametrize("action", [torch.zeros(2, dtype=torch.int64), torch.zeros(3), torch.tensor([0, 1, 4]), torch.tensor([0, -1, 1])])
def test_actions_that_are_none_are_refused(action):
    for task in (TMaze(), Bandit(arms=4)):
        episodes = task.environment(3)
        episodes.reset(0)
        with pytest.raises(fw.SignalError, match="expected integers"):
            episodes.step(action)
