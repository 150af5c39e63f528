"""The recurrent form, which is the reference: the rule's own body on real tensors, one token after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .decay import only
from .inputs import Inputs

Step = Callable[..., tuple[tuple[Tensor, ...], Tensor]]


def recurrent(given: Inputs, each: Callable[[tuple[Tensor, ...]], None] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The outputs (B, T, H, ...) and the final states; ``each`` is shown the states after every token."""
    one = _over_batch_and_heads(given)
    states = given.states
    columns = {n: _all_heads(x, given.H).to(given.dtype).unbind(1) for n, x in given.signals.items()}
    resets = None if given.reset is None else given.reset.unbind(1)
    outputs = []
    for t in range(given.T):
        if resets is not None:
            states = tuple(only(~resets[t].reshape(-1, *(1,) * (s.ndim - 1)), s) for s in states)
        token = {n: column[t] for n, column in columns.items()}
        states, y = one(states, token)
        outputs.append(y)
        if each is not None:
            each(states)
    return torch.stack(outputs, 1) if outputs else given.empty(), states


def _all_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def _over_batch_and_heads(given: Inputs) -> Step:
    """The body for one token and one head, mapped over batch and heads."""
    rule = given.rule

    def one(states: tuple[Tensor, ...], signals: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        new, y = rule.apply(dict(zip(rule.states, states, strict=True)), signals)
        # a body may return a constant
        new = tuple(torch.as_tensor(n, dtype=s.dtype, device=s.device).expand(s.shape) for n, s in zip(new, states, strict=True))
        if y is None:
            y = new[0] @ signals["q"] if "q" in signals else new[0].new_zeros(new[0].shape[:1])
        return new, torch.as_tensor(y)

    if rule.trace_for(given.token_shapes()).states is not None:
        return torch.vmap(torch.vmap(one))

    def mapped(states: tuple[Tensor, ...], signals: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        """One after the other, where control flow depends on data."""
        B, H = states[0].shape[:2]
        each = [one(*pytree.tree_map(lambda x, at=at: x[at], (states, signals))) for at in itertools.product(range(B), range(H))]
        return pytree.tree_map(lambda *parts: torch.stack(parts).unflatten(0, (B, H)), *each)

    return mapped
