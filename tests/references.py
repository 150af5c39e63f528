"""Files of flash-linear-attention by their path: the package does not import without a GPU."""

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest


def operators():
    """The folder of its operators; None where fla-core is not installed."""
    try:
        return Path(str(importlib.metadata.distribution("fla-core").locate_file("fla/ops")))
    except importlib.metadata.PackageNotFoundError:
        return None


def reference(path, name):
    """A token-by-token function in plain torch."""
    root = operators()
    if root is None:
        pytest.skip("fla-core is not installed")
    spec = importlib.util.spec_from_file_location(f"reference_{path.replace('/', '_')}", root / path / "naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
