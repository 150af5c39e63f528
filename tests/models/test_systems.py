"""Every system of models/systems.py: streaming is the whole, documents are packed, models are stored, gradients reach every weight."""

import pytest
import torch

from fastweights.models import SYSTEMS, LanguageModel, ModelConfig, SequenceModel, load, save
from fastweights.models.presets import Place

X = torch.randn(2, 13, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def made(name):
    torch.manual_seed(0)
    return SYSTEMS[name].build(Place(d_model=16, heads=2, d_key=8)).double()


def close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", SYSTEMS)
def test_cutting_a_sequence_changes_nothing(name):
    layer = made(name)
    whole, last = layer(X)
    assert whole.shape == X.shape
    for cuts in ([0, 1, 13], [0, 0, 5, 12, 13], list(range(14))):
        state, parts = None, []
        for a, b in zip(cuts, cuts[1:], strict=False):
            y, state = layer(X[:, a:b], state)
            parts.append(y)
        assert close(torch.cat(parts, 1), whole)
        for n in last:
            assert close(state[n].double(), last[n].double()), n


@pytest.mark.parametrize("name", SYSTEMS)
def test_packed_documents_do_not_see_each_other(name):
    layer = made(name)
    reset = torch.zeros(2, 13, dtype=torch.bool)
    reset[0, [0, 4, 5]] = reset[1, 9] = True
    packed, _ = layer(X, None, reset)
    for row, cuts in ((0, [0, 4, 5, 13]), (1, [0, 9, 13])):
        for a, b in zip(cuts, cuts[1:], strict=False):
            assert close(packed[row, a:b], layer(X[row : row + 1, a:b])[0][0])
    half, state = layer(X[:, :7], None, reset[:, :7])
    rest, _ = layer(X[:, 7:], state, reset[:, 7:])
    assert close(torch.cat([half, rest], 1), packed)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_past_does_not_see_the_future_and_rows_do_not_see_each_other(name):
    layer = made(name)
    other = X.clone()
    other[:, 8:] += 1
    assert close(layer(other)[0][:, :8], layer(X)[0][:, :8])
    assert not close(layer(other)[0][:, 8:], layer(X)[0][:, 8:])
    assert close(layer(X[1:])[0], layer(X)[0][1:])


@pytest.mark.parametrize("name", SYSTEMS)
def test_gradients_reach_every_weight_and_the_state_knows_its_size(name):
    layer = made(name)
    x = X.clone().requires_grad_()
    y, state = layer(x)
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    for n, p in layer.named_parameters():
        assert p.grad is not None, n
        assert p.grad.isfinite().all(), n
    layer = layer.float()
    _, state = layer(X[:1].float())
    assert layer.state_bytes(13) == sum(s.numel() * s.element_size() for s in state.values())


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_a_layer_of_a_model_that_is_stored(name, tmp_path):
    model = LanguageModel(ModelConfig(layers=(name, "softmax"), d_model=16, heads=2, vocabulary=31))
    ids = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
    logits, _ = model(ids)
    save(model, tmp_path / "it")
    assert torch.equal(load(tmp_path / "it")(ids)[0], logits)
    y, memory = SequenceModel(ModelConfig(layers=(name,), d_model=16, heads=2), d_in=3, d_out=5)(torch.randn(2, 4, 3))
    assert y.shape == (2, 4, 5)
    assert len(memory) == 1
