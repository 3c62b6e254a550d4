"""The transcript shows every token once, with its entropy and probability, in its phase and step; nothing in it can act."""

from __future__ import annotations

import html
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from toolkit import steps, transcript
from toolkit.entropies import NoEntropiesError
from toolkit.generate import Sampling, rollouts
from toolkit.lm import ThinkTags
from toolkit.methods.failed_steps import Chain
from toolkit.types import Problem, Rollout, Span

VOID = {"meta", "br"}


class Tree(HTMLParser):
    """Checks that tags nest, and keeps each token's text, hover, colour and the classes it stands in."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.tokens: list[dict] = []
        self.names: set[str] = set()
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        if tag in VOID:
            return
        self.open.append((tag, dict(attrs)))
        if tag == "i":
            within = " ".join(a.get("class", "") for _, a in self.open)
            self.tokens.append(
                {"text": "", "hover": dict(attrs)["data-t"], "style": dict(attrs).get("style"), "in": within.split()}
            )

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(tag == "i" for tag, _ in self.open) and not any(a.get("class") == "nl" for _, a in self.open):
            self.tokens[-1]["text"] += data


@pytest.fixture
def told(rollout_of) -> Rollout:
    """Random tokens of the tiny alphabet, with line ends, entropies and probabilities; graded wrong."""
    r = rollout_of(30)
    rng = np.random.default_rng(0)
    n = r.response_tokens
    return replace(r, entropies=tuple(rng.random(n).tolist()), logprobs=tuple((-9 * rng.random(n)).tolist()))


def test_every_response_token_is_shown_once_with_its_numbers(llama, told):
    tokens = Tree(transcript.fragment(llama, told)).tokens
    ids = told.token_ids[told.prompt_len :]
    assert len(tokens) == len(ids)
    for token, i, entropy, logprob in zip(tokens, ids, told.entropies, told.logprobs, strict=True):
        assert token["text"].rstrip("\n") == llama.text([i]).rstrip("\n")
        assert f"{entropy:.3f} nats" in token["hover"]
        shown = float(token["hover"].rpartition("= ")[2])
        assert shown == pytest.approx(math.exp(logprob), rel=0.06, abs=5e-4)


def test_tokens_stand_in_their_phase(llama, told):
    tokens = Tree(transcript.fragment(llama, told)).tokens
    for at, token in enumerate(tokens, told.prompt_len):
        thinking, answering = (span.start <= at < span.stop for span in (told.think, told.answer))
        assert ("step" in token["in"]) == thinking
        assert ("answer" in token["in"]) == (at >= told.answer.start)
        assert ("tag" in token["in"]) == (not thinking and not answering)


def test_deeper_colour_is_higher_entropy(llama, told):
    def depths(source: str) -> list[float]:
        return [float(re.search(r"([\d.]+)\)$", t["style"])[1]) if t["style"] else 0.0 for t in Tree(source).tokens]

    own = depths(transcript.fragment(llama, told))
    assert max(own) == transcript.DEEPEST
    order = np.argsort(told.entropies)
    assert (np.diff(np.array(own)[order]) >= 0).all()
    assert depths(transcript.fragment(llama, told, top=2.0)) == pytest.approx(np.array(own) * max(told.entropies) / 2, abs=0.011)
    assert max(depths(transcript.fragment(llama, told, top=0.1))) == transcript.DEEPEST
    certain = replace(told, entropies=(0.0,) * told.response_tokens)
    assert max(depths(transcript.fragment(llama, certain))) == 0.0


def test_the_key_shows_the_scale_that_colours_the_tokens(llama, told):
    """Also if every entropy is 0, as for a response that decoding rules placed."""
    certain = replace(told, entropies=(0.0,) * told.response_tokens)
    for r, top, scale in ((told, None, max(told.entropies)), (told, 2.0, 2.0), (certain, None, 1.0), (certain, 2.0, 2.0)):
        page = transcript.fragment(llama, r, top=top)
        (shown,) = re.findall(r"class='bar'></span>([0-9.]+) nats", page)
        assert shown == f"{scale:.2f}"
        drawn = [transcript.DEEPEST * min(entropy / scale, 1.0) for entropy in r.entropies]
        assert [float(d) for d in re.findall(r"style='background:rgba\([0-9,]+,([0-9.]+)\)'", page)] == pytest.approx(
            [depth for depth in drawn if depth >= 0.005], abs=0.006
        )


def test_failed_steps_and_rechecks_are_marked_in_words_and_not_by_colour_alone(llama, told):
    edges = [told.think.start, told.think.start + 10, told.think.start + 20, told.think.stop]
    spans = tuple(Span(a, b) for a, b in pairwise(edges))
    chain = Chain(("a", "b", "c"), (False, True, False), (False, False, True), spans)
    source = transcript.fragment(llama, told, chain=chain)
    assert re.findall(r"class='no'>([^<]*)<", source) == ["1", "2 ✗ failed", "3 re-check"]
    tokens = Tree(source).tokens
    failed = [at for at, t in enumerate(tokens, told.prompt_len) if "failed" in t["in"]]
    assert failed == list(range(edges[1], edges[2]))
    assert "failed step: 1 of 3" in source
    both = Chain(("a",), (True,), (True,), (told.think,))
    assert "1 ✗ re-check" in transcript.fragment(llama, told, chain=both)


def test_tokens_of_tool_results_are_marked_and_have_no_share_in_the_colour_scale(llama, told):
    """The model did not write them, so their entropies say nothing."""
    span = Span(told.think.start + 3, told.think.start + 8)
    mask = np.zeros(told.response_tokens, bool)
    mask[span.start - told.prompt_len : span.stop - told.prompt_len] = True
    entropies = np.where(mask, 50.0, told.entropies)
    r = replace(told, entropies=tuple(entropies.tolist()), results=(span,))
    source = transcript.fragment(llama, r)
    tokens = Tree(source).tokens
    assert [("got" in t["in"]) for t in tokens] == mask.tolist()
    assert all(("nats" in t["hover"]) != got for t, got in zip(tokens, mask, strict=True))
    assert f"{max(np.array(told.entropies)[~mask]):.2f} nats" in source and "50.00" not in source
    assert "1 tool call<" in source and "5 tokens that the model did not write" in source
    assert "tool" not in transcript.fragment(llama, told)


def test_without_a_chain_steps_are_lines(tiny, problems_of):
    (r,) = rollouts(tiny, problems_of(1), Sampling(max_new_tokens=60, details=True, temperature=0.0), progress=False)
    labels = re.findall(r"class='no'>([^<]*)<", transcript.fragment(tiny, r))
    assert labels == [str(i + 1) for i in range(len(steps.think_steps(tiny, r)))]


@pytest.mark.parametrize("shape", ["open", "silent", "untagged", "empty"])
def test_every_shape_of_response_is_shown(llama, told, rollout_of, shape):
    r = {
        "open": lambda: replace(told, answer=None, finish="length", correct=False),
        "silent": lambda: replace(told, think=None, answer=Span(told.prompt_len, told.answer.stop)),
        "untagged": lambda: replace(
            told, think=Span(told.prompt_len, told.answer.stop), answer=Span(told.prompt_len, told.answer.stop)
        ),
        "empty": lambda: replace(rollout_of(0), entropies=(0.1,) * rollout_of(0).response_tokens),
    }[shape]()
    lm = replace(llama, tags=ThinkTags(None, None)) if shape == "untagged" else llama
    source = transcript.fragment(lm, r)
    assert len(Tree(source).tokens) == r.response_tokens
    assert ("never closed" in source) == (shape == "open")
    assert ("p = " in source) == (r.logprobs is not None)


def test_a_page_is_self_contained_and_text_cannot_become_markup(llama, told):
    name = "<script>alert('x')</script>"
    problem = Problem(name, (), "<b>&", {})
    source = transcript.html_page(name, [transcript.fragment(llama, replace(told, problem_id=name), problem=problem)])
    tree = Tree(source)
    assert not tree.names & {"script", "link", "img", "iframe"}
    assert not re.search(r"https?://|@import|url\(", source)
    assert html.escape("<b>&") in source


def test_a_correct_response_says_so(llama, told):
    assert "✗ wrong" in transcript.fragment(llama, told)
    assert "✓ correct" in transcript.fragment(llama, replace(told, correct=True))


def test_what_cannot_be_shown_is_named(llama, told):
    with pytest.raises(NoEntropiesError, match="carries no entropies"):
        transcript.fragment(llama, replace(told, entropies=None))
    with pytest.raises(ValueError, match=r"top=0\.0"):
        transcript.fragment(llama, told, top=0.0)
    with pytest.raises(ValueError, match="no token spans"):
        transcript.fragment(llama, told, chain=Chain(("a",), (False,), (False,)))
