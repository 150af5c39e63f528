"""The one family of errors: each names what was given, what was expected, and the way out."""


class FastWeightError(ValueError):
    """Base of every error that fastweights raises about what it was given."""


class RuleError(FastWeightError):
    """A rule is not written as a rule: its signature, its body, or how rules were combined."""


class SignalError(FastWeightError):
    """A signal, a state or an option of a call does not fit the rule or its companions."""


class SignalTypeError(SignalError, TypeError):
    """A signal, a state or an option is of the wrong type or dtype."""


class FormError(FastWeightError):
    """A form or backend was asked for that the structure of the rule does not admit."""
