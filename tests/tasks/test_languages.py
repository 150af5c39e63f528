"""The sets of next symbols against a search through all words of a language, each language by its definition."""

import itertools
import math
import re
from collections import Counter

import pytest

from fastweights.tasks import Language
from fastweights.tasks.languages import GRAMMARS
from fastweights.tasks.source import IGNORED


def balanced(word, opening, closing):
    """Is what is left of a word, without all other symbols, made of nested brackets? Found by cancelling."""
    rest = "".join(c for c in word if c in opening + closing)
    while opening + closing in rest:
        rest = rest.replace(opening + closing, "")
    return rest


MEMBER = {
    "aa": lambda w: bool(re.fullmatch("(aa)*", w)),
    "abab": lambda w: bool(re.fullmatch("(abab)*", w)),
    "parity": lambda w: bool(re.fullmatch("(0*10*1)*0*", w)),
    "dyck1": lambda w: balanced(w, "(", ")") == "",
    "reset_dyck1": lambda w: (
        all(set(balanced(part, "(", ")")) <= {"("} for part in w.split("#")[:-1]) and balanced(w.split("#")[-1], "(", ")") == ""
    ),
    "shuffle2": lambda w: balanced(w, "(", ")") == "" and balanced(w, "[", "]") == "",
    "counter2": lambda w: w == "a" * (len(w) // 2) + "b" * (len(w) // 2) != "",
    "counter3": lambda w: w == "a" * (len(w) // 3) + "b" * (len(w) // 3) + "c" * (len(w) // 3) != "",
}
# how long words may be, and how long those must be in which the continuations of their prefixes are looked for
SIZES = {"aa": (8, 10), "abab": (8, 12), "parity": (6, 8), "dyck1": (6, 8), "reset_dyck1": (4, 7), "shuffle2": (4, 6), "counter2": (3, 8),
         "counter3": (2, 9)}  # fmt: skip


@pytest.mark.parametrize("name", GRAMMARS)
def test_the_targets_are_the_symbols_that_may_follow(name):
    longest, search = SIZES[name]
    symbols = GRAMMARS[name].symbols
    words = {"".join(w) for n in range(search + 1) for w in itertools.product(symbols, repeat=n) if MEMBER[name]("".join(w))}
    source = Language(language=name, lengths=(1, longest))
    inputs, targets = source.batch(0, 0, 60)
    for row, wanted in zip(inputs, targets, strict=True):
        n = int((wanted != IGNORED).sum())
        word = "".join(source.tokens[i] for i in row[:n])
        assert MEMBER[name](word), word
        assert (wanted[n:] == IGNORED).all()
        for t in range(n):
            prefix = word[: t + 1]
            following = {w[t + 1] if len(w) > t + 1 else "$" for w in words if w.startswith(prefix)}
            assert set(source.tokens[wanted[t]][1:-1]) == following, (word, t)


@pytest.mark.parametrize("name", GRAMMARS)
def test_long_words_are_words_and_a_start_may_be_put_before_them(name):
    source = Language(language=name, start=True)
    for this in (source, source.extended()):
        for row, wanted in zip(*this.batch(0, 0, 20), strict=True):
            assert (row[0], wanted[0]) == (source.vocabulary - 1, IGNORED)
            word = "".join(this.tokens[i] for i in row[1:][wanted[1:] != IGNORED])
            assert MEMBER[name](word), word
            assert "$" in this.tokens[wanted[wanted != IGNORED][-1]]


@pytest.mark.parametrize(("name", "length", "expected"), [("dyck1", 8, 14), ("parity", 5, 16), ("reset_dyck1", 3, 3)])
def test_words_of_a_length_are_all_drawn(name, length, expected):
    """14 words of Dyck-1 of length 8 and 16 of parity of length 5, equally likely; ()#, ((# and #() of reset-Dyck-1."""
    n = 3000
    source = Language(language=name, lengths=(length, length))
    found = Counter("".join(source.tokens[i] for i in row) for row in source.batch(0, 0, n)[0])
    assert len(found) == expected
    if name != "reset_dyck1":
        assert all(abs(k - n / expected) < 5 * math.sqrt(n / expected) for k in found.values())


def test_brackets_of_both_kinds_interleave():
    source = Language(language="shuffle2", lengths=(4, 4))
    found = {"".join(source.tokens[i] for i in row) for row in source.batch(0, 0, 2000)[0]}
    assert {"([)]", "[(])", "([])", "()[]", "(())", "[][]"} <= found
    assert len(found) == 2 * 2 + 6  # Dyck words of either kind, and the ways to interleave () and []
