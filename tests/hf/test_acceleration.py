"""Models of transformers compute the same with our functions in the place of theirs, and are as they were afterwards."""

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

import models  # noqa: E402

from fastweights import hf  # noqa: E402
from fastweights.engine.kernels import library  # noqa: E402
from fastweights.hf import acceleration  # noqa: E402

transformers.logging.set_verbosity_error()
IDS = torch.randint(3, 97, (2, 50), generator=torch.Generator().manual_seed(1))


since_5_15 = pytest.mark.skipif(models.OLD, reason="transformers has no such thing before 5.15")


def logits(model, ids=IDS, **more):
    with torch.no_grad():
        return model(ids, **more).logits


def close(a, b, bound=1e-5):
    assert (a - b).norm() <= bound * b.norm()


@pytest.fixture(params=list(models.FAMILIES))
def model(request):
    built = models.build(request.param)
    # the norm, the scan, the convolution, the gated norm (which Falcon-H1 does without); the steps of the scan and the convolution
    built.seams = {"xlstm": (1, 0), "minimax": (2, 0), "falcon_h1": (3, 2)}.get(request.param, (4, 2))
    return built


def calls(monkeypatch):
    """How often each of our functions is entered."""
    seen = []
    for name, seam in acceleration._BY_NAME.items():

        def counted(*args, name=name, instead=seam.instead, **kwargs):
            seen.append(name)
            return instead(*args, **kwargs)

        monkeypatch.setitem(acceleration._BY_NAME, name, dataclasses.replace(seam, instead=counted))
    return seen


@pytest.mark.skipif(models.OLD, reason="layers keep the functions that they were made with")
def test_logits_and_generation_are_the_same(model, monkeypatch):
    seen = calls(monkeypatch)
    plain, written = logits(model), model.generate(IDS[:, :11], max_new_tokens=12, do_sample=False)
    assert not seen
    with hf.enable() as report:
        close(logits(model), plain)
        assert len(set(seen)) == model.seams[0]
        seen.clear()
        assert torch.equal(model.generate(IDS[:, :11], max_new_tokens=12, do_sample=False), written)
        assert len(set(seen)) == sum(model.seams)
    assert report.exchanged
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("name", [n.removesuffix(".forward") for n in acceleration._BY_NAME if "RMSNorm" in n])
def test_norms_are_the_same(name):
    files = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    path = next((path for path in files if f"class {name}(" in path.read_text()), None)
    if path is None:
        pytest.skip("this version of transformers has no such layer")
    make = getattr(importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}"), name)
    variants = [{"n_groups": 3}, {"norm_before_gate": False}] if name == "FalconH1RMSNormGated" else [{}]
    for more in [{"group_size": 8}] if "group_size" in inspect.signature(make).parameters else variants:
        norm = make(24, **more)
        draw = torch.Generator().manual_seed(0)
        norm.weight.data = torch.randn(24, generator=draw)
        *given, seen = (torch.randn(2, 5, 24, generator=draw) for _ in range(3 if "Gated" in name else 2))
        both = []
        for fast in (False, True):
            leaves = [x.clone().requires_grad_() for x in given]
            with hf.enable() if fast else contextlib.nullcontext():
                y = norm(*leaves)
            both.append([y, *torch.autograd.grad((y * seen).sum(), [*leaves, norm.weight])])
            assert ("_GatedNorm" in type(y.grad_fn).__name__) == (fast and library().lib is not None)
        assert all((a - b).norm() <= 1e-6 * b.norm() for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("types", [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_types_are_those_of_transformers(types):
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

    weight, x = (getattr(torch, t) for t in types)
    norm, x = MambaRMSNormGated(24, 8).to(weight), torch.randn(2, 5, 24).to(x)
    with hf.enable():
        fast = norm(x, x)
    assert fast.dtype == norm(x, x).dtype


def test_a_scan_inside_of_an_unknown_layer_is_refused_by_name(monkeypatch):
    from transformers.models.mamba2 import modeling_mamba2 as module

    monkeypatch.setattr(module, "OtherMixer", type("OtherMixer", (), {"torch_forward": lambda self: None}), raising=False)
    with hf.enable() as report:
        assert "not known here" in report.refused["modeling_mamba2.OtherMixer.torch_forward"]


def test_an_accelerated_model_is_the_same_in_both_eras(model):
    """Whole, padded, written, and several tokens on top of a cache."""
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0

    def everything():
        written = model.generate(IDS[:, :11], max_new_tokens=12, do_sample=False)
        first = model(IDS[:, :20], use_cache=True)
        cache = {n: first[n] for n in ("past_key_values", "cache_params") if first.get(n) is not None}
        with torch.no_grad():
            more = model(IDS[:, 20:33], use_cache=True, **cache).logits
        return written, logits(model), logits(model, attention_mask=mask)[mask.bool()], more.detach()

    plain = everything()
    hf.accelerate(model)
    fast = everything()
    hf.restore(model)
    assert torch.equal(fast[0], plain[0])
    for a, b in zip(fast[1:], plain[1:], strict=True):
        close(a, b)
    assert torch.equal(logits(model), plain[1])


@since_5_15
@pytest.mark.parametrize("family", ["mamba2", "bamba", "falcon_h1", "granite", "nemotron_h", "zamba2"])
def test_layers_with_a_scan_of_their_own_are_those_of_today(family):
    """What stands in for Mamba-2 and its relatives before transformers 5.15, beside the layers since."""
    model = models.build(family)
    known = acceleration._OLD_LAYERS
    layer = next(x for x in model.modules() if type(x).__name__ in known)
    instead = known[type(layer).__name__]
    layer.time_step_min, layer.time_step_limit = 0.0, (0.0, float("inf"))
    x, draw = torch.randn(2, 40, 64, requires_grad=True), torch.randn(2, 40, 64)
    mask = torch.ones(2, 40)
    mask[1, :7] = 0
    both = [f(x, None, mask) for f in (layer, functools.partial(instead, layer))]
    close(both[1], both[0])
    wanted = [x, layer.A_log, layer.dt_bias, layer.D, layer.conv1d.weight, layer.in_proj.weight]
    for a, b in zip(*[torch.autograd.grad((y * draw).sum(), wanted) for y in reversed(both)], strict=True):
        close(a, b)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        whole = instead(layer, x)
        close(torch.cat([instead(layer, piece, cache) for piece in x.split([13, 1, 1, 20, 5], 1)], 1), whole)


def test_gradients_are_the_same(model):
    grads = []
    for fast in (False, True):
        model.zero_grad()
        if fast:
            hf.enable()
        model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
        hf.disable()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    whole = torch.stack([g.norm() for g in grads[0].values()]).norm()
    for name, g in grads[0].items():
        assert (grads[1][name] - g).norm() <= 2e-4 * g.norm() + 1e-7 * whole, name


def test_left_padding(model):
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0
    plain = logits(model, attention_mask=mask)
    with hf.enable():
        close(logits(model, attention_mask=mask)[mask.bool()], plain[mask.bool()])


def test_bfloat16(model):
    model = model.bfloat16()
    plain = logits(model).float()
    with hf.enable():
        close(logits(model).float(), plain, 0.05)


def test_one_model_and_back(monkeypatch):
    seen = calls(monkeypatch)
    mine, other = models.build("qwen3_next"), models.build("qwen3_next")
    plain = logits(mine)
    report = hf.accelerate(mine)
    assert "modeling_qwen3_next.torch_chunk_gated_delta_rule" in report.exchanged
    assert torch.equal(logits(other), plain)
    assert not seen
    close(logits(mine), plain)
    assert seen
    hf.restore(mine)
    seen.clear()
    assert torch.equal(logits(mine), plain)
    assert not seen
    assert not mine.model.layers[0].linear_attn._forward_pre_hooks
    assert not mine.model.layers[0].linear_attn._forward_hooks


def test_copies_of_an_accelerated_model_are_models_of_their_own():
    model = models.build("mamba2")
    plain = logits(model)
    hf.accelerate(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(logits(twin), plain)
        with torch.no_grad():
            for p in twin.backbone.layers.parameters():
                p.zero_()
        assert twin.backbone.layers[0].mixer(torch.randn(1, 5, 64)).abs().max() == 0
        hf.restore(twin)
        close(logits(model), plain)
    hf.restore(model)
    assert torch.equal(logits(model), plain)


def test_a_layer_that_fails_leaves_the_switch_as_it_was():
    model = models.build("mamba2")
    hf.accelerate(model)
    with pytest.raises(Exception, match=r"shape|size|mat"):
        model.backbone.layers[0].mixer(torch.randn(1, 5, 3))
    assert acceleration._here.depth == 0
    hf.restore(model)


def test_a_compiled_model_runs_again_and_again():
    model = models.build("mamba2")
    plain = logits(model)
    hf.accelerate(model)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        with torch.no_grad():
            close(compiled(IDS, use_cache=False).logits, plain)
    compiled(IDS, use_cache=False).logits.sum().backward()
    hf.restore(model)


def test_nested_switches_end_one_by_one():
    module = sys.modules["transformers.models.qwen3_next.modeling_qwen3_next"]
    original = module.torch_chunk_gated_delta_rule
    with hf.enable():
        with hf.enable():
            pass
        assert module.torch_chunk_gated_delta_rule is not original
    assert module.torch_chunk_gated_delta_rule is original
    hf.disable()


@since_5_15
def test_packed_sequences_of_kimi():
    """transformers itself runs them into each other."""
    layer = models.build("kimi_linear").model.layers[0].self_attn
    x, ends = torch.randn(1, 30, 64), torch.tensor([0, 12, 30], dtype=torch.int32)
    alone = [layer(x[:, a:b]) for a, b in ((0, 12), (12, 30))]
    with hf.enable():
        close(layer(x, cu_seq_lens_q=ends), torch.cat(alone, 1))


@since_5_15
def test_packed_sequences_work():
    model = models.build("qwen3_next")
    layer = model.model.layers[0].linear_attn
    x, ends = torch.randn(1, 30, 64), torch.tensor([0, 12, 30], dtype=torch.int32)
    alone = [layer(x[:, a:b]) for a, b in ((0, 12), (12, 30))]
    with pytest.raises(ValueError, match="packed"):
        layer(x, cu_seq_lens_q=ends)
    with hf.enable():
        close(layer(x, cu_seq_lens_q=ends), torch.cat(alone, 1))


@since_5_15
def test_packed_sequences_of_mamba():
    layer = models.build("mamba2").backbone.layers[0].mixer
    x, index = torch.randn(1, 30, 64), torch.tensor([[0] * 12 + [1] * 18], dtype=torch.int32)
    alone = [layer(x[:, a:b]) for a, b in ((0, 12), (12, 30))]
    with hf.enable():
        close(layer(x, seq_idx=index), torch.cat(alone, 1))


@pytest.mark.skipif(not models.OLD, reason="as it was before transformers 5.15")
@pytest.mark.parametrize(
    ("family", "kind"), [("bamba", "BambaMixer"), ("granite", "GraniteMoeHybridMambaLayer"), ("qwen3_next", "Qwen3NextGatedDeltaNet")]
)
def test_packed_sequences_of_old(family, kind):
    layer = next(x for x in models.build(family).modules() if type(x).__name__ == kind)
    x, index = torch.randn(1, 30, 64), torch.tensor([[0] * 12 + [1] * 18], dtype=torch.int32)
    alone = torch.cat([layer(x[:, a:b]) for a, b in ((0, 12), (12, 30))], 1)
    hf.accelerate(layer)
    close(layer(x, seq_idx=index, cu_seq_lens_q=torch.tensor([0, 12, 30], dtype=torch.int32)), alone)
    hf.restore(layer)


def test_an_unknown_signature_is_refused_and_named():
    module = types.ModuleType("transformers.models.made_up.modeling_made_up")
    module.torch_chunk_gated_delta_rule = lambda q, k, v: v
    sys.modules[module.__name__] = module
    try:
        kept = module.torch_chunk_gated_delta_rule
        with hf.enable() as report:
            assert module.torch_chunk_gated_delta_rule is kept
        assert "initial_state" in report.refused["modeling_made_up.torch_chunk_gated_delta_rule"]
    finally:
        del sys.modules[module.__name__]


def test_layers_that_keep_their_functions_are_served_too():
    """As before 5.15: a layer holds its function as an attribute."""

    class Layer(torch.nn.Module):
        def __init__(self, function):
            super().__init__()
            self.chunk_gated_delta_rule, self.causal_conv1d_fn = function, None

        def forward(self, **given):
            return self.chunk_gated_delta_rule(**given)[0]

    module = types.ModuleType("transformers.models.older.modeling_older")
    sys.modules[module.__name__] = module
    Layer.__module__ = module.__name__
    original = sys.modules["transformers.models.qwen3_next.modeling_qwen3_next"].torch_chunk_gated_delta_rule
    layer = Layer(original)
    given = {n: torch.randn(1, 20, 2, 8) for n in ("query", "key", "value")}
    given |= {"g": -torch.rand(1, 20, 2), "beta": torch.rand(1, 20, 2), "use_qk_l2norm_in_kernel": True}
    try:
        plain = layer(**given)
        hf.accelerate(layer)
        assert layer.chunk_gated_delta_rule is not original
        close(layer(**given), plain)
        columns = {"x": torch.randn(2, 32, 20), "weight": torch.randn(32, 4), "bias": torch.randn(32), "activation": "silu"}
        close(layer.causal_conv1d_fn(**columns, seq_idx=None), acceleration.functions.conv_in_torch(**columns))
        with hf.enable():
            close(layer.causal_conv1d_fn(**columns), acceleration.functions.conv_in_torch(**columns))
        hf.restore(layer)
        assert layer.chunk_gated_delta_rule is original
        assert layer.causal_conv1d_fn is None
    finally:
        del sys.modules[module.__name__]


def test_another_device_goes_to_the_original(monkeypatch):
    seen = calls(monkeypatch)
    module = sys.modules["transformers.models.qwen3_next.modeling_qwen3_next"]
    given = {n: torch.empty(1, 20, 2, 8, device="meta") for n in ("query", "key", "value")}
    given |= {n: torch.empty(1, 20, 2, device="meta") for n in ("g", "beta")}
    with hf.enable():
        module.torch_chunk_gated_delta_rule(**given)
    assert not seen


@since_5_15
def test_models_imported_later_are_exchanged_too():
    code = """
import transformers
from fastweights import hf
with hf.enable() as report:
    from transformers.models.kimi_linear import modeling_kimi_linear as m
    assert hasattr(m.chunk_kimi_delta_attention, "fastweights_original")
    assert "modeling_kimi_linear.chunk_kimi_delta_attention" in report.exchanged
assert not hasattr(m.chunk_kimi_delta_attention, "fastweights_original")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.skipif(library().lib is None, reason=f"no kernels: {library().why}")
def test_a_decoded_token_rewrites_the_cache_in_place():
    state = torch.randn(1, 2, 8, 6)
    given = {n: torch.randn(1, 1, 2, 8) for n in ("query", "key")} | {"value": torch.randn(1, 1, 2, 6)}
    given |= {"g": -torch.rand(1, 1, 2), "beta": torch.rand(1, 1, 2), "output_final_state": True}
    with torch.no_grad():
        _, after = acceleration.functions.gated_delta(**given, initial_state=state)
    assert after.data_ptr() == state.data_ptr()
    kept = state.clone()
    with torch.no_grad():
        _, none = acceleration.functions.gated_delta(**given | {"output_final_state": False}, initial_state=state)
    assert none is None
    assert torch.equal(state, kept)
