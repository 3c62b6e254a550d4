"""Small judges as arguments of rewards: a verifier of nuggets and a contrastive encoder, beside controls that were trained on chance."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from toolkit.judging import contrastive, nuggets
from toolkit.rewards import RewardBatch
from toolkit.rewards.search_gen_v import LABELS, SearchGenV, assumed_verifier, macro_f1
from toolkit.rewards.text_to_sql import ContrastiveSQL
from toolkit.tasks import text_to_sql


def scores(verify, held_out) -> float:
    return macro_f1([verify(j.answer, [j.nugget])[0] for j in held_out], [j.label for j in held_out])


def test_a_trained_verifier_beats_word_counts_and_one_trained_on_shuffled_labels():
    train, held_out = nuggets.examples(400, seed=0), nuggets.examples(300, seed=1)
    labels = [j.label for j in train]
    shuffled = []
    for seed in range(5):
        random.Random(seed).shuffle(labels)
        shuffled.append(scores(nuggets.fit([j._replace(label=x) for j, x in zip(train, labels, strict=True)]), held_out))
    trained = scores(nuggets.fit(train), held_out)
    assert trained > 0.9 and trained > scores(assumed_verifier, held_out) + 0.1 and trained > max(shuffled) + 0.3


def test_a_verifier_gives_the_labels_of_its_softmax_and_serves_as_argument_of_the_reward():
    verifier = nuggets.fit(nuggets.examples(400, seed=0))
    assert {*verifier.labels} == {*LABELS}
    j = nuggets.examples(9, seed=2)[3]
    logits = {
        label: float(w @ nuggets.features(j.answer, j.nugget) + b)
        for label, w, b in zip(verifier.labels, verifier.weight, verifier.bias, strict=True)
    }
    assert verifier(j.answer, [j.nugget]) == [max(logits, key=logits.get)]
    batch = RewardBatch.from_columns(
        answer_text=["the river of zor is iva. ao has a song", "the river of zor is kel"],
        nuggets=[("river of zor is iva", "song of ao is kel")] * 2,
    )
    values = SearchGenV("long", verifier=verifier)(batch).values
    assert values.tolist() == [0.75, 0.0]
    with pytest.raises(ValueError, match="without the label 'partial_support'"):
        nuggets.fit([x for x in nuggets.examples(50, seed=0) if x.label != "partial_support"])


def test_features_are_shares_and_do_not_depend_on_case():
    for j in nuggets.examples(50, seed=3):
        x = nuggets.features(j.answer, j.nugget)
        assert ((x >= 0) & (x <= 1)).all() and (x == nuggets.features(j.answer.upper(), j.nugget)).all()
    assert nuggets.features("a b c", "a b c").tolist() == [1, 1, 1, 1] and not nuggets.features("a", "").any()


def pairs(split: str, n: int, language: str | None = None) -> list[tuple[str, str]]:
    problems = text_to_sql.load(split, n, language=language)
    return [(p.messages[0]["content"].splitlines()[-1], p.answer) for p in problems]


def found(similarity, held_out) -> float:
    """Share of questions whose own query is the most similar of 16 queries; ties count as a share."""
    queries = [query for _, query in held_out]
    hits = []
    for question, own in held_out:
        values = np.array([similarity(question, query) for query in queries])
        best = [queries[i] for i in np.flatnonzero(values == values.max())]
        hits.append(np.mean([query == own for query in best]))
    return float(np.mean(hits))


def test_a_tuned_encoder_finds_queries_in_both_languages_and_an_untrained_one_does_not():
    known = pairs("train", 400)
    tuned, untrained = (contrastive.train(known, seed=0, steps=steps) for steps in (contrastive.assumed_steps, 0))
    for language in text_to_sql.LANGUAGES:
        held_out = pairs("test", 16, language)
        assert found(tuned, held_out) > found(untrained, held_out) + 0.2
    assert found(tuned, pairs("test", 16, "kesh")) > 0.6


def test_an_encoder_is_the_cosine_of_summed_vectors_and_its_seed_decides():
    known = [("a b", "x"), ("c", "y z"), ("a c", "x z")]
    one, again, other = (contrastive.train(known, seed=seed, steps=5) for seed in (0, 0, 1))
    assert torch.equal(one.vectors, again.vectors) and not torch.equal(one.vectors, other.vectors)
    e = {word: one.vectors[i].numpy() for word, i in one.index.items()}
    a, b = e["a"] + e["b"], e["x"]
    assert one("a B new", "x") == pytest.approx(max(0, a @ b / np.linalg.norm(a) / np.linalg.norm(b)), abs=1e-6)
    assert one("new", "x") == 0 and one("a", "a") == pytest.approx(1)
    batch = RewardBatch.from_columns(answer_text=["select 2"], question="a", gold_sql="select 1", schema="create table t (a);")
    assert ContrastiveSQL(similarity=one)(batch).values.tolist() == [0.0]
    with pytest.raises(ValueError, match="1 pairs"):
        contrastive.train(known[:1], seed=0)


def test_labels_of_generated_examples_are_all_three_and_scored_as_by_scikit_learn():
    held_out = nuggets.examples(200, seed=4)
    gold, told = [j.label for j in held_out], [assumed_verifier(j.answer, [j.nugget])[0] for j in held_out]
    assert {*gold} == {*LABELS}
    assert macro_f1(told, gold) == pytest.approx(f1_score(gold, told, average="macro"))
