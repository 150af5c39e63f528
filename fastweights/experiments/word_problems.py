"""Word problems: how many reflections a token it takes to follow the running product of a group, without training and with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import rules
from ..engine.scan import scan
from ..plots import COLOURS, figure
from ..tasks.groups import Group, Words, group
from ..tasks.source import VALIDATION_SEED
from .entrants import SOLVED, Entrant, right_by_token
from .experiment import Finding, Result, Setting, experiment
from .training import ShortFirst, fit, parameters

_TRAINED, _TESTED = 32, 128  # elements of a word


class _Case(NamedTuple):
    group: str
    how: str
    make: Callable[[Group], np.ndarray]
    needed: int  # reflections a token


class _Row(NamedTuple):
    entrant: Entrant
    solves: bool


ROWS = (
    _Row(Entrant("DeltaProduct, 2 steps, rates to 2", ("delta * 2",), {"negative_eigenvalues": True}), True),
    _Row(Entrant("DeltaNet, 1 step, rates to 2", ("delta",), {"negative_eigenvalues": True}), False),
    _Row(Entrant("DeltaProduct, 2 steps, rates to 1", ("delta * 2",)), False),
)


@experiment(
    section="expressivity",
    claim="The delta rule with n steps a token and rates to 2 follows a group whose elements are products of n reflections, at any length",
    cite="Siems et al. 2025 (DeltaProduct); Grazzi et al. 2024",
    quick=40, default=200, full=20000,
)  # fmt: skip
def word_problems(setting: Setting) -> Result:
    """Tokens are elements of a group, drawn uniformly; what is asked at every token is the product of all elements so far.

    Without training: an element g is an orthogonal matrix M(g), W begins as the identity, and a token turns W into W M(g). A step of the
    delta rule with a unit key, rate 2 and value 0 is the reflection I - 2 k k^T, so n steps make any product of n reflections. M(g) is one
    of rank(I - M(g)) reflections and no fewer (Cartan and Dieudonne; Scherk 1950), found by Householder's method. The natural
    representation of S_n and A_n permutes n axes: an exchange is one reflection, and n - 1 are needed. As turns of a cube or an
    icosahedron, S_4 and A_5 need only two. Read with a fixed query, an element is right if its own M(g) q is the nearest. With one step
    fewer the last reflection is left out.

    With training: one layer without an MLP on S_3, words of up to 8 elements for the first half and of up to 32 for the second (in the
    paper, 2 million words of 32 elements without such a beginning); then words of 128 elements, of which the last 64 count. All see equal
    words for the same number of steps, and each has the width that brings its parameters nearest to those of the others. "Solves" is an
    accuracy of 0.95 or more, "does not" 0.6 or less; chance is 1/6, and 1/3 for who knows whether the product is odd.
    """
    findings, table = _untrained(setting)
    curves: dict[str, list[Tensor]] = {}
    for row in ROWS:
        late, size = [], 0
        for seed in setting.each_seed():
            right, size = _trained(row.entrant, setting, seed)
            curves.setdefault(row.entrant.name, []).append(right)
            late.append(float(right[-_TESTED // 2 :].mean()))
        what = f"S_3 trained, {row.entrant.name}: accuracy at elements 65 to 128"
        bounds = {"low": SOLVED} if row.solves else {"high": 0.6}
        findings.append(Finding(what, late, "1.00" if row.solves else "does not solve it", source="paper", **bounds))
        table.append({"group": "S_3", "how": row.entrant.name, "right": sum(late) / len(late), "parameters": size})
    return Result(findings, table, _draw(table, curves))


# -- representations


def natural(found: Group) -> np.ndarray:
    """Permutations of axes, (order, degree, degree): M(g) e_i = e_g(i)."""
    return np.eye(found.elements.shape[1])[found.elements].swapaxes(1, 2)


def plane(found: Group) -> np.ndarray:
    """Of Z_n and D_n, n > 2: the turns and reflections of a regular polygon, (order, 2, 2)."""
    n = found.elements.shape[1]
    corners = np.stack([np.cos(2 * np.pi * np.arange(n) / n), np.sin(2 * np.pi * np.arange(n) / n)])
    return corners[:, found.elements].swapaxes(0, 1) @ np.linalg.pinv(corners)


def turns(found: Group) -> np.ndarray:
    """Of A_4, S_4 and A_5: the turns of a tetrahedron, a cube and an icosahedron, (order, 3, 3).

    The groups are made by a of order 2 and b of order 3 whose product is of order r = 3, 4, 5: half a turn and a third of one about two
    axes, at an angle with sin(pi/3) cos(angle) = cos(pi/r).
    """
    r = {12: 3, 24: 4, 60: 5}[found.order]
    a, b = next(
        (a, b) for a in range(found.order) for b in range(found.order)
        if (_order(found, a), _order(found, b), _order(found, found.table[a, b])) == (2, 3, r)
    )  # fmt: skip
    cos = np.cos(np.pi / r) / np.sin(np.pi / 3)
    of = {a: _turn(np.array([0.0, 0.0, 1.0]), np.pi), b: _turn(np.array([np.sqrt(1 - cos**2), 0.0, cos]), 2 * np.pi / 3)}
    made = {0: np.eye(3)}
    while len(made) < found.order:
        made |= {int(found.table[g, s]): M @ of[s] for g, M in made.items() for s in of if found.table[g, s] not in made}
    return np.stack([made[g] for g in range(found.order)])


def _order(found: Group, g: int) -> int:
    power, n = g, 1
    while power:
        power, n = found.table[power, g], n + 1
    return n


def _turn(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rodrigues' formula."""
    x, y, z = axis
    K = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * K + (1 - np.cos(angle)) * K @ K


CASES = (
    _Case("S_3", "permuting axes", natural, 2),
    _Case("S_4", "permuting axes", natural, 3),
    _Case("S_5", "permuting axes", natural, 4),
    _Case("Z_7", "turns of a polygon", plane, 2),
    _Case("D_8", "symmetries of a polygon", plane, 2),
    _Case("A_4", "turns of a tetrahedron", turns, 2),
    _Case("S_4", "turns of a cube", turns, 2),
    _Case("A_5", "turns of an icosahedron", turns, 2),
)


# -- reflections


def reflections(M: np.ndarray) -> np.ndarray:
    """Unit vectors k_i, (m, d), with M = (I - 2 k_1 k_1^T) ... (I - 2 k_m k_m^T) for an orthogonal M; m = rank(I - M).

    >>> reflections(np.array([[0.0, 1.0], [1.0, 0.0]])).round(3).tolist()
    [[-0.707, 0.707]]
    """
    found = []
    while np.abs(M - np.eye(len(M))).max() > 1e-9:
        moved = M - np.eye(len(M))
        k = moved[:, np.linalg.norm(moved, axis=0).argmax()]
        found.append(k / np.linalg.norm(k))
        M = M - 2 * np.outer(found[-1], found[-1] @ M)
    return np.array(found).reshape(-1, len(M))


@dataclass(frozen=True)
class Construction:
    """A group as steps of the delta rule: keys (order, steps, d), unit ones with rate 2, and zeros with rate 0."""

    group: Group
    matrices: np.ndarray
    keys: np.ndarray
    needed: int

    @classmethod
    def of(cls, found: Group, matrices: np.ndarray, steps: int | None = None) -> Construction:
        """``steps`` a token, by default as many as are needed; reflections beyond them are left out."""
        each = [reflections(M) for M in matrices]
        needed = max(map(len, each))
        keys = np.zeros((len(each), needed if steps is None else steps, matrices.shape[1]))
        for g, k in enumerate(each):
            k = k[: keys.shape[1]]
            keys[g, : len(k)] = k
        return cls(found, matrices, keys, needed)

    def run(self, words: Tensor, rate: float = 2.0) -> tuple[Tensor, Tensor]:
        """What is read after every element, and W after the last one: words (B, T), reads (B, T, d), W (B, d, d)."""
        B, d = len(words), self.keys.shape[2]
        k = torch.from_numpy(self.keys).float()[words].unsqueeze(2)
        query, W = self.query.expand(*words.shape, 1, d), torch.eye(d).expand(B, 1, d, d)
        given = {"k": k, "v": torch.zeros_like(k), "beta": rate * (k.norm(dim=-1) > 0)}
        if k.shape[3] == 1:
            given = {name: z[:, :, :, 0] for name, z in given.items()}
        y, W = scan(rules.delta * k.shape[3], q=query, state=W, **given)
        return y[:, :, 0], W[:, 0]

    @property
    def query(self) -> Tensor:
        """A vector that no element but the first leaves where it is."""
        d = self.keys.shape[2]
        return torch.arange(1, d + 1, dtype=torch.float32) ** 2 / d**2

    def read(self, y: Tensor) -> Tensor:
        """The elements whose M(g) q are nearest to the reads (B, T, d), (B, T)."""
        known = torch.from_numpy(self.matrices).float() @ self.query
        return torch.cdist(y, known.expand(len(y), -1, -1)).argmin(-1)


def _untrained(setting: Setting) -> tuple[list[Finding], list[dict]]:
    T = setting.pick(quick=4096, default=16384, full=131072)
    findings: list[Finding] = []
    table: list[dict] = []
    for case in CASES:
        found = group(case.group)
        made = Construction.of(found, case.make(found))
        fewer = Construction.of(found, made.matrices, made.needed - 1)
        right, off, less, weak = [], [], [], []
        for seed in setting.each_seed():
            x, y = Words(group=case.group, lengths=(T, T), start=False).batch(seed, 0, 4)
            reads, W = made.run(x)
            right.append(_share(made.read(reads) == y))
            off.append(float((W - torch.from_numpy(made.matrices).float()[y[:, -1]]).abs().max()))
            less.append(_share(fewer.read(fewer.run(x)[0])[:, T // 2 :] == y[:, T // 2 :]))
            weak.append(_share(made.read(made.run(x, 1.0)[0])[:, T // 2 :] == y[:, T // 2 :]))
        said, chance = f"{case.group}, {case.how}", 1 / found.order
        findings += [
            Finding(f"{said}: reflections needed", [made.needed] * setting.seeds, str(case.needed), case.needed, case.needed),
            Finding(f"{said}: share right to length {T:,} with {made.needed} steps", right, "1", low=1.0),
            Finding(f"{said}: and with {made.needed - 1}, in the second half", less, f"below half; chance is {chance:.3f}", high=0.5),
        ]
        row = {"group": case.group, "how": case.how, "length": T}
        means = [(made.needed, 2.0, right), (made.needed - 1, 2.0, less), (made.needed, 1.0, weak)]
        table += [
            {**row, "steps": n, "rate": r, "right": sum(z) / len(z), "error of W": max(off) if z is right else ""} for n, r, z in means
        ]
    return findings, table


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


# -- training


def _trained(entrant: Entrant, setting: Setting, seed: int) -> tuple[Tensor, int]:
    """Accuracy at every element of long words, and the number of parameters."""
    steps, batch = setting.pick(quick=(800, 32), default=(1600, 32), full=(20000, 256))
    source = ShortFirst(*(Words(group="S_3", lengths=(1, most)) for most in (8, _TRAINED)), steps)
    model = entrant.build(source, setting.pick(quick=72, default=72, full=128), 1, seed, heads=4, conv=1, d_hidden=0)
    lr = setting.pick(quick=1e-2, default=1e-2, full=3e-3)
    fit(model, source, steps, batch=batch, lr=lr, seed=seed, cosine=True, setting=setting, name=entrant.name)
    long = Words(group="S_3", lengths=(_TESTED, _TESTED)).batch(VALIDATION_SEED, 0, 128)
    return right_by_token(model, *long)[1:], parameters(model)


def _draw(table: list[dict], curves: dict[str, list[Tensor]]):
    made, (left, right) = figure(2, width=5.2, height=4.0)
    rows = [row for row in table if "steps" in row]
    for i, case in enumerate(CASES):
        for row, mark, colour in zip(rows[3 * i : 3 * i + 3], "osx", COLOURS, strict=False):
            left.plot(row["right"], -i, mark, color=colour, ms=7)
        left.annotate(f"{case.needed} steps", (1, -i), (-8, -3), textcoords="offset points", fontsize=9, ha="right")
    left.set_yticks([-i for i in range(len(CASES))], [f"{c.group}, {c.how}" for c in CASES])
    left.set_xlim(-0.05, 1.08)
    left.set_xlabel(f"share right without training, {rows[0]['length']:,} elements")
    names = ("as many steps as needed", "one step fewer", "rate 1 instead of 2")
    for name, mark, colour in zip(names, "osx", COLOURS, strict=False):
        left.plot([], [], mark, color=colour, label=name)
    left.legend(frameon=False, fontsize=8, loc="center", bbox_to_anchor=(0.5, 0.45))
    for colour, (name, runs) in zip(COLOURS, curves.items(), strict=False):
        bins = torch.stack(runs).unflatten(1, (-1, 8)).mean((0, 2))
        right.plot(torch.arange(len(bins)) * 8 + 4.5, bins, ".-", color=colour, label=name)
    right.axhline(1 / 6, color="0.5", lw=1, ls=":")
    right.axvspan(1, _TRAINED, color="0.9")
    right.set_ylim(0, 1.08)
    right.set_xlabel("elements read (S_3; grey: trained, dotted: chance)")
    right.set_ylabel("accuracy")
    right.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.6))
    return made
