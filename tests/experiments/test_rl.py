"""Acting from memory: the bandit's exact chances by enumeration, Bayes' filter by its definition, the maze by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fastweights.experiments.bandit import AGENTS, Filter, ThreeFactors, Watched, chances, play
from fastweights.experiments.rl import _SHORTEST, _TRAINED, Construction, Reader, _Corridors, gained
from fastweights.models.language_model import ModelConfig
from fastweights.models.sequence_model import SequenceModel
from fastweights.tasks.environments import DOWN, RIGHT, UP, Bandit, TMaze

# ---- the bandit


@pytest.mark.parametrize("agent", AGENTS, ids=lambda a: a.name)
def test_chances_by_enumeration(agent):
    """Every reward, move and coin of four trials, with weights of two arms kept as they are."""
    task = Bandit(trials=4, best=0.7, hazard=0.2)
    wrong = np.zeros(4)

    def walk(t, chance, best, weights):
        if t == 4:
            return
        lead = weights[0] - weights[1]
        for action in (0, 1):
            taken = 0.5 if lead == 0 else float((lead > 0) == (action == 0))
            wrong[t] += chance * taken * (action != best)
            for rewarded, moves in itertools.product((0, 1), (0, 1)):
                p = task.best if action == best else 1 - task.best
                likely = taken * (p if rewarded else 1 - p) * (task.hazard if moves else 1 - task.hazard)
                if likely:
                    new = list(weights)
                    new[action] += (2 * rewarded - 1) * agent.learns
                    kept = 1 - agent.rate if moves else 1
                    walk(t + 1, chance * likely, best ^ moves, [kept * w for w in new])

    walk(0, 1.0, 0, [0.0, 0.0])
    np.testing.assert_allclose(chances(agent, task), wrong, atol=1e-12)


@pytest.mark.parametrize("cue", [True, False])
def test_filter_is_the_sum_over_all_histories(cue):
    task, actions = Bandit(trials=5, best=0.75, hazard=0.1, cue=cue), [0, 1, 1, 0, 0]
    bandit, agent, seen = task.environment(1), Filter(task), []
    bandit.reset(3)
    for action in actions:
        seen.append(bandit.step(torch.tensor([action])).observation)
        agent(seen[-1])
    odds, chance = agent.odds, [0.0, 0.0]
    for path in itertools.product((0, 1), repeat=6):  # the best arm at every trial, and after the last one
        p = 0.5
        for t, action in enumerate(actions):
            right = task.best if path[t] == action else 1 - task.best
            p *= right if seen[t][0, 2] else 1 - right
            moved = path[t] != path[t + 1]
            p *= float(moved == bool(seen[t][0, 3])) if cue else (task.hazard if moved else 1 - task.hazard)
        chance[path[-1]] += p
    assert float(odds[0]) == pytest.approx(np.log(chance[0] / chance[1]))


def test_turning_over_is_the_filter_and_a_leak_is_not():
    task = Bandit(trials=60, hazard=0.2)
    watched = Watched(ThreeFactors(AGENTS[-1]), Filter(task))
    leads = play(watched, task, 50, 1)[1]
    np.testing.assert_allclose(np.log(4) * leads, watched.odds, atol=1e-9)
    leaky = play(ThreeFactors(AGENTS[1], 2 * task.hazard), Bandit(trials=60, hazard=0.2, cue=False), 50, 1)[1]
    assert np.abs(leaky).max() <= 0.6 / 0.4  # a sum of (1 - 2h)^i, i = 1, 2, ...
    assert not np.allclose(leaky, leads)


def test_three_factors_by_hand():
    agent = ThreeFactors(AGENTS[2])  # an action and its reward; after the third the arm has moved, and all is forgotten
    seen = torch.tensor([[[1.0, 0, 1, 0]], [[0, 1, 1, 0]], [[0, 1, 0, 1]], [[0, 1, 0, 0]]])
    assert [float(agent(s)[0]) for s in seen] == [1, 0, 0, 1]


def test_fixed_weights_never_prefer_anything():
    wrong, leads = play(ThreeFactors(AGENTS[0]), Bandit(trials=20), 500, 0)
    assert not leads.any()
    assert abs(wrong.mean() - 0.5) < 0.03


# ---- the maze


def test_corridors_show_the_way():
    lengths = set()
    for step in range(200):
        x, y = _Corridors().batch(0, step, 3)
        lengths.add(x.shape[1] - 1)
        assert (y[:, :-1] == RIGHT).all()
        assert torch.equal(y[:, -1], torch.where(x[:, 0, 1] > 0, UP, DOWN))
        assert torch.equal(x, TMaze(corridor=x.shape[1] - 1).batch(0, step, 3)[0])
    assert lengths == set(range(_SHORTEST, _TRAINED + 1))


def test_who_gains_what():
    task = TMaze(corridor=30)
    assert gained(Construction(), task, 50) == 1
    assert gained(lambda seen: torch.full((len(seen),), RIGHT), task, 50) == 0
    always_up = gained(lambda seen: torch.where(seen[:, 0] > 0, UP, RIGHT), task, 2000)
    assert abs(always_up - 0.5) < 0.06


def test_a_reader_acts_as_the_model_on_the_whole_sequence():
    model = SequenceModel(ModelConfig(layers=("delta",), d_model=16, heads=2), d_in=2, d_out=4)
    x, reader = TMaze(corridor=9).batch(0, 0, 5)[0], Reader(model)
    assert torch.equal(torch.stack([reader(seen) for seen in x.unbind(1)], 1), model(x)[0].argmax(-1))
