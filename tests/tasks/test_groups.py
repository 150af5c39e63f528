"""Groups obey their axioms and are the groups of their names; labels are running products of permutations."""

import itertools
import math

import pytest

from fastweights.tasks import Words, group
from fastweights.tasks.source import IGNORED

NAMES = ("Z_1", "Z_2", "Z_5", "Z_60", "S_1", "S_3", "S_4", "S_5", "A_2", "A_3", "A_4", "A_5", "D_3", "D_4", "D_8")
ORDER = {"Z": lambda n: n, "S": math.factorial, "A": lambda n: max(math.factorial(n) // 2, 1), "D": lambda n: 2 * n}


@pytest.mark.parametrize("name", NAMES)
def test_axioms(name):
    g = group(name)
    n, t = g.order, g.table
    assert n == ORDER[name[0]](int(name[2:]))
    assert len({tuple(p) for p in g.elements.tolist()}) == n
    assert all(sorted(p) == list(range(g.elements.shape[1])) for p in g.elements.tolist())
    assert (t[0] == range(n)).all()  # identity
    assert (t[:, 0] == range(n)).all()
    assert (t[range(n), g.inverse] == 0).all()  # inverses
    assert (t[g.inverse, range(n)] == 0).all()
    assert (t[t] == t[:, t]).all()  # (a b) c = a (b c), over all a, b and c


@pytest.mark.parametrize("name", NAMES)
def test_products_are_compositions(name):
    g = group(name)
    permutations = [tuple(p) for p in g.elements.tolist()]
    for (a, p), (b, q) in itertools.islice(itertools.product(enumerate(permutations), repeat=2), 0, None, 7):
        assert permutations[g.table[a, b]] == tuple(p[i] for i in q)


def orders(name):
    """How many elements there are of every order, found by multiplying."""
    g, found = group(name), {}
    for a in range(g.order):
        power, order = a, 1
        while power:
            power, order = g.table[power, a], order + 1
        found[order] = found.get(order, 0) + 1
    return found


@pytest.mark.parametrize(
    ("name", "expected", "commutes"),
    [
        ("Z_5", {1: 1, 5: 4}, True),
        ("Z_6", {1: 1, 2: 1, 3: 2, 6: 2}, True),
        ("S_3", {1: 1, 2: 3, 3: 2}, False),
        ("S_4", {1: 1, 2: 9, 3: 8, 4: 6}, False),
        ("S_5", {1: 1, 2: 25, 3: 20, 4: 30, 5: 24, 6: 20}, False),
        ("A_4", {1: 1, 2: 3, 3: 8}, False),
        ("A_5", {1: 1, 2: 15, 3: 20, 5: 24}, False),
        ("D_4", {1: 1, 2: 5, 4: 2}, False),
        ("D_8", {1: 1, 2: 9, 4: 2, 8: 4}, False),
    ],
)
def test_they_are_the_groups_of_their_names(name, expected, commutes):
    """The numbers of elements of every order, as they are known."""
    assert orders(name) == expected
    assert (group(name).table == group(name).table.T).all() == commutes


@pytest.mark.parametrize("name", ["Z_5", "S_3", "S_5", "A_4", "A_5", "D_8"])
@pytest.mark.parametrize("start", [True, False])
def test_labels_are_running_products(name, start):
    source, g = Words(group=name, lengths=(2, 12), start=start), group(name)
    permutations = [tuple(p) for p in g.elements.tolist()]
    inputs, targets = source.batch(0, 0, 40)
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        product = permutations[0]
        if start:
            assert (row.pop(0), wanted.pop(0)) == (g.order, IGNORED)
        for element, label in zip(row, wanted, strict=True):
            if label == IGNORED:
                assert element == 0
                continue
            product = tuple(product[i] for i in permutations[element])  # the product so far after the newest element
            assert permutations[label] == product


def test_every_element_is_as_likely_as_any_other_at_the_end():
    _, targets = Words(group="S_3", lengths=(8, 8)).batch(0, 0, 6000)
    counts = targets[:, -1].bincount(minlength=6)
    assert (abs(counts - 1000) < 5 * math.sqrt(1000 * 5 / 6)).all()
