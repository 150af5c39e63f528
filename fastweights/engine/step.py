"""``step``: one token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..language.errors import SignalError, SignalTypeError
from ..language.rule import Rule
from . import prepared
from .inputs import check
from .scan import Output, choose, run, scan
from .watched import forward_derivatives, modes

_output = tuple.__new__  # as Output(*done), without the function around it
_traced = torch.compiler.is_dynamo_compiling  # a third of what is_compiling costs where other work has filled the caches


def step(
    rule: Rule, W: Any = None, /, *, form: str = "auto", backend: str = "auto", out: Tensor | None = None, **signals: Tensor
) -> Output:
    """One token: like ``scan``, with signals (B, H, ...) that have no T axis.

    The new state is a new tensor, or is written to ``out``, which may be ``W`` itself: a stream then needs no memory but its own.

    >>> import torch, fastweights as fw
    >>> k, v = torch.ones(1, 1, 1), torch.full((1, 1, 2), 3.0)
    >>> y, W = fw.step(fw.rules.hebb, None, q=k, k=k, v=v)
    >>> y.tolist(), W.shape
    ([[[3.0, 3.0]]], torch.Size([1, 1, 2, 1]))
    """
    usual = form == "auto" and backend in ("auto", "cpu") and isinstance(rule, Rule) and isinstance(W, Tensor)
    if usual and not _traced() and not modes() and not forward_derivatives():
        given = (*signals.values(), W)  # looked up here: where the caches are cold, a function around it is felt
        names, fits, call = prepared.known.last.get(rule.number, prepared.NONE)
        if names != tuple(signals) or not fits(*given):
            call = prepared.step(rule, W, signals, given)
        done = None if call is None else call(given, out)
        if done is not None:
            return _output(Output, done)
    if torch.compiler.is_compiling() and out is None:
        y, state = scan(
            rule, state=W, reset=None, form=form, backend=backend, chunk_size=None, **{n: x.unsqueeze(1) for n, x in signals.items()}
        )
        return Output(y.squeeze(1), state)
    given = check(rule, signals, W, time=False)
    y, state = run(given, choose(given, form, backend, None))
    if out is not None:
        state = _into(rule, out, state)
    return Output(y.squeeze(1), state)


def _into(rule: Rule, out: Any, state: Any) -> Tensor:
    if not isinstance(out, Tensor) or not isinstance(state, Tensor):
        raise SignalTypeError(f"{rule.name}: out is a {type(out).__name__}; it is a tensor for the new W of a rule with one state")
    if out.shape != state.shape or out.dtype != state.dtype or out.device != state.device:
        raise SignalError(f"{rule.name}: out is {out.dtype} {tuple(out.shape)}, but the new state is {state.dtype} {tuple(state.shape)}")
    if torch.is_grad_enabled() and (state.requires_grad or out.requires_grad):
        raise SignalError(f"{rule.name}: out cannot hold a state that needs a gradient; leave it out, or use torch.no_grad()")
    return out.copy_(state)
