"""The language model inside transformers: generation, files, training."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import fastweights as fw  # noqa: E402
from fastweights.hf import FastWeightConfig, FastWeightForCausalLM  # noqa: E402
from fastweights.models import LanguageModel, ModelConfig  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
LAYERS = [("gated_delta", "kda"), ("gated_deltanet", "softmax"), ("retnet", "mlstm"), ("linear_transformer", "window:4")]
IDS = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))


def build(layers=LAYERS[1], **more):
    torch.manual_seed(0)
    config = FastWeightConfig(layers=layers, vocab_size=50, hidden_size=32, heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more)
    return FastWeightForCausalLM(config).eval()


@pytest.fixture(params=LAYERS, ids="-".join)
def model(request):
    return build(request.param)


def test_generation_with_and_without_a_cache(model):
    for how in ({"do_sample": False}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "top_k": 5}):
        found = []
        for use_cache in (True, False):
            torch.manual_seed(1)
            found.append(model.generate(IDS, max_new_tokens=8, use_cache=use_cache, **how))
        assert torch.equal(*found), how


def test_padding_on_the_left_changes_nothing(model):
    mask, ids = torch.ones_like(IDS), IDS.clone()
    mask[1, :4] = ids[1, :4] = 0
    alone = model.generate(IDS[1:, 4:], max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[1, 9:], alone[0, 5:])


def test_padding_on_the_right_is_refused_where_it_would_be_remembered():
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0
    with pytest.raises(fw.SignalError, match="on the left"):
        build()(IDS, attention_mask=mask, use_cache=True)
    assert torch.allclose(build()(IDS, attention_mask=mask, use_cache=False).logits[1, :5], build()(IDS[1:, :5]).logits[0], atol=1e-5)


def test_packed_sequences(model):
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(IDS[:1], position_ids=positions).logits
    assert torch.allclose(packed[:, 4:], model(IDS[:1, 4:]).logits, atol=1e-5)


def test_files_and_auto_classes(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, FastWeightForCausalLM)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.embed.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for n, p in half.named_parameters() if n.endswith(("A_log", "dt_bias")))
    assert (half(IDS).logits.float() - model(IDS).logits).norm() < 0.05 * model(IDS).logits.norm()


def test_a_rule_of_ones_own_is_asked_for_and_checked(tmp_path):
    @fw.rule
    def mine(W, k: fw.Key, v: fw.Value):
        return 0.5 * W + fw.outer(v, k)

    config = FastWeightConfig(layers=("mine",), vocab_size=50, hidden_size=32, heads=2)
    model = FastWeightForCausalLM(config, {"mine": mine})
    model.save_pretrained(tmp_path)
    again = FastWeightForCausalLM.from_pretrained(tmp_path, rules={"mine": mine})
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    with pytest.raises(fw.RuleError, match="mine"):
        FastWeightForCausalLM.from_pretrained(tmp_path)


def test_a_trained_model_becomes_one_of_transformers():
    plain = LanguageModel(ModelConfig(layers=("gated_delta",), d_model=32, heads=2, vocabulary=50))
    model = FastWeightForCausalLM.of(plain, eos_token_id=2)
    assert torch.equal(model(IDS).logits, plain(IDS)[0])
    assert model.config.eos_token_id == 2


def test_gradient_checkpointing_changes_nothing(model):
    grads = []
    model.train()
    for on in (False, True):
        model.zero_grad()
        if on:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(IDS, labels=IDS).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*grads, strict=True))


def trainer(folder, steps):
    pytest.importorskip("accelerate")
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 50, (16, 12), generator=torch.Generator().manual_seed(2))]
    options = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=3, learning_rate=1e-3, seed=0, report_to=[],
        use_cpu=True, lr_scheduler_type="constant", disable_tqdm=True, logging_steps=100,
    )  # fmt: skip
    return transformers.Trainer(build(("gated_delta", "softmax")).train(), options, train_dataset=data)


def test_the_trainer_resumes_bit_for_bit(tmp_path):
    whole = trainer(tmp_path / "whole", 6)
    whole.train()
    trainer(tmp_path / "parts", 3).train()
    rest = trainer(tmp_path / "parts", 6)
    rest.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    for (n, a), b in zip(whole.model.named_parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(a, b), n


def test_a_pipeline(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz ", "<unk>"])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", padding_side="left")
    write = transformers.pipeline("text-generation", model=build(), tokenizer=tokenizer)
    found = write(["abc", "defgh"], max_new_tokens=4, do_sample=False, batch_size=2)
    assert [f[0]["generated_text"].replace(" ", "")[:3] for f in found] == ["abc", "def"]
