"""Thinking that goes on in the answer is found, whatever the tags; answers that only use the word are not."""

from __future__ import annotations

import pytest
from families import family

from toolkit import evaluate, tags
from toolkit.generate import Sampling
from toolkit.leaks import leaks
from toolkit.lm import Condition
from toolkit.tags import FORMATS, ThinkTags
from toolkit.types import Problem, Rollout, Span


def response(text: str, marks: ThinkTags, *, opened: bool = True, closed_by_prompt: bool = False) -> Rollout:
    """A response with the spans that its text has, if each character is a token and the prompt is one token."""
    close = marks.close or ""
    at = text.find(close)
    think = Span(1, 1) if closed_by_prompt else Span(1, 1 + (at if at >= 0 else len(text))) if opened else None
    start = 1 if closed_by_prompt or not opened else 1 + at + len(close)
    answer = None if opened and at < 0 and not closed_by_prompt else Span(start, 1 + len(text))
    return Rollout("p", 0, (0,) * (1 + len(text)), 1, think, answer, "stop", text, True)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("answer", "leaking"),
    [
        ("12", False),
        ("The answer is 12. Please wait for the bus.", False),
        ("You wait 5 minutes.", False),
        ("12. Wait, 7+6 is 13, so 13", True),
        ("12\nBut wait, that is wrong", True),
        ("wait", True),
        ("Hmm, 12", True),
        ("Await the result. Hummus.", False),
        ("12 OPEN 13 CLOSE 13", True),
        ("12 CLOSE 13", True),
    ],
)
def test_an_answer_leaks_if_it_opens_thinking_again_or_takes_something_back(name, answer, leaking):
    marks = FORMATS[name].tags
    text = "5+7=12. Wait, yes." + str(marks.close) + answer.replace("OPEN", str(marks.open)).replace("CLOSE", str(marks.close))
    assert leaks(response(text, marks), marks) is leaking


def test_doubts_while_thinking_are_no_leak_and_neither_is_thinking_that_never_ends():
    marks = ThinkTags()
    assert not leaks(response("<think>5. Wait, 6</think>6", marks), marks)
    assert not leaks(response("<think>5. Wait, 6", marks), marks)


def test_an_answer_that_never_was_thought_about_leaks_where_it_starts_to_doubt():
    marks = ThinkTags()
    assert leaks(response("5. Wait, 6", marks, opened=False), marks)
    assert leaks(response("5. Wait, 6", marks, closed_by_prompt=True), marks)
    assert leaks(response("5</think>6", marks, closed_by_prompt=True), marks)
    assert not leaks(response("6", marks, closed_by_prompt=True), marks)


@pytest.mark.parametrize("marks", [None, ThinkTags(None, None)])
def test_a_model_that_does_not_mark_its_thinking_has_no_leaks(marks):
    assert not leaks(response("5. Wait, 6", ThinkTags(), opened=False), marks)


def test_the_comparison_reports_the_share_of_leaking_responses():
    lm = family("llama")
    opening, closing = (lm.token_id(tag) for tag in tags.DEFAULT_TAGS)
    problems = [Problem("p", ({"role": "user", "content": "1+1=?"},), "2")]

    def once(lm, reader, drawn):
        """Think, and answer."""
        return {0: [opening], 1: [closing]}.get(reader.phase)

    def twice(lm, reader, drawn):
        """Think, close thinking, and open it again."""
        return {0: [opening], 1: [closing, opening]}.get(reader.phase)

    def no_tags(lm, reader, drawn):
        """An answer that has no tags by chance."""
        return [5] if reader.phase == 2 and drawn in (opening, closing) else None

    conditions = {name: Condition(lm, rules=(rule, no_tags)) for name, rule in {"base": once, "again": twice}.items()}
    report = evaluate.compare(conditions, problems, Sampling(n=4, max_new_tokens=12), progress=False)
    summary = evaluate.summary(report).set_index(["condition", "metric"])["mean"]
    assert summary["base", "leaking"] == 0 and summary["again", "leaking"] == 1
