"""Several processes are one: outputs, last state and gradients of a sequence do not depend on how many processes share it."""

import datetime
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rows import AFFINE, R, momentum, state_for

import fastweights as fw
from fastweights.engine.check import distance, example
from fastweights.engine.distributed import scan_across

T = 23
PARTS = {2: (14, 9), 3: (7, 11, 5), 4: (5, 8, 1, 9)}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fastweights"])


# ---- what runs in the processes ---------------------------------------------------------------------------------------


def _process(work, rank, size, folder):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timeout)
    try:
        torch.save(work(rank), Path(folder, f"{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def processes(size, work, folder, meanwhile=lambda: None):
    """What ``work(rank)`` returns in each of several processes, and what ``meanwhile()`` returns in this one."""
    with ProcessPoolExecutor(size, mp_context=CONTEXT) as pool:
        running = [pool.submit(_process, work, rank, size, str(folder)) for rank in range(size)]
        mine = meanwhile()
        errors = [e for process in running if (e := process.exception())]
    if errors:  # of its own, rather than that another has gone
        raise min(errors, key=lambda e: "Connection closed" in str(e))
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)], mine


def parts(out):
    return (out.y, *(out.state if isinstance(out.state, tuple) else (out.state,)))


def slices(lengths):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]


def pattern(x):
    return torch.arange(x.numel(), dtype=torch.float64).sin().reshape(x.shape).to(x.dtype)


def case(rule, pick, reset, dtype=torch.float64, sizes=(T, 2, 5, 3)):
    """Signals, states and resets, which are in one row of the batch."""
    steps, H, K, V = sizes
    signals = example(rule, 2, steps, H, K, V, per_channel=pick == -1, dtype=dtype)
    at = torch.zeros(2, steps, dtype=torch.bool)
    at[0, [steps // 2, steps // 2 + 1]] = True
    return signals, state_for(rule, 2, H, K, V, dtype), at if reset else None


def whole(rule, signals, start, reset):
    """Outputs, last states and gradients in one process."""
    leaves = [x.clone().requires_grad_() for x in (*signals.values(), *start)]
    found = parts(fw.scan(rule, **dict(zip(signals, leaves, strict=False)), state=tuple(leaves[len(signals) :]), reset=reset))
    loss = torch.stack([(x * pattern(x)).sum() for x in found]).sum()
    return [x.detach() for x in found], torch.autograd.grad(loss, leaves, materialize_grads=True)


def shared(rule, signals, start, reset, lengths, rank, group=None):
    """The same of one part; the weights of the last states sum to one over the processes, as they are in one."""
    at = slices(lengths)[rank]
    leaves = [*(x[:, at].clone().requires_grad_() for x in signals.values()), *(s.clone().requires_grad_() for s in start)]
    mine = dict(zip(signals, leaves, strict=False))
    state = tuple(leaves[len(signals) :])
    y, *left = parts(scan_across(rule, **mine, group=group, state=state, reset=None if reset is None else reset[:, at]))
    weight = (rank + 1) / sum(range(1, len(lengths) + 1))
    weights = pattern(torch.empty(y.shape[0], sum(lengths), *y.shape[2:], dtype=y.dtype))[:, at]
    loss = torch.stack([(y * weights).sum(), *(weight * (s * pattern(s)).sum() for s in left)]).sum()
    slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [x.detach() for x in (y, *left)], slopes


def rules_and_shapes():
    return [(i, pick) for i, rule in enumerate(AFFINE) for pick in rule.shapes]


def every_rule(rank, size):
    return {(i, p): shared(AFFINE[i], *case(AFFINE[i], p, size > 2), PARTS[size], rank) for i, p in rules_and_shapes()}


def error(found, want, at, rank):
    """The largest error of outputs, last states and gradients of one process, relative to those of the whole."""
    (y, *left), slopes = found
    (all_y, *all_left), all_slopes = want
    n = len(all_slopes) - len(left)
    pairs = [(y, all_y[:, at], all_y), *zip(left, all_left, all_left, strict=True)]
    pairs += [(g, w[:, at], w) for g, w in zip(slopes[:n], all_slopes, strict=False)]
    if rank == 0:
        pairs += [(g, w, w) for g, w in zip(slopes[n:], all_slopes[n:], strict=True)]
    else:
        assert all(g is None or not g.any() for g in slopes[n:])
    return max(((w if g is None else g - w).norm() / (scale.norm() + 1e-300)).item() for g, w, scale in pairs)


# ---- theorems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", PARTS)
def test_several_processes_are_one(size, tmp_path):
    """All affine rules; parts of different lengths, an initial state, and from three processes on resets."""
    cases = rules_and_shapes()
    found, want = processes(
        size, partial(every_rule, size=size), tmp_path, lambda: {(i, p): whole(AFFINE[i], *case(AFFINE[i], p, size > 2)) for i, p in cases}
    )
    errors = {
        (AFFINE[i].name, p, rank): error(found[rank][i, p], want[i, p], at, rank)
        for i, p in cases
        for rank, at in enumerate(slices(PARTS[size]))
    }
    assert {k: e for k, e in errors.items() if not e < 1e-10} == {}


UNEVEN = [(0, 12, 0, 11), (23, 0, 0, 0), (0, 0, 0, 23), (0, 1, 22, 0)]
SOME = [R.hebb, R.gated_delta, R.exp_gated_hebb, R.preconditioned_delta, R.gated_oja, R.delta * 2]


def empty_parts(rank):
    return {(i, n): shared(rule, *case(rule, 0, True), UNEVEN[n], rank) for i, rule in enumerate(SOME) for n in range(len(UNEVEN))}


def test_parts_may_be_empty(tmp_path):
    found, want = processes(4, empty_parts, tmp_path, lambda: [whole(rule, *case(rule, 0, True)) for rule in SOME])
    for rank in range(4):
        for (i, n), part in found[rank].items():
            assert error(part, want[i], slices(UNEVEN[n])[rank], rank) < 1e-10


KERNELS = [R.hebb, R.decayed_hebb, R.exp_gated_hebb, R.gated_delta, R.generalised_delta, R.comba, R.gated_oja, R.delta * 2]
LONG = 50, 60, 40, 50


def grouped(rule, pick, dtype):
    """Float32 numbers with half the heads for keys and queries."""
    signals, start, reset = case(rule, pick, True, torch.float32, (sum(LONG), 4, 16, 12))
    signals = {n: (x[:, :, :2] if n in ("k", "q") else x).to(dtype) for n, x in signals.items()}
    return signals, tuple(s.to(dtype) for s in start), reset


def on_the_kernels(rank):
    return {(i, p): shared(r, *grouped(r, p, torch.float32), LONG, rank) for i, r in enumerate(KERNELS) for p in r.shapes}


def test_float32_with_grouped_heads_is_as_good_as_one_process(tmp_path):
    """At most twice the rounding of one process, outputs, last states and gradients alike."""

    def references():
        return [
            {(i, p): whole(r, *grouped(r, p, dtype)) for i, r in enumerate(KERNELS) for p in r.shapes}
            for dtype in (torch.float32, torch.float64)
        ]

    found, (low, want) = processes(4, on_the_kernels, tmp_path, references)
    for key in want:
        allowed = 2 * error(low[key], want[key], slice(None), 0) + torch.finfo(torch.float32).eps
        assert max(error(found[rank][key], want[key], at, rank) for rank, at in enumerate(slices(LONG))) <= allowed, KERNELS[key[0]].name


POISONED = [R.gated_delta, R.hebb, R.normalised_hebb, R.exp_gated_hebb]
CUTS = (6, 6, 6, 5)


def poisoned(rule, steps=T):
    signals, start, _ = case(rule, 0, False)
    signals["k"][0, 2, 0] = torch.nan
    reset = torch.zeros(2, steps, dtype=torch.bool)
    reset[0, 14] = True
    return signals, start, reset


def with_a_nan(rank):
    return [shared(rule, *poisoned(rule), CUTS, rank) for rule in POISONED]


def test_a_nan_stays_in_its_row_head_and_future_and_a_reset_cures_it(tmp_path):
    found, _ = processes(4, with_a_nan, tmp_path)
    for i, rule in enumerate(POISONED):
        y = torch.cat([found[rank][i][0][0] for rank in range(4)], 1)
        want = fw.scan(rule, **dict(poisoned(rule)[0]), state=poisoned(rule)[1], reset=poisoned(rule)[2]).y
        assert y[0, 2:14, 0].isnan().all()
        assert torch.equal(y.isnan(), want.isnan())
        assert distance(y.nan_to_num(), want.nan_to_num()) < 1e-12
        assert all(s.isfinite().all() for s in found[3][i][0][1:])


def two_windows(rank):
    """One window after the other, the state handed on; only the second process has a signal that takes gradients."""
    found = []
    for rule in SOME:
        signals, start, _ = case(rule, 0, False)
        at = slices((6, 5))[rank]
        first, second = ({n: x[:, w][:, at].clone() for n, x in signals.items()} for w in (slice(0, 11), slice(11, 22)))
        first["k"].requires_grad_(rank == 1)
        y1, state = scan_across(rule, state=start, **first)
        y2, _ = scan_across(rule, state=state, **second)
        y2.square().sum().backward(retain_graph=True)
        once = first["k"].grad if rank == 0 else first["k"].grad.clone()
        y2.square().sum().backward()
        found.append((y1.detach(), y2.detach(), once, first["k"].grad))
    return found


def test_windows_in_turn_and_gradients_for_one_process_alone(tmp_path):
    (zero, one), _ = processes(2, two_windows, tmp_path)
    for i, rule in enumerate(SOME):
        signals, start, _ = case(rule, 0, False)
        k = signals["k"].requires_grad_()
        y = fw.scan(rule, **{n: x[:, :22] for n, x in signals.items()}, state=start).y
        y[:, 11:].square().sum().backward()
        assert distance(torch.cat([zero[i][0], one[i][0], zero[i][1], one[i][1]], 1), y) < 1e-12
        assert zero[i][2] is None
        assert distance(one[i][2], k.grad[:, 6:11]) < 1e-12
        assert distance(one[i][3], 2 * k.grad[:, 6:11]) < 1e-12


def counted(rank):
    """How many numbers a process sends, forward and backward, for sequences of two lengths."""
    sent, whole_gather = [], dist.all_gather

    def gather(every, x, group=None):
        sent.append(x.numel())
        return whole_gather(every, x, group=group)

    dist.all_gather = gather
    found = []
    for rule in (R.gated_delta, R.decayed_hebb):
        for steps in (8, 40):
            shared(rule, *case(rule, 0, False, sizes=(steps, 2, 5, 3)), (steps // 4,) * 4, rank)
            found.append(sum(sent))
            sent.clear()
    dist.all_gather = whole_gather
    return found


def test_what_is_exchanged_does_not_grow_with_time(tmp_path):
    """A, B and the last state forward; the gradient of the last state and G backward."""
    B, H, K, V = 2, 2, 5, 3
    found, _ = processes(4, counted, tmp_path)
    for sent in found:
        assert sent == [B * H * (K * K + 4 * V * K)] * 2 + [B * H * (K + 4 * V * K)] * 2


# ---- what is refused --------------------------------------------------------------------------------------------------


def raised(run):
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def mistakes(rank):
    signals = example(R.delta, 1, 4, 1, 4, 3)
    wide = example(R.delta, 1, 4, 1, 4, 4)
    learning = signals | {"v": signals["v"].clone().requires_grad_()}
    pair = dist.new_group([0, 1])

    def one_in_no_grad():
        with torch.set_grad_enabled(rank != 2):
            scan_across(R.delta, **learning)

    def second_derivative():
        y = scan_across(R.delta, **learning).y
        (slope,) = torch.autograd.grad(y.square().sum(), learning["v"], create_graph=True)
        slope.sum().backward()

    return {
        "not affine": raised(lambda: scan_across(momentum, **example(momentum, 1, 4, 1, 4, 3))),
        "one bad part": raised(lambda: scan_across(R.delta, **(signals if rank != 1 else signals | {"beta": signals["v"]}))),
        "another width": raised(lambda: scan_across(R.delta, **(signals if rank != 1 else wide))),
        "another rule": raised(lambda: scan_across(R.delta if rank else R.hebb_rate, **signals)),
        "no_grad": raised(one_in_no_grad),
        "second derivative": raised(second_derivative),
        "outside": raised(lambda: scan_across(R.delta, group=pair, **signals)),
        "in time": raised(lambda: scan_across(R.delta, **signals)),
    }


def test_mistakes_of_one_process_are_told_to_all(tmp_path):
    found, _ = processes(3, mistakes, tmp_path)
    for rank, told in enumerate(found):
        assert told["not affine"].startswith("FormError: a sequence over several processes is refused")
        assert "second matrix" in told["not affine"]
        assert "signal 'beta'" in told["one bad part"]
        assert ("process 1 cannot run its part" in told["one bad part"]) == (rank != 1)
        assert "process 1 has V = 4, but process 0 has V = 3" in told["another width"]
        assert "process 1 has rule = delta" in told["another rule"]
        assert "process 0 takes gradients, but process 2 is under torch.no_grad()" in told["no_grad"]
        assert "once_differentiable" in told["second derivative"]
        assert ("not in the group" in told["outside"]) == (rank == 2)
        assert told["in time"] == ""


def test_without_processes_it_says_how_to_start_them():
    with pytest.raises(fw.SignalError, match="torchrun"):
        scan_across(R.delta, **example(R.delta))


def test_one_process_is_a_scan(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        signals = example(R.gated_delta)
        assert torch.equal(scan_across(R.gated_delta, **signals).y, fw.scan(R.gated_delta, **signals).y)
        with pytest.raises(fw.FormError, match="second matrix"):
            scan_across(momentum, **example(momentum))
    finally:
        dist.destroy_process_group()
