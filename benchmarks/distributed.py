"""One sequence in one process and over several: time, work and memory of the largest part, and what each process sends.

python benchmarks/distributed.py [--tokens 65536] [--processes 1 2 4] [--repeats 3]

Each process has one thread. ``busy`` is the processor time of the busiest process; ``ms`` is the time that passed, and tells something
only with as many idle cores as processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

import fastweights as fw
from fastweights.engine.check import example
from fastweights.engine.distributed import scan_across

RULES = {"decayed_hebb": fw.rules.decayed_hebb, "gated_delta": fw.rules.gated_delta}
PEAK = 1024.0 if sys.platform.startswith("linux") else 1.0  # bytes in a unit of ru_maxrss


def process(name: str, rank: int, size: int, store: str, tokens: int, repeats: int, backward: bool) -> tuple[float, ...]:
    """Median seconds and busy seconds of a pass, the peak of memory in MB above what the process had before, and the MB that it sent."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    before, sent, gather = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [0], dist.all_gather

    def counted(every: list[torch.Tensor], x: torch.Tensor, group: Any = None) -> Any:
        sent[0] += x.nbytes
        return gather(every, x, group=group)

    dist.all_gather = counted
    signals = example(RULES[name], 1, 1, 4, 64, 64, seed=rank, dtype=torch.float32)
    signals = {n: x.expand(1, tokens // size, *x.shape[2:]).clone().requires_grad_(backward) for n, x in signals.items()}
    run, times, busy = (fw.scan if size == 1 else scan_across), [], []
    for _ in range(repeats + 1):
        dist.barrier()
        start, working, sent[0] = time.perf_counter(), time.process_time(), 0
        y = run(RULES[name], **signals).y  # type: ignore[arg-type]
        if backward:
            y.sum().backward()
        del y
        busy.append(time.process_time() - working)
        dist.barrier()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    dist.destroy_process_group()
    return statistics.median(times[1:]), statistics.median(busy[1:]), peak * PEAK / 1e6, sent[0] / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores; batch 1, {options.tokens} tokens, 4 heads of 64 x 64, float32")
    print(f"{'rule':14} {'pass':12} {'processes':>9} {'ms':>8} {'busy':>8} {'MB a process':>13} {'MB sent':>8}")
    for name in RULES:
        for backward in (False, True):
            for size in options.processes:
                with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(size, multiprocessing.get_context("spawn")) as pool:
                    given = size, f"{folder}/store", options.tokens, options.repeats, backward
                    found = [p.result() for p in [pool.submit(process, name, rank, *given) for rank in range(size)]]
                seconds, busy, peak, sent = map(max, zip(*found, strict=True))
                told = "with backward" if backward else "forward"
                print(f"{name:14} {told:13} {size:>8} {1e3 * seconds:>8.0f} {1e3 * busy:>8.0f} {peak:>13.0f} {sent:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
