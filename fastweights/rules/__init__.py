"""The catalogue of fast weight rules, one small file a family, and how to find a rule by its name."""

from __future__ import annotations

import ast
import difflib

from ..language.errors import RuleError
from ..language.rule import Rule
from .coupled import cascade, eligibility, momentum, rls
from .delta import comba, delta, erase, erase_write, gated_delta, generalised_delta, implicit_delta, preconditioned_delta, td
from .hebb import bonus_hebb, decay, decayed_hebb, exp_gated_hebb, hebb, hebb_rate, normalised_hebb, stepped_hebb, write
from .nonlinear import bcm, clip, cosine, huber, lp, softmax_delta, tanh, willshaw
from .oja import gated_oja, oja
from .recurrent import (
    attend_to_the_past,
    backpropamine,
    delta_delta,
    delta_lstm,
    delta_mlp,
    delta_rnn,
    differentiable_plasticity,
    fwm,
    gated_fast_weights,
    mpn,
    rdn,
    srwm,
    srwm_delta,
    srwm_fixed,
)

# affine in W: they run in every form
CATALOGUE: tuple[Rule, ...] = (
    hebb, hebb_rate, decayed_hebb, stepped_hebb, normalised_hebb, exp_gated_hebb, bonus_hebb,
    delta, gated_delta, implicit_delta, erase_write, comba, generalised_delta, preconditioned_delta, td,
    oja, gated_oja,
    decay, erase, write,
)  # fmt: skip

# with several matrices, not affine, or with a programmer that sees its past: they run token by token
RECURRENT: tuple[Rule, ...] = (
    momentum, eligibility, cascade, rls, bcm, clip, tanh, willshaw, huber, lp, cosine, softmax_delta, delta_rnn, delta_mlp, delta_delta,
    delta_lstm, rdn, srwm, srwm_delta, srwm_fixed, attend_to_the_past, gated_fast_weights, fwm, differentiable_plasticity, backpropamine,
    mpn,
)  # fmt: skip

__all__ = [
    "CATALOGUE", "RECURRENT", "attend_to_the_past", "backpropamine", "bcm", "bonus_hebb", "cascade", "clip", "comba", "cosine", "decay",
    "decayed_hebb", "delta", "delta_delta", "delta_lstm", "delta_mlp", "delta_rnn", "differentiable_plasticity", "eligibility", "erase",
    "erase_write", "exp_gated_hebb", "fwm", "gated_delta", "gated_fast_weights", "gated_oja", "generalised_delta", "get", "hebb",
    "hebb_rate", "huber", "implicit_delta", "lp", "momentum", "mpn", "normalised_hebb", "oja", "preconditioned_delta", "rdn", "rls",
    "softmax_delta", "srwm", "srwm_delta", "srwm_fixed", "stepped_hebb", "tanh", "td", "willshaw", "write",
]  # fmt: skip


def get(name: str) -> Rule:
    """The rule of that name, which may be composed: ``"gated_delta"``, ``"delta * 2"``, ``"delta.T"``, ``"erase >> write"``.

    >>> get("delta * 2").program.n
    2
    """
    try:
        return _build(ast.parse(name.strip(), mode="eval").body)
    except SyntaxError as error:
        raise RuleError(
            f"{name!r} is not the name of a rule: write a name such as 'delta', 'delta * 2' or 'delta.T', or FILE.py:NAME for your own"
        ) from error


def _build(node: ast.expr) -> Rule:
    match node:
        case ast.Name(name):
            known = {rule.name: rule for rule in (*CATALOGUE, *RECURRENT)}
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else "."
                raise RuleError(f"no rule is named {name!r}{hint} Known: {', '.join(known)}; a rule of your own is FILE.py:NAME")
            return known[name]
        case ast.BinOp(left, ast.Mult(), ast.Constant(int(n))):
            return _build(left) * n
        case ast.BinOp(left, ast.RShift(), right):
            return _build(left) >> _build(right)
        case ast.Attribute(value, "T"):
            return _build(value).T
    raise RuleError(f"{ast.unparse(node)!r} does not name a rule: rules combine by >>, * n and .T, and a rule of your own is FILE.py:NAME")
