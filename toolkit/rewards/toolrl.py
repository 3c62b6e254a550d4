"""ToolRL, arXiv:2504.13958: a reward for format, tool names, parameter names and parameter values of calls.

Equations (P: calls of the response; G: the right calls; J: Jaccard index of two multisets, the size of the intersection divided by that of
the union; pairs (g, p): each right call g with the best unused call p of the same tool):

    score     J(names of G, names of P) + sum over pairs of ( J(parameter names of g, of p) + number of equal values )
    S         1 + sum over g in G of (1 + number of parameters of g)                    the largest score
    match     2 m score / S - m,  with m = 3;   -m if a call cannot be read;   0 if G is empty
    r         w_f (1 if well formed, else 0) + match + w_l min(1, words of thinking / target)

Variants of the paper: weights and targets that change during training (``combine.Schedule`` for ``most``, ``format`` or ``target``), and
coarse matching (``matching="coarse"``): m if score = S, else -m. The paper finds that the length reward does not help, so its weight is 0.

Deviations: a call here is a tool with an argument as text. A tool with one parameter gets that text as its value; for several, the text
must be a JSON object. Texts are compared by words, other values by equality (ours). The paper's format is an order of tags; here the column
``formatted`` says whether an answer follows closed thinking. Words of thinking are those of the whole response before the answer (ours).

Units and signs: ``match`` from -m to m; higher is better.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from toolkit.rewards.batch import RewardBatch, RewardValues
from toolkit.rewards.combine import Weight
from toolkit.rewards.turns import Protocol, Turn, words
from toolkit.stats import Number

PUBLISHED_MOST = 3.0
PUBLISHED_TARGET = 512  # words
MATCHING = ("fine", "coarse")


class ToolCall(NamedTuple):
    """A call: name of the tool, and its parameters by name. ``None`` as parameters: the argument could not be read."""

    name: str
    parameters: Mapping[str, Any] | None


def jaccard(one: Iterable[str], other: Iterable[str]) -> float:
    """Return the Jaccard index of two multisets; 1 if both are empty.

    >>> jaccard(["a", "a", "b"], ["a", "b", "c"])
    0.5
    """
    a, b = Counter(list(one)), Counter(list(other))  # lists: a Counter of a mapping takes its values as counts
    union = (a | b).total()
    return (a & b).total() / union if union else 1.0


def same_value(one: Any, other: Any) -> bool:
    """Return True if two values of a parameter are equal. Texts are compared by their words in lower case."""
    if isinstance(one, str) and isinstance(other, str):
        return words(one) == words(other)
    return type(one) is type(other) and bool(one == other)


def matching_score(gold: Sequence[ToolCall], calls: Sequence[ToolCall], *, most: Number = PUBLISHED_MOST) -> float:
    """Return the reward of a response's calls, from ``-most`` to ``most``; 0 if there are no right calls.

    >>> f = [ToolCall("f", {"x": 1, "y": 2})]
    >>> [matching_score(f, [ToolCall("f", p)]) for p in ({"x": 1, "y": 2}, {"x": 1, "y": 3}, {"x": 1})]
    [3.0, 1.5, 0.75]

    Args:
        gold: The right calls.
        calls: Calls of the response.
        most: m, the largest reward.
    """
    if not gold:
        return 0.0
    if any(call.parameters is None for call in calls):
        return -float(most)
    total, largest = jaccard([g.name for g in gold], [c.name for c in calls]), 1.0
    unused = list(calls)
    for g in gold:
        largest += 1 + len(g.parameters or {})
        scores = [_pair(g, c) for c in unused]
        if scores and max(scores) > 0:
            total += max(scores)
            unused.pop(int(np.argmax(scores)))
    return float(2 * most * total / largest - most)


def _pair(gold: ToolCall, call: ToolCall) -> float:
    if gold.name != call.name:
        return 0.0
    g, c = gold.parameters or {}, call.parameters or {}
    return jaccard(g, c) + sum(k in c and same_value(v, c[k]) for k, v in g.items())


@dataclass(frozen=True)
class ToolRL:
    """Reward for format and for calls that match the right ones in name, parameters and values.

    >>> columns = dict(calls=1, formatted=1, answer_text="7", gold_calls=[({"name": "search", "parameters": {"query": "Zor"}},)] * 2)
    >>> text = ["<search>Zor</search><result>7</result>7", "<search>Ao</search><result>8</result>7"]
    >>> ToolRL()(RewardBatch.from_columns(text=text, **columns)).values.tolist()
    [4.0, 2.0]

    Attributes:
        most: m, the largest reward for calls; a number, or a function of the optimizer step.
        format: w_f, reward for a well-formed response; a number, or a function of the optimizer step.
        length: w_l, weight of the length reward.
        target: Words of thinking at which the length reward is 1; a number, or a function of the optimizer step.
        matching: ``"fine"``, or ``"coarse"``: all calls equal or not.
        parameters: Tool name -> names of its parameters. A tool that is not in it has one parameter, named ``query``.
        protocol: Marks of calls and results.
    """

    most: Weight = PUBLISHED_MOST
    format: Weight = 1.0
    length: Number = 0.0
    target: Weight = PUBLISHED_TARGET
    matching: str = "fine"
    parameters: Mapping[str, Sequence[str]] = field(default_factory=dict)
    protocol: Protocol = field(default_factory=Protocol)

    name: ClassVar[str] = "toolrl"
    needs: ClassVar[frozenset[str]] = frozenset({"text", "calls", "formatted", "answer_text", "gold_calls"})

    def __post_init__(self) -> None:
        if self.matching not in MATCHING:
            raise ValueError(f"matching={self.matching!r}: choose one of {', '.join(MATCHING)}.")

    def __call__(self, batch: RewardBatch) -> RewardValues:
        batch.check(self)
        most, form, target = (w(batch.step) if callable(w) else w for w in (self.most, self.format, self.target))
        match = np.empty(len(batch))
        length = np.empty(len(batch))
        for i, turns in enumerate(self.protocol.of_batch(batch)):
            gold = [ToolCall(g["name"], g["parameters"]) for g in batch["gold_calls"][i]]
            calls = [self.read(turn) for turn in turns if turn.tool is not None]
            match[i] = matching_score(gold, calls, most=most)
            if self.matching == "coarse" and gold:
                match[i] = most if math.isclose(match[i], most, rel_tol=1e-9) else -most
            written = sum(len(turn.written.split()) for turn in turns)
            length[i] = min(1.0, max(0, written - len(batch["answer_text"][i].split())) / target)
        return RewardValues.sum(format=form * batch["formatted"].astype(float), calls=match, length=self.length * length)

    def read(self, turn: Turn) -> ToolCall:
        """Return the call of a turn with its parameters by name."""
        names = self.parameters.get(str(turn.tool), ("query",))
        if len(names) == 1:
            return ToolCall(str(turn.tool), {names[0]: turn.argument})
        try:
            value = json.loads(turn.argument)
        except (ValueError, RecursionError):
            value = None
        return ToolCall(str(turn.tool), value if isinstance(value, dict) else None)


def calls_of(queries: Sequence[str], tool: str = "search", parameter: str = "query") -> tuple[dict[str, Any], ...]:
    """Return right calls (for the column ``gold_calls``) from right queries of one tool with one parameter.

    >>> calls_of(["river of Zor"])
    ({'name': 'search', 'parameters': {'query': 'river of Zor'}},)
    """
    return tuple({"name": tool, "parameters": {parameter: query}} for query in queries)
