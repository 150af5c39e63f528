"""The recurrent form, which is the reference: the rule's own body on real tensors, one token after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .decay import only
from .inputs import Inputs

Step = Callable[..., tuple[tuple[Tensor, ...], Tensor]]


def recurrent(given: Inputs, each: Callable[[tuple[Tensor, ...]], None] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The outputs (B, T, H, ...) and the final states; ``each`` is shown the states after every token."""
    one = _over_batch_and_heads(given)
    states = given.states
    columns = [x.unbind(1) for x in given.signals.values()]
    resets = None if given.reset is None else given.reset.unbind(1)
    outputs = []
    for t in range(given.T):
        if resets is not None:
            states = tuple(only(~resets[t].reshape(-1, *(1,) * (s.ndim - 1)), s) for s in states)
        token = [_all_heads(c[t], given.H).to(given.dtype) for c in columns]
        states, y = one(states, token)
        outputs.append(y)
        if each is not None:
            each(states)
    if not outputs:
        return given.empty(), states
    return torch.stack(outputs, 1), states


def _all_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _over_batch_and_heads(given: Inputs) -> Step:
    """The body for one token and one head, mapped over batch and heads."""
    rule, names = given.rule, list(given.signals)

    def one(states: tuple[Tensor, ...], token: list[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        signals = dict(zip(names, token, strict=True))
        new, y = rule.apply(dict(zip(rule.states, states, strict=True)), signals)
        new = tuple(_like(n, s) for n, s in zip(new, states, strict=True))
        if y is None:
            y = new[0] @ signals["q"] if "q" in signals else new[0].new_zeros(new[0].shape[:1])
        return new, torch.as_tensor(y)

    if rule.trace_for(given.token_shapes()).states is None:  # control flow that depends on data
        return _loop(one)
    return torch.vmap(torch.vmap(one))


def _like(new: Any, old: Tensor) -> Tensor:
    """A returned state, as a tensor even where the body returned a constant."""
    return torch.as_tensor(new, dtype=old.dtype, device=old.device).expand(old.shape)


def _loop(one: Step) -> Step:
    def mapped(states: tuple[Tensor, ...], token: list[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        B, H = states[0].shape[:2]
        rows = [[one(tuple(s[b, h] for s in states), [x[b, h] for x in token]) for h in range(H)] for b in range(B)]
        new = tuple(torch.stack([torch.stack([r[0][i] for r in row]) for row in rows]) for i in range(len(states)))
        return new, torch.stack([torch.stack([r[1] for r in row]) for row in rows])

    return mapped
