"""LongWriter-Zero: quality is the naive count of what the prompt requests, repetition lowers it, no scale decides the advantage."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from toolkit import rewards
from toolkit.grpo import advantages, recipes
from toolkit.rewards import RewardBatch
from toolkit.rewards.columns import object_array
from toolkit.rewards.longwriter import LongWriter
from toolkit.rewards.longwriter_zero import LongWriterZero, headings_share, keywords_share, quality

WORDS = st.sampled_from(["Past", "Uses", "rain", "ice", "the", "rains", "## Past", "uses:", "\n"])
TEXTS = st.lists(WORDS, max_size=14).map(" ".join)


def naive(text: str, headings: list[str], keywords: list[str]) -> float:
    lines = [re.sub(r"[#*_:\s]+", "", line).lower() for line in text.split("\n")]
    best, place = 0, -1
    for heading in headings:
        later = [i for i, line in enumerate(lines) if i > place and line == heading.lower()]
        if later:
            best, place = best + 1, later[0]
    words = re.findall(r"\w+", text.lower())
    mentioned = sum(word in words for word in keywords)
    triples = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    distinct = len(set(triples)) / len(triples) if triples else 1.0
    return distinct * (best / len(headings) + mentioned / len(keywords)) / 2 if words else 0.0


@given(TEXTS)
def test_quality_is_the_naive_count_times_the_share_of_distinct_triples(text):
    headings, keywords = ["Past", "Uses"], ["rain", "ice"]
    assert quality(text, headings, keywords) == pytest.approx(naive(text, headings, keywords))


def test_headings_count_in_their_order_and_on_lines_of_their_own():
    for order in itertools.permutations(["Past", "Uses", "Limits"]):
        share = headings_share("\n".join(order), ["Past", "Uses", "Limits"])
        assert (share == 1) == (order == ("Past", "Uses", "Limits"))
    assert headings_share("We speak of Past and Uses.", ["Past", "Uses"]) == 0
    assert keywords_share("rainy Ice", ["rain", "ice"]) == 0.5


def test_a_repeated_text_has_less_quality_and_an_empty_one_none():
    once = "Past\nrain fell on the ice today"
    assert quality(once, ["Past"], ["rain", "ice"]) == 1
    assert quality(" ".join([once] * 5), ["Past"], ["rain", "ice"]) < 0.5
    assert quality("", [], []) == quality("...", ["Past"], ["rain"]) == 0


def batch() -> RewardBatch:
    texts = ["Past\nrain", "Past\nrain and ice and rain again", "no", "rain rain rain rain rain rain rain"]
    return RewardBatch.from_columns(
        answer_text=texts,
        low_words=3,
        high_words=5,
        formatted=[1, 0, 1, 1],
        headings=object_array([("Past",)] * 4),
        keywords=object_array([("rain", "ice")] * 4),
    )


def test_the_components_are_length_quality_and_format():
    found = LongWriterZero(longest=20)(batch())
    assert list(found.components) == ["length", "quality", "format"]
    assert_allclose(found.components["length"], LongWriter(longest=20, unit="words")(batch()).values)
    assert_allclose(found.components["quality"], [naive(t, ["Past"], ["rain", "ice"]) for t in batch()["answer_text"]])
    assert found.components["format"].tolist() == [1, 0, 1, 1]


def test_the_recipe_averages_the_advantages_so_that_no_scale_decides():
    recipe = recipes.longwriter()
    assert rewards.ALL[recipe.reward].make is LongWriterZero
    parts = np.stack([*LongWriterZero(longest=20)(batch()).components.values()], axis=1)
    groups, tokens = np.zeros(4, int), np.ones(4, int)
    found = advantages.ALL[recipe.advantage](parts, groups, tokens)
    each = [(p - p.mean()) / (p.std(ddof=1) + advantages.TRL_EPSILON) for p in parts.T]
    assert_allclose(found, np.mean(each, axis=0))
    assert_allclose(advantages.ALL[recipe.advantage](parts * [1000, 1, 1], groups, tokens), found, atol=1e-3)
    summed = advantages.grpo(parts * [1000, 1, 1], groups, tokens)
    assert not np.allclose(summed, advantages.grpo(parts, groups, tokens), atol=0.1)  # with GRPO, the scale would decide


def test_the_target_range_is_read_in_the_unit_of_the_reward():
    with pytest.raises(rewards.MissingColumnError, match=r"(low|high)_tokens"):
        LongWriterZero(unit="tokens")(batch())
    with pytest.raises(rewards.MissingColumnError, match="headings"):
        columns = {k: v for k, v in batch().columns.items() if k != "headings"}
        LongWriterZero()(RewardBatch(columns))
