"""The fla backend: on a GPU, a program runs on the kernel that flash-linear-attention has for its class, where that is installed.

Its state is W^T, (K, V); a micro-step is a token of its own there. With S = W^T its kernels compute, all with y = S^T q afterwards,

    linear_attn, simple_gla, gla         S <- diag(exp(g)) S + k v^T                                 erase none: k = w, v = u
    delta_rule, gated_delta_rule, kda    S <- exp(g) S, then S <- S + beta k (v - S^T k)^T           erase tied, of this very form
    dplr_delta_rule                      S <- (diag(exp(g)) + b a^T) S + k v^T                       everything else: a = x, b = y
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..language.expr import Expr
from ..language.program import Program
from .cpu import Operand, flat, split
from .inputs import Inputs
from .lowered import Prepared
from .watched import may_look, traced

# by decay and erase: the module of fla.ops and the function
_KERNELS = {
    ("none", "none"): ("linear_attn", "chunk_linear_attn"),
    ("scalar", "none"): ("simple_gla", "chunk_simple_gla"),
    ("key", "none"): ("gla", "chunk_gla"),
    ("none", "tied"): ("delta_rule", "chunk_delta_rule"),
    ("scalar", "tied"): ("gated_delta_rule", "chunk_gated_delta_rule"),
    ("key", "tied"): ("kda", "chunk_kda"),
}
_GENERAL = ("generalized_delta_rule", "chunk_dplr_delta_rule")
_SIXTEEN_BITS = ("chunk_delta_rule",)  # kernels that refuse float32
_MOST_KEYS = 256  # of the kernels that erase
_STRONGEST = -50.0  # log decay: they add up 64 of them before they take an exponential, in float32, where -inf - -inf is NaN
Part = tuple[Expr | None, float]  # what is handed over, times a number; None is zero


@dataclass(frozen=True, eq=False)
class Arguments:
    """Which kernel, and what of every micro-step its arguments are."""

    module: str
    function: str
    parts: Mapping[str, tuple[Part, ...]]


@functools.lru_cache(maxsize=256)
def arguments(program: Program) -> Arguments | str:
    """The kernel of a program and its arguments, or why there is none."""
    steps, reads = program.steps, program.reads
    if any(step.factor is not None for step in steps):
        return "a decay is not written as an exponential"
    if any(step.lag for step in steps):
        return "a micro-step reads W as it was some micro-steps before"
    if len(reads) != 1 or reads[0].backward or reads[0].version != program.n:
        return "fla reads once a token, W q, when the token is written"
    if all(step.u is None for step in steps):
        return "nothing is written"
    with _disable_current_modes():
        return _simple(program) or _general(program)


def _simple(program: Program) -> Arguments | None:
    """The kernel of the program's own class, if each of its micro-steps is of the form that it has."""
    if program.erase == "free":
        return None
    parts: dict[str, list[Part]] = {name: [] for name in ("k", "v", "g", "beta")}
    for step in program.steps:
        key = step.y if step.y is not None else step.w
        if program.erase == "tied":
            x, u = split(step.x, step), split(step.u, step, may_decay=False)
            if x is None or u is None or not _corrects(x, u, key, step.log_decay is not None):
                return None
            parts["beta"].append((u.number, u.scale))
            parts["v"].append((u.vector, 1.0))
        else:
            parts["v"].append((step.u, 1.0))
        parts["k"].append((key, 1.0))
        parts["g"].append((step.log_decay, 1.0))
    unused = {"g"} if program.decay == "none" else set()
    unused |= {"beta"} if program.erase == "none" else set()
    return Arguments(*_KERNELS[program.decay, program.erase], {n: tuple(p) for n, p in parts.items() if n not in unused})


def _corrects(x: Operand, u: Operand, key: Expr | None, decays: bool) -> bool:
    """Whether what is written is number * (u - decayed W key)."""
    return x.vector is key and x.decayed == decays and x.number is u.number and x.scale == -u.scale and u.number is not None


def _general(program: Program) -> Arguments:
    parts: dict[str, list[Part]] = {name: [] for name in ("a", "b", "k", "v", "gk")}
    for step in program.steps:
        for name, e in (("a", step.x), ("b", step.y), ("k", step.w), ("v", step.u), ("gk", step.log_decay)):
            parts[name].append((e, 1.0))
    return Arguments(*_GENERAL, {n: tuple(p) for n, p in parts.items()})


def refusal(program: Program, given: Inputs) -> str:
    """Why fla does not run a call; nothing if it does."""
    found = arguments(program)
    if isinstance(found, str):
        return found
    if not may_look(given.states[0]) or traced((*given.signals.values(), *given.states)):
        return "fla's kernels run outside of torch.compile and of the transforms of torch.func"
    K, V = (given.V, given.K) if program.transposed else (given.K, given.V)
    if program.erase != "none" and K > _MOST_KEYS:
        return f"fla's {found.function} takes keys of up to {_MOST_KEYS} numbers, and these have {K}"
    if program.erase == "none" and given.out.itemsize == 2 and (K % 2 or V % 2):
        return f"fla's {found.function} takes even K and V in 16 bits, and these are {K} and {V}"
    if given.out == torch.float64 or (given.out == torch.float32 and found.function in _SIXTEEN_BITS):
        return f"fla's {found.function} does not take {given.out}; use bfloat16"
    return unavailable(given.device)


def unavailable(device: torch.device) -> str:
    """Why fla runs nothing on a device; nothing if it does."""
    if device.type != "cuda":
        return f"fla needs a GPU, and the signals are on {device}"
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed (pip install flash-linear-attention)"
    return ""


def kernel(found: Arguments) -> Callable[..., tuple[Tensor, Tensor]]:
    return getattr(importlib.import_module(f"fla.ops.{found.module}"), found.function)


def blocks(prepared: Prepared, weights: Tensor) -> tuple[list[Tensor], Tensor]:
    """What the reader reads, (B, T, *heads, V), and the final W, for the signals of a call."""
    given, heads, program = prepared.given, prepared.heads, prepared.program
    found = arguments(program)
    assert isinstance(found, Arguments)
    first, n = weights.flatten(1, len(heads)).mT.float(), program.n
    rooms = {"v": (first.shape[3],), "g": (first.shape[2],) if program.decay == "key" else (), "beta": ()}
    like = torch.empty((), dtype=given.out, device=given.device)
    named: dict[str, Any] = {}
    for name, parts in found.parts.items():
        each = [_whole(part, prepared, rooms.get(name, (first.shape[2],))) for part in parts]
        dtype = torch.float32 if name in ("g", "gk", "beta") else like.dtype
        x = torch.stack(each, 2).flatten(1, 2).to(dtype)
        named[name] = x.clamp(min=_STRONGEST) if name in ("g", "gk") else x
    q = _whole((program.reads[0].q, 1.0), prepared, (first.shape[2],)).to(like.dtype)
    named["q"] = q.repeat_interleave(n, 1)
    if found.function == "chunk_linear_attn":
        named["normalize"] = False
    y, last = _call(kernel(found), named, first, given.reset, n)
    return [y[:, n - 1 :: n].unflatten(2, heads)], last.mT.unflatten(1, heads)


def _whole(part: Part, prepared: Prepared, room: tuple[int, ...]) -> Tensor:
    """A part for every head, (B, T, H, *room)."""
    (e, scale), given = part, prepared.given
    if e is None:
        x = torch.zeros((), device=given.device)
    elif e in prepared.raw:
        x = prepared.raw[e]
        x = x.repeat_interleave(given.H // x.shape[2], 2)
    else:
        prepared.evaluate([e])
        x = flat(prepared.values[e], e, given, prepared.heads)
    if room and x.ndim == 3:  # a decay a head, among those a key
        x = x.unsqueeze(-1)
    x = x if scale == 1 else scale * x
    return x.expand(given.B, given.T, given.H, *room)


def _call(
    run: Callable[..., tuple[Tensor, Tensor]], named: dict[str, Any], first: Tensor, reset: Tensor | None, n: int
) -> tuple[Tensor, Tensor]:
    """The kernel from the states ``first`` (B, H, K, V); with resets on one row of sequences that begin where W is zero."""
    if reset is None:
        return run(**named, scale=1.0, initial_state=first.contiguous(), output_final_state=True)
    B, T = reset.shape
    starts = reset.clone()
    starts[:, 0] = True
    begin = starts.flatten().nonzero().flatten()
    ends = torch.cat([begin[1:], begin.new_tensor([B * T])])
    fresh = reset.flatten()[begin].view(-1, 1, 1, 1)
    states = torch.where(fresh, torch.zeros_like(first[:1]), first[begin // T])
    row = {m: x.flatten(0, 1).unsqueeze(0) if isinstance(x, Tensor) else x for m, x in named.items()}
    bounds = n * torch.cat([begin[:1], ends])
    y, last = run(**row, scale=1.0, initial_state=states.contiguous(), output_final_state=True, cu_seqlens=bounds)
    return y.squeeze(0).unflatten(0, (B, n * T)), last[ends % T == 0]
