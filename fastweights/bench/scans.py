"""The nine classes of rules at three shapes, beside softmax attention, the torch form and the torch functions of transformers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import rules as R
from ..engine.scan import scan
from ..engine.step import step
from ..language import decorator
from ..language.decorator import outer
from ..language.roles import Key, KeyVector, Value
from ..language.rule import Rule
from .measure import call, in_turn, interleaved, multiply_adds

SHAPES = {"A": (1, 4, 2048, 64), "B": (4, 8, 1024, 64), "C": (1, 8, 8192, 128)}  # B, H, T, and both sizes of W


@decorator.rule
def free_erase(W, k: Key, v: Value, x: KeyVector, y: KeyVector):  # type: ignore[no-untyped-def]
    return W + outer(W @ x, y) + outer(v, k)


CLASSES: dict[str, tuple[Rule, bool]] = {
    "Hebb": (R.hebb, False),
    "decay a head (Mamba-2)": (R.decayed_hebb, False),
    "decay a key (GLA)": (R.decayed_hebb, True),
    "DeltaNet": (R.delta, False),
    "Gated DeltaNet": (R.gated_delta, False),
    "KDA": (R.gated_delta, True),
    "free erase": (free_erase, False),
    "free, decay a head": (R.generalised_delta, False),
    "free, decay a key (RWKV-7)": (R.generalised_delta, True),
}
# Operations a token over K V: two for every vector that reads or writes the matrix, forward, and with a backward pass that
# rebuilds the states. A free erase writes twice a token.
WORK = {"none": (4, 14), "tied": (6, 20), "free": (8, 28)}
GOALS = {(64, False): 0.50, (128, False): 0.65, (64, True): 0.42, (128, True): 0.58}  # shares of the peak; backward: rules that erase


@dataclass
class Row:
    name: str
    shape: str
    backward: bool
    seconds: dict[str, float]
    share: float
    goal: float | None = field(default=None)

    def ratio(self, other: str) -> float | None:
        return self.seconds[other] / self.seconds["kernels"] if other in self.seconds else None


def signals(rule: Rule, shape: tuple[int, int, int, int], per_channel: bool) -> dict[str, Tensor]:
    B, H, T, D = shape
    draw = torch.Generator().manual_seed(0)
    out = {}
    for name, s in rule.signals.items():
        x = torch.randn(B, T, H, *s.shapes(D, D)[-1 if per_channel else 0], generator=draw)
        if s.role.log_decay:
            out[name] = -0.1 * F.softplus(x)
        elif s.role.name == "Rate":
            out[name] = x.sigmoid()
        else:
            out[name] = x if s.role.name == "Value" else F.normalize(x, dim=-1)
    if "x" in out and "y" in out:
        out["y"] = -0.5 * out["x"]
    return out


def scanned(rule: Rule, backend: str) -> Callable[..., Tensor]:
    return lambda **x: scan(rule, **x, backend=backend).y


def softmax(q: Tensor, k: Tensor, v: Tensor, **_: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)


def fallbacks() -> dict[str, Callable[..., Tensor]]:
    """What transformers runs on a processor without its kernels, by class; nothing without transformers."""
    try:
        from transformers.models.kimi_linear import modeling_kimi_linear as kimi  # type: ignore[import-not-found]
        from transformers.models.mamba2 import modeling_mamba2 as mamba  # type: ignore[import-not-found]
        from transformers.models.qwen3_next import modeling_qwen3_next as qwen  # type: ignore[import-not-found]
    except ImportError:
        return {}
    gated, channels, ssd = (
        getattr(f, "__wrapped__", f) for f in (qwen.torch_chunk_gated_delta_rule, kimi.chunk_kimi_delta_attention, mamba.mamba2_chunk_scan)
    )

    def mamba2(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:  # its decay is A dt, and its values are multiplied by dt
        return ssd(v / -g[..., None], -g, g.new_full(g.shape[-1:], -1.0), k, q, 64)

    return {
        "decay a head (Mamba-2)": mamba2,
        "Gated DeltaNet": lambda q, k, v, g, beta: gated(q, k, v, g, beta)[0],
        "KDA": lambda q, k, v, g, beta: channels(q, k, v, g, beta)[0],
    }


def scans(shapes: tuple[str, ...], seconds: float) -> Iterator[Row]:
    others = fallbacks()
    for shape in shapes:
        for name in CLASSES:
            for backward in (False, True):
                yield _scan(name, shape, backward, seconds, others)


def _scan(name: str, shape: str, backward: bool, seconds: float, others: dict[str, Callable[..., Tensor]]) -> Row:
    rule, per_channel = CLASSES[name]
    B, H, T, D = SHAPES[shape]
    given = signals(rule, SHAPES[shape], per_channel)
    at_peak, operations = multiply_adds()
    runs = {"peak": at_peak, "kernels": call(scanned(rule, "cpu"), given, backward)}
    if shape != "C" or not backward:  # the others take up to a minute there
        runs["torch"] = call(scanned(rule, "torch"), given, backward)
        runs["softmax"] = call(softmax, given, backward)
        if name in others:
            runs["transformers"] = call(others[name], given, backward)
    times = in_turn(runs, seconds)
    work = WORK[rule.program.erase][backward] * D * D * B * H * T  # type: ignore[union-attr]
    # the peak just before each run: what others do on the same machine takes from both
    shares = [work / kernels / (operations / peak) for peak, kernels in zip(times.pop("peak"), times["kernels"], strict=True)]
    erases = rule.program.erase != "none"  # type: ignore[union-attr]
    goal = GOALS[D, backward] if erases or not backward else None
    return Row(name, shape, backward, {n: statistics.median(t) for n, t in times.items()}, statistics.median(shares), goal)


def decode(seconds: float) -> dict[str, float]:
    """Seconds for one token of gated delta, 16 heads of 128 x 128: as a function, in place, and in transformers."""
    given = signals(R.gated_delta, (1, 16, 1, 128), False)
    one = {n: x[:, 0] for n, x in given.items()}
    W = torch.zeros(1, 16, 128, 128)
    runs: dict[str, Callable[[], object]] = {
        "step": lambda: step(R.gated_delta, W, **one),
        "step in place": lambda: step(R.gated_delta, W, out=W, **one),
    }
    try:
        from transformers.models.qwen3_next import modeling_qwen3_next as qwen  # type: ignore[import-not-found]
    except ImportError:
        pass
    else:
        theirs = getattr(qwen.torch_recurrent_gated_delta_rule, "__wrapped__", qwen.torch_recurrent_gated_delta_rule)
        S, x = torch.zeros(1, 16, 128, 128), given
        runs["transformers"] = lambda: theirs(x["q"], x["k"], x["v"], x["g"], x["beta"], initial_state=S, output_final_state=True)
    with torch.no_grad():
        return interleaved(runs, seconds)


def lengths(seconds: float) -> dict[int, float]:
    """Seconds a token of gated delta, 2 heads of 64 x 64, forward, from a thousand to a million tokens."""
    found = {}
    for T in (1_000, 10_000, 100_000, 1_000_000):
        run = call(scanned(R.gated_delta, "cpu"), signals(R.gated_delta, (1, 2, T, 64), False), False)
        found[T] = interleaved({"it": run}, seconds)["it"] / T
    return found
