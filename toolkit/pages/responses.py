"""Responses of several conditions to one problem, side by side, as HTML."""

from __future__ import annotations

import html
from collections.abc import Mapping

from toolkit.lm import LM
from toolkit.types import Problem, Rollout


def side_by_side(lms: Mapping[str, LM], problem: Problem, responses: Mapping[str, Rollout]) -> str:
    """Return the responses to a problem as HTML: thinking and answer of each, its length, and whether it is right.

    Args:
        lms: Name of a condition -> its model, whose tokenizer made its tokens.
        problem: The problem.
        responses: Name of a condition -> its response.
    """
    question = html.escape(str(problem.messages[-1]["content"]))
    answer = f"Right answer: <b>{html.escape(problem.answer)}</b>"
    panes = "".join(_pane(lms[name], name, r) for name, r in responses.items())
    return f"<div class='question'><p class='text'>{question}</p><p class='how'>{answer}</p></div><div class='pair'>{panes}</div>"


def _pane(lm: LM, name: str, r: Rollout) -> str:
    verdict = (
        "<span class='verdict right-answer'>✓ right</span>" if r.correct else "<span class='verdict wrong-answer'>✗ wrong</span>"
    )
    head = f"<header><b>{html.escape(name)}</b>{verdict}<span class='soft'>{r.think_tokens} think tokens</span></header>"
    parts = ""
    if r.think is not None:
        label = "thinking" if r.closed else "thinking, never closed"
        parts += _part("think", label, lm.text(r.token_ids[r.think.start : r.think.stop]))
    # Where no tag separates thinking and answer, the answer is the thinking, which is shown already.
    if r.answer is not None and (r.think is None or r.answer.start >= r.think.stop):
        label = "answer" if r.think is not None else "response, without thinking"
        parts += _part("answer", label, lm.text(r.token_ids[r.answer.start : r.answer.stop]))
    return f"<article class='response panel'>{head}{parts}</article>"


def _part(kind: str, name: str, text: str) -> str:
    return f"<div class='part {kind}'><p class='name'>{name}</p><p class='text'>{html.escape(text.strip())}</p></div>"
