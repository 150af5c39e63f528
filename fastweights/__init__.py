"""fastweights: fast weight programmers. A rule is written once, as mathematics, and everything follows from it."""

from . import rules
from .engine.check import check
from .engine.scan import Output, Plan, attention_matrix, plan, scan, step, unroll
from .layers import FastWeightLayer, Programmer, SoftmaxAttention
from .language.errors import FastWeightError, FormError, RuleError, SignalError, SignalTypeError
from .language.objective import Objective, descend
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
from .language.rule import Rule, outer, rule
