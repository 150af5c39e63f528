"""The tasks by name, and one made from a line of text such as ``mqar:pairs=4,vocabulary=64``."""

from __future__ import annotations

import difflib
import typing
from dataclasses import fields
from typing import Any

from ..language.errors import FastWeightError
from .arithmetic import Modular
from .code import Code
from .continual import Continual
from .copying import Copying
from .environments import Bandit, TMaze
from .fewshot import FewShot
from .groups import Words
from .languages import Language
from .listops import ListOps
from .parity import Parity
from .recall import MQAR, Recall
from .regression import InContextRegression
from .retrieval import Overwrite, Retrieval
from .source import Task, show
from .timeseries import TimeSeries

_ALL = (
    Recall, MQAR, Copying, Parity, Modular, Words, Language, ListOps, Code, Retrieval, Overwrite, InContextRegression, FewShot, Continual,
    TimeSeries, TMaze, Bandit,
)  # fmt: skip
TASKS: dict[str, type[Task]] = {t.name: t for t in _ALL}


def task(text: str) -> Task:
    """The task ``NAME``, or ``NAME:option=value,option=value`` with other options than its own.

    Numbers are written as they are, true and false so, a range of lengths as 3-40 or, for one length, 40.

    >>> task("parity:lengths=5,every=false")
    Parity(lengths=(5, 5), longer=(41, 256), every=False, start=True)
    """
    name, _, rest = text.partition(":")
    found = TASKS.get(name.strip())
    if found is None:
        near = difflib.get_close_matches(name, TASKS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FastWeightError(f"there is no task {name!r}{hint} There are {', '.join(TASKS)}")
    types = typing.get_type_hints(found)
    names = [f.name for f in fields(found)]
    options: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        option, equals, value = part.partition("=")
        if option not in names or not equals:
            what = f"has no option {option!r}" if equals else f"takes options as option=value, not {part!r}"
            raise FastWeightError(f"task {name} {what}; its options are {describe(found)}")
        options[option] = _read(name, option, value, types[option])
    return found(**options)


def describe(found: type[Task]) -> str:
    """The options of a task and their values by default.

    >>> describe(TASKS["mqar"])
    'pairs=4, vocabulary=8192, tokens=64, power=0.01, filler=true'
    """
    return ", ".join(f"{f.name}={show(f.default)}" for f in fields(found)) or "none"


def _read(name: str, option: str, text: str, wanted: Any) -> Any:
    try:
        if wanted is bool:
            return {"true": True, "false": False}[text]
        if wanted is int or wanted is float or wanted is str:
            return wanted(text)
        ends = [int(end) for end in text.split("-")]
        return (ends[0], ends[-1]) if len(ends) < 3 else (0, 0)  # which the task refuses
    except (KeyError, ValueError) as error:
        known = {bool: "true or false", int: "a whole number", float: "a number"}.get(wanted, "a range such as 3-40")
        raise FastWeightError(f"{option} of task {name} is {text!r}, expected {known}") from error
