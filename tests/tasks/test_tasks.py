"""What holds for every task: batches are a function of (seed, step), validation is not trained on, options are checked."""

import dataclasses
import gzip

import numpy as np
import pytest
import torch

import fastweights as fw
from fastweights.tasks import ENVIRONMENTS, TASKS, describe, task
from fastweights.tasks.source import IGNORED

SMALL = {
    "recall": "pairs=4", "mqar": "tokens=32,vocabulary=64", "copying": "lengths=3-9", "parity": "lengths=3-20", "modular": "lengths=3-20",
    "words": "lengths=3-20", "language": "lengths=2-20", "listops": "depth=3", "code": "statements=10", "retrieval": "pairs=6",
    "overwrite": "pairs=6", "icl-regression": "d=3,examples=5", "fewshot": "side=8", "continual": "side=8,parts=2", "timeseries": "",
    "tmaze": "corridor=5", "bandit": "trials=20",
}  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with data sets in the form of the packages, but small."""
    place = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    head = "# made up\n@problemName Tiny\n@classLabel true left right\n@data\n"
    for part, n in (("TRAIN", 8), ("TEST", 5)):
        lines = []
        for i in range(n):
            channels = [",".join(f"{x:.4f}" for x in row) for row in draw.standard_normal((3, 4 + i))]
            lines.append(":".join([*channels, ("left", "right")[i % 2]]))
        (place / f"Tiny_{part}.ts").write_text(head + "\n".join(lines) + "\n")
    table = np.concatenate([draw.integers(0, 17, (60, 64)), np.arange(60)[:, None] % 10], 1)
    with gzip.open(place / "digits.csv.gz", "wt") as file:
        np.savetxt(file, table, delimiter=",", fmt="%d")
    return place


@pytest.fixture(params=TASKS)
def source(request, folder):
    options = SMALL[request.param] or f"series=Tiny,folder={folder}"
    return task(f"{request.param}:{options}")


def equal(a, b):
    return all(x.shape == y.shape and torch.equal(x.nan_to_num(nan=-77), y.nan_to_num(nan=-77)) for x, y in zip(a, b, strict=True))


def test_any_batch_can_be_had_at_any_time(source):
    alone = source.batch(3, 7, 32)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    several = [source.batch(3, step, 32) for step in (9, 7, 0)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert equal(alone, several[1])
    assert not any(equal(alone, other) for other in (several[0], several[2], source.batch(4, 7, 32)))
    assert all(equal(a, b) for a, b in zip(source.validation(8), source.validation(8), strict=True))


def test_inputs_and_targets_have_their_form(source):
    for inputs, targets in (source.batch(0, 0, 5), *source.validation(5)):
        if hasattr(source, "vocabulary"):
            assert inputs.dtype == targets.dtype == torch.int64
            assert inputs.shape == targets.shape
            assert 0 <= inputs.min() <= inputs.max() < source.vocabulary
            classes = source.vocabulary
        else:
            assert inputs.dtype == torch.float32
            assert inputs.shape == (*targets.shape[:2], source.d_in)
            assert inputs.isfinite().all()
            classes = source.d_out
        if targets.is_floating_point():
            assert targets.shape[-1] == source.d_out
            assert torch.equal(targets.isnan().any(-1), targets.isnan().all(-1))
            assert (~targets.isnan()).any(-1).any(-1).all()
        else:
            counted = targets != IGNORED
            assert counted.any(-1).all()
            assert 0 <= targets[counted].min() <= targets[counted].max() < classes


def test_tasks_are_values_whose_identity_tells_them_apart(source):
    options = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
    again = type(source)(**options)
    assert again == source
    assert hash(again) == hash(source)
    for option, value in options.items():
        if type(value) in (int, float) and option not in ("power", "vocabulary"):
            other = type(source)(**{**options, option: value / 2 if isinstance(value, float) else value + 2})
            assert (other.identity == source.identity) == (value == 0.0 and isinstance(value, float)), option
    with pytest.raises(dataclasses.FrozenInstanceError):
        source.vocabulary = 1


def rows(batches):
    return {tuple(row) for inputs, _ in batches for row in inputs.flatten(1).tolist()}


@pytest.mark.parametrize("text", [
    "recall", "mqar", "copying:lengths=20", "parity:lengths=60-80", "modular:lengths=40", "modular:brackets=true,lengths=40",
    "words:lengths=30",
    "language:language=dyck1,lengths=80", "language:language=shuffle2,lengths=60", "listops:depth=8", "code", "retrieval", "overwrite",
    "icl-regression", "fewshot:side=8", "continual:side=8", "bandit",
])  # fmt: skip
def test_validation_is_not_trained_on(text):
    source = task(text)
    held_out = rows(source.validation(32))
    assert len(held_out) == 128
    assert not held_out & rows(source.batch(0, step, 32) for step in range(8))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("copying", lambda n: 2 * n),
        ("parity", lambda n: n + 1),
        ("parity:start=false", lambda n: n),
        ("modular", lambda n: n + n % 2),  # an odd number of symbols, and =
        ("modular:brackets=true", lambda n: n + 1),
        ("words", lambda n: n + 1),
        ("language", lambda n: n),
        ("language:language=dyck1", lambda n: n - n % 2),
        ("language:language=reset_dyck1,start=true", lambda n: n + 1),
        ("language:language=counter3", lambda n: 3 * n),
    ],
)
def test_lengths_are_kept_and_those_for_testing_are_longer(text, tokens):
    name, _, options = text.partition(":")
    source = task(f"{name}:lengths=4-9,longer=12-20,{options}")
    for this, lengths in ((source, range(4, 10)), (source.extended(), range(12, 21))):
        _, targets = this.batch(0, 0, 400)
        found = ((targets != IGNORED).long() * torch.arange(1, targets.shape[1] + 1)).max(1).values
        assert set(found.tolist()) == {tokens(n) for n in lengths}
        assert targets.shape[1] == max(found)
    assert source.extended().extended() is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parit", "did you mean 'parity'"),
        ("nothing at all", "There are recall, mqar"),
        ("parity:pairs=3", r"has no option 'pairs'; its options are lengths=3-40, longer=41-256, every=true, start=true"),
        ("parity:every", "not 'every'"),
        ("parity:every=yes", "expected true or false"),
        ("parity:lengths=a-b", "expected a range such as 3-40"),
        ("parity:lengths=9-3", "the smaller one first"),
        ("parity:lengths=1-2-3", "the smaller one first"),
        ("mqar:pairs=1.5", "expected a whole number"),
        ("mqar:power=much", "expected a number"),
        ("mqar:power=0", "expected a number above 0"),
        ("mqar:pairs=40", "at least 4 pairs"),
        ("mqar:vocabulary=8", "expected at least 10"),
        ("recall:pairs=0", "expected at least 1"),
        ("recall:pairs=65", "64 keys"),
        ("copying:symbols=1", "expected at least 2"),
        ("modular:modulus=1", "expected at least 2"),
        ("words:group=Q_8", "there is no group 'Q_8'"),
        ("words:group=S_7", "out of range"),
        ("language:language=dyck2", "there is no language 'dyck2'"),
        ("language:language=abab,lengths=5-7", "multiples of 4"),
        ("listops:depth=0", "expected at least 1"),
        ("code:variables=6", "at most 5"),
        ("retrieval:queries=21", "more than its 20 writes"),
        ("icl-regression:noise=-1", "expected at least 0"),
        ("fewshot:images=cats", "there are no images 'cats'"),
        ("fewshot:ways=500", "has 240 classes"),
        ("continual:parts=200", "240 classes"),
        ("timeseries:dropped=1,folder=nowhere", "expected a share"),
        ("timeseries:folder=nowhere", "there is no aeon/.*pip install aeon"),
        ("tmaze:corridor=0", "expected at least 1"),
        ("bandit:best=1.5", "expected a probability"),
    ],
)
def test_what_is_no_task_is_refused(text, message):
    with pytest.raises(fw.FastWeightError, match=message):
        task(text)


def test_options_are_read_as_they_are_written():
    for name, found in TASKS.items():
        if name != "timeseries":
            assert task(f"{name}:{describe(found).replace(' ', '').replace('folder=,', '').replace('test=,', '')}") == found()
    assert task("parity: lengths=7 , every=false").lengths == (7, 7)
    assert set(ENVIRONMENTS) < set(TASKS)
