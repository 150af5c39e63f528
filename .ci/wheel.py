"""In an environment that has only the wheel: the kernels are found and right for every instruction set here, without a compiler."""

import os
import subprocess
import sys

from fastweights.engine.kernels import isas, library

PROGRAM = """
import torch, fastweights as fw
from fastweights.engine.check import example
from fastweights.engine.kernels import library
signals = example(fw.rules.gated_delta, 1, 50, 2, 16, 16, dtype=torch.float32)
found, want = (fw.scan(fw.rules.gated_delta, **signals, backend=b).y for b in ("cpu", "torch"))
assert (found - want).norm() < 1e-5 * want.norm()
print("the wheel's kernels work:", library().isa, fw.__file__)
"""

assert library().lib is not None, library().why
for isa in isas():
    subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, env={"FASTWEIGHTS_ISA": isa, "PATH": "", "HOME": os.environ.get("HOME", "/")}
    )
