"""What is written down while a rule runs: weights, traces and errors, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.step import step
from ..language.errors import SignalError
from ..language.rule import Rule


class Recording(NamedTuple):
    """``states``: every state by name *after* every token, (B, T, H, ...), W first; ``y``: what was read, (B, T, H, V).

    ``error``: v - W k with W *before* the token, (B, T, H, V): what the delta rule corrects, the error that dopamine is said to carry;
    None for a rule without a key and a value.
    """

    states: Mapping[str, Tensor]
    y: Tensor
    error: Tensor | None

    @property
    def W(self) -> Tensor:
        """The fast weights after every token, (B, T, H, V, K)."""
        return next(iter(self.states.values()))


def record(rule: Rule, *, state: Any = None, **signals: Tensor) -> Recording:
    """Run a rule token by token and keep all states; ``fw.unroll`` keeps W alone. A query that is left out is zero.

    Raises:
        SignalError: a signal does not fit, or there is no token.

    >>> import fastweights as fw
    >>> k = torch.ones(1, 3, 1, 1)
    >>> record(fw.rules.delta, k=k, v=k, beta=torch.full((1, 3, 1), 0.5)).error.flatten().tolist()
    [1.0, 0.5, 0.25]
    """
    if "q" in rule.signals and "q" not in signals and "k" in signals:
        signals = {"q": torch.zeros_like(signals["k"]), **signals}
    if not signals or any(x.shape[1] == 0 for x in signals.values()):
        raise SignalError(f"{rule.name}: there is nothing to record: pass the signals of at least one token, (B, T, H, ...)")
    kept: dict[str, list[Tensor]] = {name: [] for name in rule.states}
    read, errors = [], []
    for t in range(next(iter(signals.values())).shape[1]):
        token = {name: x[:, t] for name, x in signals.items()}
        if "k" in token and "v" in token:
            errors.append(token["v"] - _predicted(rule, state, token))
        y, state = step(rule, state, **token)
        read.append(y)
        for name, new in zip(rule.states, state if isinstance(state, tuple) else (state,), strict=True):
            kept[name].append(new)
    return Recording(
        {n: torch.stack(all_of, 1) for n, all_of in kept.items()}, torch.stack(read, 1), torch.stack(errors, 1) if errors else None
    )


def _predicted(rule: Rule, state: Any, token: Mapping[str, Tensor]) -> Tensor:
    W = state[0] if isinstance(state, (tuple, list)) else state
    if W is None:
        return torch.zeros_like(token["v"])
    return torch.einsum("bhvk,bhk->bhv", W, token["k"].repeat_interleave(W.shape[1] // token["k"].shape[1], 1).to(W.dtype))
