"""The language model: files, own rules, streams."""

import json

import pytest
import torch
from rows import R

import fastweights as fw
from fastweights import Key, Rate, Value, outer
from fastweights.models import LanguageModel, ModelConfig, Sampler, Stream, load, save


@fw.rule
def mine(W, k: Key, v: Value, beta: Rate):
    return W + outer(beta * (v - 0.9 * W @ k), k)


@fw.rule
def not_mine(W, k: Key, v: Value, beta: Rate):
    return W + outer(beta * (v - 0.8 * W @ k), k)


SMALL = {"d_model": 32, "heads": 2}
HYBRID = ("gated_delta", "window:4", "exp_gated_hebb", "softmax")


def model_of(*layers, rules=None, **options):
    return LanguageModel(ModelConfig(layers=layers, **SMALL, **options), rules)


def test_reading_in_parts_is_reading_the_whole():
    model = model_of(*HYBRID).double()
    ids = torch.randint(0, 256, (2, 23))
    whole, _ = model(ids)
    memory, parts = None, []
    for part in ids.split([1, 9, 1, 12], 1):
        logits, memory = model(part, memory)
        parts.append(logits)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-9)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_seed_alone():
    before = torch.get_rng_state()
    a, b, c = model_of("delta"), model_of("delta"), LanguageModel(ModelConfig(layers=("delta",), **SMALL), seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embed.weight, c.embed.weight)


def test_saved_and_loaded_is_the_same(tmp_path):
    model = model_of(*HYBRID, decay="channel").eval()
    save(model, tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    again = load(tmp_path / "m")
    ids = torch.randint(0, 256, (1, 9))
    assert torch.equal(model(ids)[0], again(ids)[0])


def test_a_rule_of_ones_own_is_asked_for_and_checked(tmp_path):
    save(model_of("mine", "delta", rules={"mine": mine}), tmp_path)
    with pytest.raises(fw.RuleError, match=r"--rule FILE.py:mine"):
        load(tmp_path)
    with pytest.raises(fw.RuleError, match="fingerprint differs"):
        load(tmp_path, {"mine": not_mine})
    assert load(tmp_path, {"mine": mine}).rules["mine"] is mine
    assert "rows" not in (tmp_path / "config.json").read_text()


def test_a_rule_of_the_catalogue_is_checked_too(tmp_path):
    save(model_of("delta"), tmp_path)
    with pytest.raises(fw.RuleError, match="fingerprint differs"):
        load(tmp_path, {"delta": R.oja})


def test_composed_rules_are_layer_names(tmp_path):
    save(model_of("delta * 2", "gated_delta.T"), tmp_path)
    assert load(tmp_path).rules["delta * 2"] == R.delta * 2


def test_broken_files_are_refused_with_the_reason(tmp_path):
    model = model_of("delta")
    for break_it, message in [
        (lambda d: (d / "config.json").unlink(), "is not there"),
        (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
        (lambda d: (d / "config.json").write_text('{"format": 2}'), "format 2"),
        (lambda d: (d / "model.safetensors").unlink(), "is not there"),
        (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:1000]), "cut off"),
    ]:
        save(model, tmp_path / "m")
        break_it(tmp_path / "m")
        with pytest.raises(fw.FastWeightError, match=message):
            load(tmp_path / "m")
    save(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"d_model": 64}))
    with pytest.raises(fw.FastWeightError, match="does not fit its config"):
        load(tmp_path / "m")


def test_a_stream_continues_bit_for_bit(tmp_path):
    model = model_of(*HYBRID).eval()
    stream = Stream(model, seed=3)
    stream.feed(list(b"once upon a time"))
    list(stream.generate(5))
    stream.save(tmp_path / "memory.safetensors")
    copied, loaded = stream.copy(), Stream.load(tmp_path / "memory.safetensors", model)
    sampler = Sampler(0.9, top_k=50, top_p=0.95)
    written = list(stream.generate(30, sampler))
    assert written == list(copied.generate(30, sampler)) == list(loaded.generate(30, sampler))
    assert stream.tokens == loaded.tokens == 16 + 5 + 30
    with pytest.raises(fw.FastWeightError, match="memory of another model"):
        Stream.load(tmp_path / "memory.safetensors", model_of("delta"))


def test_the_memory_of_fast_weights_does_not_grow():
    model = model_of("gated_delta", "exp_gated_hebb")
    stream = Stream(model)
    stream.feed([1])
    sizes = [s.numel() for state in stream.memory for s in state.values()]
    stream.feed(list(range(200)))
    assert sizes == [s.numel() for state in stream.memory for s in state.values()]
    assert sum(sizes) * 4 == model.state_bytes(1) == model.state_bytes(10**9)


def test_sampling():
    logits = torch.tensor([0.0, 3.0, 2.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    assert Sampler(0).draw(logits, generator) == 1
    assert {Sampler(5.0, top_k=2).draw(logits, generator) for _ in range(200)} == {1, 2}
    assert {Sampler(1.0, top_p=0.5).draw(logits, generator) for _ in range(50)} == {1}
    assert {Sampler(9.0).draw(logits, generator) for _ in range(300)} == {0, 1, 2, 3}
    counts = torch.bincount(torch.tensor([Sampler(1.0).draw(logits, generator) for _ in range(4000)]), minlength=4) / 4000
    assert torch.allclose(counts, logits.softmax(-1), atol=0.03)


BAD = {
    "temperature is -1": lambda: Sampler(-1),
    "top_k is 0": lambda: Sampler(top_k=0),
    "top_p is 2": lambda: Sampler(top_p=2),
    "nothing yet": lambda: next(Stream(model_of("delta")).generate(1)),
    "outside the vocabulary": lambda: Stream(model_of("delta")).feed([256]),
    "window:N": lambda: model_of("window:x"),
    "'gated_delt', which is neither a preset nor a rule": lambda: model_of("gated_delt"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_refused(message):
    with pytest.raises(fw.FastWeightError) as refused:
        BAD[message]()
    assert message in str(refused.value)
