"""What an installation can do, and what it lacks."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from .engine import fla
from .engine.kernels import library
from .engine.scan import BACKENDS

_NEEDED = ("torch", "numpy", "safetensors", "tyro", "rich", "matplotlib")


def findings() -> list[tuple[str, str, bool | None]]:
    """What, what was found, and whether that is good (None: for information)."""
    rows: list[tuple[str, str, bool | None]] = [
        ("fastweights", _version("fastweights") or "not installed: run from a source tree", None),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}", None),
    ]
    rows += [(name, found or f"missing: pip install {name}", found is not None) for name in _NEEDED for found in [_version(name)]]
    rows.append(
        (
            "processor",
            f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
            None,
        )
    )
    cuda = torch.cuda.is_available()
    rows.append(("gpu", torch.cuda.get_device_name() if cuda else "none that torch can use; everything runs on the processor", None))
    rows.append(("backends", ", ".join(BACKENDS), True))
    kernels = library()
    rows.append(("cpu kernels", kernels.why or f"compiled for {kernels.isa}, forward and backward", not kernels.why))
    why = fla.unavailable(torch.device("cuda" if cuda else "cpu"))
    rows.append(("fla kernels", why or "flash-linear-attention is installed: backend='fla' runs on it", None))
    rows.append(("forms", "recurrent, parallel and chunk, in torch, on any device", True))
    return rows


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
