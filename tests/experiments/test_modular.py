"""Modular arithmetic: reflections against integers and against Python's own reading of an expression."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fastweights.experiments import modular
from fastweights.experiments.experiment import Setting
from fastweights.tasks.arithmetic import SYMBOLS, Modular
from fastweights.tasks.source import IGNORED

QUICK = Setting("quick", 1)


def written(said: str, n: int) -> torch.Tensor:
    return torch.tensor([[int(c) if c.isdigit() else n + SYMBOLS.index(c) for c in said]])


def test_all_short_sums():
    """Every a + b - c modulo 3 and 5: the value after every number."""
    for n in (3, 5):
        sums = [(a, b, c, x, y) for a, b, c in itertools.product(range(n), repeat=3) for x, y in itertools.product("+-", repeat=2)]
        read = modular.values(torch.cat([written(f"{a}{x}{b}{y}{c}=", n) for a, b, c, x, y in sums]), n).tolist()
        for (a, b, c, x, y), told in zip(sums, read, strict=True):
            one = a + b if x == "+" else a - b
            two = one + c if y == "+" else one - c
            assert told == [z % n for z in (a, a, one, one, two, two)]


@pytest.mark.parametrize("said", ["(2-(1-2))=", "(0-(1-(2-(1+1))))=", "((-1)-(-2))=", "(-2--2)=", "(1-(2--1))=", "((2-(1+2))-((1-2)-2))="])
def test_brackets(said):
    assert modular.values(written(said, 3), 3)[0, -1].item() == eval(said[:-1]) % 3


@pytest.mark.parametrize("brackets", [False, True])
@pytest.mark.parametrize("n", [3, 4, 7])
def test_expressions_of_any_kind(n, brackets):
    """Python reads the same text."""
    task = Modular(modulus=n, brackets=brackets, multiply=False, lengths=(1, 60))
    inputs, targets = task.batch(0, 0, 64)
    read = modular.values(inputs, n)
    for row, x, y in zip(read, inputs, targets, strict=True):
        at = int((y != IGNORED).nonzero())
        assert row[at].item() == eval(task.text(x)[:-1]) % n


def test_two_steps_are_a_turn():
    for n, x in ((3, 1), (5, 2), (7, 6)):
        k, beta = modular.signals(written(f"{x}", n), n)
        M = np.eye(2)
        for key, rate in zip(k[0, 0].double().numpy(), beta[0, 0].tolist(), strict=True):
            M = M @ (np.eye(2) - rate * np.outer(key, key))
        angle = 2 * np.pi * x / n
        np.testing.assert_allclose(M, [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], atol=1e-6)


def test_exact_part():
    findings, table, shares = modular._untrained(QUICK)
    assert not [f.what for f in findings if not f.passed]
    assert len(table) == len(shares) == 3 * len(findings) // 2
