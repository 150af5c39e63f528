"""Rules and models go to another process: a rule by the name under which a module has it, or by what it is made of."""

import pickle
import subprocess
import sys

import pytest
import torch

import fastweights as fw
from fastweights import Key, Value
from fastweights.language.rule import imported
from fastweights.models import LanguageModel, ModelConfig

R = fw.rules
MADE = [R.decay >> R.delta, R.delta * 3, R.delta.T, (R.decay >> R.hebb * 2)]


@pytest.mark.parametrize("rule", [*R.CATALOGUE, *R.RECURRENT, *MADE], ids=lambda r: r.name)
def test_a_rule_comes_back(rule):
    again = pickle.loads(pickle.dumps(rule))
    assert again == rule
    if rule.origin[0] is imported:
        assert again is rule


def test_a_rule_that_nobody_finds_is_refused():
    @fw.rule
    def hidden(W, k: Key, v: Value):
        return W + fw.outer(v, k)

    with pytest.raises(fw.RuleError, match=r"'hidden' cannot be pickled.*<locals>.hidden; define it at the top of a module"):
        pickle.dumps(hidden)


def test_a_model_goes_to_another_process(tmp_path):
    layers = ("gated_deltanet", "retnet", "fast_weight_delta", "ttt_linear", "window:4")
    model = LanguageModel(ModelConfig(layers=layers, d_model=16, heads=2, vocabulary=11))
    ids = torch.arange(7)[None]
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, ids, model(ids)[0].detach())))
    code = "import pickle, sys; model, ids, y = pickle.load(open(sys.argv[1], 'rb')); print(bool((model(ids)[0] - y).abs().max() < 1e-5))"
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pickle")], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True"
