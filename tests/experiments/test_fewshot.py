"""Few-shot learning: the nearest image by hand, where training begins, and that fixed weights see one token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastweights.experiments import fewshot as module
from fastweights.experiments.entrants import Entrant
from fastweights.experiments.experiment import Setting
from fastweights.experiments.fewshot import CASES, ROWS, Nearest, at_the_end, available, begin, fewshot
from fastweights.language.errors import FastWeightError
from fastweights.tasks.fewshot import FewShot
from fastweights.tasks.images import SOURCES, glyphs, images


def test_rows():
    assert all(r.quick <= r.default <= len(CASES) for r in ROWS)


@pytest.mark.parametrize("delayed", [False, True])
def test_nearest_image_by_hand(delayed):
    task = FewShot(shots=2, delayed=delayed, side=8)
    x, y = task.batch(0, 0, 16)
    told = Nearest(task)(x)[0][:, -1].argmax(-1).tolist()
    expected = []
    for row in x.numpy():
        pictures, labels = row[:, :64], row[:, 64:]
        far = [float(((pictures[-1] - picture) ** 2).sum()) for picture in pictures[:-1]]
        at = int(np.argmin(far))
        expected.append(int(labels[at + 1 if delayed else at].argmax()))
    assert told == expected
    right = np.mean([a == b for a, b in zip(expected, y[:, -1].tolist(), strict=True)])
    assert at_the_end(Nearest(task), [(x, y)]) == pytest.approx(right)


def test_equal_images_at_no_distance_are_told_right():
    task = FewShot(side=8)
    x, y = task.batch(0, 0, 8)
    for row, label in zip(x, y[:, -1], strict=True):
        row[-1, :64] = row[:-1][row[:-1, 64:].argmax(-1) == label][0, :64]
    assert at_the_end(Nearest(task), [(x, y)]) == 1


def made(layer: str, conv: int = 1) -> Any:
    task: Any = FewShot(side=8)
    model = Entrant(layer, (layer,)).build(task, 16, 2, 0, heads=2, conv=conv)
    begin(model, task.ways, 0)
    return model, task


def test_fixed_weights_see_one_token_and_the_others_more():
    for layer, remembers in (("srwm_fixed", False), ("srwm", True), ("delta", True), ("hebb", True), ("lstm", True)):
        model, task = made(layer)
        x = task.batch(0, 0, 4)[0]
        changed = x.clone()
        changed[:, 0] = 1 - changed[:, 0]
        same = torch.allclose(model(x)[0][:, -1], model(changed)[0][:, -1], atol=1e-6)
        assert same is not remembers


def test_a_convolution_begins_with_keys_of_the_token_before():
    model, _ = made("delta", conv=2)
    programmer = model.blocks[0].layer.programmer
    x = torch.zeros(1, 3, 16)
    x[0, 1] = torch.randn(16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        programmer.conv.weight[:] = programmer.conv.weight.round()
        signals = programmer(x, None)[0]
    assert [float(signals["k"][0, t].abs().max()) > 0 for t in range(3)] == [False, False, True]
    assert [float(signals["v"][0, t].abs().max()) > 0 for t in range(3)] == [False, True, False]


def test_keys_of_srwm_begin_as_the_softmax_of_what_is_read():
    model, _ = made("srwm")
    slow = model.blocks[1].layer.programmer.slow
    torch.testing.assert_close(slow["P_0"][1], 8 * torch.eye(8))
    assert slow["P_0"].requires_grad


def test_images_that_are_absent(monkeypatch):
    assert available("glyphs") == ("glyphs", "")

    def absent(name):
        raise FastWeightError("pip install it")

    monkeypatch.setattr(module, "images", absent)
    assert available("digits") == ("", "No digits were used: pip install it.")


@pytest.mark.parametrize("size", ["quick", "default"])
def test_report_with_digits(monkeypatch, size):
    """Models that are not trained, and images under the name of digits: what is reported of which."""
    trained = []

    def untrained(entrant, case, source, setting, seed):
        trained.append((entrant.name, case.name, source))
        return Nearest(module._task(case, source)), [1.6, 1.5]

    monkeypatch.setattr(module, "_trained", untrained)
    monkeypatch.setattr(module, "_TESTED", 32)
    monkeypatch.setattr(module, "available", lambda name: ("", "No kanji.") if name == "kanji" else (name, ""))
    monkeypatch.setitem(SOURCES, "digits", glyphs)
    images.cache_clear()
    result = fewshot.run(Setting(size, 2))
    images.cache_clear()
    assert {source for *_, source in trained} == {"glyphs"}
    assert result.notes == "No kanji."
    by_name = {f.what: f for f in result.findings}
    assert not any("digits" in name for name in by_name)  # told, and not claimed
    assert not by_name["SRWM, fixed weights, 1-shot: scaled accuracy"].passed  # as it is no control here
    assert ("1-shot: accuracy of DeltaNet - nearest image" in by_name) is (size == "default")
    assert all(len(f.measured) == 2 for f in result.findings)
    assert {row["images"] for row in result.table} == {"glyphs", "digits"}
