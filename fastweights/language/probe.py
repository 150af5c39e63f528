"""Whether two rules are the same map: their values at fixed points (identity testing).

Two analytic maps that agree at points in general position agree everywhere. The points come from an integer sequence, so
that they are the same on every machine; they span three orders of magnitude, so that bounds show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .roles import Signal
    from .rule import Rule

_SCALES = (0.3, 1.0, 30.0)
OVERFLOW = "overflow"


def _numbers(seed: int) -> Iterator[float]:
    """Uniform in (-1, 1), by a linear congruence."""
    while True:
        seed = (6364136223846793005 * seed + 1442695040888963407) % 2**64
        yield (seed >> 11) / 2**52 - 1


def probe(rule: Rule) -> list[float | str | None]:
    """Weighted sums of what the rule returns at fixed points: None where it accepts no such signals, ``OVERFLOW`` where not finite."""
    values: list[float | str | None] = []
    for which, dk, dv in ((0, 4, 3), (-1, 4, 3), (0, 6, 5)):
        for seed, scale in enumerate(_SCALES):
            out = _at(rule, which, seed, scale, dk, dv)
            values += [None] * 2 if out is None else _sums(out, seed)
    return values


def _at(rule: Rule, which: int, seed: int, scale: float, dk: int, dv: int) -> list[Tensor] | None:
    def fill(s: Signal, name: str) -> Tensor:
        draw = _numbers(seed * 1_000_003 + sum(ord(c) * 131**i for i, c in enumerate(name)))
        shape = s.shapes(dk, dv)[which]
        x = torch.tensor([next(draw) for _ in range(math.prod(shape))], dtype=torch.float64).reshape(shape)
        return _in_range(s.role.name, x, scale)

    states = {n: fill(s, s.role.name) for n, s in rule.states.items()}
    signals = {n: fill(s, n) for n, s in rule.signals.items()}
    try:
        new, y = rule.apply(states, signals)
    except (RuntimeError, IndexError):
        return None
    return [torch.as_tensor(x, dtype=torch.float64) for x in (*new, new[0] @ signals["q"] if y is None else y)]


def _in_range(role: str, x: Tensor, scale: float) -> Tensor:
    if role in ("LogDecay", "ValueLogDecay"):
        return -(x + 1.1) * min(scale, 2.0)
    if role.startswith("Positive"):
        return (x + 1.1) * scale
    return (x + 1) / 2 if role == "Rate" or role.endswith("Gate") else x * scale


def _sums(tensors: list[Tensor], seed: int) -> list[float | str]:
    """Two weighted sums, so that a difference in one place cannot hide."""
    flat = [x for t in tensors for x in t.flatten().tolist()]
    if not all(map(math.isfinite, flat)):
        return [OVERFLOW] * 2
    return [math.fsum(x * (w + 1.5) for x, w in zip(flat, _numbers(which + seed), strict=False)) for which in (7, 11)]


def matches(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Equal up to rounding."""
    if len(a) != len(b) or list(map(type, a)) != list(map(type, b)):
        return False
    return all(math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-9) if isinstance(x, float) else x == y for x, y in zip(a, b, strict=True))
