"""fastweights: fast weight programmers. A rule is written once, as mathematics, and everything follows from it."""

from . import rules
from .engine.check import check
from .engine.scan import Output, Plan, attention_matrix, plan, scan, unroll
from .engine.step import step
from .language.decorator import descend, outer, rule
from .language.errors import FastWeightError, FormError, RuleError, SignalError, SignalTypeError
from .language.objective import Objective
from .language.roles import (
    Gate,
    Key,
    KeyGate,
    KeyState,
    KeyVector,
    LogDecay,
    Matrix,
    PositiveKey,
    PositiveQuery,
    Query,
    Rate,
    Scalar,
    ScalarState,
    Value,
    ValueGate,
    ValueLogDecay,
    ValueState,
    ValueVector,
)
from .language.rule import Rule
from .layers import FastWeightLayer, Programmer, SoftmaxAttention

__all__ = [
    "FastWeightError",
    "FastWeightLayer",
    "FormError",
    "Gate",
    "Key",
    "KeyGate",
    "KeyState",
    "KeyVector",
    "LogDecay",
    "Matrix",
    "Objective",
    "Output",
    "Plan",
    "PositiveKey",
    "PositiveQuery",
    "Programmer",
    "Query",
    "Rate",
    "Rule",
    "RuleError",
    "Scalar",
    "ScalarState",
    "SignalError",
    "SignalTypeError",
    "SoftmaxAttention",
    "Value",
    "ValueGate",
    "ValueLogDecay",
    "ValueState",
    "ValueVector",
    "attention_matrix",
    "check",
    "descend",
    "outer",
    "plan",
    "rule",
    "rules",
    "scan",
    "step",
    "unroll",
]
