"""``fastweights bench``: what the rules cost on this machine, beside what else runs here."""

from .report import run

__all__ = ["run"]
