"""A rescaling that leaves the logits alone leaves every score, rank, plan and lens of heads alone, in every family."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from families import FAMILIES
from rescale import copied, rescalings
from test_retrieval_heads import random_examples
from torch import Tensor

from toolkit import collect, edits, jobs, probes
from toolkit.board import measure
from toolkit.jobs import heads, retrieval
from toolkit.jobs.finding import OURS, PUBLISHED, find_heads
from toolkit.lm import LM, Condition
from toolkit.methods import retrieval_heads
from toolkit.probes import Protocol
from toolkit.types import HeadScores

CASES = [(family, name) for family in FAMILIES for name in rescalings(family)]
IN_THE_STREAM = (heads.SHORT, "short thinking, published", heads.WRITE)  # grow with the stream's own scale


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-3) -> bool:
    """Equal relative to the largest entry: with weights rescaled, a norm's epsilon weighs a little more or less."""
    gap = (found - expected).nan_to_num().abs().max() if found.numel() else 0.0
    return bool(gap <= tolerance * expected.nan_to_num().abs().max()) and bool((found.isnan() == expected.isnan()).all())


@pytest.fixture(scope="module")
def changed_of(model_of):
    return cache(lambda family, name: rescalings(family)[name][0](model_of(family)))


@pytest.fixture(scope="module")
def finding_of(mixed_rollouts):
    """Both forms of the method on a model."""
    settings = jobs.EditSettings(share=0.4, fraction=0.3)
    return cache(lambda lm_id, name: find_heads(MODELS[lm_id], mixed_rollouts, settings, name))


MODELS: dict[int, LM] = {}


def key(lm: LM) -> int:
    MODELS[id(lm)] = lm
    return id(lm)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}, {case[1]}")
def pair(request, model_of, changed_of) -> tuple[LM, LM, float]:
    """A model, the same rescaled, and what lengths in its residual stream are multiplied by."""
    family, name = request.param
    return model_of(family), changed_of(family, name), rescalings(family)[name][1]


def logits(lm: LM, mixed_rollouts) -> Tensor:
    return torch.cat([collect.logits(lm, r) for r in mixed_rollouts[:6]])


def test_the_rescaled_model_has_other_weights_and_the_same_logits(pair, mixed_rollouts):
    lm, changed, _ = pair
    assert lm.fingerprint != changed.fingerprint
    assert same(logits(changed, mixed_rollouts), logits(lm, mixed_rollouts))


@pytest.mark.parametrize("form", [PUBLISHED, OURS])
def test_short_thinking_scores_ranks_and_plans_do_not_change(pair, form, finding_of):
    lm, changed, grown = pair
    before, after = finding_of(key(lm), form), finding_of(key(changed), form)
    assert before.scores.units == "residual-stream units"
    assert same(after.scores.score, grown * before.scores.score)
    assert after.scores.ranked() == before.scores.ranked()
    assert after.plan.heads == before.plan.heads


@pytest.mark.parametrize("form", [PUBLISHED, OURS])
def test_an_edit_of_the_rescaled_model_does_the_same(pair, form, finding_of, mixed_rollouts):
    lm, changed, _ = pair
    before, after = (logits(edits.apply(x, finding_of(key(x), form).plan), mixed_rollouts) for x in (lm, changed))
    assert same(after, before, 2e-3)
    assert not same(before, logits(lm, mixed_rollouts), 2e-2), "the edit did nothing"


def test_the_push_of_the_board_does_not_change(pair, finding_of, mixed_rollouts):
    def push(lm: LM) -> Tensor:
        texts = [r for r in mixed_rollouts if r.think_tokens]
        return torch.tensor(measure._short_push(Condition(lm), texts, finding_of(key(lm), OURS)).to_numpy())

    lm, changed, grown = pair
    assert same(push(changed), grown * push(lm))


def test_retrieval_scores_do_not_change(pair):
    lm, changed, grown = pair
    before, after = (retrieval_heads.measure(x, random_examples(2)) for x in (lm, changed))
    for metric in retrieval_heads.METRICS:
        factor = grown if metric == "write" else 1.0
        assert same(after.values[metric], factor * before.values[metric]), metric
    assert retrieval_heads.scores(after, "write").ranked() == retrieval_heads.scores(before, "write").ranked()


@pytest.mark.parametrize("name", rescalings("gemma2"))
def test_probes_of_single_heads_do_not_change(name, model_of, changed_of, mixed_rollouts, by_length):
    lm, changed = model_of("gemma2"), changed_of("gemma2", name)
    states = [collect.states(x, mixed_rollouts, "z", by=by_length) for x in (lm, changed)]
    before, after = (probes.classify_heads(s, lm.layout.n_heads, protocol=Protocol(folds=2))[0] for s in states)
    assert torch.equal(after.score, before.score)


@pytest.fixture(scope="module")
def plain_copy_of(model_of):
    return cache(lambda family: copied(model_of(family)))


@pytest.fixture(scope="module")
def lenses_of(mixed_rollouts):
    def lenses(lm_id: int) -> dict[str, HeadScores]:
        lm = MODELS[lm_id]
        measured = retrieval_heads.measure(lm, random_examples(2))
        looked = retrieval.RetrievalMeasurement([], [], {name: measured for name in retrieval.RANKINGS})
        return heads.lenses(lm, mixed_rollouts, looked, jobs.EditSettings(share=0.4, fraction=0.3))

    return cache(lenses)


ATLAS = [*(("gemma2", name) for name in rescalings("gemma2")), ("qwen3", "values")]


@pytest.mark.parametrize("family, name", ATLAS)
def test_every_lens_of_the_atlas_shows_the_same(family, name, plain_copy_of, changed_of, lenses_of, monkeypatch):
    monkeypatch.setattr(heads, "FEW", 3)
    grown = rescalings(family)[name][1]
    # The neighbour leaves hooks of its own on a model: on copies.
    before, after = lenses_of(key(plain_copy_of(family))), lenses_of(key(changed_of(family, name)))
    for lens, scores in before.items():
        assert same(after[lens].score, (grown if lens in IN_THE_STREAM else 1.0) * scores.score, 5e-3), lens
