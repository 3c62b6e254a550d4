"""Immutable dataclasses that the other modules exchange: problems, rollouts, activation sums, directions, head edits, reports.

Nothing here runs a model, or reads or writes a file. Lengths are in tokens, entropies in nats. Directions are ``[layers, d_model]``;
layer 0 is the first block. All directions follow one sign convention, **+ is longer**: adding a direction to the activations is meant to
lengthen thinking.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from toolkit import origins

Finish = Literal["stop", "length"]
Kind = Literal["resid_pre", "z", "attn_out", "resid_mid", "mlp_out", "resid_post"]
"""Kinds of sites, in the order in which a block computes them. A site is a place in a block where activations are read or changed.

The docstring of the module ``sites`` has a table that describes each kind.
"""
Z_OVER_NORM = "z_over_norm"
"""Name of the quantity ``z / s``, one vector per position. It is not a site, but is computed from the sites ``z`` and ``attn_out``.

``z`` is the heads' outputs, the input of ``W_O``. ``attn_out`` is the output of ``W_O``. Some models have a norm after ``W_O``. s is the
number by which this norm divides ``attn_out`` at the position (in an RMS norm, the root mean square). In models without this norm, s is 1.
"""
Op = Literal["project_out", "scale"]
Ask = Callable[[Sequence[Mapping[str, str]]], Sequence[Mapping[str, str]]]
"""A change of the prompt: a function from the chat messages of a problem to those that the model gets."""


LONG, SHORT = "long", "short"  # classes of rollouts by length


def _checked(name: str, value: Tensor, axes: int) -> Tensor:
    """Return ``value`` unchanged. Raise ValueError unless it is a float tensor with ``axes`` axes, none of size 0."""
    if value.ndim != axes or not value.is_floating_point() or 0 in value.shape:
        raise ValueError(f"{name} is {value.dtype} of shape {tuple(value.shape)}: expected floats with {axes} axes, none empty.")
    return value


@dataclass(frozen=True)
class Problem:
    """One question with a checkable answer.

    Attributes:
        id: Unique id that never changes. Statistics group the rollouts by problem id, and compare conditions problem by problem.
        messages: Chat messages, ``({"role": ..., "content": ...}, ...)``.
        answer: The gold answer as text.
        meta: Facts about the problem (``task``, ``difficulty``, ``split``, ...), and fields that the task's grader reads: see
            ``tasks.grading``.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """Half-open range of token positions ``[start, stop)`` in a full sequence (prompt + response).

    >>> think = Span(12, 40)
    >>> len(think)
    28
    >>> think.predictors()
    Span(start=11, stop=39)
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"Span needs 0 <= start <= stop, got start={self.start}, stop={self.stop}.")

    def __len__(self) -> int:
        return self.stop - self.start

    def predictors(self) -> Span:
        """Return the positions that *predict* this span's tokens: the span ``[start-1, stop-1)``. Raise ValueError if start is 0.

        The activations at position t predict token t+1. In this toolkit, averages "over the think span" are over these positions.
        """
        if self.start == 0:
            raise ValueError("Span starts at position 0: no position predicts its first token.")
        return Span(self.start - 1, self.stop - 1)


def runs_of(values: Sequence[Any], wanted: Any) -> Iterator[Span]:
    """Yield the spans of consecutive values that equal ``wanted``, in order.

    >>> list(runs_of([1, 0, 0, 1, 0], 0))
    [Span(start=1, stop=3), Span(start=4, stop=5)]
    """
    for equal, run in groupby(range(len(values)), lambda i: values[i] == wanted):
        if equal:
            places = list(run)
            yield Span(places[0], places[-1] + 1)


@dataclass(frozen=True)
class Rollout:
    """One sampled response with its think span, answer span and grade. The module ``generate`` sets spans and grade.

    Spans index ``token_ids`` and never include the end-of-sequence token. The docstring of ``spans.spans`` lists special cases, such as
    models without think tags.

    Attributes:
        problem_id: Id of the problem.
        sample: Index of this response among the samples of the problem, from 0.
        token_ids: Prompt and response tokens (no padding).
        prompt_len: Number of prompt tokens.
        think: Tokens *between* the think tags, tags excluded. If thinking was never closed, the span runs to the end of the response.
            ``None`` if thinking was never opened.
        answer: Tokens after the closing tag; the whole response if thinking was never opened. ``None`` if thinking was opened but never
            closed. If tool results follow the closing tag, the answer starts after the last of them.
        finish: ``"stop"`` if an end-of-sequence token was sampled. ``"length"`` if the response reached ``Sampling.max_new_tokens``, or
            ended with a call that was not answered, because of ``Toolbox.max_calls`` or because its result did not fit.
        text: Decoded response, special tokens included.
        correct: True if the grader accepts the answer; False if it does not or if there is no answer span.
        logprobs: Natural log-probability of each response token; ``None`` if not recorded. There are two ways to get it:

            - Sampling with ``Sampling.details=True`` records it under the distribution from which the token was drawn, after temperature,
              top-k and top-p. In greedy sampling, that is the softmax at temperature 1. A token placed by a decoding rule gets 0.
            - ``entropies.with_entropies`` computes it afterwards, under the softmax at the temperature that it is given, without top-k and
              top-p.
        entropies: Entropy in nats of the softmax that predicts each response token, without top-k and top-p; ``None`` if not recorded. The
            temperature of this softmax is the sampling temperature (1 if greedy), or the one passed to ``entropies.with_entropies``.
        results: Tokens of the response that are tool results, with the marks around them: one span per answered call, in order. The model
            did not write them. They are never trained on, are not thinking, and are not part of the answer span. Empty without tools.
        after_results: Decoded tokens after the last tool result, special tokens included; "" without results.
    """

    problem_id: str
    sample: int
    token_ids: tuple[int, ...]
    prompt_len: int
    think: Span | None
    answer: Span | None
    finish: Finish
    text: str
    correct: bool
    logprobs: tuple[float, ...] | None = None
    entropies: tuple[float, ...] | None = None
    results: tuple[Span, ...] = ()
    after_results: str = ""

    @property
    def think_tokens(self) -> int:
        """Number of tokens in the think span that the model wrote, tags excluded; 0 if there is no think span."""
        if self.think is None:
            return 0
        return len(self.think) - sum(len(s) for s in self.results if self.think.start <= s.start < self.think.stop)

    @property
    def result_tokens(self) -> int:
        """Number of tokens of the response that are tool results."""
        return sum(map(len, self.results))

    @property
    def written_tokens(self) -> int:
        """Number of tokens of the response that the model wrote: all but tool results."""
        return self.response_tokens - self.result_tokens

    @property
    def written(self) -> tuple[bool, ...]:
        """For each token of the response, True if the model wrote it, False if it belongs to a tool result."""
        mask = [True] * self.response_tokens
        for span in self.results:
            mask[span.start - self.prompt_len : span.stop - self.prompt_len] = [False] * len(span)
        return tuple(mask)

    @property
    def closed(self) -> bool:
        """True if the response has an answer span.

        It has one if thinking was closed, or was never opened. Models that do not mark their thinking (``ThinkTags(None, None)``) are an
        exception. Their whole response is the think span. If it ended with an end-of-sequence token, it is also the answer span.
        """
        return self.answer is not None

    @property
    def response_tokens(self) -> int:
        """Number of tokens after the prompt; tags, end-of-sequence and tool results included."""
        return len(self.token_ids) - self.prompt_len


def problems_by_id(problems: Sequence[Problem], rollouts: Sequence[Rollout]) -> dict[str, Problem]:
    """Return the problems as a dict from id to problem. Raise KeyError if the problem of a rollout is not among them."""
    by_id = {p.id: p for p in problems}
    if missing := sorted({r.problem_id for r in rollouts} - by_id.keys()):
        raise KeyError(
            f"{len(missing)} problems of the rollouts are not among the {len(by_id)} given, such as {missing[0]!r}: pass the problems that "
            "were sampled from (same task, split, number and seed)."
        )
    return by_id


@dataclass(frozen=True)
class Provenance:
    """The model and settings that a value (a direction, moments, a plan, ...) was computed with; saved in the value's file.

    Attributes:
        model: Hub id or directory that the model was loaded from.
        revision: Hub revision (branch, tag or commit), or ``None``.
        fingerprint: SHA-256 over all weights and the config of the model. The value can be used only with a model that has the same
            fingerprint. Directions are an exception: they can also be used with a model that was edited or trained from this one (see
            ``LM.parent``).
        template_hash: Hash of the chat template.
        toolkit_version: Version of the toolkit that computed the value.
        seed: Random seed, or ``None`` if nothing was random.
        notes: Other facts, JSON-serialisable, such as sampling settings or the lengths that count as short and long. If the value was
            computed from problems, ``notes["problem_ids"]`` holds the hashed ids of these problems (see ``origins``).
    """

    model: str
    revision: str | None
    fingerprint: str
    template_hash: str
    toolkit_version: str
    seed: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        origins.check(self.notes)


@dataclass(frozen=True)
class Moments:
    """Sums of activations per class of examples and per layer. Class means and covariances are computed from them.

    An example is one rollout; its class is a label such as "long". For each example, the activations h at a site are first averaged over
    the chosen positions (such as the think span). The averages are then summed over the examples of each class. The moments of two sets of
    examples can be added with ``+``.

    Attributes:
        labels: Class names, e.g. ``("long", "short")``.
        n: Number of examples per class, in the order of ``labels``.
        positions: Name of the rule that chose the positions, e.g. ``"think"`` (see the module ``positions``).
        sums: Site kind -> sums of h, ``[labels, layers, width]``, fp32 or wider. The key ``Z_OVER_NORM`` is allowed too: h is then z
            divided by the number by which the norm after ``W_O`` divides.
        outer: Site kind -> sums of the outer products ``h h^T``, ``[labels, layers, width, width]``; covariances need them. They are outer
            products of h at single positions, averaged over the positions of an example. Empty if none were collected.
        provenance: Model and settings that the activations are from.
    """

    labels: tuple[str, ...]
    n: tuple[int, ...]
    positions: str
    sums: Mapping[str, Float[Tensor, "labels layers _"]]
    outer: Mapping[str, Float[Tensor, "labels layers _ _"]]
    provenance: Provenance

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.labels) or len(self.n) != len(self.labels) or any(n < 0 for n in self.n):
            raise ValueError(
                f"Moments need class names without duplicates and one count of at least 0 per class, got {self.labels} and {self.n}."
            )
        kinds = (*get_args(Kind), Z_OVER_NORM)
        if unknown := [kind for kind in self.sums if kind not in kinds]:
            raise ValueError(f"Moments.sums has the unknown site kind {unknown[0]!r:.40}: expected {', '.join(kinds)}.")
        if extra := [kind for kind in self.outer if kind not in self.sums]:
            raise ValueError(f"Moments.outer has {extra[0]!r:.40}, but Moments.sums does not.")
        layers = {kind: _checked(f"Moments.sums.{kind}", value, 3).shape[1] for kind, value in self.sums.items()}
        if len(set(layers.values())) > 1:
            raise ValueError(f"The sites in Moments.sums differ in their number of layers: {layers}.")
        for kind, value in self.sums.items():
            size = (len(self.labels), value.shape[1], value.shape[2])
            if value.shape[0] != size[0]:
                raise ValueError(f"Moments.sums.{kind} has shape {tuple(value.shape)}, but there are {size[0]} classes.")
            if kind in self.outer and self.outer[kind].shape != (*size, size[2]):
                raise ValueError(f"Moments.outer.{kind} has shape {tuple(self.outer[kind].shape)}, expected {(*size, size[2])}.")

    def __repr__(self) -> str:
        examples = ", ".join(f"{count} {label}" for label, count in zip(self.labels, self.n, strict=True))
        return f"Moments({examples}; positions {self.positions}; {', '.join(self.sums)}; {self.provenance.model})"

    def index(self, label: str) -> int:
        """Return the index of a class along the first axis of ``sums`` and ``outer``. Raise KeyError if there is no such class."""
        if label not in self.labels:
            raise KeyError(f"No class {label!r} in these moments: choose one of {', '.join(self.labels)}.")
        return self.labels.index(label)

    def mean(self, kind: str, label: str) -> Float[Tensor, "layers _"]:
        """Return the mean activation of a class at one kind of site: ``[layers, width]``. Every example has the same weight.

        Each example is first averaged over its positions, then the examples of the class are averaged.

        Args:
            kind: Site kind, such as ``"resid_mid"``.
            label: Name of the class.

        Raises:
            KeyError: there is no such class, or this kind was not collected.
            ValueError: the class has no examples.
        """
        row = self.index(label)
        if kind not in self.sums:
            raise KeyError(f"Site kind {kind!r} was not collected: these moments hold {', '.join(self.sums)}.")
        if self.n[row] == 0:
            raise ValueError(f"Class {label!r} has no examples: its mean is undefined.")
        return self.sums[kind][row] / self.n[row]

    def merged(self, classes: Mapping[str, str]) -> Moments:
        """Return the moments of larger classes, each the union of some of these.

        >>> from toolkit.types import Provenance
        >>> sums = {"resid_mid": torch.ones(3, 1, 2)}
        >>> cells = Moments(("a", "b", "c"), (2, 3, 4), "think", sums, {}, Provenance("example", None, "0", "0", "0.1.0"))
        >>> cells.merged({"a": "first", "c": "first", "b": "second"})
        Moments(6 first, 3 second; positions think; resid_mid; example)

        Args:
            classes: Name of a class -> name of the larger class that it joins. Classes that are not named are left out.

        Raises:
            KeyError: there is no such class.
        """
        labels = tuple(sorted(set(classes.values())))
        into = torch.zeros(len(labels), len(self.labels), dtype=torch.float64)
        for old, new in classes.items():
            into[labels.index(new), self.index(old)] = 1
        n = tuple(int(count) for count in into @ torch.tensor(self.n, dtype=torch.float64))

        def add(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {kind: torch.tensordot(into, value.double(), dims=1) for kind, value in values.items()}

        return Moments(labels, n, self.positions, add(self.sums), add(self.outer), self.provenance)

    def covariance(self, kind: str) -> Float[Tensor, "layers _ _"]:
        """Return the within-class covariance matrices of the activations h at one kind of site: ``[layers, width, width]``.

        Per layer, it is the weighted average of ``(h - m)(h - m)^T`` over all positions of the examples of all classes. Here m is the mean
        (see ``mean``) of the example's class. Every example has weight 1, divided equally among its positions.

        Raises:
            KeyError: outer products of this kind were not collected.
        """
        if kind not in self.outer:
            raise KeyError(f"No second moments of {kind!r}: collect with second=({kind!r},).")
        # Sum over classes of (sum of h h^T) - n * mean mean^T, divided by the number of examples.
        total = self.outer[kind].sum(dim=0)
        for i, n in enumerate(self.n):
            if n:
                mean = self.sums[kind][i] / n
                total = total - n * mean[:, :, None] * mean[:, None, :]
        return total / sum(self.n)

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of two sets of examples together. A class may occur in only one of the two.

        Raises:
            ValueError: the two differ in positions, model fingerprint or site kinds.
        """
        left = (self.positions, self.provenance.fingerprint, sorted(self.sums), sorted(self.outer))
        right = (other.positions, other.provenance.fingerprint, sorted(other.sums), sorted(other.outer))
        if left != right:
            raise ValueError(
                f"These moments cannot be added: {left} and {right} differ. Positions, weights and sites must be the same."
            )
        labels = tuple(sorted({*self.labels, *other.labels}))
        # Both parts are added at the indices of their classes in ``labels``.

        def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
            totals = {kind: torch.zeros(len(labels), *a[kind].shape[1:], dtype=a[kind].dtype) for kind in a}
            for part, names in ((a, self.labels), (b, other.labels)):
                for kind, value in part.items():
                    totals[kind][[labels.index(name) for name in names]] += value
            return totals

        counts = [dict(zip(m.labels, m.n, strict=True)) for m in (self, other)]
        n = tuple(sum(c.get(name, 0) for c in counts) for name in labels)
        about = replace(self.provenance, notes=origins.join_notes(self.provenance.notes, other.provenance.notes))
        return Moments(labels, n, self.positions, add(self.sums, other.sums), add(self.outer, other.outer), about)


@dataclass(frozen=True)
class Direction:
    """A direction in the residual stream that is meant to change the length of thinking, one vector per layer.

    The sign convention is **+ is longer**: adding the vectors to the activations is meant to lengthen thinking.

    Attributes:
        vector: ``[layers, d_model]``, not normalised.
        kind: Kind of site at which the direction was measured, usually ``"resid_mid"`` or ``"resid_post"``. The ThinkEdit paper
            (arXiv:2503.22048) calls these two "attn" and "mlp". A direction can also be measured at ``"attn_out"``, the output of ``W_O``.
            If the model has a norm between ``W_O`` and the residual stream, it is a direction of the norm's input, not of the stream.
        positions: Name of the rule that chose the positions to average over, such as ``"think"`` (see the module ``positions``).
        estimator: Name of the estimator: ``"mean_difference"``, ``"whitened"``, ``"random(seed=0)"``, ...
        n_pos: Number of examples in the long class, usually rollouts. For estimators that compare long and short thinking problem by
            problem (their names begin with "paired"), it is the number of problems. 0 if unknown.
        n_neg: The same number for the short class. For the paired estimators it equals ``n_pos``.
        provenance: Model and settings that the direction was computed with.
    """

    vector: Float[Tensor, "layers d_model"]
    kind: str
    positions: str
    estimator: str
    n_pos: int
    n_neg: int
    provenance: Provenance

    def __post_init__(self) -> None:
        _checked("Direction.vector", self.vector, 2)
        if self.kind not in get_args(Kind) or self.kind == "z":
            kinds = ", ".join(kind for kind in get_args(Kind) if kind != "z")
            raise ValueError(f"Direction.kind is {self.kind!r:.40}: expected one of {kinds}.")
        if self.n_pos < 0 or self.n_neg < 0:
            raise ValueError(f"n_pos={self.n_pos}, n_neg={self.n_neg}: expected numbers of examples, 0 or more.")

    def __repr__(self) -> str:
        layers, width = self.vector.shape
        how = f"{self.estimator} at {self.kind}, positions {self.positions}"
        return f"Direction({layers} layers x {width}; {how}; {self.n_pos} long, {self.n_neg} short; {self.provenance.model})"

    @property
    def norms(self) -> Float[Tensor, " layers"]:
        """Euclidean norm of each layer's vector."""
        return self.vector.norm(dim=-1)

    def unit(self) -> Float[Tensor, "layers d_model"]:
        """Return the vectors scaled to norm 1. A zero vector stays zero, so projecting it out changes nothing."""
        norms = self.norms[:, None]
        return self.vector / norms.where(norms > 0, 1.0)


@dataclass(frozen=True)
class HeadScores:
    """One score per attention head.

    Attributes:
        score: ``[layers, heads]``; a higher score means more of the property that ``method`` names. NaN at the entries in ``absent``.
        method: Name of the score, e.g. ``"short_thinking"``.
        units: Unit of the score, e.g. ``"nats per token"``. A score in ``"residual-stream units"`` is the dot product of two vectors:
            the one that a head adds to the residual stream, and a direction of norm 1. So it has the units of the stream.
        provenance: Model and settings that the scores were computed with.
        absent: Entries ``(layer, head)`` of ``score`` for which there is no head, if some layers have fewer heads than others.
    """

    score: Float[Tensor, "layers heads"]
    method: str
    units: str
    provenance: Provenance
    absent: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        _checked("HeadScores.score", self.score, 2)
        if self.absent:
            layers, heads = torch.tensor(self.absent).T
            score = self.score.clone()
            score[layers, heads] = torch.nan  # IndexError if there is no such place
            object.__setattr__(self, "score", score)

    def __repr__(self) -> str:
        layers, heads = self.score.shape
        return f"HeadScores({self.method}, {layers} layers x {heads} heads, {self.units}; {self.provenance.model})"

    @property
    def present(self) -> Bool[Tensor, "layers heads"]:
        """True at the entries of ``score`` for which the model has a head."""
        present = torch.ones(self.score.shape, dtype=torch.bool)
        for layer, head in self.absent:
            present[layer, head] = False
        return present

    @property
    def headless(self) -> str:
        """Text that names the layers without heads, such as ``"layers 0-2, 4 have none"``; ``""`` if every layer has heads."""
        layers = (~self.present.any(dim=1)).nonzero().flatten().tolist()
        # Consecutive layers have the same difference between layer and rank.
        runs = [[at for _, at in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
        text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
        return f"layer{'s' if len(layers) > 1 else ''} {text} {'have' if len(layers) > 1 else 'has'} none" if layers else ""

    def check(self) -> None:
        """Raise ValueError unless the score of every head is a finite number."""
        if not torch.isfinite(self.score[self.present]).all():
            raise ValueError(f"The scores of {self.method!r} hold NaN or infinity, so heads cannot be ranked by them.")

    def ranked(self) -> list[tuple[int, int]]:
        """Return all heads as ``(layer, head)``, from the highest score to the lowest. Ties are ordered by layer, then head."""
        heads, absent = self.score.shape[1], {*self.absent}
        order = self.score.flatten().argsort(descending=True, stable=True).tolist()
        return [at for i in order if (at := (i // heads, i % heads)) not in absent]


@dataclass(frozen=True)
class HeadEdit:
    """A change to the weights of one attention head: to ``W_h``, the head's columns of the output projection ``W_O``.

    Attributes:
        layer: Index of the layer.
        head: Index of the head in the layer.
        op: Kind of change.

            - ``"project_out"``: ``W_h <- (I - strength v v^T) W_h``. Here v is the direction of the ``Plan`` at this layer, scaled to norm
              1. If the model has a norm after ``W_O``, v is first mapped to the output of ``W_O`` (see ``edits.unit_at``).
            - ``"scale"``: ``W_h <- (1 - strength) W_h``.
        strength: Strength of the change; 0 changes nothing. With ``"project_out"``, 1 removes the component along v, and 2 reverses its
            sign. With ``"scale"``, 1 silences the head, and 2 reverses the sign of its output.
    """

    layer: int
    head: int
    op: Op
    strength: float

    def __post_init__(self) -> None:
        if self.layer < 0 or self.head < 0:
            raise ValueError(f"layer={self.layer}, head={self.head}: expected numbers from 0.")
        if self.op not in get_args(Op) or not math.isfinite(self.strength):
            raise ValueError(
                f"Head {self.layer}.{self.head} cannot be edited by op={self.op!r:.40}, strength={self.strength}: expected one of "
                f"{', '.join(get_args(Op))}, and a finite strength."
            )


@dataclass(frozen=True)
class Plan:
    """A set of head edits, with the direction that its ``project_out`` edits remove. ``edits.apply`` applies a plan to a model.

    Attributes:
        edits: The head edits.
        direction: Direction that the edits with ``op="project_out"`` remove; may be ``None`` if there is no such edit.
        name: Description for reports, e.g. ``"top 2 of 32 heads, mean_difference"``.
        provenance: Model and settings that the plan was made with.
    """

    edits: tuple[HeadEdit, ...]
    direction: Direction | None
    name: str
    provenance: Provenance

    def __post_init__(self) -> None:
        if self.direction is None and any(edit.op == "project_out" for edit in self.edits):
            raise ValueError("This plan projects a direction out of heads, but direction is None: pass direction=...")
        if self.direction is None:
            return
        for edit in self.edits:
            if edit.op == "project_out" and edit.layer >= len(self.direction.vector):
                raise IndexError(
                    f"This plan edits layer {edit.layer}, but its direction has layers 0..{len(self.direction.vector) - 1}: "
                    "they were made for different models."
                )

    @property
    def heads(self) -> list[tuple[int, int]]:
        """The edited heads as ``(layer, head)``."""
        return [(edit.layer, edit.head) for edit in self.edits]


@dataclass(frozen=True)
class Report:
    """Results of a comparison of conditions, all sampled on the same problems with the same random numbers.

    Attributes:
        rows: One row per rollout. Columns: ``condition, problem_id, sample, task, difficulty, correct, think_tokens, response_tokens,
            closed, looping, leaking, finish``. ``condition`` is the name of the condition. ``task`` and ``difficulty`` are from
            ``Problem.meta``. ``looping`` is True if the response reached the token limit and ends in tokens that repeat. ``leaking`` is
            True if the answer goes on thinking (see ``leaks``). The other columns are attributes of ``Rollout``.
        conditions: Condition name -> dict that describes the condition, with these keys:

            - ``model``, ``fingerprint``: name of the model, and hash of its weights and config.
            - ``parent``: fingerprint of the model that it was edited or trained from, or ``None``.
            - ``interventions``: texts from ``identity.describe_interventions``.
            - ``note``: one line that describes the condition.
            - ``made_from``: text that names the problems used to edit, steer or train.
            - ``overlap``: number of problems that occur both in this report and among those used to edit, steer or train.
        base: Name of the condition that the others are compared with.
        provenance: Provenance of the base model. Its notes hold the sampling settings, and the number, task and split of the problems.
    """

    rows: pd.DataFrame
    conditions: Mapping[str, Mapping[str, Any]]
    base: str
    provenance: Provenance

    def only(self, **columns: Any) -> Report:
        """Return a report with only the rows that have the given values, such as ``only(task="arithmetic", difficulty=[4, 5, 6])``.

        Args:
            columns: Column of ``rows`` -> the value to keep, or a list of values. A row must match in all of these columns.

        Raises:
            KeyError: there is no such column.
            ValueError: no row is left.
        """
        rows = self.rows
        for name, wanted in columns.items():
            if name not in rows:
                raise KeyError(f"No column {name!r} in this report: it has {', '.join(rows.columns)}.")
            rows = rows[rows[name].isin(list(wanted) if isinstance(wanted, list | tuple | range) else [wanted])]
        if rows.empty:
            raise ValueError(f"No row of this report has {columns}: choose other values.")
        return Report(rows, self.conditions, self.base, self.provenance)
