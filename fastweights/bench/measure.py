"""How things are timed: interleaved, so that a busy minute is shared by all, with the peak of the processor sampled beside them."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..engine.kernels import library
from ..language.errors import FastWeightError


def multiply_adds() -> tuple[Callable[[], object], int]:
    """A call that multiplies and adds on registers alone, in all threads that torch uses; and how many operations that is."""
    lib = library().lib
    if lib is None:
        raise FastWeightError(f"there are no kernels to measure: {library().why}")
    threads, rounds = torch.get_num_threads(), 400_000  # one or two milliseconds
    given = ctypes.c_int64(rounds), ctypes.c_int64(threads)
    run = lib.fastweights_multiply_add
    run.restype = ctypes.c_int64
    return lambda: run(*given), run(*given)


def interleaved(runs: Mapping[str, Callable[[], object]], seconds: float, least: int = 3) -> dict[str, float]:
    """The median time of each, in turn until ``seconds`` for each have gone by and each has been timed ``least`` times."""
    return {name: statistics.median(t) for name, t in in_turn(runs, seconds, least).items()}


def in_turn(runs: Mapping[str, Callable[[], object]], seconds: float, least: int = 3) -> dict[str, list[float]]:
    """All times of that, in order.

    Each runs twice in a row and the second run is timed: in a model, too, its inputs have just been made.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < end or min(map(len, times.values())) < least:
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def call(function: Callable[..., Tensor], given: Mapping[str, Tensor], backward: bool) -> Callable[[], object]:
    """The function of tensors, without a gradient or with those of all of them."""
    leaves = {n: x.detach().clone().requires_grad_(backward) for n, x in given.items()}

    def run() -> object:
        if not backward:
            with torch.no_grad():
                return function(**leaves)
        for x in leaves.values():
            x.grad = None
        return function(**leaves).sum().backward()

    return run


_MEMORY = """
import re, sys, torch
from fastweights.bench.scans import CLASSES, SHAPES, scanned, signals
from fastweights.bench.measure import call
name, shape, backend = sys.argv[1:]
rule, per_channel = CLASSES[name]
small = (1, 1, 64, SHAPES[shape][3])
call(scanned(rule, backend), signals(rule, small, per_channel), True)()
run = call(scanned(rule, backend), signals(rule, SHAPES[shape], per_channel), True)
def kilobytes(of):
    return int(re.search(of + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = kilobytes("VmRSS")
run()
print(kilobytes("VmHWM") - before)
"""


def memory(name: str, shape: str, backend: str) -> float | None:
    """Bytes that a forward and backward pass adds to its inputs, in a process of its own; None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    words = [sys.executable, "-c", _MEMORY, name, shape, backend]
    return 1024.0 * int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
