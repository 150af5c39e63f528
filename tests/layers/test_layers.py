"""Layers: built from a rule's signature, state in and state out, streaming equal to the whole."""

import copy

import pytest
import torch
from rows import AFFINE, NOT_AFFINE, R, name

import fastweights as fw
from fastweights.layers import ShortConvolution, SoftmaxAttention
from fastweights.layers.attention import rotate

# reads of W fed back as a sum without a decay grow with any trained or untrained programmer
UNBOUNDED = {"self_target", "traces", "rows_and_columns", "row_decay", "linear_decay", "product_of_reads"}


def stream(layer, x, sizes):
    state, parts = None, []
    for part in x.split(sizes, 1):
        y, state = layer(part, state)
        parts.append(y)
    return torch.cat(parts, 1), state


@pytest.mark.parametrize("rule", [*AFFINE, *NOT_AFFINE], ids=name)
def test_every_rule_is_a_layer_and_streams(rule):
    torch.manual_seed(0)
    layer = fw.FastWeightLayer(rule, 24, heads=2, d_key=5, d_value=4).double()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    whole, end = layer(x)
    assert whole.shape == x.shape
    parts, end_parts = stream(layer, x, [1, 1, 3, 4])
    assert torch.allclose(parts, whole, rtol=1e-9, atol=1e-11)
    assert end.keys() == end_parts.keys()
    assert all(torch.allclose(end[n], end_parts[n], rtol=1e-9) for n in end)
    whole.square().sum().backward()
    for n, p in layer.named_parameters():
        assert p.grad is not None, n
        assert p.grad.isfinite().all(), n


@pytest.mark.parametrize("rule", [r for r in AFFINE if r.name not in UNBOUNDED], ids=name)
def test_a_long_sequence_stays_finite(rule):
    torch.manual_seed(0)
    y, _ = fw.FastWeightLayer(rule, 32, heads=2)(torch.randn(1, 600, 32))
    assert y.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"decay": "channel"}, {"key_heads": 2}, {"key_heads": 1, "decay": "channel"}, {"conv": 1}, {"conv": 2},
        {"feature_map": "elu1", "norm": "sum"}, {"negative_eigenvalues": True}, {"output_norm": False, "output_gate": False},
        {"d_key": 3, "d_value": 7}, {"form": "recurrent"},
    ],
    ids=str,
)  # fmt: skip
def test_options(options):
    torch.manual_seed(0)
    layer = fw.FastWeightLayer(R.gated_delta, 24, heads=4, **options).double()
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    assert torch.allclose(stream(layer, x, [3, 1, 7])[0], layer(x)[0], rtol=1e-9, atol=1e-12)


def test_roles_shape_the_signals():
    layer = fw.FastWeightLayer(R.gated_delta, 24, heads=2, negative_eigenvalues=True)
    signals, _ = layer.programmer(torch.randn(3, 50, 24) * 5)
    assert signals["k"].norm(dim=-1).max() <= 1 + 1e-5
    assert 1 < signals["beta"].max() <= 2
    assert signals["beta"].min() >= 0
    assert signals["g"].max() <= 0
    assert fw.FastWeightLayer(R.normalised_hebb, 24, heads=2).programmer(torch.randn(1, 5, 24))[0]["k"].min() > 0


def test_a_signal_of_ones_own():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return torch.full((*x.shape[:2], 2), -0.1, dtype=x.dtype)

    layer = fw.FastWeightLayer(R.decayed_hebb, 16, heads=2, custom={"g": Fixed()})
    signals, _ = layer.programmer(torch.randn(1, 4, 16))
    assert (signals["g"] == -0.1).all()
    assert "g" not in layer.programmer.decays


def test_a_programmer_of_ones_own():
    class Constant(torch.nn.Module):
        def forward(self, x, conv):
            k = torch.ones(*x.shape[:2], 2, 8, dtype=x.dtype)
            return {"q": k, "k": k, "v": k}, None

    _, state = fw.FastWeightLayer(R.hebb, 16, heads=2, programmer=Constant())(torch.randn(1, 4, 16))
    assert state.keys() == {"W"}
    assert (state["W"] == 4).all()


BAD = {
    "is a str, expected a Rule": lambda: fw.FastWeightLayer("delta", 32),
    "not a multiple of heads": lambda: fw.FastWeightLayer(R.delta, 30),
    "key_heads is 3": lambda: fw.FastWeightLayer(R.delta, 32, key_heads=3),
    "feature_map is 'gelu'": lambda: fw.FastWeightLayer(R.delta, 32, feature_map="gelu"),
    "takes one decay a head": lambda: fw.FastWeightLayer(R.exp_gated_hebb, 32, decay="channel"),
    "has no signal 'z'": lambda: fw.FastWeightLayer(R.delta, 32, custom={"z": torch.nn.Identity()}),
    "another programmer was given": lambda: fw.FastWeightLayer(R.delta, 32, programmer=torch.nn.Identity(), conv=2),
    "expected a tensor (B, T, d_model = 32)": lambda: fw.FastWeightLayer(R.delta, 32)(torch.zeros(2, 32)),
    "rotary": lambda: SoftmaxAttention(36, heads=4),
    "window is 0": lambda: SoftmaxAttention(32, window=0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_refused(message):
    with pytest.raises(fw.FastWeightError) as refused:
        BAD[message]()
    assert message in str(refused.value)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_attention_streams(window):
    torch.manual_seed(0)
    layer = SoftmaxAttention(16, heads=2, window=window).double()
    x = torch.randn(2, 17, 16, dtype=torch.float64)
    assert torch.allclose(stream(layer, x, [5, 1, 1, 10])[0], layer(x)[0], rtol=1e-10)
    state = stream(layer, x, [5, 12])[1]
    assert state["k"].shape[2] == (17 if window is None else min(window - 1, 17))


def test_attention_is_softmax_within_its_window():
    torch.manual_seed(0)
    layer = SoftmaxAttention(8, heads=1, window=3).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    q, k, v = layer.project(x)[0].chunk(3, -1)
    places = torch.arange(9)
    q, k = rotate(q, places), rotate(k, places)
    rows = []
    for t in range(9):
        seen = slice(max(t - 2, 0), t + 1)
        rows.append(torch.softmax(k[seen] @ q[t] / 8**0.5, 0) @ v[seen])
    assert torch.allclose(layer.out(torch.stack(rows)), layer(x)[0][0])


def test_the_short_convolution_is_causal_and_depthwise():
    torch.manual_seed(0)
    conv = ShortConvolution(3, 4).double()
    x = torch.randn(1, 10, 3, dtype=torch.float64)
    want = torch.nn.functional.conv1d(torch.nn.functional.pad(x.mT, (3, 0)), conv.weight, groups=3).mT
    assert torch.allclose(conv(x, None)[0], want)


def test_state_bytes_are_those_of_the_state():
    for layer in (
        fw.FastWeightLayer(R.exp_gated_hebb, 32, heads=2),
        SoftmaxAttention(32, heads=2),
        SoftmaxAttention(32, heads=2, window=5),
    ):
        state = layer(torch.randn(1, 40, 32))[1]
        assert sum(s.numel() * s.element_size() for s in state.values()) == layer.state_bytes(40)


def test_a_layer_can_be_copied():
    layer = fw.FastWeightLayer(R.gated_delta, 16, heads=2)
    twin = copy.deepcopy(layer)
    x = torch.randn(1, 5, 16)
    assert torch.equal(twin(x)[0], layer(x)[0])
    assert twin.rule is layer.rule
    assert twin.programmer.project.weight is not layer.programmer.project.weight


def test_a_state_that_lacks_a_part_is_refused():
    from fastweights.models import layer_of

    layer = layer_of("retnet", 16, heads=2)
    x = torch.randn(1, 3, 16)
    _, state = layer(x)
    with pytest.raises(fw.SignalError, match="position is missing"):
        layer(x, {"W": state["W"]})


def test_a_convolution_of_one_token_keeps_nothing():
    conv = ShortConvolution(3, width=1)
    x, state = torch.randn(2, 4, 3), None
    for _ in range(2):
        y, state = conv(x, state)
        assert torch.allclose(y, x * conv.weight[:, 0, 0])
        assert state.shape == (2, 0, 3)


def test_rates_and_gates_have_more_than_sixteen_bits():
    """1 - 2^-10 has no place in bfloat16, and a rate of it is not a rate of 1."""
    rule = R.erase_write
    programmer = fw.FastWeightLayer(rule, 16, heads=2).bfloat16().programmer
    signals, _ = programmer(torch.randn(1, 3, 16, dtype=torch.bfloat16))
    wide = {n for n, s in rule.signals.items() if s.role.name.endswith(("Rate", "Gate", "LogDecay"))}
    assert {n for n, x in signals.items() if x.dtype == torch.float32} == wide
    assert {x.dtype for n, x in signals.items() if n not in wide} == {torch.bfloat16}


@pytest.mark.parametrize("rule", [R.oja, R.gated_oja, R.oja.T], ids=name)
def test_what_says_what_is_erased_has_length_one(rule):
    """Else large inputs make W grow without bound: (I - beta v v^T) W has an eigenvalue below -1 once beta |v|^2 > 2."""
    torch.manual_seed(0)
    y, state = fw.FastWeightLayer(rule, 16, heads=2)(30 * torch.randn(1, 400, 16))
    assert y.isfinite().all()
    assert state["W"].norm() < 100


@fw.rule
def gated_vectors(W, u: fw.ValueVector, w: fw.KeyVector, b: fw.Gate, g: fw.LogDecay):
    W = b * g.exp() * W + fw.outer(u, w)
    return W, W @ w


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_without_keys_and_values(dtype):
    y, _ = fw.FastWeightLayer(gated_vectors, 32, heads=2).to(dtype)(torch.randn(2, 5, 32).to(dtype))
    assert y.dtype == dtype


def test_the_share_of_a_value_that_all_heads_have():
    """A programmer of one's own may give one value head for all."""
    layer = fw.FastWeightLayer(R.hebb, 16, heads=2, skip=True)

    class Shared(torch.nn.Module):
        def forward(self, x, conv=None):
            q, k, v = x.unflatten(-1, (2, 8)).split(1, 2)[0].expand(-1, -1, 2, -1), x.unflatten(-1, (2, 8)), x[..., None, :8]
            return {"q": q, "k": k, "v": v}, conv

    layer.programmer = Shared()
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    signals, _ = layer.programmer(x)
    y = fw.scan(R.hebb, **signals).y
    expected = layer.out(layer._finish(x, (y + signals["v"]).flatten(2)))
    assert torch.allclose(layer(x)[0], expected, atol=1e-6)
