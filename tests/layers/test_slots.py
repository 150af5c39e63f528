"""Slot memories: two linear memories and a softmax, as in the papers; and their limits."""

import numpy as np
import pytest
import torch

import fastweights as fw
from fastweights.layers.slots import ABC, GatedSlotAttention, log_sums, slot_attention

X = torch.randn(2, 17, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def made(kind, **options):
    torch.manual_seed(0)
    return kind(12, **{"heads": 2, "slots": 5, "d_key": 4, "d_value": 3, **options}).double()


def projections(layer):
    return [part.detach().numpy() for part in layer.signals(X)]


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def heads(one):
    """y (B, T, H, dv) of a loop over the tokens of one row and head."""
    return np.stack([np.stack([one(b, h) for h in range(2)], 1) for b in range(2)])


def test_gated_slot_attention_is_the_recurrence_of_the_paper():
    layer = made(GatedSlotAttention)
    q, k, v, z = projections(layer)

    def silu(x):
        return x / (1 + np.exp(-x))

    def one(b, h):
        K, V, ys = np.zeros((5, 4)), np.zeros((5, 3)), []
        for t in range(17):
            a = (1 / (1 + np.exp(-z[b, t, h]))) ** (1 / 8)
            K = a[:, None] * K + np.outer(1 - a, silu(k[b, t, h]))
            V = a[:, None] * V + np.outer(1 - a, silu(v[b, t, h]))
            ys.append(V.T @ softmax(K @ silu(q[b, t, h])))
        return np.stack(ys)

    y = torch.from_numpy(silu(heads(one))).flatten(2)
    assert torch.allclose(layer.out(layer.norm(y)), layer(X)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("average", [False, True])
def test_bounded_memory_is_the_sum_of_the_paper(average):
    """Slots as sums over all tokens so far, with weights exp(z_i) over their sum up to i (or, averaged, up to now)."""
    layer = made(ABC, average=average)
    q, k, v, z = projections(layer)

    def one(b, h):
        a, ys = np.exp(z[b, :, h]), []
        for t in range(17):
            phi = a[: t + 1] / (a[: t + 1].sum(0) if average else a[: t + 1].cumsum(0))
            K, V = phi.T @ k[b, : t + 1, h], phi.T @ v[b, : t + 1, h]
            ys.append(V.T @ softmax(K @ q[b, t, h] / 2))
        return np.stack(ys)

    y = torch.from_numpy(heads(one)).flatten(2)
    assert torch.allclose(layer.out(y), layer(X)[0], rtol=1e-10, atol=1e-12)


def test_one_slot_averages_and_many_selected_ones_are_attention():
    """A slot for every token, written by it alone, is softmax attention; one slot is the mean of all values."""
    q, k, v = (torch.randn(1, 6, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    s = torch.eye(6, dtype=torch.float64).reshape(1, 6, 1, 6)
    y = slot_attention(q=q, k=k, v=v, s=s).y
    A = torch.softmax(torch.einsum("bthk,bshk->bts", q, k), -1)[0, -1]
    assert torch.allclose(y[0, -1, 0], A @ v[0, :, 0])
    layer = made(ABC, slots=1, average=True)
    with torch.no_grad():
        layer.signals.project.weight[-2:] = 0  # z: the same for all tokens
    mean = layer.signals(X)[2].cumsum(1) / torch.arange(1, 18).reshape(1, 17, 1, 1)
    assert torch.allclose(layer(X)[0], layer.out(mean.flatten(2)), rtol=1e-10, atol=1e-12)


def test_an_averaging_memory_is_gated_slot_attention_whose_decay_is_what_it_does_not_take_in():
    layer = made(ABC, average=True)
    q, k, v, z = layer.signals(X)
    total = log_sums(z, torch.full((2, 2, 5), -torch.inf, dtype=torch.float64))
    phi = (z - total).exp()
    y = slot_attention(q=q, k=k, v=v, s=phi, g=torch.log1p(-phi).clamp(max=0), scale=0.5).y
    assert torch.allclose(layer.out(y.flatten(2)), layer(X)[0], rtol=1e-9, atol=1e-12)


def test_sums_in_logs_over_documents():
    z = 300 * torch.randn(2, 37, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = torch.randn(2, 3, dtype=torch.float64)
    reset = torch.zeros(2, 37, dtype=torch.bool)
    reset[0, [0, 9, 10]] = reset[1, 20] = True
    found = log_sums(z, start, reset)
    for b in range(2):
        total = start[b]
        for t in range(37):
            total = z[b, t] if reset[b, t] else torch.logaddexp(total, z[b, t])
            assert torch.allclose(found[b, t], total, rtol=1e-13)


@pytest.mark.parametrize("layer", [made(ABC), made(ABC, average=True), made(GatedSlotAttention)], ids=["abc", "average", "gsa"])
def test_derivatives_and_a_start_from_nothing(layer):
    x = X[:1, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], (x,))
    reset = torch.tensor([[False, True, False, True]])
    assert torch.autograd.gradcheck(lambda x: layer(x, None, reset)[0], (x,))
    empty, state = layer(x[:, :0])
    assert empty.shape == (1, 0, 12)
    assert torch.equal(layer(x, state)[0], layer(x)[0])


def test_both_memories_run_on_the_kernels():
    q, k, v, s = (torch.randn(1, 40, 2, n) for n in (4, 4, 3, 5))
    g = -torch.rand(1, 40, 2, 5)
    assert fw.plan(fw.rules.decayed_hebb.T, q=q, k=k, v=s, g=g).form == "chunk"
    y = slot_attention(q=q, k=k, v=v, s=s, g=g).y
    want = slot_attention(**{n: x.double() for n, x in {"q": q, "k": k, "v": v, "s": s, "g": g}.items()}).y
    assert (y - want).abs().max() < 1e-4


@pytest.mark.parametrize("layer", [made(ABC), made(ABC, average=True), made(GatedSlotAttention)], ids=["abc", "average", "gsa"])
def test_nothing_of_what_came_before_a_reset_is_left(layer):
    """Not even what is not finite."""
    _, spoilt = layer(X * torch.nan)
    reset = torch.zeros(2, 17, dtype=torch.bool)
    reset[:, 0] = True
    assert torch.allclose(layer(X, spoilt, reset)[0], layer(X)[0], rtol=1e-9, atol=1e-12)
    first = torch.cat([X[:, :5] * torch.nan, X[:, 5:]], 1)
    assert torch.allclose(layer(first, None, reset.roll(5, 1))[0][:, 5:], layer(X[:, 5:])[0], rtol=1e-9, atol=1e-12)


BAD = {
    "not a multiple of heads = 5": lambda: ABC(12, heads=5),
    "slots is 0": lambda: GatedSlotAttention(12, slots=0),
    "temper is 0": lambda: GatedSlotAttention(12, temper=0),
    "expected a tensor (B, T, d_model = 12)": lambda: ABC(12)(torch.zeros(1, 3, 11)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_refused(message):
    with pytest.raises(fw.FastWeightError) as refused:
        BAD[message]()
    assert message in str(refused.value)
