"""The main job in two minutes: check rules, train two small models on real text, compare them, write from one.

Run by ``make demo``. It writes runs/demo/: two runs and comparison.png.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

import fastweights as fw
from fastweights import plots
from fastweights.models import Sampler, Stream
from fastweights.train import TrainConfig, train
from fastweights.train.loop import Result
from fastweights.train.metrics import read_metrics

FOLDER = Path("runs/demo")
CONTEXTS = (1_000, 100_000)
OPTIONS = {"steps": 400, "batch": 8, "length": 256, "depth": 4, "d_model": 128, "evaluate_every": 80, "checkpoint_every": 200}
PROMPT = "    def __init__(self"


def check_rules(console: Console) -> None:
    console.rule("1. every form of a rule is the same function")
    for rule in (fw.rules.hebb, fw.rules.delta, fw.rules.gated_delta):
        report = fw.check(rule)
        worst = max(max(r.error or 0, r.gradient or 0) for r in report.rows if r.dtype == "float64" and r.what in ("parallel", "chunk"))
        console.print(
            f"{'PASS' if report.passed else 'FAIL'}  {rule!r}\n      parallel and chunk form, gradients too, within {worst:.0e}",
            highlight=False,
        )


def train_both(console: Console) -> dict[str, Result]:
    console.rule("2. two models, alike but for their memory, learn Python")
    shutil.rmtree(FOLDER, ignore_errors=True)
    results = {}
    for rule in ("gated_delta", "softmax"):
        config = TrainConfig(rule=rule, runs=str(FOLDER), name=rule, **OPTIONS)  # type: ignore[arg-type]
        results[rule] = train(config, console)
    return results


def compare(console: Console, results: dict[str, Result]) -> None:
    console.rule("3. compared")
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("model", "parameters", "bits/byte", "tokens/s", *(f"at {c // 1000}k" for c in CONTEXTS)):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for name, r in results.items():
        memory = [size(r.model.state_bytes(c)) for c in CONTEXTS]
        table.add_row(name, f"{r.model.parameters_count():,}", f"{r.bits:.3f}", f"{r.tokens_per_second:,.0f}", *memory)
    console.print(table)
    draw(results, FOLDER / "comparison.png")
    console.print("tokens/s: in training. at 1k, at 100k: memory of one sequence after that many tokens.", highlight=False)
    console.print(f"picture: {FOLDER / 'comparison.png'}", highlight=False)


def size(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if n >= 10 else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


def draw(results: dict[str, Result], path: Path) -> None:
    made, (learning, memory) = plots.figure(2, width=4.6)
    plots.draw_losses(learning, {name: read_metrics(r.folder / "metrics.jsonl") for name, r in results.items()}, "bits per byte")
    learning.set_title("learning to predict Python source")
    contexts = [2**i for i in range(7, 21)]
    for colour, (name, r) in zip(plots.COLOURS, results.items(), strict=False):
        memory.loglog(contexts, [r.model.state_bytes(c) / 1e6 for c in contexts], color=colour, lw=2, label=name)
    memory.set_title("memory while reading and writing")
    memory.set_xlabel("context (tokens)")
    memory.set_ylabel("state of one sequence (MB)")
    memory.legend(frameon=False)
    plots.save_figure(made, path)


def write(console: Console, result: Result) -> None:
    console.rule("4. the gated delta model writes on from " + repr(PROMPT))
    stream = Stream(result.model, seed=0)
    stream.feed(list(PROMPT.encode()))
    text = bytes(stream.generate(300, Sampler(temperature=0.9, top_p=0.95)))
    sys.stdout.flush()
    console.print(PROMPT + text.decode(errors="replace"), markup=False, highlight=False)


def main() -> None:
    console = Console()
    check_rules(console)
    results = train_both(console)
    compare(console, results)
    write(console, results["gated_delta"])


if __name__ == "__main__":
    main()
