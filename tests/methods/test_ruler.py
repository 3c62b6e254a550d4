"""Ruler: tokens are single and kept by files, examples carry the token of their length, the control's tokens say nothing."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st

from toolkit import lm as lms
from toolkit import stats
from toolkit.methods import ruler
from toolkit.types import Problem

RANGES = {4: (2, 6), 10: (8, 12), 20: (20, math.inf)}
PROBLEM = Problem("p", ({"role": "user", "content": "1+1=?"},), "2")


def text_of(words: int) -> str:
    return "2 " * words


def responses(*words: int) -> list[tuple[Problem, str]]:
    return [(Problem(f"p{i}", PROBLEM.messages, "2"), text_of(n)) for i, n in enumerate(words)]


@pytest.fixture(scope="module")
def grown(tiny):
    return ruler.with_tokens(tiny, RANGES)


def test_the_training_ranges_lie_in_the_narrow_ranges_of_the_paper_and_do_not_overlap():
    for target, (low, high) in ruler.TRAINING.items():
        narrow = stats.RULER_PRECISE[target]
        assert narrow[0] <= low < high <= narrow[1]
    for length in range(1, 1000):
        assert ruler.target_of(length) in (None, *stats.RULER_PRECISE)
    assert ruler.TRAINING[150] == (145, 155)


@given(st.floats(0, 30))
def test_a_length_belongs_to_the_range_that_a_loop_finds(length):
    naive = [t for t in RANGES if RANGES[t][0] < length and length <= RANGES[t][1]]
    assert ruler.target_of(length, RANGES) == (naive[0] if naive else None)


def test_each_added_token_is_one_token_and_leaves_other_texts_as_they_were(tiny, grown):
    for target in RANGES:
        name = ruler.token(target, RANGES)
        ids = grown.tokenizer(name + "12", add_special_tokens=False)["input_ids"]
        assert ids[0] == grown.token_id(name) >= tiny.vocab_size and len(ids) == 3
    assert grown.tokenizer("17+5")["input_ids"] == tiny.tokenizer("17+5")["input_ids"]
    ids = torch.tensor([tiny.prompt_ids(PROBLEM.messages)])
    with torch.inference_mode():
        before, after = (m.model(ids).logits[..., : tiny.vocab_size] for m in (tiny, grown))
    assert torch.equal(before, after)


def test_tied_embeddings_stay_tied_and_a_saved_model_has_the_same_tokens(grown, tmp_path):
    model = grown.model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    read = lms.load(grown.save(tmp_path / "model"), device="cpu")
    assert read.fingerprint == grown.fingerprint
    assert [read.token_id(ruler.token(t, RANGES)) for t in RANGES] == [grown.token_id(ruler.token(t, RANGES)) for t in RANGES]
    assert read.prompt_ids(ruler.requested(PROBLEM, 10, RANGES).messages)[-1] == read.token_id("[MLT:10]")


def test_the_first_embeddings_do_not_depend_on_earlier_random_numbers(tiny, grown, model_of):
    new = grown.model.get_input_embeddings().weight[tiny.vocab_size :]
    assert torch.isfinite(new).all() and new.shape[0] == len(RANGES)
    for lm in (tiny, model_of("gpt2") if "gpt2" in FAMILIES else model_of("llama")):
        torch.manual_seed(1)
        first = ruler.with_tokens(lm, RANGES).fingerprint
        torch.manual_seed(2)
        assert ruler.with_tokens(lm, RANGES).fingerprint == first


def test_a_model_with_free_rows_keeps_its_size(model_of):
    lm = model_of("llama")
    free = lm.vocab_size - len(lm.tokenizer)
    wide = ruler.with_tokens(lm, RANGES)
    assert wide.vocab_size == max(lm.vocab_size, len(lm.tokenizer) + len(RANGES)), free


def test_every_example_is_prompt_token_of_its_length_response_and_end(grown):
    made = ruler.examples(grown, responses(3, 7, 10, 30, 12), RANGES)
    heads = {e.problem: grown.text(e.response[:1]) for e in made}
    assert heads == {"p0": "[MLT:4]", "p2": "[MLT:10]", "p3": "[MLT:>20]", "p4": "[MLT:10]"}  # 7 words lie in no range
    for e in made:
        _, text = ruler.written(grown.text(e.response, special=True), RANGES)
        low, high = RANGES[ruler.written(grown.text(e.response), RANGES)[0]]
        assert low < stats.words(text.removesuffix("<|end|>")) <= high
        assert list(e.prompt) == grown.prompt_ids(PROBLEM.messages) and e.response[-1] == grown.tokenizer.eos_token_id


def test_a_target_has_at_most_the_requested_number_of_examples(grown):
    made = ruler.examples(grown, responses(*[4] * 9, *[10] * 3, 25), RANGES, most=5)
    assert Counter(e.response[0] for e in made) == {
        grown.token_id("[MLT:4]"): 5,
        grown.token_id("[MLT:10]"): 3,
        grown.token_id("[MLT:>20]"): 1,
    }


def test_the_control_keeps_prompts_responses_and_the_number_of_each_token_but_not_their_places(grown):
    made = ruler.examples(grown, responses(*[4, 10, 25] * 20), RANGES)
    control = ruler.shuffled(made, seed=3)
    assert [(e.problem, e.prompt, e.response[1:]) for e in control] == [(e.problem, e.prompt, e.response[1:]) for e in made]
    assert Counter(e.response[0] for e in control) == Counter(e.response[0] for e in made)
    kept = sum(a.response[0] == b.response[0] for a, b in zip(made, control, strict=True))
    assert kept < 40  # 20 of 60 by chance, 60 without shuffling
    assert control == ruler.shuffled(made, seed=3) != ruler.shuffled(made, seed=4)


def test_a_requested_and_a_written_token_are_read_back():
    for target in ruler.TRAINING:
        asked = ruler.requested(PROBLEM, target)
        assert ruler.written(asked.messages[-1]["content"] + "four five") == (target, "four five")
        assert asked.id == PROBLEM.id and asked.messages[:-1] == PROBLEM.messages
    assert ruler.written("four [MLT:>800]five") == (None, "four five")  # a stray token is no request


def test_what_cannot_be_made_is_refused(tiny, grown):
    with pytest.raises(ValueError, match="has the token"):
        ruler.with_tokens(grown, RANGES)
    with pytest.raises(ValueError, match="lacks the token"):
        ruler.examples(tiny, responses(3), RANGES)
    with pytest.raises(ValueError, match="none with a length in"):
        ruler.examples(grown, responses(3), RANGES)
    with pytest.raises(ValueError, match="do not overlap"):
        ruler.target_of(5, {4: (0, 10), 6: (2, 8)})
    with pytest.raises(ValueError, match="choose one of 4, 10, 20"):
        ruler.token(50, RANGES)
