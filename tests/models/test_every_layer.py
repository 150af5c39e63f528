"""Whatever `fastweights rules` lists is a layer of a model: it learns from a gradient, and streams."""

import pytest
import torch

import fastweights as fw
from fastweights.models import PRESETS, SYSTEMS, LanguageModel, ModelConfig

# what acts alone makes no layer: it has no value, or nothing that it writes
PARTS = {"decay", "erase"}
NAMES = sorted({r.name for r in (*fw.rules.CATALOGUE, *fw.rules.RECURRENT)} - PARTS | set(PRESETS) | set(SYSTEMS))


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_learns(name):
    model = LanguageModel(ModelConfig(layers=(name,), d_model=16, heads=2, vocabulary=11))
    ids = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        logits, _ = model(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert losses[-1] < losses[0]
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        model.to(dtype)
        logits, memory = model(ids[:, :7])
        rest, _ = model(ids[:, 7:], memory)
        assert (torch.cat([logits, rest], 1) - model(ids)[0]).abs().max() <= bound
