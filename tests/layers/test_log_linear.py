"""Log-linear attention: the Fenwick tree of the paper, its parallel form and the scans by level are one."""

import numpy as np
import pytest
import torch

import fastweights as fw
from fastweights.layers import decays
from fastweights.layers.log_linear import LogLinear, fenwick_levels, log_linear, log_linear_matrix

R = fw.rules
RULES = [R.hebb, R.decayed_hebb, R.stepped_hebb, R.delta, R.gated_delta]


def signals(rule, steps, rows=2, channel=False):
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(rows, steps, 2, *shape, dtype=torch.float64, generator=draw)

    made = {"q": normal(3), "k": normal(3) / 2, "v": normal(4), "beta": normal().sigmoid(), "dt": normal().exp(), "g": -normal().exp()}
    if channel:
        made["g"] = -normal(3).exp()
    return {n: made[n] for n in rule.signals}


def lambdas(steps, levels, rows=2):
    return torch.rand(rows, steps, 2, levels, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2


def token(rule, W, s):
    """What a token makes of the memory of older ones, and its own memory, from the papers."""
    g, k, v = np.exp(s.get("g", 0.0)), s["k"], s["v"] * s.get("dt", 1.0)
    if "beta" not in s:
        return W * g, np.outer(v, k)
    return W * g - s["beta"] * np.outer((W * g) @ k, k), s["beta"] * np.outer(v, k)


def fenwick(rule, given, lam):
    """The recurrence of the paper: level 0 is the present token; at token t all levels up to the lowest set bit of t merge into one."""
    B, T, H = lam.shape[:3]
    s = {n: x.numpy() for n, x in given.items()}
    y = np.zeros((B, T, H, 4))
    for b in range(B):
        for h in range(H):
            S = {}
            for t in range(T):
                if t:
                    low = (t & -t).bit_length() - 1
                    S[low + 1] = sum(S.pop(level) for level in range(low + 1) if level in S)
                now = {n: x[b, t, h] for n, x in s.items()}
                S = {level: token(rule, W, now)[0] for level, W in S.items()} | {0: token(rule, np.zeros((4, 3)), now)[1]}
                y[b, t, h] = sum(lam[b, t, h, level].item() * W @ now["q"] for level, W in S.items())
    return y


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("steps", [1, 2, 13, 16, 23])
def test_levels_of_scans_are_the_tree_of_the_paper_and_the_parallel_form(rule, steps):
    given, lam = signals(rule, steps), lambdas(steps, 6)
    y = log_linear(rule, weights=lam, **given).y
    assert np.allclose(y.numpy(), fenwick(rule, given, lam), rtol=1e-10, atol=1e-12)
    matrix = log_linear_matrix(rule, weights=lam, **{n: x for n, x in given.items() if n != "v"})
    assert torch.allclose(torch.einsum("bhts,bshv->bthv", matrix, given["v"]), y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", [R.decayed_hebb, R.gated_delta], ids=lambda r: r.name)
def test_decays_of_key_channels(rule):
    given, lam = signals(rule, 13, channel=True), lambdas(13, 5)
    assert np.allclose(log_linear(rule, weights=lam, **given).y.numpy(), fenwick(rule, given, lam), rtol=1e-10, atol=1e-12)


def test_levels_by_their_bits_are_those_of_merging():
    merged, S = np.zeros((40, 40), dtype=int), {}
    for t in range(40):
        if t:
            low = (t & -t).bit_length() - 1
            S[low + 1] = [s for level in range(low + 1) for s in S.pop(level, [])]
        S[0] = [t]
        for level, tokens in S.items():
            merged[t, tokens] = level
    assert (np.tril(fenwick_levels(40).numpy()) == merged).all()


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_beyond_its_levels_the_last_one_holds_everything_older(levels):
    given, lam = signals(R.gated_delta, 21), lambdas(21, levels)
    full = torch.cat([lam, lam[..., -1:].expand(-1, -1, -1, 6 - levels)], -1)
    y = log_linear(R.gated_delta, weights=lam, **given).y
    assert np.allclose(y.numpy(), fenwick(R.gated_delta, given, full), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_with_equal_weights_it_is_the_rule(rule):
    given = signals(rule, 19)
    y, state, position = log_linear(rule, weights=torch.ones(2, 19, 2, 7, dtype=torch.float64), **given)
    want = fw.scan(rule, **given)
    assert torch.allclose(y, want.y, rtol=1e-10, atol=1e-12)
    assert torch.allclose(state[:, -1], want.state, rtol=1e-10, atol=1e-12)
    assert position.tolist() == [19, 19]


@pytest.mark.parametrize("levels", [3, 6])
def test_cut_anywhere_and_packed(levels):
    given, lam = signals(R.gated_delta, 29), lambdas(29, levels)
    reset = torch.zeros(2, 29, dtype=torch.bool)
    reset[0, [5, 21]] = reset[1, 11] = True
    whole = log_linear(R.gated_delta, weights=lam, reset=reset, **given)
    for row, cuts in ((0, [0, 5, 21, 29]), (1, [0, 11, 29])):
        for a, b in zip(cuts, cuts[1:], strict=False):
            part = {n: x[row : row + 1, a:b] for n, x in given.items()}
            alone = log_linear(R.gated_delta, weights=lam[row : row + 1, a:b], **part)
            assert torch.allclose(alone.y[0], whole.y[row, a:b], rtol=1e-10, atol=1e-12)
        assert alone.position[0] == whole.position[row]
        assert torch.allclose(alone.state[0], whole.state[row], rtol=1e-10, atol=1e-12)
    for cuts in ([0, 1, 29], [0, 0, 7, 8, 22, 29], list(range(30))):
        past, ys = {}, []
        for a, b in zip(cuts, cuts[1:], strict=False):
            y, state, position = log_linear(
                R.gated_delta, weights=lam[:, a:b], reset=reset[:, a:b], **past, **{n: x[:, a:b] for n, x in given.items()}
            )
            past = {"state": state, "position": position}
            ys.append(y)
        assert torch.allclose(torch.cat(ys, 1), whole.y, rtol=1e-10, atol=1e-12)
        assert torch.allclose(state, whole.state, rtol=1e-10, atol=1e-12)


def test_its_derivatives():
    given = {n: x.requires_grad_() for n, x in signals(R.gated_delta, 6, rows=1).items()}
    lam = lambdas(6, 3, rows=1).requires_grad_()
    names = list(given)
    assert torch.autograd.gradcheck(
        lambda lam, *s: log_linear(R.gated_delta, weights=lam, **dict(zip(names, s, strict=True)))[:2], (lam, *given.values())
    )


def test_the_kernels_run_it():
    given = {n: x.float() for n, x in signals(R.gated_delta, 100).items()}
    lam = lambdas(100, 8)
    y = log_linear(R.gated_delta, weights=lam.float(), **given).y
    assert (y - log_linear(R.gated_delta, weights=lam, **{n: x.double() for n, x in given.items()}).y).abs().max() < 1e-4


def mamba2(**options):
    torch.manual_seed(0)
    step = decays.StepSize(24, 2)
    custom = {"dt": step, "g": decays.SteppedDecay(step)}
    return LogLinear(24, heads=2, rule=R.stepped_hebb, key_heads=1, skip=True, custom=custom, **options).double()


def test_a_layer_starts_as_that_of_its_rule_and_reads_its_levels():
    layer, x = mamba2(levels=5), torch.randn(2, 21, 24, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weigh.weight)
    assert torch.allclose(layer(x)[0], layer.memory(x)[0], rtol=1e-8, atol=1e-9)  # the bias is kept in float32
    torch.nn.init.normal_(layer.weigh.weight)
    assert not torch.allclose(layer(x)[0], layer.memory(x)[0], rtol=1e-3)
    _, state = layer.float()(x[:1].float())
    assert state["W"].shape == (1, 4, 2, 12, 12)
    assert layer.state_bytes(21) == sum(s.numel() * s.element_size() for s in state.values())


@pytest.mark.parametrize("rule", [R.stepped_hebb, R.gated_delta], ids=lambda r: r.name)
def test_nothing_of_what_came_before_a_reset_is_left(rule):
    """Not even what is not finite."""
    layer, x = LogLinear(24, heads=2, levels=5, rule=rule).double(), torch.randn(2, 21, 24, dtype=torch.float64)
    _, spoilt = layer(x * torch.nan)
    reset = torch.zeros(2, 21, dtype=torch.bool)
    reset[:, 0] = True
    assert torch.allclose(layer(x, spoilt, reset)[0], layer(x)[0], rtol=1e-9, atol=1e-12)
    first = torch.cat([x[:, :5] * torch.nan, x[:, 5:]], 1)
    assert torch.allclose(layer(first, None, reset.roll(5, 1))[0][:, 5:], layer(x[:, 5:])[0], rtol=1e-9, atol=1e-12)


BAD = {
    "cannot be read level by level": lambda: log_linear(R.oja, weights=lambdas(3, 4), **signals(R.delta, 3)),
    "'delta * 2'": lambda: log_linear(R.delta * 2, weights=lambdas(3, 4), **signals(R.delta, 3)),
    "'erase_write'": lambda: log_linear(R.erase_write, weights=lambdas(3, 4), v=torch.zeros(2, 3, 2, 4)),
    "'exp_gated_hebb'": lambda: log_linear(R.exp_gated_hebb, weights=lambdas(3, 4), v=torch.zeros(2, 3, 2, 4)),
    "missing signal 'v'": lambda: log_linear(R.hebb, weights=lambdas(3, 4)),
    "weights are (2, 3, 2, 1)": lambda: log_linear(R.hebb, weights=lambdas(3, 1), **signals(R.hebb, 3)),
    "levels is 1, expected at least 2": lambda: LogLinear(16, levels=1),
    "rotary is not an option": lambda: LogLinear(16, rotary=True),
}


@pytest.mark.parametrize("message", BAD)
def test_what_has_no_levels_is_refused(message):
    with pytest.raises(fw.FastWeightError) as refused:
        BAD[message]()
    assert message in str(refused.value)
