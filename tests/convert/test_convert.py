"""Checkpoints of other libraries become models of this one, and come back the same."""

import json

import pytest
import torch
from fla_models import CONFIGS, config, logits, weights
from safetensors.torch import load_file, save_file

import fastweights as fw
from fastweights.cli import main
from fastweights.convert import ConversionError, convert, layer_from, layer_to, load_theirs
from fastweights.models import LanguageModel, ModelConfig, load, save

IDS = torch.randint(31, (2, 17), generator=torch.Generator().manual_seed(0))


def write(folder, config, tensors, parts=1):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if parts == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names, index = sorted(tensors), {}
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        mine = {n: tensors[n] for n in names[i::parts]}
        save_file(mine, folder / file)
        index |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_fla_converts_whole_and_back(name, tmp_path):
    theirs = weights(name)
    write(tmp_path / "theirs", config(name), theirs, parts=1 if name == "gla" else 3)
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "theirs", tmp_path / "mine")
    model = load(tmp_path / "mine")
    expected = logits(name, theirs, IDS)
    assert (model(IDS)[0] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (model.double()(IDS)[0] - expected).abs().max() < 1e-6 * expected.abs().max()  # constants are float32
    assert (tmp_path / "mine" / "tokenizer.json").is_file()
    convert(tmp_path / "mine", tmp_path / "back", name)
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert again.keys() == theirs.keys()
    for n, tensor in theirs.items():
        if n != "model.lower_bounds":  # of which a softmax is what counts
            assert torch.equal(again[n], tensor), n
    convert(tmp_path / "back", tmp_path / "twice")
    assert torch.allclose(load(tmp_path / "twice")(IDS)[0].double(), expected, atol=1e-5 * expected.abs().max())
    stored = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {n: stored[n] for n in config(name) if n in stored} == {n: x for n, x in config(name).items() if n in stored}


def test_mamba2_of_transformers_converts_whole_and_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    for groups in (1, 2):
        sizes = {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": groups, "expand": 2, "chunk_size": 16}
        model = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(hidden_size=64, num_hidden_layers=2, vocab_size=31, **sizes, pad_token_id=0)
        )
        torch.manual_seed(0)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        model.save_pretrained(tmp_path / f"theirs{groups}")
        expected = model(IDS).logits
        main_ok(["convert", str(tmp_path / f"theirs{groups}"), str(tmp_path / f"mine{groups}")])
        found = load(tmp_path / f"mine{groups}")(IDS)[0]
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        main_ok(["convert", str(tmp_path / f"mine{groups}"), str(tmp_path / f"back{groups}"), "--to", "mamba2"])
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"back{groups}")
        assert torch.allclose(again(IDS).logits, expected, rtol=1e-5, atol=1e-5)
        for n, p in model.state_dict().items():
            assert torch.equal(again.state_dict()[n], p), n


def main_ok(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0


def test_what_does_not_convert_is_named(tmp_path):
    def refused(match, name="gated_deltanet", tensors=None, **changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write(folder, {**config(name), **changes}, tensors or weights(name))
        with pytest.raises(ConversionError, match=match):
            load_theirs(folder)

    refused("rwkv7.*layer_from", model_type="rwkv7")
    refused("attn is", attn={"layers": [1]})
    refused("qk_norm is 'sum'", "delta_net", qk_norm="sum")
    refused("num_householder is 3", "gated_deltaproduct", num_householder=3)
    some = weights("gla")
    refused("no tensor 'o_proj.weight'", "gla", {n: x for n, x in some.items() if n != "model.layers.1.attn.o_proj.weight"})
    refused("1 weights.*extra.weight", "gla", {**some, "extra.weight": torch.zeros(2)})
    refused("which does not hold", "gla", {**some, "model.layers.0.attn.q_proj.weight": torch.zeros(3, 24)})
    mine = tmp_path / "mine"
    save(LanguageModel(ModelConfig(layers=("gla", "softmax"), d_model=24, heads=2)), mine)
    with pytest.raises(ConversionError, match="--to one of"):
        convert(mine, tmp_path / "new")
    with pytest.raises(ConversionError, match="this model has gla, softmax"):
        convert(mine, tmp_path / "new", "gla")
    with pytest.raises(ConversionError, match="is there already"):
        convert(mine, mine, "gla")
    other = tmp_path / "other"
    save(LanguageModel(ModelConfig(layers=("gla",), d_model=24, heads=2)), other)
    with pytest.raises(ConversionError, match="options="):
        convert(other, tmp_path / "new", "gla")
    assert not (tmp_path / "new").exists()


# ---- single layers of transformers ---------------------------------------------------------------------------------------------------


def families():
    pytest.importorskip("transformers")
    from models import FAMILIES, build

    return FAMILIES, build


def linear_layer(model):
    from fastweights.convert.layers import LAYERS

    return next(m for m in model.modules() if type(m).__name__ in LAYERS)


def run(layer, x):
    y = layer(x, None, None) if "MiniMax" in type(layer).__name__ else layer(x)
    return y[0] if isinstance(y, tuple) else y


NAMES = [
    "qwen3_next", "qwen3_5", "olmo_hybrid", "kimi_linear", "bailing_hybrid", "mamba2", "bamba", "falcon_h1", "granite", "nemotron_h",
    "zamba2", "xlstm", "minimax",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_of_transformers_converts_and_back(name):
    """Outputs, gradients, in pieces with the state carried, and the weights return as they were."""
    _, build = families()
    theirs = linear_layer(build(name).double())
    torch.manual_seed(1)
    for p in theirs.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, std=0.5)
    mine = layer_from(theirs)
    x = torch.randn(2, 23, mine.d_model, dtype=torch.float64, requires_grad=True)
    y, expected = mine(x)[0], run(theirs, x)
    assert (y - expected).norm() < 1e-6 * expected.norm()  # theirs computes in float32
    g = torch.randn_like(y)
    (a,), (b,) = torch.autograd.grad((y * g).sum(), x), torch.autograd.grad((expected * g).sum(), x)
    assert (a - b).norm() < 1e-5 * b.norm()
    first, state = mine(x[:, :9])
    parts = [first]
    for t in range(9, 23):
        part, state = mine(x[:, t : t + 1], state)
        parts.append(part)
    assert torch.allclose(torch.cat(parts, 1), y, rtol=1e-9, atol=1e-10)
    before = {n: p.clone() for n, p in theirs.named_parameters()}
    with torch.no_grad():
        for p in theirs.parameters():
            p.zero_()
    layer_to(mine, theirs)
    for n, p in theirs.named_parameters():
        assert torch.allclose(p, before[n], rtol=1e-12, atol=0), n


@pytest.mark.parametrize("name", ["qwen3_5", "kimi_linear"])
def test_a_cached_state_of_transformers_is_ours_transposed(name):
    _, build = families()
    model = build(name).double()
    ids = torch.randint(97, (2, 13), generator=torch.Generator().manual_seed(0))
    seen = []

    def look(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    layer = linear_layer(model)
    layer.register_forward_pre_hook(look, with_kwargs=True)
    out = model(ids, use_cache=True)
    cache = getattr(out, "past_key_values", None) or out.cache
    theirs = cache.layers[0].recurrent_states[0]
    mine = layer_from(layer)(seen[0])[1]["W"]
    assert (mine.mT - theirs).norm() < 1e-5 * theirs.norm()


def test_other_layers_are_refused_by_name():
    with pytest.raises(ConversionError, match="a Linear is not"):
        layer_from(torch.nn.Linear(2, 2))
    _, build = families()
    theirs = linear_layer(build("qwen3_5"))
    theirs.activation = "gelu"
    with pytest.raises(ConversionError, match="activation 'gelu'"):
        layer_from(theirs)
    assert issubclass(ConversionError, fw.FastWeightError)
