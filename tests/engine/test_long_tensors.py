"""Memory of long tensors is lent again, and never to two at once."""

import copy
import gc
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import R

import fastweights as fw
from fastweights.engine import memory
from fastweights.engine.check import example
from fastweights.engine.kernels import library

pytestmark = pytest.mark.skipif(library().lib is None, reason=f"no kernels: {library().why}")


@pytest.fixture(autouse=True)
def nothing_waits(monkeypatch):
    monkeypatch.setattr(memory, "waiting", {})


def waits():
    return sum(size * len(several) for size, several in memory.waiting.items())


def test_it_waits_until_the_last_view_is_gone():
    x = memory.empty((512, 1024))
    address, view = x.data_ptr(), x.view(-1)[7:].view(torch.int32)
    del x
    assert not waits()
    del view
    assert waits() == 4 * 512 * 1024
    assert memory.empty((1024, 512)).data_ptr() == address


def test_short_tensors_are_left_to_torch():
    del_me = memory.empty((1000,))
    del del_me
    assert not waits()


def test_no_more_waits_than_is_meant_to(monkeypatch):
    monkeypatch.setattr(memory, "KEPT", 5 * memory.LONG)
    several = [memory.empty((n * memory.LONG // 4,)) for n in (1, 2, 3, 1, 2, 7)]
    for _ in range(6):
        several.pop()
        assert waits() <= 5 * memory.LONG


def test_lengths_that_never_return_do_not_pile_up():
    for n in range(20):
        x = memory.empty((memory.LONG // 4 * (n + 1) * 3,))
        size = x.nbytes
        del x
        assert waits() <= 2 * size


def test_what_was_used_long_ago_goes_first(monkeypatch):
    monkeypatch.setattr(memory, "KEPT", 20 * memory.LONG)
    often, once = memory.empty((memory.LONG,)), memory.empty((memory.LONG // 4 * 11,))
    del often, once
    often = memory.empty((memory.LONG,))
    del often
    other = memory.empty((memory.LONG // 4 * 3,)), memory.empty((memory.LONG // 4 * 3,))
    del other
    assert 4 * memory.LONG in memory.waiting
    assert waits() <= 20 * memory.LONG


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.booleans()), max_size=30))
def test_nothing_is_lent_twice(steps):
    kept = []
    for n, drop in steps:
        x = memory.empty((n * memory.LONG // 4 + n,))
        x.fill_(len(kept))
        kept.append(x)
        if drop:
            kept.pop(len(kept) // 2).fill_(-1)
            kept = [y.fill_(i) for i, y in enumerate(kept)]
        del x
    assert all((y == i).all() for i, y in enumerate(kept))


def test_a_sequence_of_calls_uses_the_same_memory():
    made = {n: x.float().requires_grad_() for n, x in example(R.gated_delta, 1, 3000, 4, 64, 64).items()}

    def run():
        y, W = fw.scan(R.gated_delta, **made)
        return y.detach().clone(), *torch.autograd.grad(y.square().sum() + W.sum(), list(made.values()))

    want = [x.clone() for x in run()]
    gc.collect()
    size = waits()
    assert size > 0
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))
        assert waits() == size


def test_threads_get_memory_of_their_own():
    def right(me):
        x = memory.empty((memory.LONG // 4,))
        x.fill_(me)
        return bool((x == me).all())

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(right, range(200)))


def test_its_tensors_are_like_any_other(tmp_path):
    x = memory.empty((512, 1024)).fill_(3)
    torch.save(x, tmp_path / "x.pt")
    others = [torch.load(tmp_path / "x.pt"), pickle.loads(pickle.dumps(x)), copy.deepcopy(x), torch.from_numpy(x.numpy()).clone()]
    assert all(torch.equal(x, y) for y in others)
    assert x.clone().resize_(3).shape == (3,)
    x.share_memory_()
    assert (x == 3).all()


def test_a_process_ends_with_some_lent():
    program = """
import torch, fastweights as fw
k = torch.randn(1, 3000, 4, 64, requires_grad=True)
y = fw.scan(fw.rules.hebb, q=k, k=k, v=k).y
y.sum().backward()
print(y.shape[1])
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("3000\n", "")
