"""The two modes: every problem gives four examples, a request and its response agree, the control's requests say nothing."""

from __future__ import annotations

from collections import Counter

import pytest

from toolkit.methods import adaptive_deep_reasoning as adr
from toolkit.methods.adaptive_deep_reasoning import Pair
from toolkit.spans import spans
from toolkit.types import Problem

REQUESTS = {"long": " long", "short": " short"}


def pairs_of(n: int) -> list[Pair]:
    problems = [Problem(f"p{i}", ({"role": "user", "content": f"{i}+1=?"},), str(i + 1)) for i in range(n)]
    return [adr.pair(p, f"{i}+1={i + 1}\n", p.answer) for i, p in enumerate(problems)]


def kinds(lm, made) -> Counter:
    """Number of examples by the request in the prompt (or none) and the mode of the response."""
    asked = [next((m for m, text in REQUESTS.items() if text in lm.text(e.prompt)), None) for e in made]
    return Counter((a, adr.mode_of(lm.text(e.response))) for a, e in zip(asked, made, strict=True))


def test_every_problem_gives_the_four_kinds_and_each_request_has_its_mode(tiny):
    made = adr.examples(tiny, pairs_of(6), REQUESTS)
    assert kinds(tiny, made) == {("long", "long"): 6, ("short", "short"): 6, (None, "long"): 6, (None, "short"): 6}
    assert {e.problem for e in made} == {f"p{i}" for i in range(6)}


def test_in_the_control_a_request_has_either_mode_equally_often(tiny):
    made = adr.examples(tiny, adr.exchanged(pairs_of(10), seed=2), REQUESTS)
    assert kinds(tiny, made) == {
        ("long", "long"): 5, ("long", "short"): 5, ("short", "short"): 5, ("short", "long"): 5, (None, "long"): 10, (None, "short"): 10,
    }  # fmt: skip
    assert adr.exchanged(pairs_of(10), seed=2) == adr.exchanged(pairs_of(10), seed=2) != adr.exchanged(pairs_of(10), seed=3)


def test_a_short_response_has_no_thinking_and_the_same_answer(tiny):
    for p in pairs_of(3):
        prompt = tiny.prompt_ids(p.problem.messages)
        found = []
        for text in (p.long, p.short):
            ids = prompt + tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
            think, answer = spans(tiny, ids, len(prompt), ended=False)
            found.append((len(think), tiny.text(ids[answer.start : answer.stop])))
        (steps, right), (none, same) = found
        assert steps > none == 0 and same == right == p.problem.answer


def test_the_first_token_decides_the_mode(tiny):
    made = adr.examples(tiny, pairs_of(3), REQUESTS)
    first = {(adr.mode_of(tiny.text(e.response)), e.response[0]) for e in made}
    assert first == {("long", tiny.token_id("<think>")), ("short", tiny.token_id("</think>"))}


def test_requests_and_responses_that_cannot_be_told_apart_are_refused(tiny):
    with pytest.raises(ValueError, match="two different texts"):
        adr.examples(tiny, pairs_of(1), {"long": " x", "short": " x"})
    one = pairs_of(1)[0]
    with pytest.raises(ValueError, match="begin with '<think>'"):
        adr.examples(tiny, [Pair(one.problem, one.long, "<think></think>1")], REQUESTS)
    begun = Problem("b", (*one.problem.messages, {"role": "assistant", "content": "1"}), "1")
    with pytest.raises(ValueError, match="message of 'assistant'"):
        adr.request(begun, " long")
