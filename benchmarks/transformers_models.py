"""Whole models of transformers with and without ``fastweights.hf.enable()``, interleaved, on random weights.

python benchmarks/transformers_models.py [--models kimi_linear mamba2 qwen3_next] [--tokens 1024 4096] [--dtypes float32 bfloat16]
    [--vocabulary 32000]

Hidden size 1024, two linear layers (for decoding: a linear one and one of softmax attention, which the caches of transformers need), logits
of the last token only for prefill. Prints milliseconds (medians) and ratios: prefill, a training step (forward and backward), one decoded
token; and, with --memory, the peak memory of a training step in a process of its own. Training multiplies with every word of the
vocabulary, which no scan makes faster: with 1,000 words it is the layers that are compared.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from fastweights import hf
from fastweights.bench.measure import interleaved

COMMON: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 2}
MLP = {"intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
LINEAR, HYBRID = ["linear_attention"] * 2, ["linear_attention", "full_attention"]
MODELS = {
    "qwen3_next": lambda layers: transformers.Qwen3NextForCausalLM(
        transformers.Qwen3NextConfig(
            **COMMON, **MLP, layer_types=layers, mlp_only_layers=[0, 1], num_experts=0,
            linear_key_head_dim=128, linear_value_head_dim=128, linear_num_key_heads=16, linear_num_value_heads=16,
        )
    ),
    "kimi_linear": lambda layers: transformers.KimiLinearForCausalLM(
        transformers.KimiLinearConfig(
            **COMMON, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=16, kv_lora_rank=128, qk_nope_head_dim=64,
            qk_rope_head_dim=0, v_head_dim=64, q_lora_rank=None, linear_num_heads=16, linear_head_dim=128, first_k_dense_replace=2,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
            layer_types=layers, num_experts=1, moe_intermediate_size=64, num_experts_per_token=1,
        )
    ),
    "mamba2": lambda layers: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**COMMON, num_heads=32, head_dim=64, state_size=128, n_groups=1, expand=2, chunk_size=256)
    ),
}  # fmt: skip


def cases(name: str, dtype: torch.dtype, T: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    model, hybrid = (MODELS[name](layers).to(dtype) for layers in (LINEAR, HYBRID))
    ids = torch.randint(COMMON["vocab_size"], (1, T + 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = hybrid.eval()(ids[:, :T], use_cache=True)
    word = "cache_params" if "cache_params" in first else "past_key_values"

    def prefill() -> None:
        with torch.no_grad():
            model.eval()(ids[:, :T], logits_to_keep=1, use_cache=False)

    def train() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        model(ids[:, :T], labels=ids[:, 1:], use_cache=False).loss.backward()

    def decode() -> None:
        with torch.no_grad():
            hybrid(ids[:, T:], use_cache=True, **{word: first[word]})

    return {"prefill": prefill, "train": train, "decode": decode}


def with_and_without(run: Callable[[], object], seconds: float) -> tuple[float, float]:
    def fast() -> None:
        with hf.enable():
            run()

    found = interleaved({"without": run, "with": fast}, seconds, least=1)
    return found["without"], found["with"]


def peak_memory(name: str, T: int, dtype: str, fast: bool) -> float:
    """Megabytes that one training step adds, in a process of its own."""
    words = [sys.executable, __file__, "--models", name, "--tokens", str(T), "--dtypes", dtype, "--child", str(int(fast))]
    words += ["--vocabulary", str(COMMON["vocab_size"])]
    return float(re.findall(r"peak (\d+)", subprocess.run(words, check=True, capture_output=True, text=True).stdout)[-1]) / 1024


def child(name: str, T: int, dtype: str, fast: bool) -> None:
    model = MODELS[name](LINEAR).to(getattr(torch, dtype))
    ids = torch.randint(COMMON["vocab_size"], (1, T + 1))
    if fast:
        hf.enable()

    def read(what: str) -> int:
        found = re.search(what + r":\s+(\d+)", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = read("VmRSS")
    model.train()(ids[:, :T], labels=ids[:, 1:], use_cache=False).loss.backward()
    print("peak", read("VmHWM") - before)


def compare(name: str, dtype: str, T: int, seconds: float, memory: bool) -> None:
    """Prints the rows of one model; memory first, while this process holds none."""

    def row(what: str, unit: str, without: float, fast: float) -> None:
        print(f"{name:12} {dtype:9} {T:>5} {what:8} {without:>8.1f}{unit} {fast:>8.1f}{unit} {without / fast:>6.2f}", flush=True)

    if memory:
        row("memory", "MB", *(peak_memory(name, T, dtype, fast) for fast in (False, True)))
    for what, run in cases(name, getattr(torch, dtype), T).items():
        row(what, "ms", *(1e3 * t for t in with_and_without(run, seconds)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--vocabulary", type=int, default=COMMON["vocab_size"])
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--child", type=int)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    COMMON["vocab_size"] = options.vocabulary
    if options.child is not None:
        return child(options.models[0], options.tokens[0], options.dtypes[0], bool(options.child))
    print(f"{'':36} {'without':>10} {'with':>10} {'ratio':>6}")
    for case in itertools.product(options.models, options.dtypes, options.tokens):
        compare(*case, options.seconds, options.memory)


if __name__ == "__main__":
    main()
