"""flash-linear-attention's own kernels, behind the fla backend and beside ``compat.fla``.

``make test-fla`` has Triton's interpreter run them, which takes no GPU. What it does not do is what a GPU would: choose block sizes by
time, and run in bfloat16.
"""

import importlib
import inspect
import os
import sys
from typing import Any

import pytest
import torch
from rows import R, name, state_for
from torch import Tensor
from torch.nn import functional as F

import fastweights as fw
from fastweights.compat import fla as compat
from fastweights.engine import fla
from fastweights.engine.check import example

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels need a GPU, or make test-fla", allow_module_level=True)
pytest.importorskip("triton")
language = importlib.import_module("triton.language")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of numbers that a mask takes out

B, T, H, K, V = 2, 70, 2, 16, 32  # 64 tokens are a chunk there
MODULES = ["comba", "gated_delta_product", "gdn2", "lightning_attn", "retention", "rwkv6", "rwkv7", "utils"]


def loop(*bounds: Any):
    """``range`` in a kernel: its numbers are tensors, for the compiler and so for what is written in a kernel."""
    tensors = [b for b in bounds if isinstance(b, language.tensor)]
    numbers = range(*(int(b) for b in bounds))
    return (tensors[0] * 0 + i for i in numbers) if tensors else numbers


@pytest.fixture(scope="module", autouse=True)
def interpreted():
    tuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    start = tuner.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner, "__init__", lambda self, f, names, sizes, *a, **named: start(self, f, names, sizes[:1], *a, **named))
        for module in (*MODULES, *(m for m, _ in (*fla._KERNELS.values(), fla._GENERAL))):
            importlib.import_module(f"fla.ops.{module}")
        for module in [m for n, m in sys.modules.items() if n.startswith("fla.")]:
            patch.setattr(module, "range", loop, raising=False)
            if getattr(module, "gather", None) is language.gather:
                patch.setattr(module, "gather", lambda *a, **named: language.gather(*a, **named))
        patch.setattr(fla, "unavailable", lambda device: "")
        yield


# ---- backend="fla" ---------------------------------------------------------------------------------------------------


def draw(rule, per_key):
    signals = {n: x.float() for n, x in example(rule, B, T, H, K, V).items()}
    if per_key:
        signals["g"] = -torch.rand(B, T, H, K, generator=torch.Generator().manual_seed(0))
    state = tuple(s.float() for s in state_for(rule, B, H, K, V))
    return signals, state if len(state) > 1 else state[0]


def run(rule, signals, state, reset, backend):
    """What is read, the final state, and the gradients of all signals."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in signals.items()}
    y, last = fw.scan(rule, **leaves, state=state, reset=reset, backend=backend)
    return with_gradients((y, last), list(leaves.values()))


def with_gradients(found, leaves):
    tensors = [x for x in flat(found) if x is not None]
    loss = tensors[0].float().sin().sum() + sum(s.cos().sum() for s in tensors[1:])
    return [*tensors, *torch.autograd.grad(loss, leaves)]


def flat(x):
    return [y for part in x for y in flat(part)] if isinstance(x, tuple) else [x]


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(
    ("rule", "per_key", "function"),
    [
        (R.hebb, False, "chunk_linear_attn"),
        (R.decayed_hebb, False, "chunk_simple_gla"),
        (R.exp_gated_hebb, False, "chunk_simple_gla"),
        (R.decayed_hebb, True, "chunk_gla"),
        (R.gated_delta, False, "chunk_gated_delta_rule"),
        (R.gated_delta * 3, False, "chunk_gated_delta_rule"),
        (R.gated_delta, True, "chunk_kda"),
        (R.generalised_delta, False, "chunk_dplr_delta_rule"),
        (R.generalised_delta, True, "chunk_dplr_delta_rule"),
        (R.hebb >> R.delta, False, "chunk_dplr_delta_rule"),
    ],
    ids=lambda x: x if isinstance(x, str) else name(x) if isinstance(x, fw.Rule) else None,
)
def test_a_program_on_their_kernel(rule, per_key, function, resets):
    signals, state = draw(rule, per_key)
    reset = torch.zeros(B, T, dtype=torch.bool) if resets else None
    if resets:
        reset[0, [0, 3, 40]] = reset[1, 66] = True
    assert function in fw.plan(rule, **signals, backend="fla").why
    for ours, theirs in zip(*(run(rule, signals, state, reset, b) for b in ("torch", "fla")), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [R.delta, R.delta * 2], ids=name)
def test_a_kernel_of_sixteen_bits(rule):
    signals, state = draw(rule, False)
    signals = {n: x.half() for n, x in signals.items()}
    assert "chunk_delta_rule" in fw.plan(rule, **signals, backend="fla").why
    for ours, theirs in zip(*(run(rule, signals, state, None, b) for b in ("torch", "fla")), strict=True):
        assert (ours - theirs).float().norm() < 0.01 * ours.float().norm()


# ---- compat.fla ------------------------------------------------------------------------------------------------------

FUNCTIONS = sorted(n for n in dir(compat) if n.startswith(("chunk_", "fused_")))
A_KEY = ("kda", "gdn2", "chunk_gla", "fused_chunk_gla")  # whose g has a number a key
SIXTEEN_BITS = ("chunk_delta_rule", "fused_recurrent_delta_rule", "chunk_gated_delta_product")
GONE = ("fused_chunk_delta_rule", "fused_chunk_gla")  # names that theirs has and refuses


def original(function):
    found = [getattr(m, function) for n, m in sys.modules.items() if n.startswith("fla.ops.") and hasattr(m, function)]
    return found[0]


def arguments(function, names):
    """A tensor for each of the arguments that make the rule."""
    generator, n = torch.Generator().manual_seed(0), 2 if "product" in function else 1

    def normal(*shape):
        return torch.randn(1, *shape, generator=generator)

    log = -F.softplus(normal(T, H, K))
    a = -F.normalize(normal(T, H, K), dim=-1)
    given = {
        "q": normal(T, H, K), "r": normal(T, H, K), "k": F.normalize(normal(T * n, H, K), dim=-1), "v": normal(T * n, H, V),
        "beta": normal(T * n, H).sigmoid(), "gk": log, "g": log if function.endswith(A_KEY) else log[..., 0], "p": 0.3 * normal(T, H, K),
        "a": a, "b": -a * normal(T, H, K).sigmoid(), "w": log, "u": normal(T, H, K)[0, 0],
        "layer_idx": 3, "num_layers": 4, "num_householder": n,  # of layers that decay faster theirs ends in NaN where a chunk is not full
    }  # fmt: skip
    if "linear_attn" in function:
        given |= {"q": F.normalize(given["q"], dim=-1).abs(), "k": given["k"].abs()}
    if "gdn2" in function:
        given |= {"b": normal(T, H, K).sigmoid(), "w": normal(T, H, V).sigmoid()}
    if "g" in names:
        del given["gk"]
    if function in SIXTEEN_BITS:
        given = {n: x.half() if isinstance(x, Tensor) else x for n, x in given.items()}
    return {n: x for n, x in given.items() if n in names}


def options(function, names, given):
    """What else may be asked for: a name, and the arguments."""
    state = torch.randn(3, H, K, V, generator=torch.Generator().manual_seed(1))
    one = {"initial_state": state[:1], "output_final_state": True}
    normalised = {"normalize": False} if "normalize" in names else {}
    yield "alone", normalised
    yield "scale", {"scale": 0.7, **normalised}
    yield "state", one | normalised
    if "cu_seqlens" in names:
        packed = {"initial_state": state, "output_final_state": True, "cu_seqlens": torch.tensor([0, 3, 40, T])}
        yield "packed", packed | normalised
    if "normalize" in names:
        yield "normalised", {"normalize": True, "output_final_state": True}
    if "use_qk_l2norm_in_kernel" in names:
        yield "l2norm", {"use_qk_l2norm_in_kernel": True}
    if "reverse" in names:
        yield "reverse", {"reverse": True, **one, **normalised}
    if "state_v_first" in names:
        yield "values first", {**one, "initial_state": state[:1].mT.contiguous(), "state_v_first": True}
    if "gk" in names and "g" in names:
        yield "two decays", {"gk": -torch.rand(1, T, H, K, generator=torch.Generator().manual_seed(2))}
    if "g_gamma" in names:
        yield "fixed decays", {"g": None, "g_gamma": torch.tensor([-0.1, -0.5])}
    if "use_beta_sigmoid_in_kernel" in names:
        yield "sigmoid", {"use_beta_sigmoid_in_kernel": True, "beta": torch.logit(given["beta"])}
        yield "negative", {"use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True, "beta": torch.logit(given["beta"])}
    if "use_gate_in_kernel" in names:
        bias = torch.linspace(-1, 1, H * K if given["g"].ndim == 4 else H)
        yield "gate", {"use_gate_in_kernel": True, "g": given["g"] + 1, "A_log": torch.tensor([-1.0, 0.5]), "dt_bias": bias}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_by_their_kernel(function):
    theirs, ours = original(function), getattr(compat, function)
    signature = inspect.signature(theirs).parameters
    given = arguments(function, signature)
    if function in GONE:
        with pytest.raises(NotImplementedError):
            theirs(**given)
        return
    tolerance = 2e-3 if function in SIXTEEN_BITS else 2e-5
    for what, more in options(function, signature, given):
        found = []
        for f in (theirs, ours):
            named = {
                n: x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
                for n, x in (given | more).items()
            }
            wanted = {*given, "initial_state"} if function.startswith("chunk") else set()
            leaves = [x for n, x in named.items() if isinstance(x, Tensor) and n in wanted]
            result = f(**named)
            found.append(with_gradients(result, leaves) if leaves else [x for x in flat(result) if x is not None])
        for i, (a, b) in enumerate(zip(*found, strict=True)):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), (what, i)
            assert (a - b).float().norm() <= tolerance * (a.float().norm() + 1), (what, i)
