"""Responses to prompts that contain a needle, the piece of the prompt that the response should retrieve.

An ``Example`` holds a response with the positions of needle and question. A *haystack* is a problem with one or more needles in its prompt,
from ``tasks.haystack``. ``examples`` makes examples from haystacks and the responses to them. ``needle_recalled`` tells whether a response
retrieved the needle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.tasks.haystack import Haystack
from toolkit.types import Rollout, Span

PUBLISHED_RECALL = 0.5  # success: unigram recall above this value; released retrieval_head_detection.py (arXiv:2404.15574)


class NeedleError(ValueError):
    """The parts of an example do not fit together.

    A span is empty or outside its prompt or response, a control prompt differs in length from the prompt, or a rollout belongs to none of
    the given haystacks.
    """


@dataclass(frozen=True)
class Example:
    """One response to a prompt with a needle.

    Attributes:
        rollout: Prompt and response.
        needle: Span of the needle in the prompt: the tokens to be retrieved.
        query: Span of the question in the prompt; ``None`` if its position is not given.
        control: Token ids of a control prompt of the same length; ``None`` if there is none. In a control prompt, other tokens replace all
            needles of the prompt.
        emitted: Part of the response that is evaluated, as a token span of the whole sequence (prompt and response). It may be the answer
            span, for example. ``None`` evaluates the whole response.
    """

    rollout: Rollout
    needle: Span
    query: Span | None = None
    control: tuple[int, ...] | None = None
    emitted: Span | None = None

    def __post_init__(self) -> None:
        r, name = self.rollout, f"Example {self.rollout.problem_id!r}"
        for part, span in (("needle", self.needle), ("query", self.query)):
            if span is not None and (not len(span) or span.stop > r.prompt_len):
                raise NeedleError(
                    f"{name}: the {part} is [{span.start}, {span.stop}), the prompt has {r.prompt_len} tokens: "
                    "need at least one token, inside the prompt."
                )
        span = self.span
        if not len(span) or span.start < r.prompt_len or span.stop > len(r.token_ids):
            raise NeedleError(
                f"{name}: the emitted tokens are [{span.start}, {span.stop}), the response is [{r.prompt_len}, "
                f"{len(r.token_ids)}): need at least one token, inside the response. Sample with max_new_tokens > 0, or choose other tokens."
            )
        if self.control is not None and len(self.control) != r.prompt_len:
            raise NeedleError(
                f"{name}: the control has {len(self.control)} tokens, the prompt {r.prompt_len}: need the same length. "
                "Replace the needle by as many other tokens."
            )

    @property
    def span(self) -> Span:
        """Token span of the response tokens that are evaluated: ``emitted``, or the whole response if ``emitted`` is ``None``."""
        return self.emitted if self.emitted is not None else Span(self.rollout.prompt_len, len(self.rollout.token_ids))

    @property
    def tokens(self) -> list[int]:
        """Token ids of the needle, each distinct id once, in order of first appearance."""
        return list(dict.fromkeys(self.rollout.token_ids[self.needle.start : self.needle.stop]))


def needle_recalled(example: Example, *, above: float = PUBLISHED_RECALL) -> bool:
    """Return True if the response retrieved the needle, that is, if its recall of the needle's tokens is above ``above``.

    Recall is the share of the needle's tokens (0 to 1) that occur in the evaluated part of the response (``Example.span``). A token that
    occurs twice in the needle counts twice only if it also occurs twice in that part.

    Args:
        example: Response to a prompt with a needle.
        above: Recall that must be exceeded; the default, 0.5, is that of the released code of arXiv:2404.15574.
    """
    ids = example.rollout.token_ids
    # The intersection of two Counters takes the smaller count of each token.
    needle = Counter(ids[example.needle.start : example.needle.stop])
    return (needle & Counter(ids[example.span.start : example.span.stop])).total() / needle.total() > above


def examples(haystacks: Sequence[Haystack], rollouts: Sequence[Rollout], *, whole: bool = True) -> list[Example]:
    """Return the examples of all responses, in order: for each response, one example per needle of its prompt.

    A needle is the piece of the prompt that the response should retrieve. If the prompt contains the assignment ``N=8;`` and asks for N,
    the needle is either the whole assignment (``whole=True``) or only the answer, ``8`` (``whole=False``).

    The choice matters because early layers may copy the answer to other tokens of the assignment. A retrieval head in a later layer may
    then attend to those tokens instead of the answer. The metric ``copy`` of ``retrieval_heads`` never detects such a head, since it counts
    only attention on the token ``8`` itself. The metrics ``mass`` and ``write`` detect it only if the needle is the whole assignment.

    Args:
        haystacks: Problems with needles in their prompts, from ``tasks.haystack``.
        rollouts: Responses to the haystacks, in any number and order.
        whole: True makes each needle a whole piece of the prompt that the answer depends on (``Haystack.needed``). False makes it only the
            answer in such a piece (``Haystack.answers``), as in the released code of arXiv:2404.15574.

    Raises:
        NeedleError: A rollout belongs to none of the haystacks, or its prompt differs from that of its haystack.
    """
    by_id, made = {h.problem.id: h for h in haystacks}, []
    for r in rollouts:
        h = by_id.get(r.problem_id)
        if h is None or r.token_ids[: r.prompt_len] != h.prompt_ids:
            raise NeedleError(
                f"Rollout {r.sample} of {r.problem_id!r} does not answer one of these haystacks' prompts: pass the haystacks that were "
                "sampled from, placed with this model's tokenizer."
            )
        made += [Example(r, needle, h.query, h.control) for needle in (h.needed if whole else h.answers)]
    return made
