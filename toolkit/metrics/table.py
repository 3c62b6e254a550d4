"""The table of all metrics: name, label, unit, whether high or low is better, and how the metric is computed from outcomes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from toolkit.metrics import outcomes
from toolkit.metrics.outcomes import How, mean_of
from toolkit.stats import UNBOUNDED, Bounds, Estimate

RANGES: Mapping[str, Bounds] = MappingProxyType(
    {"share": (0.0, 1.0), "tokens": (0.0, math.inf), "calls": (0.0, math.inf), "nats": (0.0, math.inf)}
)
"""Unit -> smallest and largest possible value of a metric. Other units are unbounded."""


@dataclass(frozen=True)
class Metric:
    """Description of one metric, a quantity by which conditions are compared.

    Attributes:
        label: Column heading.
        unit: ``share`` (0 to 1), ``tokens``, ``nats``, ``score`` or ``number``.
        better: ``high`` if higher values are better, ``low`` if lower ones are, ``none`` if neither is, as for a length.
        group: Part of the board that shows the metric: ``main`` (accuracy and length of thinking), ``damage`` (side effects), ``budget``
            (pass and vote rates at a limited number of tokens), ``mechanism`` (internals of the model) or ``cost``.
        help: Explanation in one sentence, shown to readers of the board.
        how: Function that computes the metric from outcomes. ``None`` if ``board.measure`` stores one value per problem instead; the
            metric is then their mean.
        against_base: True if the metric is itself a comparison with base, so that no difference from base is computed.
    """

    label: str
    unit: str
    better: str
    group: str
    help: str
    how: How | None = None
    against_base: bool = False

    @property
    def about(self) -> dict[str, str]:
        """The fields ``label``, ``unit``, ``better``, ``group`` and ``help`` as a dict that JSON can store."""
        return {name: getattr(self, name) for name in ("label", "unit", "better", "group", "help")}

    @property
    def bounds(self) -> Bounds:
        """``(smallest, largest)`` possible value of the metric; infinite where there is no limit."""
        return RANGES.get(self.unit, UNBOUNDED)

    def change_bounds(self, base: Estimate) -> Bounds:
        """Return the ``(smallest, largest)`` possible difference from base (condition minus base).

        The largest difference is the metric's largest possible value minus its smallest. The smallest difference is the negative of that.
        But if the metric has no upper limit, such as a length, the smallest difference is its smallest value minus the value of base.
        Base's value is uncertain, so the upper end of its interval is used.

        Args:
            base: Value of the metric for base, with its interval.
        """
        low, high = self.bounds
        return low - (base.high if math.isinf(high) else high), high - low


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "accuracy": Metric("accuracy", "share", "high", "main", "Share of right answers, at temperature 1.", mean_of("correct")),
        "think_tokens": Metric("think tokens", "tokens", "none", "main", "Mean length of thinking, tags excluded.", mean_of("think_tokens")),
        "aes": Metric("AES", "score", "high", "main", "Accuracy-efficiency score against base: constants under Methods.", outcomes.aes, against_base=True),
        "ock_score": Metric("OckScore", "score", "high", "main", "Accuracy in percent - 10 ln(mean response tokens / 10000 + 1).", outcomes.ock_score),
        "tokens_per_right": Metric("tokens per right answer", "tokens", "low", "main", "Response tokens, those of wrong responses included, per right answer.", outcomes.tokens_per_right),
        "think_tokens_right": Metric("think tokens, right", "tokens", "none", "main", "Mean length of thinking of the right responses.", outcomes.think_tokens_of(True)),
        "think_tokens_wrong": Metric("think tokens, wrong", "tokens", "none", "main", "Mean length of thinking of the wrong responses.", outcomes.think_tokens_of(False)),
        "think_tokens_q10": Metric("think tokens, 10 %", "tokens", "none", "main", "10 % of the responses think less than this.", outcomes.quantile_of("think_tokens", 0.1)),
        "think_tokens_q50": Metric("think tokens, median", "tokens", "none", "main", "Half of the responses think less than this.", outcomes.quantile_of("think_tokens", 0.5)),
        "think_tokens_q90": Metric("think tokens, 90 %", "tokens", "none", "main", "10 % of the responses think more than this.", outcomes.quantile_of("think_tokens", 0.9)),
        "shortest_5": Metric("own shortest 5 %", "share", "high", "main", "Accuracy of the model's own shortest 5 % of responses.", outcomes.shortest(0.05)),
        "shortest_10": Metric("own shortest 10 %", "share", "high", "main", "Accuracy of the model's own shortest 10 % of responses.", outcomes.shortest(0.1)),
        "shortest_20": Metric("own shortest 20 %", "share", "high", "main", "Accuracy of the model's own shortest 20 % of responses.", outcomes.shortest(0.2)),
        "shortest_5_same": Metric(
            "where base is shortest, 5 %", "share", "high", "main", "Accuracy on the problems that base thinks least about: the same for all.", outcomes.shortest_of_base(0.05)
        ),
        "shortest_10_same": Metric(
            "where base is shortest, 10 %", "share", "high", "main", "Accuracy on the problems that base thinks least about: the same for all.", outcomes.shortest_of_base(0.1)
        ),
        "shortest_20_same": Metric(
            "where base is shortest, 20 %", "share", "high", "main", "Accuracy on the problems that base thinks least about: the same for all.", outcomes.shortest_of_base(0.2)
        ),
        "accuracy_arithmetic": Metric("arithmetic", "share", "high", "main", "Accuracy on arithmetic."),
        "accuracy_lookup": Metric("lookup", "share", "high", "main", "Accuracy on lookup."),
        "never_closed": Metric("never closed", "share", "low", "damage", "Thinking that the budget cut off."),
        "closed": Metric("closed share", "share", "high", "damage", "Responses whose thinking was closed within the budget.", mean_of("closed")),
        "looping": Metric("loops", "share", "low", "damage", "Responses that end in a repeated run of tokens.", mean_of("looping")),
        "leaking": Metric(
            "thinking in answers", "share", "low", "damage", "Answers that open thinking again, or have a sentence that begins with 'Wait' or the like.", mean_of("leaking")
        ),
        "no_think": Metric("no thinking", "share", "low", "damage", "Answers without a single think token."),
        "failed_steps": Metric("failed steps", "share", "low", "damage", "Failed-step fraction: steps of thinking that are wrong (recomputed)."),
        "review": Metric("re-checks", "share", "none", "damage", "Characters of thinking that re-check an earlier step."),
        "running_sum_step": Metric(
            "step accuracy, chains", "share", "high", "damage", "Steps right relative to the model's own total, on chains of additions, greedy."
        ),
        "running_sum_expected": Metric("p^H, chains", "share", "high", "damage", "Accuracy on such chains that follows from step accuracy alone."),
        "accuracy_running_sum": Metric("chains", "share", "high", "damage", "Right answers to those chains, greedy: compare with p^H."),
        "accuracy_threading": Metric("threading", "share", "high", "damage", "Following keys through a haystack."),
        "accuracy_characters": Metric("characters", "share", "high", "damage", "Counting and finding characters."),
        "accuracy_countdown": Metric("countdown", "share", "high", "damage", "Making a number from others."),
        "right_within_half": Metric("right within 1/2 x base's tokens", "share", "high", "budget", "Right, and at most half of base's mean response length.", outcomes.right_within(0.5)),
        "right_within_1x": Metric("right within base's tokens", "share", "high", "budget", "Right, and at most base's mean response length.", outcomes.right_within(1.0)),
        "right_within_2x": Metric("right within 2 x base's tokens", "share", "high", "budget", "Right, and at most twice base's mean response length.", outcomes.right_within(2.0)),
        "area_right_within_2x": Metric("area up to 2 x base's tokens", "share", "high", "budget", "Mean accuracy over all budgets from 0 to twice base's mean response length.", outcomes.area_right_within(2.0)),
        "pass_at_2x": Metric("pass, 2 x base's tokens", "share", "high", "budget", "Any response within twice base's mean tokens is right.", outcomes.passed(2)),
        "vote_at_2x": Metric("vote, 2 x base's tokens", "share", "high", "budget", "The majority answer within twice base's mean tokens is right.", outcomes.voted(2)),
        "pass_at_4x": Metric("pass, 4 x base's tokens", "share", "high", "budget", "Any response within four times base's mean tokens is right.", outcomes.passed(4)),
        "vote_at_4x": Metric("vote, 4 x base's tokens", "share", "high", "budget", "The majority answer within four times base's mean tokens is right.", outcomes.voted(4)),
        "projection": Metric(
            "projection on length", "number", "none", "mechanism", "Projection of its own thinking on the length direction, at line starts; + is longer."
        ),
        "think_entropy": Metric("think entropy", "nats", "none", "mechanism", "Mean entropy of a think token."),
        "answer_entropy": Metric("answer entropy", "nats", "none", "mechanism", "Mean entropy of an answer token."),
        "short_push": Metric(
            "push of short-thinking heads", "number", "low", "mechanism", "Contribution of base's short-thinking heads towards short thinking, on the same texts."
        ),
        "retrieved": Metric("retrieved", "share", "high", "mechanism", "Haystacks (lookup, needles) answered rightly, greedy."),
        "retrieval_write": Metric(
            "write of retrieval heads", "number", "high", "mechanism", "Contribution of base's retrieval heads towards the retrieved token, on the same texts (logits)."
        ),
        "response_tokens": Metric("response tokens", "tokens", "none", "cost", "Mean length of a response, tags and answer included.", mean_of("response_tokens")),
    }
)  # fmt: skip
"""Name -> metric, for all metrics except the accuracies on single tasks, which ``described`` makes."""


def described(name: str) -> Metric:
    """Return the metric ``name`` of ``METRICS``. For a name ``accuracy_TASK``, return the accuracy on the task TASK.

    Raise KeyError for any other name.
    """
    task = name.removeprefix("accuracy_")
    if name in METRICS or task == name:
        return METRICS[name]
    return Metric(task.replace("_", " "), "share", "high", "main", f"Accuracy on the task {task!r}.")
