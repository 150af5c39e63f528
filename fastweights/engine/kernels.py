"""The compiled kernels: which library serves this processor, and its C interface by ``ctypes`` on data pointers and strides."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ABI = 7
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CHUNK = 16  # micro-steps a chunk, as in csrc/problem.h
_BUILD_HINT = "a C++17 compiler (GCC 12 or later, or Clang) at install builds them: pip install --force-reinstall --no-deps fastweights"


class CTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((n, ctypes.c_int64) for n in ("batch", "time", "head", "channel", "heads", "type"))]


class CMicro(ctypes.Structure):
    _fields_ = [
        *((n, CTensor) for n in ("x", "y", "u", "w", "cx", "cu", "g")),
        *((n, ctypes.c_double) for n in ("sx", "su")),
        *((n, ctypes.c_int64) for n in ("lag", "x_is_y", "decayed")),
    ]


class CRead(ctypes.Structure):
    _fields_ = [("q", CTensor), ("out", CTensor), ("version", ctypes.c_int64)]


class CUse(ctypes.Structure):
    _fields_ = [("place", ctypes.c_void_p), ("index", ctypes.c_int64)]


class CProblem(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("B", "T", "H", "K", "V", "n", "reads", "decay", "erase", "backward_reads")),
        ("micro", ctypes.POINTER(CMicro)),
        ("read", ctypes.POINTER(CRead)),
        ("first", CTensor),
        ("last", CTensor),
        ("reset", ctypes.c_void_p),
        *((n, ctypes.c_int64) for n in ("reset_batch", "reset_time")),
        ("values", ctypes.c_void_p),
        ("checkpoints", ctypes.c_void_p),
        *((n, ctypes.c_int64) for n in ("segment", "uses")),
        ("use", ctypes.POINTER(CUse)),
        ("threads", ctypes.c_int64),
        ("positive", ctypes.c_void_p),
    ]


class CGradient(ctypes.Structure):
    _fields_ = [
        ("micro", ctypes.POINTER(CMicro)),
        ("read", ctypes.POINTER(CRead)),
        ("first", CTensor),
        ("last", CTensor),
        ("groups", ctypes.c_int64),
    ]


NOTHING = CTensor(None, 0, 0, 0, 0, 1, 0)


def tensor(x: Tensor | None) -> CTensor:
    """A signal (B, T, h) or (B, T, h, D)."""
    if x is None:
        return NOTHING
    s = x.stride()
    return CTensor(x.data_ptr(), s[0], s[1], s[2], s[3] if len(s) > 3 else 0, x.shape[2], TYPES[x.dtype])


def rows(x: Tensor | None) -> CTensor:
    """Rows (B, T, C)."""
    if x is None or not x.shape[1]:
        return NOTHING
    s = x.stride()
    return CTensor(x.data_ptr(), s[0], s[1], 0, s[2], 1, TYPES[x.dtype])


def state(x: Tensor | None) -> CTensor:
    """A state (B, H, V, K)."""
    if x is None:
        return NOTHING
    s = x.stride()
    return CTensor(x.data_ptr(), s[0], s[2], s[1], s[3], x.shape[1], 0)


class Library(NamedTuple):
    """The loaded kernels and the instruction set they are compiled for; ``lib`` is None if there are none, and ``why`` says why."""

    lib: ctypes.CDLL | None
    isa: str
    why: str


def isas() -> list[str]:
    """The instruction sets of this processor that kernels are compiled for, the best first."""
    machine = platform.machine().lower()
    if machine in ("arm64", "aarch64"):
        return ["aarch64"]
    if machine not in ("x86_64", "amd64"):
        return []
    capability = torch.backends.cpu.get_cpu_capability()
    known = ["x86-64-v4", "x86-64-v3"] if capability == "AVX512" else ["x86-64-v3"] if capability == "AVX2" else []
    bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return (["x86-64-v4-bf16"] if known[:1] == ["x86-64-v4"] and bfloat16() else []) + known


def _folders() -> list[Path]:
    if chosen := os.environ.get("FASTWEIGHTS_KERNELS"):
        return [Path(chosen)]
    import fastweights.engine as engine

    # an editable install keeps what it compiled beside the other packages, not beside the sources
    return [Path(p) for p in engine.__path__] + [Path(p, "fastweights", "engine") for p in sys.path]


@functools.cache
def library() -> Library:
    """The kernels for this machine.

    For tests, ``FASTWEIGHTS_ISA`` names another instruction set (or ``none``), ``FASTWEIGHTS_KERNELS`` a folder to take them from.
    """
    wanted = os.environ.get("FASTWEIGHTS_ISA", "")
    if wanted == "none":
        return Library(None, "", "FASTWEIGHTS_ISA is none")
    candidates = [wanted] if wanted else isas()
    if not candidates:
        return Library(None, "", f"there are no kernels for this processor ({platform.machine()}, which needs AVX2 or NEON)")
    refused = None
    for path in (folder / f"_kernels_{isa}.so" for isa in candidates for folder in _folders()):
        if path.exists():
            found = _open(path, path.stem.removeprefix("_kernels_"))
            if found.lib is not None:
                return found
            refused = refused or found
    return refused or Library(None, "", f"no compiled kernels for {' or '.join(candidates)} were found; {_BUILD_HINT}")


def _open(path: Path, isa: str) -> Library:
    lib = ctypes.CDLL(str(path))
    if lib.fastweights_abi() != ABI:
        return Library(None, "", f"{path.name} was compiled from other sources; {_BUILD_HINT}")
    lib.fastweights_use_threads.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    lib.fastweights_use_threads(*_openmp_entries())
    # a forked child has none of its parent's threads, and the OpenMP runtime would wait for them
    os.register_at_fork(after_in_child=lambda: lib.fastweights_use_threads(None, None))
    return Library(lib, isa, "")


def _openmp_entries() -> tuple[int | None, int | None]:
    """The addresses of GOMP_parallel and omp_get_thread_num in the OpenMP runtime that torch has loaded."""
    folder = Path(torch.__file__).parent / "lib"
    bundled = [p for pattern in ("libgomp*", "libomp*", "libiomp*") for p in sorted(folder.glob(pattern))]
    bundled += sorted(folder.parent.parent.glob("torch.libs/lib*omp*"))
    for path in [None, *map(str, bundled)]:
        runtime = ctypes.CDLL(path)
        if hasattr(runtime, "GOMP_parallel"):
            found = (ctypes.cast(getattr(runtime, n), ctypes.c_void_p).value for n in ("GOMP_parallel", "omp_get_thread_num"))
            return next(found), next(found)
    return None, None


def opened() -> ctypes.CDLL:
    """The kernels, where a call has found out that there are some."""
    lib = library().lib
    assert lib is not None
    return lib


def array(kind: type[ctypes.Structure], items: Sequence[ctypes.Structure]) -> ctypes.Array:
    return (kind * max(len(items), 1))(*items)


def at(structure: ctypes.Structure, field: str) -> int:
    """The address of a field, or of the data that it begins with."""
    return ctypes.addressof(structure) + getattr(type(structure), field).offset
