"""Labels of the tasks of tokens against slow interpreters of their definitions, and facts about their distributions."""

import math
import random

import numpy as np
import pytest
import torch

from fastweights.tasks import MQAR, Code, Copying, ListOps, Modular, Parity, task
from fastweights.tasks.source import IGNORED


def counted(inputs, targets):
    """For every row, the tokens and the targets that count, by position."""
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        yield row, {t: w for t, w in enumerate(wanted) if w != IGNORED}


# ---- recall ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filler", [True, False])
def test_mqar_asks_every_key_once_for_its_value(filler):
    source = MQAR(pairs=5, vocabulary=40, tokens=48, filler=filler)
    for row, wanted in counted(*source.batch(0, 0, 50)):
        keys, values = row[0:10:2], row[1:10:2]
        known = dict(zip(keys, values, strict=True))
        assert len(known) == 5
        assert len(set(values)) == 5
        assert all(0 < k < 20 for k in keys)
        assert all(20 <= v < 40 for v in values)
        assert sorted(row[t] for t in wanted) == sorted(keys)
        assert all(known[row[t]] == v and t >= 10 and t % 2 == 0 for t, v in wanted.items())
        if not filler:
            assert all(x == 0 for t, x in enumerate(row) if t >= 10 and t not in wanted)


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_gaps_of_mqar_follow_the_power_law(power):
    """One pair: place i has the probability i^(a-1) / sum. Two: the first drawn is followed by one of the others, in proportion."""
    n, places = 20_000, 8
    _, targets = MQAR(pairs=1, vocabulary=32, tokens=2 + 2 * places, power=power).batch(0, 0, n)
    p = np.arange(1, places + 1) ** (power - 1.0)
    p /= p.sum()
    found = np.bincount(((targets != IGNORED).long().argmax(1) - 2) // 2, minlength=places) / n
    assert (abs(found - p) < 5 * np.sqrt(p * (1 - p) / n)).all()
    inputs, targets = MQAR(pairs=2, vocabulary=32, tokens=4 + 2 * places, power=power, filler=False).batch(0, 0, n)
    first = ((inputs[:, 4:] == inputs[:, :1]).long().argmax(1) // 2).numpy()
    second = ((inputs[:, 4:] == inputs[:, 2:3]).long().argmax(1) // 2).numpy()
    p = np.arange(1, places + 1) ** (power - 1.0)
    p /= p.sum()
    joint = np.array([[0 if i == j else p[i] * p[j] / (1 - p[i]) for j in range(places)] for i in range(places)])
    found = np.bincount(first * places + second, minlength=places**2).reshape(places, places) / n
    assert (abs(found - joint) < 5 * np.sqrt(joint * (1 - joint) / n) + 1e-12).all()


# ---- parity and copying ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("start", [True, False])
def test_parity_is_the_number_of_ones_modulo_two(every, start):
    source = Parity(lengths=(3, 17), every=every, start=start)
    seen = set()
    for row, wanted in counted(*source.batch(0, 0, 200)):
        last = max(wanted)
        assert (row[0] == 2) == start
        assert all(w == row[start : t + 1].count(1) % 2 for t, w in wanted.items())
        assert sorted(wanted) == (list(range(start, last + 1)) if every else [last])
        assert not any(row[last + 1 :])
        seen.add(last + 1 - start)
    assert seen == set(range(3, 18))


@pytest.mark.parametrize("every", [True, False])
def test_parity_is_balanced_at_every_place(every):
    _, targets = Parity(lengths=(20, 20), every=every).batch(0, 0, 4000)
    for t in range(1, 21) if every else [20]:
        assert abs(float((targets[:, t] == 1).float().mean()) - 0.5) < 5 * 0.5 / math.sqrt(4000)


def test_copying_says_again_what_was_said():
    source = Copying(symbols=5, lengths=(2, 9))
    for row, wanted in counted(*source.batch(0, 0, 200)):
        n = row.index(5)
        assert list(wanted) == list(range(n, 2 * n))
        assert list(wanted.values()) == row[:n]
        assert row[n + 1 : 2 * n] == row[: n - 1]
        assert not any(row[2 * n :])
        assert max(row[:n]) < 5


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modulus", [2, 5, 7])
@pytest.mark.parametrize("brackets", [True, False])
@pytest.mark.parametrize("multiply", [True, False])
def test_the_value_of_an_expression_is_what_python_says(modulus, brackets, multiply):
    source = Modular(lengths=(1, 40), modulus=modulus, brackets=brackets, multiply=multiply)
    for this in (source, source.extended()):
        inputs, targets = this.batch(1, 2, 60)
        for tokens, (row, wanted) in zip(inputs, counted(inputs, targets), strict=True):
            said = this.text(tokens)
            ((at, value),) = wanted.items()
            assert len(said) == at + 1
            assert not any(row[at + 1 :])
            assert value == eval(said[:-1]) % modulus, said
            assert ("*" in said) <= multiply
            assert ("(" in said) <= brackets


def grown(n, draw):
    """An expression of n symbols by the definition, as its shape: d for a digit, o for an operator."""
    if n < 5:
        return {1: "d", 2: "-d", 3: "(d)", 4: "(-d)"}[n]
    left = draw.randrange(1, n - 3)
    return f"({grown(left, draw)}o{grown(n - 3 - left, draw)})"


def test_nested_expressions_have_the_distribution_of_their_definition():
    n = 4000
    source = Modular(lengths=(11, 11), brackets=True)
    shapes = {}
    for row in source.batch(0, 0, n)[0]:
        said = source.text(row)
        shape = "".join(
            "d" if c.isdigit() else "o" if c in "+*" or (c == "-" and (said[i - 1].isdigit() or said[i - 1] == ")")) else c
            for i, c in enumerate(said[:-1])
        )
        shapes[shape] = shapes.get(shape, 0) + 1
    draw, expected = random.Random(0), {}
    for _ in range(n):
        shape = grown(11, draw)
        expected[shape] = expected.get(shape, 0) + 1
    assert set(shapes) == set(expected)
    assert all(abs(shapes[s] - expected[s]) < 5 * math.sqrt(2 * expected[s] + 1) for s in shapes)


# ---- listops ---------------------------------------------------------------------------------------------------------


def evaluated(words):
    """(value, depth) of a list of words, by recursion; takes them off its front."""
    word = words.pop(0)
    if word.isdigit():
        return int(word), 0
    inside = []
    while words[0] != "]":
        inside.append(evaluated(words))
    words.pop(0)
    assert 2 <= len(inside) <= 5
    values = [v for v, _ in inside]
    return {"[MIN": min, "[MAX": max, "[FIRST": lambda v: v[0]}[word](values), 1 + max(d for _, d in inside)


@pytest.mark.parametrize("depth", [1, 2, 4, 10])
def test_lists_have_the_value_and_the_depth_that_recursion_finds(depth):
    source = ListOps(depth=depth)
    for row, tokens in zip(source.batch(0, 0, 60)[0], counted(*source.batch(0, 0, 60)), strict=True):
        words = source.text(row).split()
        ((at, value),) = tokens[1].items()
        assert at == len(words) - 1
        assert evaluated(words) == (value, depth)
        assert not words
        assert not any(tokens[0][at + 1 :])


def tree(draw, depth, root=True):
    """Words, value and depth of a list by the definition; None if it is deeper than ``depth``."""
    if not root and draw.random() >= 0.25:
        value = draw.randrange(10)
        return 1, value, 0
    if depth == 0:
        return None
    count, operator = draw.randint(2, 5), draw.randrange(3)
    inside = []
    for _ in range(count):
        if (one := tree(draw, depth - 1, False)) is None:
            return None
        inside.append(one)
    value = (min(v for _, v, _ in inside), max(v for _, v, _ in inside), inside[0][1])[operator]
    return 2 + sum(n for n, _, _ in inside), value, 1 + max(d for _, _, d in inside)


def test_lists_have_the_distribution_of_drawing_until_the_depth_is_right():
    draw, lengths, values = random.Random(0), [], []
    while len(lengths) < 3000:
        one = tree(draw, 3)
        if one is not None and one[2] == 3:
            lengths.append(one[0])
            values.append(one[1])
    inputs, targets = ListOps(depth=3).batch(0, 0, 3000)
    found = ((targets != IGNORED).long().argmax(1) + 1).numpy()
    told = targets.max(1).values.numpy()
    deviation = np.std(lengths) * math.sqrt(2 / 3000)
    assert abs(found.mean() - np.mean(lengths)) < 4 * deviation
    assert abs(np.sort(found) - np.sort(lengths)).mean() < 0.1 * np.std(lengths)
    assert (abs(np.bincount(told, minlength=10) - np.bincount(values, minlength=10)) < 5 * math.sqrt(2 * 500)).all()
    assert np.bincount(told).max() / 3000 < 0.3  # what a constant answer gets
    assert inputs.max() == 13


# ---- code ------------------------------------------------------------------------------------------------------------


def executed(program):
    """What every ``print`` prints, _ where it is not reached, by a dictionary of variables; checks that the program is proper."""
    values, said = {}, []
    for line in program.split(";")[:-1]:
        words, does = line.split(), True
        if words[0] == "if":
            _, name, sign, bound, colon = words[:5]
            assert colon == ":"
            does = values[name] < int(bound) if sign == "<" else values[name] > int(bound)
            words = words[5:]
        if words[0] == "print":
            value = str(values[words[1]])
            said.append(value if does else "_")
        elif words[1] == "=":
            assert 0 <= int(words[2]) <= 9
            if does:
                values[words[0]] = int(words[2])
        else:
            value = values[words[0]] + {"++": 1, "--": -1}[words[1]]
            assert -8 <= value <= 16
            if does:
                values[words[0]] = value
    return said


@pytest.mark.parametrize("variables", [1, 3, 5])
def test_programs_print_what_an_interpreter_prints(variables):
    source = Code(variables=variables, statements=60)
    inputs, targets = source.batch(0, 0, 60)
    names = set()
    for row, answers in zip(inputs, targets, strict=True):
        program = source.text(row)
        assert program.count(";") == 60
        assert [source.text(a[None]) for a in answers if a != IGNORED] == executed(program)
        assert all(source.text(row[t : t + 1]) == ";" for t, a in enumerate(answers.tolist()) if a != IGNORED)
        names |= set(program.split()) & set("xyzab")
        last = program.split(";")[-2].split()
        assert last[0] == "print"
    assert len(names) == variables


def test_statements_of_programs_are_equally_likely():
    """Of the statements between the first and the last, a quarter of each kind, and a third of those under a condition."""
    source = Code(statements=100)
    kinds = {"=": 0, "+-": 0, "print": 0, "if": 0}
    under = {"=": 0, "+-": 0, "print": 0}
    for row in source.batch(0, 0, 100)[0]:
        for line in source.text(row).split(";")[1:-2]:
            words = line.split()
            where = kinds
            if words[0] == "if":
                kinds["if"] += 1
                where, words = under, words[5:]
            where["print" if words[0] == "print" else "=" if words[1] == "=" else "+-"] += 1
    n = sum(kinds.values())
    assert n == 9800
    assert all(abs(k / n - 1 / 4) < 5 * math.sqrt(3 / 16 / n) for k in kinds.values())
    n = kinds["if"]
    assert all(abs(k / n - 1 / 3) < 5 * math.sqrt(2 / 9 / n) for k in under.values())


def test_values_reach_their_limits_and_turn_back():
    source = Code(variables=1, statements=400)
    said = [source.text(a[None]) for a in source.batch(0, 0, 40)[1].flatten() if a != IGNORED]
    values = {int(v) for v in said if v != "_"}
    assert min(values) < 0
    assert max(values) > 9


def test_a_batch_of_one_and_of_the_shortest():
    for text in ("parity:lengths=1", "copying:lengths=1", "modular:lengths=1", "modular:brackets=true,lengths=1", "words:lengths=1",
                 "listops:depth=1",
                 "code:statements=2", "mqar:pairs=1,tokens=4,vocabulary=4", "recall:pairs=1,vocabulary=2"):  # fmt: skip
        inputs, targets = task(text).batch(0, 0, 1)
        assert inputs.shape == targets.shape
        assert (targets != IGNORED).sum() == 1, text
        assert torch.equal(task(text).batch(0, 0, 1)[0], inputs)
