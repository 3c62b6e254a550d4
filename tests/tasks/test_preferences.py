"""Generated preferences: a reader of prompt and response finds the stated quality; splits are disjoint; preferences follow the utility."""

from __future__ import annotations

import math
import re
from itertools import product

import numpy as np
import pytest

from toolkit.tasks.generators import preferences
from toolkit.tasks.generators.preferences import DIMENSIONS, Annotator

COURTESIES = ("Thank", "happy", "good question", "welcome", "pleasure")


def reader(prompt: str, text: str) -> tuple[int, ...]:
    """Quality of a response, read off its text and the prompt alone."""
    notes, asked = prompt.splitlines()[0].removeprefix("Notes: "), prompt.splitlines()[1]
    known = [f"{s.strip()}." for s in notes.split(".") if s.strip()]
    subject = next(w for w in reversed(re.findall(r"\w+", asked)) if f"the {w}" in notes.lower())
    needed = next(s for s in known if f"the {subject}" in s.lower())
    listed = all(line.startswith("- ") for line in text.splitlines())
    sentences = re.findall(r"[^.]+\.", re.sub(r"^- ", "", text, flags=re.MULTILINE).replace("\n", " "))
    polite = any(c in sentences[0] for c in COURTESIES)
    return int(needed in text), int(len(sentences) == 3), int(f"the {subject}" in sentences[2]), int(polite), int(listed)


def test_a_reader_of_prompt_and_response_finds_the_stated_quality():
    for question in preferences.questions("train", 8):
        for quality in product((0, 1), repeat=len(DIMENSIONS)):
            for seed in range(3):
                response = preferences.respond(question, quality, seed)
                assert reader(question.prompt, response.text) == response.quality == quality


def test_the_segments_are_the_sentences_and_name_each_broken_dimension():
    question = preferences.questions("dev", 1)[0]
    for quality in product((0, 1), repeat=len(DIMENSIONS)):
        response = preferences.respond(question, quality)
        sentences = [response.text[s.start : s.stop] for s in response.segments]
        assert all(s[0].isupper() and s.endswith(".") and s.count(".") == 1 for s in sentences)
        left = response.text
        for sentence in sentences:
            left = left.replace(sentence, "", 1)
        assert not left.replace("-", "").strip()
        broken = {d for d, q in zip(DIMENSIONS, quality, strict=True) if not q}
        assert {s.error for s in response.segments} - {None} == broken - {"formatted"}
        assert response.words == sum(len(s.split()) for s in sentences)


def test_splits_share_no_prompt_and_equal_seeds_give_equal_data():
    prompts = {split: {q.prompt for q in preferences.questions(split, 60)} for split in ("train", "dev", "test")}
    assert all(len(p) == 60 for p in prompts.values())
    assert not (prompts["train"] & prompts["test"] or prompts["train"] & prompts["dev"] or prompts["dev"] & prompts["test"])
    assert preferences.pairs("test", 5) == preferences.pairs("test", 5)
    assert preferences.pairs("test", 5) != preferences.pairs("test", 5, seed=1)


def test_conciseness_is_the_only_dimension_that_changes_the_length_much():
    drawn = [r for q in preferences.questions("train", 100) for r in preferences.sample(q, 4)]
    quality, words = np.array([r.quality for r in drawn]), np.array([r.words for r in drawn])
    gaps = [words[quality[:, k] == 0].mean() - words[quality[:, k] == 1].mean() for k in range(len(DIMENSIONS))]
    assert gaps[1] > 15
    assert max(abs(g) for k, g in enumerate(gaps) if k != 1) < 3


def test_without_temperature_the_response_of_higher_utility_is_preferred():
    annotator = Annotator((3.0, 0.0, 1.0, -1.0, 0.5), length=0.01)
    for pair in preferences.pairs("train", 50, annotator=annotator):
        by_hand = [
            3 * r.quality[0] + r.quality[2] - r.quality[3] + 0.5 * r.quality[4] + 0.01 * r.words
            for r in (pair.chosen, pair.rejected)
        ]
        assert pair.margin > 0
        assert pair.margin == pytest.approx(by_hand[0] - by_hand[1])


def test_with_temperature_preferences_follow_the_bradley_terry_model():
    annotator = Annotator((1.0, 0.0, 0.0, 0.0, 0.0), temperature=1.0)
    drawn = preferences.pairs("train", 2000, annotator=annotator)
    share, expected = np.mean([p.margin > 0 for p in drawn]), 1 / (1 + math.exp(-1))
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 2000)


def test_impossible_requests_are_refused():
    question = preferences.questions("train", 1)[0]
    with pytest.raises(ValueError, match="give 0 or 1 for each of correct, concise"):
        preferences.respond(question, (1, 1, 2, 0, 0))
    with pytest.raises(ValueError, match="give a probability for each"):
        preferences.sample(question, 2, rates=(0.5,))
    with pytest.raises(ValueError, match="one weight for each"):
        Annotator(weights=(1.0,))
    with pytest.raises(ValueError, match="Change weights or rates"):
        preferences.pairs("train", 1, annotator=Annotator((0.0,) * 5))
