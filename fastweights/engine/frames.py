"""The C structures of a call of the kernels, forward and backward, in which only addresses change from call to call."""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..language.errors import SignalError
from .kernels import NOTHING, CGradient, CMicro, CProblem, CRead, CUse, array, at, opened, state, tensor
from .memory import empty, empty_as

SLOTS = ("x", "y", "u", "w", "cx", "cu", "g")
MOST_TOGETHER = 4  # heads that share a tensor and are done in turn in the backward pass
SEGMENT = 64  # tokens between checkpoints of the state


def positive_decay(where: str) -> SignalError:
    """What the kernels find while they read; checked calls find it before."""
    return SignalError(f"{where}: a log decay is positive, expected <= 0; a decay a in (0, 1] is given as g = a.log()")


class Spec:
    """What the numbers of a ``spec`` say: a program as the kernels take it (cpu.py)."""

    def __init__(self, spec: Sequence[int]) -> None:
        self.decay, self.erase, self.backward, self.n, self.reads = spec[:5]
        width = len(SLOTS) + 3
        self.micro = [spec[5 + i * width : 5 + (i + 1) * width] for i in range(self.n)]
        rest = spec[5 + self.n * width :]
        self.queries = list(zip(rest[::2], rest[1::2], strict=True))

    def tokens(self) -> int:
        """How many tokens the kernels take together in the forward pass."""
        p = CProblem(n=self.n, reads=self.reads, decay=self.decay, erase=self.erase, backward_reads=self.backward)
        p.micro = array(CMicro, [CMicro(lag=m[len(SLOTS)]) for m in self.micro])
        p.read = array(CRead, [CRead(version=version) for _, version in self.queries])
        return opened().fastweights_tokens(ctypes.byref(p))


class Sizes(Spec):
    """The same with the sizes of a call."""

    def __init__(self, tensors: Sequence[Tensor], first: Tensor, spec: Sequence[int]) -> None:
        super().__init__(spec)
        self.B, self.T = tensors[self.queries[0][0]].shape[:2]
        self.H, self.V, self.K = first.shape[1:]
        self.width = self.K if self.backward else self.V

    def saved(self, save: bool = True) -> tuple[tuple[int, int], tuple[int, int]]:
        """Room for what the backward pass needs: the values that an erase wrote, and the state at the start of every segment."""
        row, size = _padded(self.K, self.V)
        rows = self.B * self.H * self.T * self.n if save and self.erase else 0
        return (rows, row), (self.B * self.H * -(-self.T // SEGMENT) if save else 0, size)


class Frame(Sizes):
    """The C structures of a call, in which only addresses change from one call of the same shapes, strides and types to the next."""

    def __init__(
        self, tensors: Sequence[Tensor], first: Tensor, reset: Tensor | None, spec: Sequence[int], scales: Sequence[float]
    ) -> None:
        super().__init__(tensors, first, spec)
        of = [tensor(t) for t in tensors]
        micro = [
            CMicro(*(NOTHING if i < 0 else of[i] for i in m[:7]), scales[2 * j], scales[2 * j + 1], *m[7:])
            for j, m in enumerate(self.micro)
        ]
        reads = [CRead(of[i], NOTHING, version) for i, version in self.queries]
        self.problem = p = CProblem(self.B, self.T, self.H, self.K, self.V, self.n, self.reads, self.decay, self.erase, self.backward)
        self.c_micro, self.c_read = p.micro, p.read = array(CMicro, micro), array(CRead, reads)
        p.first, p.segment = state(first), SEGMENT
        if reset is not None:
            p.reset_batch, p.reset_time = reset.stride()
        self.tensor_places = self.places(self.c_micro, self.c_read, len(tensors))
        self.reference = ctypes.byref(p)

    def places(self, micro: ctypes.Array[CMicro], reads: ctypes.Array[CRead], count: int) -> list[list[int]]:
        """Where the address of each tensor, or of its gradient, stands in the structures."""
        places: list[list[int]] = [[] for _ in range(count)]
        for j, m in enumerate(self.micro):
            for slot, i in zip(SLOTS, m, strict=False):
                if i >= 0:
                    places[i].append(at(micro[j], slot))
        for j, (i, _) in enumerate(self.queries):
            places[i].append(at(reads[j], "q"))
        return places

    def bind(self, *places: list[int]) -> None:
        """The addresses of a call, in order, each with the places where it belongs."""
        uses = [CUse(place, i) for i, several in enumerate(places) for place in several]
        self.uses, self.addresses = array(CUse, uses), struct.Struct(f"{len(places)}P").pack
        self.problem.uses, self.problem.use = len(uses), self.uses


class Forward(Frame):
    """The forward pass: what is read, the last state, and what the backward pass needs, if it is to be saved."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        first: Tensor,
        reset: Tensor | None,
        spec: Sequence[int],
        scales: Sequence[float],
        dtype: torch.dtype,
        save: bool,
        where: str = "scan",
    ) -> None:
        super().__init__(tensors, first, reset, spec, scales)
        self.spec, self.scales, self.save, self.where = spec, scales, save, where
        self.like = _like((self.B, self.T, self.H, self.width), dtype)  # what is read
        for j in range(self.reads):
            self.c_read[j].out = tensor(torch.empty_like(self.like))
        self.state_like = _like(first.shape)
        self.saved_sizes = self.saved() if save else ()
        p = self.problem
        p.last = state(torch.empty_like(first))
        outs = [[at(self.c_read[j], "out")] for j in range(self.reads)]
        fields = ("first", "reset", "last", *(("values", "checkpoints") if save else ()))
        self.bind(*self.tensor_places, *outs, *([at(p, field)] for field in fields))
        self.run = opened().fastweights_forward
        self.spare: dict[Any, list[Backward]] = {}  # the structures of backward passes that are not under way

    def __call__(
        self, tensors: Sequence[Tensor], first: Tensor | None, reset: Tensor | None, outs: Sequence[Tensor] | None = None
    ) -> tuple[Sequence[Tensor], Tensor, list[Tensor]]:
        if outs is None:
            outs = [empty_as(self.like) for _ in range(self.reads)]
        last = torch.empty_like(self.state_like if first is None else first)
        saved = [empty(size) for size in self.saved_sizes]
        every = (*tensors, *outs, first, reset, last, *saved)
        if self.run(self.reference, self.addresses(*[0 if x is None else x.data_ptr() for x in every]), torch.get_num_threads()):
            raise positive_decay(self.where)
        return outs, last, saved

    def gradients(self, needed: tuple[bool, ...], tensors: Sequence[Tensor], reset: Tensor | None, *rest: Any) -> list[Tensor | None]:
        """The gradients; two backward passes at once have structures of their own."""
        # what hooks on saved tensors gave back may lie in memory in another way
        key = (needed, *[(t.stride(), t.dtype) for t in tensors], None if reset is None else reset.stride())
        spare = self.spare.setdefault(key, [])
        try:
            frame = spare.pop()
        except IndexError:
            frame = Backward(tensors, self.state_like, reset, self.spec, self.scales, needed)
        grads = frame(tensors, reset, *rest)
        spare.append(frame)
        return grads


class Backward(Frame):
    """The backward pass: those gradients of the tensors and of the first state that are ``needed``. Of the state only the size is asked."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        first: Tensor,
        reset: Tensor | None,
        spec: Sequence[int],
        scales: Sequence[float],
        needed: Sequence[bool],
    ) -> None:
        super().__init__(tensors, first, reset, spec, scales)
        self.problem.first = NOTHING
        block = _block(self.H, [t.shape[2] for t in tensors])
        likes = [_like_gradient(t, self.H, block) if wanted else None for t, wanted in zip(tensors, needed, strict=False)]
        to = [NOTHING if like is None else tensor(torch.empty_like(like)) for like in likes]
        micro = array(CMicro, [CMicro(*(NOTHING if i < 0 else to[i] for i in m[:7])) for m in self.micro])
        self.read = array(CRead, [CRead(to[i], NOTHING, 0) for i, _ in self.queries])
        self.gradient = g = CGradient(micro, self.read, state(torch.empty(first.shape, device="cpu")), NOTHING, self.H // block)
        every = self.places(micro, self.read, len(tensors))
        into = [self.uses(micro, places, t) if wanted else [] for t, places, wanted in zip(tensors, every, needed, strict=False)]
        fields = [at(self.problem, field) for field in ("reset", "values", "checkpoints")]
        self.bind(*self.tensor_places, *([f] for f in fields), [at(g, "first")], *(use for uses in into for use in uses))
        self.grads = [(like, len(uses)) for like, uses in zip(likes, into, strict=True)]  # a tensor that is used twice gets two
        self.sums = [
            (t.shape[2], t.dtype) if uses > 1 or (like is not None and (like.shape[2], like.dtype) != (t.shape[2], t.dtype)) else None
            for t, (like, uses) in zip(tensors, self.grads, strict=False)
        ]
        self.first_like = _like(first.shape) if needed[-1] else None
        self.run = opened().fastweights_backward

    def uses(self, micro: ctypes.Array[CMicro], places: list[int], of: Tensor) -> list[list[int]]:
        """The places of a tensor's gradient, those of one address together: a number of both x and u has one, their sum (csrc)."""
        of_x = {at(m, "cu"): at(m, "cx") for m in micro} if of.dtype == torch.float32 else {}
        joined = {place: [place] for place in places if of_x.get(place) not in places}
        for place in places:
            if place not in joined:
                joined[of_x[place]].append(place)
        return [*joined.values()]

    def __call__(
        self,
        tensors: Sequence[Tensor],
        reset: Tensor | None,
        values: Tensor,
        checkpoints: Tensor,
        grad_outs: Sequence[Tensor | None],
        grad_last: Tensor | None,
    ) -> list[Tensor | None]:
        for j, grad in enumerate(grad_outs):
            self.read[j].out = tensor(grad)
        self.gradient.last = state(grad_last)
        # hooks on saved tensors may have given back others than what was saved
        saved = [x.to(torch.float32).contiguous() for x in (values, checkpoints)]
        found = [[empty_as(like) for _ in range(uses)] if like is not None else [] for like, uses in self.grads]
        grad_first = None if self.first_like is None else empty_as(self.first_like)
        every = (*tensors, reset, *saved, grad_first, *(grad for grads in found for grad in grads))
        addresses = self.addresses(*[0 if x is None else x.data_ptr() for x in every])
        self.run(self.reference, ctypes.byref(self.gradient), addresses, torch.get_num_threads())
        return [*(_whole(grads, *of) if of else (grads or [None])[0] for grads, of in zip(found, self.sums, strict=True)), grad_first]


def _like(size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """What ``empty_as`` makes another of; it takes no memory."""
    return torch.empty((), dtype=dtype, device="cpu").expand(size)


def _like_gradient(t: Tensor, H: int, block: int) -> Tensor:
    """A gradient as the kernels write it; of heads that share a tensor, float32 sums over each block of heads."""
    heads = H // min(H // t.shape[2], block)
    return _like((*t.shape[:2], heads, *t.shape[3:]), t.dtype if t.shape[2] == H else torch.float32)


def _whole(grads: list[Tensor], heads: int, dtype: torch.dtype) -> Tensor:
    """The gradient of a tensor: the sum over its uses, and over the blocks of heads that share it."""
    grad, *others = grads
    for other in others:
        grad += other
    if grad.shape[2] != heads:
        grad = grad.unflatten(2, (heads, -1)).sum(3)
    return grad.to(dtype)


def _block(H: int, heads: list[int]) -> int:
    """Heads that are done in turn: those that share a tensor, but no more than a few, for the others are work for other threads.

    The number depends on nothing but the program's heads, so that the order of every sum does too.
    """
    shared = [H // h for h in heads]
    together = H // math.gcd(H, *heads)
    fits = [b for b in range(min(together, MOST_TOGETHER), 0, -1) if all(s % b == 0 or b % s == 0 for s in shared)]
    return next((b for b in fits if together % b == 0), together)


@functools.lru_cache(maxsize=256)
def _padded(K: int, V: int) -> tuple[int, int]:
    row, size = ctypes.c_int64(), ctypes.c_int64()
    opened().fastweights_sizes(ctypes.byref(CProblem(K=K, V=V)), ctypes.byref(row), ctypes.byref(size))
    return row.value, size.value
