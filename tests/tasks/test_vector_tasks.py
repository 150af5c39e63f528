"""Tasks of vectors: what is asked is what was shown; risks that are known; images of classes that were not trained on."""

import math

import numpy as np
import pytest
import torch

from fastweights.tasks import Continual, FewShot, InContextRegression, Overwrite, Retrieval, images
from fastweights.tasks.images import SOURCES, Images
from fastweights.tasks.source import IGNORED

# ---- retrieval -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [Retrieval, Overwrite])
@pytest.mark.parametrize(("d_value", "queries"), [(0, 1), (5, 4)])
def test_a_dictionary_of_what_was_written_answers(made, d_value, queries):
    source = made(pairs=7, d_key=6, d_value=d_value, queries=queries)
    writes = 7 if made is Retrieval else 14
    rewritten = 0
    for x, y in zip(*source.batch(0, 0, 50), strict=True):
        memory = {}
        for token in x[:writes]:
            key = tuple(token[:6].tolist())
            rewritten += key in memory
            memory[key] = token[6:]
        assert y[:writes].isnan().all()
        assert len(x) == writes + queries
        for token, answer in zip(x[writes:], y[writes:], strict=True):
            assert not token[6:].any()
            assert torch.equal(memory[tuple(token[:6].tolist())], answer)
        if made is Retrieval:
            assert len(memory) == 7
            assert len({tuple(v.tolist()) for v in memory.values()}) == 7
    assert (rewritten > 0) == (made is Overwrite)


def test_keys_are_one_table_of_normal_vectors():
    source = Retrieval(pairs=64, d_key=64)
    x, _ = source.batch(0, 0, 2)
    keys = x[0, :64, :64]
    assert abs(float(keys.mean())) < 5 / 64
    assert abs(float(keys.std()) - 1) < 5 / 64 / math.sqrt(2)
    assert {tuple(k.tolist()) for k in keys} == {tuple(k.tolist()) for k in x[1, :64, :64]}
    assert not torch.equal(keys.sort(0).values, Retrieval(pairs=64, d_key=64, table=1).batch(0, 0, 1)[0][0, :64, :64].sort(0).values)


def test_keys_written_more_often_are_asked_more_often():
    """The query is one of the writes, uniformly: its expected number of writes is 1 + (writes - 1)/pairs."""
    x, _ = Overwrite(pairs=4, d_key=3).batch(0, 0, 8000)
    number = (x[:, :8, :3] == x[:, 8:, :3]).all(-1).sum(1).double()
    assert abs(float(number.mean()) - (1 + 7 / 4)) < 5 * float(number.std()) / math.sqrt(8000)


# ---- regression ------------------------------------------------------------------------------------------------------


def shown(source, size):
    x, y = source.batch(0, 0, size)
    x, y = x.double(), y.double()
    return x[:, :-1, : source.d], x[:, :-1, source.d :], x[:, -1, : source.d], y[:, -1]


@pytest.mark.parametrize(("d", "n", "outputs"), [(3, 5, 1), (4, 12, 2)])
def test_risks_are_those_of_theory(d, n, outputs):
    size = 20_000
    x, y, query, target = shown(InContextRegression(d=d, examples=n, outputs=outputs), size)
    step = torch.einsum("bno,bnd,bd->bo", y, x, query) / (n + d + 1)
    for prediction, risk in ((torch.zeros_like(target), d), (step, d * (d + 1) / (n + d + 1))):
        error = (prediction - target).square().sum(-1)
        assert abs(float(error.mean()) - outputs * risk) < 5 * float(error.std()) / math.sqrt(size)
    fit = torch.linalg.lstsq(x[:50], y[:50]).solution
    assert (torch.einsum("bdo,bd->bo", fit, query[:50]) - target[:50]).abs().max() < 1e-4  # numbers are of float32


def test_noise_is_on_the_examples_alone():
    x, y, query, target = shown(InContextRegression(d=2, examples=400, noise=0.5), 200)
    fit = torch.linalg.lstsq(x, y).solution
    left = (y - x @ fit).square().mean()
    assert abs(float(left) - 0.25) < 0.01
    assert float((torch.einsum("bdo,bd->bo", fit, query) - target).square().mean()) < 0.01


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch):
    """Images whose class can be read from them: class c is of brightness c/100, in two versions."""
    images.cache_clear()
    bank = (torch.arange(80) // 2 / 100)[:, None, None].expand(80, 4, 4).clone()
    monkeypatch.setitem(SOURCES, "plain", lambda folder: Images("plain", bank, 2 * np.arange(40), np.full(40, 2), 30, varied=False))
    yield
    images.cache_clear()


def classes_of(x, side):
    middle = side**2 // 2 + side // 2
    return (100 * x[..., middle]).round().long()


@pytest.mark.parametrize("delayed", [True, False])
@pytest.mark.parametrize("shots", [1, 3])
def test_few_shot_labels_are_those_shown(plain, delayed, shots):
    source = FewShot(ways=4, shots=shots, delayed=delayed, images="plain", side=4)
    assert source.d_in == 20
    for part, batches in (("training", [source.batch(0, 0, 30)]), ("testing", source.validation(30))):
        for x, y in batches:
            assert x.shape[1] == 4 * shots + 1
            classes, labels = classes_of(x, 4), x[..., 16:]
            assert (classes < 30).all() if part == "training" else ((classes >= 30) & (classes < 40)).all()
            for c, told, wanted in zip(classes.tolist(), labels, y.tolist(), strict=True):
                empty = 0 if delayed else -1
                assert not told[empty].any()
                said = told.argmax(-1).tolist()
                said = said[1:] if delayed else said[:-1]  # the labels of all images but the last
                meaning = dict(zip(c, said, strict=False))
                assert len(meaning) == 4
                assert sorted(said) == sorted(list(range(4)) * shots)
                assert [meaning[one] for one in c[:-1]] == said
                assert wanted[-1] == meaning[c[-1]]
                assert wanted[:-1] == (said if delayed else [IGNORED] * len(said))


def test_labels_have_a_new_meaning_in_every_sequence(plain):
    x, y = FewShot(ways=5, images="plain", side=4).batch(0, 0, 500)
    asked = classes_of(x, 4)[:, -1]
    given = {}
    for c, label in zip(asked.tolist(), y[:, -1].tolist(), strict=True):
        given.setdefault(c, set()).add(label)
    assert len(given) == 30
    assert all(len(labels) > 2 for labels in given.values())
    assert (abs(y[:, -1].bincount() - 100) < 5 * math.sqrt(80)).all()


@pytest.mark.parametrize("backward", [True, False])
def test_the_stream_asks_about_every_task_so_far(plain, backward):
    source = Continual(parts=3, ways=2, shots=4, images="plain", side=4, backward=backward)
    queries = source.queries()
    assert [(q.after, q.about) for q in queries] == [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    for training, batches in ((True, [source.batch(0, 0, 40)]), (False, source.validation(40))):
        for x, y in batches:
            classes, told = classes_of(x, 4), x[..., 16:]
            assert (classes < 30).all() == training
            assert sorted(q.at for q in queries) == (~told.any(-1))[0].nonzero().flatten().tolist()
            for c, label, wanted in zip(classes.tolist(), told, y.tolist(), strict=True):
                tasks, t = [], 0
                for part in range(3):
                    block = range(t, t + 8)
                    tasks.append({c[i]: int(label[i].argmax()) for i in block})
                    assert len(tasks[-1]) == 2
                    assert sum(int(label[i].argmax()) for i in block) == 4
                    assert all(wanted[i] == IGNORED for i in block)
                    t += 8
                    for about in range(part + 1):
                        answer = tasks[about][c[t]]
                        assert wanted[t] == (IGNORED if training and not backward and about < part else answer)
                        t += 1
                assert t == len(c)
                assert len(set().union(*tasks)) == 6


def test_tested_on_other_images_in_their_order(plain, monkeypatch):
    ten = (torch.arange(10) / 100 + 0.5)[:, None, None].expand(10, 4, 4).clone()
    monkeypatch.setitem(SOURCES, "ten", lambda folder: Images("ten", ten, np.arange(10), np.ones(10, int), 5, varied=False))
    source = Continual(images="plain", test="ten", side=4, shots=2)
    x, _ = next(source.validation(8))
    for q in source.queries():
        found = classes_of(x, 4)[:, q.at] - 50
        assert set(found.tolist()) <= {2 * q.about, 2 * q.about + 1}
    assert (classes_of(source.batch(0, 0, 8)[0], 4) < 30).all()
    assert "ten 10 images" in source.identity


def test_glyphs_can_be_told_apart_by_their_looks():
    """One image of each of five: the nearest neighbour in pixels is right far more often than 1/5, and not always."""
    right = total = 0
    source = FewShot()
    for x, y in source.validation(64):
        pictures = x[..., : source.side**2]
        nearest = (pictures[:, :-1] - pictures[:, -1:]).square().sum(-1).argmin(1)
        told = x[torch.arange(len(x)), nearest, source.side**2 :].argmax(-1)
        right, total = right + int((told == y[:, -1]).sum()), total + len(x)
    assert 0.6 < right / total < 1


def test_images_of_a_class_differ_and_are_drawn_from_all_its_versions():
    found = images("glyphs")
    draw = np.random.default_rng(0)
    a = found.draw(np.full((2, 3), 5), 14, draw)
    assert a.shape == (2, 3, 196)
    assert 0 <= a.min() < a.max() <= 1
    assert len({x.tobytes() for x in a.reshape(6, -1)}) == 6
    assert not set(found.part(True)) & set(found.part(False))
    three = Images("x", torch.arange(3.0)[:, None, None].expand(3, 4, 4) / 4, np.array([0, 1]), np.array([1, 2]), 1, varied=False)
    versions = three.draw(np.array([0] * 50 + [1] * 50), 4, draw)[:, 5]
    assert set(versions[:50]) == {0.0}
    assert set(versions[50:]) == {0.25, 0.5}
