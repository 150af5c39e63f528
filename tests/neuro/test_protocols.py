"""Trials, laps and delays as signals, and what is recorded: durations are physical, and a finer step does not change what was done."""

import numpy as np
import pytest
import torch

import fastweights as fw
from fastweights.neuro.protocols import Conditioning, DelayTrials, Laps, Phase, place_cells, steps
from fastweights.neuro.recorder import record

CLOSE = {"rtol": 0, "atol": 1e-10}


def test_trials_are_the_cues_that_are_present_and_the_outcome():
    protocol = Conditioning((Phase("A+", 2), Phase("AB- C+", 1)), salience={"B": 0.25}, outcome=2.0)
    signals = protocol.signals(rate=0.1)
    assert protocol.cues == "ABC"
    assert signals["k"][0, :, 0].tolist() == [[1, 0, 0], [1, 0, 0], [1, 0.5, 0], [0, 0, 1]]
    assert signals["v"].flatten().tolist() == [2, 2, 0, 2]
    assert signals["beta"].shape == (1, 4, 1)


def test_the_delta_rule_on_trials_is_rescorla_and_wagner_with_saliences():
    salience = {"A": 0.7, "B": 0.2, "C": 1.3}
    protocol = Conditioning((Phase("A+ BC- ABC+", 7), Phase("AB+ C-", 5)), salience=salience, outcome=1.5)
    V, expected = dict.fromkeys("ABC", 0.0), []
    for cues, follows in protocol.kinds:
        error = 1.5 * follows - sum(V[c] for c in cues)
        for c in cues:
            V[c] += 0.2 * salience[c] * error
        expected.append(list(V.values()))
    found = fw.unroll(fw.rules.delta, **protocol.signals(0.2))[0, :, 0, 0] * protocol.scale()
    np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.parametrize("text", ["A", "+", "A+ 1B+", "AA+"])
def test_a_trial_that_cannot_be_read_is_refused(text):
    with pytest.raises(fw.FastWeightError, match="write the cues"):
        _ = Phase(text).kinds


def test_a_salience_is_positive():
    with pytest.raises(fw.FastWeightError, match="finite and > 0"):
        Conditioning((Phase("A+"),), salience={"A": 0.0}).signals(0.1)


@pytest.mark.parametrize("dt", [0.1, 0.05, 0.025])
def test_a_finer_step_does_not_move_the_animal(dt):
    laps = Laps(length=2.0, speed=0.5, count=3)
    position = laps.position(dt)
    assert len(position) == round(12 / dt)
    every = round(0.1 / dt)
    np.testing.assert_allclose(position[::every], Laps(2.0, 0.5, 3).position(0.1), **CLOSE)
    assert laps.places(dt).argmax(1).tolist() == list(range(round(4 / dt))) * 3
    rates = place_cells(position, torch.tensor([0.5, 1.0]), width=0.2)
    np.testing.assert_allclose(rates[:, 1], np.exp(-((position.numpy() - 1.0) ** 2) / 0.08), **CLOSE)


@pytest.mark.parametrize("dt", [0.05, 0.025])
def test_pulses_last_as_long_as_they_are_said_to(dt):
    pulses = DelayTrials(cue=0.1, delay=0.5, probe=0.2, rest=0.2, count=4).pulses(dt)
    for name, first, length in (("cue", 0.0, 0.1), ("probe", 0.6, 0.2)):
        on = pulses[name]
        assert len(on) == round(4 / dt)
        np.testing.assert_allclose(float(on.sum()) * dt, 4 * length, **CLOSE)
        np.testing.assert_allclose(np.flatnonzero(np.diff(on.numpy(), prepend=0) > 0) * dt, first + np.arange(4), **CLOSE)


@pytest.mark.parametrize(("seconds", "dt"), [(0.25, 0.1), (1.0, 0.0), (-1.0, 0.1), (float("nan"), 0.1), (float("inf"), 0.1), (1.0, -0.5)])
def test_a_duration_is_a_whole_number_of_steps(seconds, dt):
    with pytest.raises(fw.FastWeightError):
        steps(seconds, dt)


def test_no_trials_and_no_laps_are_no_tokens():
    assert Conditioning((Phase("A+", 0), Phase("AB+", 2))).signals(0.1)["k"].shape == (1, 2, 1, 2)
    assert Laps(1.0, 1.0, 0).position(0.1).shape == (0,)


def signals(T=7):
    draw = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, T, 3, n, generator=draw, dtype=torch.float64) for n in (4, 2))
    return {"k": k, "v": v, "beta": torch.rand(2, T, 3, generator=draw, dtype=torch.float64)}


def test_a_recording_is_what_unroll_shows_and_its_error_is_that_of_before():
    given = signals()
    recording = record(fw.rules.delta, **given)
    assert torch.equal(recording.W, fw.unroll(fw.rules.delta, **given))
    before = torch.cat([torch.zeros_like(recording.W[:, :1]), recording.W[:, :-1]], 1)
    np.testing.assert_allclose(recording.error, given["v"] - torch.einsum("bthvk,bthk->bthv", before, given["k"]), **CLOSE)


def test_a_recording_keeps_every_state_and_can_be_cut_anywhere():
    given = signals()
    given["k"] = given["k"].exp()
    given = {"k": given["k"], "v": given["v"], "q": given["k"]}
    whole = record(fw.rules.normalised_hebb, **given)
    assert list(whole.states) == ["W", "z"]
    np.testing.assert_allclose(whole.states["z"], given["k"].cumsum(1), **CLOSE)
    first = record(fw.rules.normalised_hebb, **{n: x[:, :3] for n, x in given.items()})
    state = tuple(x[:, -1] for x in first.states.values())
    rest = record(fw.rules.normalised_hebb, state=state, **{n: x[:, 3:] for n, x in given.items()})
    assert torch.equal(torch.cat([first.error, rest.error], 1), whole.error)
    assert torch.equal(torch.cat([first.y, rest.y], 1), whole.y)


def test_without_a_token_there_is_nothing_to_record():
    with pytest.raises(fw.SignalError, match="nothing to record"):
        record(fw.rules.delta, **signals(0))
