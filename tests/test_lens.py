"""The lens: measures with known values, plain loops beside them, a text cut anywhere, and memory that does not grow with the text."""

import collections
import math
import weakref

import numpy as np
import pytest
import torch
from rows import AFFINE, NOT_AFFINE, name
from torch.utils._python_dispatch import TorchDispatchMode

import fastweights as fw
from fastweights import lens
from fastweights.language.errors import FastWeightError, FormError
from fastweights.models import PRESETS, LanguageModel, ModelConfig, SequenceModel
from fastweights.models.presets import rule_of

ALL = ("norms", "writes", "kept", "spectra", "ranks")
MIXED = ("gated_delta", "normalised_hebb", "window:5", "retnet", "exp_gated_hebb", "rwkv7", "deltaproduct", "oja", "bonus_hebb", "softmax")


class Told(torch.nn.Module):
    """A programmer whose signals are a table: token i of the text brings row i. The model must embed one-hot."""

    def __init__(self, **table):
        super().__init__()
        self.table = table

    def forward(self, x, conv):
        return {n: rows[x.argmax(-1)] for n, rows in self.table.items()}, conv


def told(rule, **table):
    """A model of one layer whose signals at token i are ``table[name][i]``, (heads, ...), and the text 0, 1, 2, ..."""
    table = {n: torch.as_tensor(x, dtype=torch.float64) for n, x in table.items()}
    T, heads, K = table["k"].shape[:3]
    model = LanguageModel(ModelConfig(layers=(rule,), vocabulary=T, d_model=T, heads=heads, d_key=K, d_value=table["v"].shape[-1])).double()
    model.embed.weight.data.copy_(torch.eye(T))
    model.blocks[0].layer.programmer = Told(**table)
    return model, torch.arange(T)


def made(*layers, **options):
    model = LanguageModel(ModelConfig(layers=layers, vocabulary=50, d_model=16, heads=2, **options), seed=3).double()
    for p in model.parameters():  # far from where layers begin
        p.data += 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel()))
    return model


def text(T, seed=0):
    return torch.randint(50, (T,), generator=torch.Generator().manual_seed(seed))


def same(a, b, tolerance=1e-10):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def spoken(model, ids):
    """The signals of every layer in one pass over all, and the memory after it."""
    heard = {}
    hooks = [
        b.layer.programmer.register_forward_hook(lambda _, __, out, i=i: heard.update({i: out[0]}))  # the layer turns them in place
        for i, b in enumerate(model.blocks)
        if isinstance(b.layer, fw.FastWeightLayer)
    ]
    with torch.no_grad():
        _, memory = model(ids[None])
    for hook in hooks:
        hook.remove()
    return heard, memory


# ---- exact values ---------------------------------------------------------------------------------------------------------


def test_hebb_with_orthonormal_keys():
    K, T = 8, 7
    keys = torch.linalg.qr(torch.randn(K, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q[:T, None]
    v = torch.nn.functional.one_hot(torch.arange(T), 7).double()[:, None] * 3  # orthogonal values of one length
    model, ids = told("hebb", q=keys, k=keys, v=v)
    seen = lens.look(model, ids, every=1)
    n = torch.arange(1, T + 1).double()
    assert same(seen.norms[0, 0], 3 * n.sqrt())
    assert same(seen.writes[0, 0], 3 * torch.ones(T))
    assert same(seen.ranks[0, 0], n)
    assert same(seen.spectra[0, 0], 3.0 * (torch.arange(7) < n[:, None]))
    assert same(seen.kept[0, 0], [math.nan] + [1.0] * (T - 1))
    assert same(seen.errors.before[0, 0], torch.ones(T))
    assert same(seen.errors.after[0, 0], torch.zeros(T))
    assert same(seen.attention(0, 0), torch.eye(T))
    assert same(seen.ages[0, 0], torch.zeros(T))


def test_values_of_one_direction_have_rank_one():
    keys = torch.eye(5)[:, None]
    v = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64) * torch.arange(1, 6)[:, None]
    model, ids = told("hebb", q=keys, k=keys, v=v[:, None])
    seen = lens.look(model, ids, every=2)
    assert seen.at.tolist() == [1, 3, 4]
    assert same(seen.ranks, torch.ones(1, 1, 3))
    assert same(seen.norms[0, 0], (v**2).sum(-1).cumsum(0).sqrt())


def test_delta_with_unit_keys_and_rate_one_remembers_what_it_wrote():
    draw = torch.Generator().manual_seed(1)
    k = torch.nn.functional.normalize(torch.randn(11, 2, 4, dtype=torch.float64, generator=draw), dim=-1)
    v = torch.randn(11, 2, 3, dtype=torch.float64, generator=draw)
    model, ids = told("delta", q=k, k=k, v=v, beta=torch.ones(11, 2))
    seen = lens.look(model, ids)
    assert same(seen.errors.after, torch.zeros(1, 2, 11))
    assert (seen.errors.before > 0.01).all()
    W = fw.unroll(fw.rules.delta, k=k[None], v=v[None], beta=torch.ones(1, 11, 2, dtype=torch.float64))[0]
    erased = torch.einsum("thvk,thk->thv", W[:-1], k[1:]).norm(dim=-1) / W[:-1].flatten(2).norm(dim=-1)
    assert same(seen.kept[0, :, 1:], (1 - erased**2).sqrt().T)


def test_the_same_pair_again_leaves_nothing_to_write():
    one = torch.ones(6, 1, 1)
    model, ids = told("delta", q=one, k=one, v=5 * one, beta=one[..., 0])
    seen = lens.look(model, ids)
    assert same(seen.writes[0, 0], [5, 0, 0, 0, 0, 0])
    assert same(seen.errors.before[0, 0], [1, 0, 0, 0, 0, 0])
    assert same(seen.ages[0, 0], torch.zeros(6))  # every write replaces what was there


@pytest.mark.parametrize("a", [1.0, 0.5, 0.9])
def test_ages_and_decays_by_hand(a):
    """With keys and queries of 1, A_ts = a^(t-s): the mean age is a sum of a geometric series."""
    T = 9
    one = torch.ones(T, 1, 1)
    model, ids = told("decayed_hebb", q=one, k=one, v=one, g=torch.full((T, 1), math.log(a), dtype=torch.float64))
    seen = lens.look(model, ids)
    powers = a ** np.arange(T)
    assert same(seen.ages[0, 0], [(powers[: t + 1] * np.arange(t + 1)).sum() / powers[: t + 1].sum() for t in range(T)])
    assert same(seen.kept[0, 0, 1:], np.full(T - 1, a))
    assert same(seen.attention(0, 0), [[a ** (t - s) if t >= s else 0 for s in range(T)] for t in range(T)])
    short = lens.look(model, ids, window=3)
    powers = powers[:3]
    assert same(short.ages[0, 0], [(powers[: t + 1] * np.arange(min(t + 1, 3))).sum() / powers[: t + 1].sum() for t in range(T)])
    assert same(short.attention(0, 0), seen.attention(0, 0)[-3:, -3:])


def test_a_query_for_one_token_recalls_its_age():
    T = 6
    model, ids = told("hebb", q=torch.eye(T)[[0, 0, 1, 0, 3, 2]][:, None], k=torch.eye(T)[:, None], v=torch.ones(T, 1, 2))
    assert same(lens.look(model, ids).ages[0, 0], [0, 1, 1, 3, 1, 3])


def test_what_is_not_there_is_nan():
    zero, one = torch.zeros(3, 1, 2), torch.ones(3, 1, 2)
    model, ids = told("hebb", q=zero, k=one, v=zero)
    seen = lens.look(model, ids)
    assert seen.kept.isnan().all()
    assert seen.errors.before.isnan().all()
    assert seen.ages.isnan().all()
    assert (seen.ranks == 0).all()
    assert (seen.norms == 0).all()


# ---- plain loops ----------------------------------------------------------------------------------------------------------


def test_gated_delta_beside_a_loop():
    model, ids = made("gated_delta", decay="channel"), text(23)
    seen = lens.look(model, ids, every=5)
    assert seen.at.tolist() == [4, 9, 14, 19, 22]
    s = {n: x[0].numpy() for n, x in spoken(model, ids)[0][0].items()}
    for h in range(2):
        W, n = np.zeros((8, 8)), 0
        for t in range(23):
            k, v, beta, g = (s[i][t, h] for i in ("k", "v", "beta", "g"))
            M = np.diag(np.exp(g)) @ (np.eye(8) - beta * np.outer(k, k))
            old, W = W, W @ M + beta * np.outer(v, k)
            expected = [
                np.sqrt((W**2).sum()), np.sqrt(((W - old) ** 2).sum()), np.linalg.norm(v - old @ k) / np.linalg.norm(v),
                np.linalg.norm(v - W @ k) / np.linalg.norm(v),
            ]  # fmt: skip
            found = [x[0, h, t] for x in (seen.norms, seen.writes, *seen.errors)]
            assert same(torch.stack(found), expected)
            if t:
                assert same(seen.kept[0, h, t], np.sqrt(((old @ M) ** 2).sum() / (old**2).sum()))
            if t in seen.at:
                energy = np.linalg.eigvalsh(W @ W.T)[::-1].clip(1e-300)
                p = energy / energy.sum()
                assert same(seen.spectra[0, h, n] ** 2, energy)
                assert same(seen.ranks[0, h, n], np.exp(-(p * np.log(p)).sum()))
                n += 1
        assert n == 5


def test_of_mlstm_the_share_kept_is_the_stabilised_forget_gate():
    model, ids = made("exp_gated_hebb"), text(17)
    seen = lens.look(model, ids, chunk=5)
    s = {n: x[0].numpy() for n, x in spoken(model, ids)[0][0].items()}
    for h in range(2):
        m = 0.0
        for t in range(17):
            top = max(s["g"][t, h] + m, s["i"][t, h])
            if t:
                assert same(seen.kept[0, h, t], np.exp(s["g"][t, h] + m - top))
            m = top


def test_several_pairs_a_token_are_one_error():
    model, ids = made("delta * 2"), text(9)
    seen = lens.look(model, ids)
    s = spoken(model, ids)[0][0]
    W = fw.unroll(fw.rules.get("delta * 2"), **s)[0]
    k, v = s["k"][0], s["v"][0]
    off = sum((v[:, :, i] - (W @ k[:, :, i, :, None]).squeeze(-1)).square().sum(-1) for i in range(2))
    assert same(seen.errors.after[0], (off / v.square().sum((-2, -1))).sqrt().T)


# ---- every rule and preset ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [n for n in PRESETS if rule_of(n).trace.program is not None and n != "srwm_fixed"])
def test_presets_are_seen_as_they_run(layer):
    """W at the end is the model's own; attention is that of ``attention_matrix`` for the same signals."""
    model, ids = made(layer, "softmax", layer), text(13)
    seen = lens.look(model, ids, chunk=5, every=13)
    assert seen.layers == (0, 2)
    signals, memory = spoken(model, ids)
    for at, i in enumerate(seen.layers):
        rule, W = model.blocks[i].layer.rule, memory[i]["W"][0]
        assert same(seen.norms[at, :, -1], W.flatten(1).norm(dim=1))
        assert same(seen.spectra[at, :, -1], torch.linalg.svdvals(W))
        try:
            A = fw.attention_matrix(rule, **{n: x for n, x in signals[i].items() if n != "v"})[0]
        except FormError:
            with pytest.raises(FormError, match="no attention matrix"):
                seen.attention(at, 0)
            continue
        for h in range(2):
            assert same(seen.attention(at, h), A[h])
        y, _ = fw.scan(rule, **signals[i])
        assert same(torch.stack([seen.attention(at, h) @ signals[i]["v"][0, :, h] for h in range(2)], 1), y[0], 1e-9)
        weights, back = A.abs(), (torch.arange(13)[:, None] - torch.arange(13)).clamp(min=0)
        assert same(seen.ages[at], (weights * back).sum(-1) / weights.sum(-1))


@pytest.mark.parametrize("rule", [*AFFINE, *NOT_AFFINE], ids=name)
def test_states_are_those_of_unroll(rule):
    draw = torch.Generator().manual_seed(0)
    layer = fw.FastWeightLayer(rule, 12, heads=2, d_key=5, d_value=4).double()
    x = torch.randn(2, 11, 12, dtype=torch.float64, generator=draw)
    with torch.no_grad():
        signals, _ = layer.programmer(x)
        _, memory = layer(x)
        start = tuple(memory[n] + 0.1 for n in rule.states)
        W = fw.unroll(rule, state=start, **signals)
        states = lens.trajectory(rule, signals, start)
        assert same(states.after[0], W)
        assert same(states.before[0][:, 1:], W[:, :-1])
        share = lens.kept(rule, signals, states)
    assert share.shape == (2, 11, 2)
    assert share.isnan().all() if rule in NOT_AFFINE else (share >= 0).all()


@pytest.mark.parametrize("T", [0, 1, 2, 7])
def test_trajectories_of_few_tokens(T):
    x = torch.ones(1, T, 2, 3)
    before, after = lens.trajectory(fw.rules.hebb, {"q": x, "k": x, "v": x})
    assert before[0].shape == after[0].shape == (1, T, 2, 3, 3)
    assert same(after[0][0, :, 0, 0, 0], torch.arange(1, T + 1))
    assert lens.kept(fw.rules.hebb, {"q": x, "k": x, "v": x}, lens.measure.Trajectory(before, after)).shape == (1, T, 2)


# ---- a long text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "chunk"), [(1, 1), (2, 1), (11, 1), (31, 7), (31, 30), (31, 99)])
def test_a_text_may_be_cut_anywhere(T, chunk):
    model, ids = made(*MIXED), text(T)
    for window in (4, 100):
        whole, parts = (lens.look(model, ids, every=4, window=window, chunk=c) for c in (T, chunk))
        assert whole.layers == (0, 1, 3, 4, 6, 7, 8)
        for n in ALL:
            assert same(getattr(parts, n), getattr(whole, n)), n
        for a, b in zip(parts.errors, whole.errors, strict=True):
            assert same(a, b)
        assert same(parts.ages, whole.ages)
        assert whole.ages[[4, 5]].isnan().all()
        for at in (0, 1, 2, 3, 6):
            assert same(parts.attention(at, 1), whole.attention(at, 1))
            assert whole.attention(at, 1).shape == (min(T, window),) * 2


def test_a_window_shows_the_end_of_the_whole():
    """Of rules whose read depends on other states too (what it divides by), as they were before the window."""
    model, ids = made("normalised_hebb", "exp_gated_hebb", "gated_delta"), text(29)
    whole, end = lens.look(model, ids), lens.look(model, ids, window=6, chunk=4)
    assert whole.attention(1, 0)[-1, 0] != 0
    for at in range(3):
        assert same(end.attention(at, 0), whole.attention(at, 0)[-6:, -6:])


class Held(TorchDispatchMode):
    """The most numbers that tensors held at one time."""

    def __init__(self):
        super().__init__()
        self.users, self.now, self.most = collections.Counter(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key, numbers = storage._cdata, storage.nbytes() // 8
                self.now += 0 if self.users[key] else numbers
                self.users[key] += 1
                self.most = max(self.most, self.now)
                weakref.finalize(x, self.freed, key, numbers)
        return out

    def freed(self, key, numbers):
        self.users[key] -= 1
        self.now -= 0 if self.users[key] else numbers


def test_memory_grows_with_the_text_by_the_results_alone():
    """Six numbers a token, once in pieces and once joined; W of a token has 256, its ages 64."""
    model = LanguageModel(ModelConfig(layers=("gated_delta", "decayed_hebb"), vocabulary=50, d_model=16, heads=1)).double()
    most = []
    for T in (96, 320):
        with Held() as mode:
            lens.look(model, text(T), window=64, chunk=32, every=64)
        most.append(mode.most)
    assert most[0] > 32 * 256
    assert most[1] - most[0] < (320 - 96) * 2 * 6 * 2


# ---- what a person meets --------------------------------------------------------------------------------------------------


def test_a_text_is_its_bytes_and_the_model_is_left_as_it_was():
    model = LanguageModel(ModelConfig(layers=("delta", "rwkv7"), d_model=16, heads=2))
    a, b, c = (lens.look(model, x) for x in ("häß", "häß".encode(), list("häß".encode())))
    assert torch.equal(a.norms, b.norms)
    assert torch.equal(a.norms, c.norms)
    assert a.norms.dtype == torch.float32
    assert a.notes == ("layer 1, rwkv7, is skipped: a system is more than a rule",)
    assert repr(a) == "Seen(5 tokens; 2 heads; layers 0 delta)"
    assert not model.blocks[0].layer.programmer._forward_hooks


def test_without_an_attention_matrix_it_is_said_which_layer_and_why():
    seen = lens.look(made("oja"), text(5))
    for asked in (lambda: seen.ages, lambda: seen.attention(0, 0)):
        with pytest.raises(FormError, match=r"layer 0, oja.*acts on the rows of W"):
            asked()


BAD = {
    "no layer of a rule": lambda: lens.look(made("softmax", "rwkv7"), text(3)),
    "expected a LanguageModel": lambda: lens.look(SequenceModel(ModelConfig(layers=("delta",)), d_in=1, d_out=1), text(3)),  # type: ignore
    "a vocabulary of 50; pass its tokens": lambda: lens.look(made("delta"), "text"),
    "at least one token": lambda: lens.look(made("delta"), []),
    "int64 (1, 3)": lambda: lens.look(made("delta"), text(3)[None]),
    "torch.float32": lambda: lens.look(made("delta"), text(3).float()),
    "outside the vocabulary of 50": lambda: lens.look(made("delta"), [3, 50]),
    "every is 0": lambda: lens.look(made("delta"), text(3), every=0),
    "window is 0": lambda: lens.look(made("delta"), text(3), window=0),
    "chunk is -1": lambda: lens.look(made("delta"), text(3), chunk=-1),
    "layer is 1, expected 0 to 0": lambda: lens.look(made("delta"), text(3)).attention(1, 0),
    "head is -1, expected 0 to 1": lambda: lens.look(made("delta"), text(3)).attention(0, -1),
    "one that ends in .": lambda: lens.plot(lens.look(made("delta"), text(3)), "figure.xyz"),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_teach(message):
    with pytest.raises(FastWeightError) as error:
        BAD[message]()
    assert message in str(error.value)


def test_a_memory_that_overflows_is_an_error():
    one = torch.ones(4, 1, 1, dtype=torch.float64)
    model, ids = told("hebb", q=one, k=torch.tensor([1.0, 1.0, 1e200, 1.0], dtype=torch.float64).view(4, 1, 1), v=1e200 * one)
    with pytest.raises(FastWeightError, match="layer 0, hebb: W is not finite from token 2 on"):
        lens.look(model, ids, chunk=2)


@pytest.mark.parametrize(
    ("layers", "T", "file", "begins"),
    [
        (("gated_delta", "hebb"), 40, "it.png", b"\x89PNG"),
        (("oja", "softmax"), 1, "it.pdf", b"%PDF"),
        (("delta",) * 9, 9, "it.svg", b"<?xml"),
    ],
    ids=str,
)
def test_the_figure(layers, T, file, begins, tmp_path):
    lens.plot(lens.look(made(*layers), text(T)), tmp_path / file, head=1)
    assert (tmp_path / file).read_bytes().startswith(begins)


def test_the_figure_shows_the_means_of_heads_and_of_tokens():
    seen = lens.look(made("gated_delta", "delta"), text(301))
    sizes, changes = lens.plots.drawn(seen, 1, 0).axes[:2]
    for axes, values in ((sizes, seen.norms), (changes, seen.writes)):
        (*heads, mean) = axes.lines[:3]
        shown = values[0, :, :300].unflatten(1, (100, 3)).mean(2)
        assert same(torch.stack([torch.as_tensor(line.get_ydata()) for line in heads])[:, :100], shown)
        assert same(mean.get_ydata()[:100], shown.mean(0))
        assert same(mean.get_ydata()[100], values[0, :, 300].mean())
        assert mean.get_xdata()[:2].tolist() == [1, 4]
